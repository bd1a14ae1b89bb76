"""Why a network works: what passes through it, and what becomes of it where it is changed.

A module an analysis. Each has a pure function from a network, its variables and a batch to numbers
by block, and `run`, which makes tables, figures and remarks of them: see python -m resflax.analyze.
"""
