"""Command line values more than one script takes."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A whole number of 1 or more, for argparse's `type`."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: pass a whole number of 1 or more")
    return int(text)
