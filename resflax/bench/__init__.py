"""How fast the networks are, beside other libraries' where installed: python -m resflax.bench."""
