"""Files that are written as a whole, and the folders that they are written to."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["make_folder", "replace"]


def make_folder(path: Path, what: str) -> None:
    """Makes a folder that is not there; ValueError, which says what names it, where no file can be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{what}: nothing can be written into {path}: {reason}; pass another folder") from None


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Has write(beside) make a file that then takes the place of `path`: whoever is stopped in the middle, or fails,
    leaves it as it was or as it will be.
    """
    beside = path.with_name(f"{path.name}.new")
    try:
        write(beside)
        os.replace(beside, path)
    except Exception:
        beside.unlink(missing_ok=True)
        raise
