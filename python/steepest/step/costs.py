"""What a step of a matrix costs, so that matrices can be shared out among ranks."""

from __future__ import annotations

import functools

import torch

from ..linalg.work import Work
from ..recipe import Recipe

__all__ = ["cost", "matrix_work"]


@functools.lru_cache(maxsize=4096)
def matrix_work(recipe: Recipe, rows: int, cols: int, dtype: torch.dtype = torch.float32, device: str = "cuda") -> Work:
    """What a step of one rows x cols matrix takes, but for what is elementwise: direction, factors, turns and refresh.

    A refresh is shared out over the steps between two. dtype: of the direction's input. device: "cuda" or "cpu", whose
    forms and solvers differ; ranks that share matrices out have to say the same.
    """
    blocks, m, n = recipe.input_shape((1, rows, cols))
    work = recipe.direction.work(m, n, dtype, device).times(blocks)
    return work if recipe.kronecker is None else work + recipe.kronecker.work(rows, cols, device)


def cost(recipe: Recipe, rows: int, cols: int, device: str = "cuda") -> int:
    """`matrix_work` as one whole number that grows with its time (`Work.cost`), the same on every rank."""
    return matrix_work(recipe, rows, cols, device=device).cost
