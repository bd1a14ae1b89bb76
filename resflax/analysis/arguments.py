"""Types of the analyses' arguments on the command line."""

import argparse


def count(text: str) -> int:
    """A number of things, of which there is one at least."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1, and a whole number.")
    return int(text)
