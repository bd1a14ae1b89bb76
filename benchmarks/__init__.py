"""Measurements behind the pages of docs/, for maintainers: `python -m benchmarks.NAME`."""
