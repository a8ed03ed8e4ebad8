"""Sums and norms of matrices, of which each has the bits that it has alone.   x: (batch, m, n).

On a CPU torch adds up in an order that follows memory, what else is in the batch and, of a lone long row, the threads.
Here what is added up is contiguous, and in pieces of CHUNK that no thread cuts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .matmul import by_itself, contiguous

CHUNK = 4096  # torch cuts a lone sum of 32768 numbers and more


def total(x: Tensor, dim: int | tuple[int, int] = (-2, -1), keepdim: bool = False) -> Tensor:
    """The sum over dim: -1, -2 or both of them, (-2, -1)."""
    if not by_itself(x):
        return x.sum(dim, keepdim=keepdim)
    return _shaped(_sum(_in_rows(x, dim)), dim, keepdim)


def vector_norm(
    x: Tensor, dim: int | tuple[int, int] = (-2, -1), keepdim: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """The Euclidean length over dim, as for `total`, in a dtype that is no narrower."""
    if not by_itself(x):
        return torch.linalg.vector_norm(x, dim=dim, keepdim=keepdim, dtype=dtype)
    return _shaped(torch.linalg.vector_norm(_in_rows(x if dtype is None else x.to(dtype), dim), dim=-1), dim, keepdim)


def _in_rows(x: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """x with what is added up contiguous in the last dimension."""
    if dim == (-2, -1):
        return contiguous(x).flatten(-2)
    return contiguous(x.mT if dim == -2 else x)


def _sum(x: Tensor) -> Tensor:
    n = x.shape[-1]
    if n <= 2 * CHUNK:
        return x.sum(-1)
    whole = n // CHUNK
    parts = _sum(x[..., : whole * CHUNK].unflatten(-1, (whole, CHUNK)).sum(-1))
    return parts if whole * CHUNK == n else parts + x[..., whole * CHUNK :].sum(-1)


def _shaped(sums: Tensor, dim: int | tuple[int, int], keepdim: bool) -> Tensor:
    if not keepdim:
        return sums
    return sums.unsqueeze(dim) if isinstance(dim, int) else sums[..., None, None]
