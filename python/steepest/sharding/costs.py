"""What a direction costs."""

from __future__ import annotations

from ..recipe import Recipe

__all__ = ["cost"]


def cost(recipe: Recipe, rows: int, cols: int) -> float:
    """Proportional to the floating-point operations of a matrix' step."""
    return float(rows * cols * min(rows, cols))
