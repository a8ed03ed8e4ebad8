"""Files that are written as a whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["replace"]


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
