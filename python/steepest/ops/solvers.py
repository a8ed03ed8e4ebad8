"""LAPACK's decompositions of stacks of matrices, of which each has the bits that it has alone.

On a CPU torch gives LAPACK one matrix of a stack after another, but as they lie, and rounding may depend on where in
memory a matrix begins: here each is at a boundary. Elsewhere it is torch's batched call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .matmul import by_itself, placed


def eigh(P: Tensor) -> Tensor:
    """Eigenvectors in columns, values ascending.   P: (batch, n, n) symmetric."""
    return _each(lambda x: (torch.linalg.eigh(x).eigenvectors,), P)[0]


def qr(Y: Tensor) -> tuple[Tensor, ...]:
    """The reduced Q and R of Y = Q R.   Y: (batch, m, n)."""
    return _each(torch.linalg.qr, Y)


def svd(x: Tensor) -> tuple[Tensor, ...]:
    """The reduced U, S and V^T.   x: (batch, m, n)."""
    return _each(lambda one: torch.linalg.svd(one, full_matrices=False), x)


def _each(solve: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
    if not by_itself(x) or not len(x):
        return tuple(solve(x))
    solved = [solve(placed(one.contiguous())) for one in x.unbind()]
    return tuple(map(torch.stack, zip(*solved, strict=True)))
