"""Switches that are set in the environment."""

from __future__ import annotations

import os


def switch(name: str, default: bool) -> bool:
    """Whether the variable `name` is "1"; the default where it is unset or empty. ValueError for another value."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{name}={value!r} is neither '0' (off) nor '1' (on); unset it for {'01'[default]!r}")
    return default if value == "" else value == "1"
