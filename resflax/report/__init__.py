"""What came out of many runs: `python -m resflax.report DIR...`."""
