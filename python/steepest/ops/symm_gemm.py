"""Products that are known to be symmetric.   out = alpha A B + beta C,   A, B, C: (batch, m, ·), out: (batch, m, m).

The caller promises that the exact result is symmetric (A B with B = A^T, or commuting symmetric factors).  The result
is symmetric to the bit: entries below the diagonal are computed and entries above it are copies of them.

On a CPU, one matrix at a time, only the block rows at and below the diagonal are multiplied, (p + 1) / 2p of the work
for p block rows.  Everywhere else the full batched product is taken and then mirrored.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Two cores with AVX512-BF16, torch 2.13, bf16, ratio to the time of the full product, mirroring included:
#   768x768x768    p=2 0.84   p=3 0.74   p=4 0.73   p=6 0.75
#   768x2304x768   p=2 0.79   p=3 0.69   p=4 0.68   p=6 0.66
#   768x3072x768   p=2 0.79   p=3 0.69   p=4 0.67   p=6 0.65
# polar("auto") over the matrices of GPT-2 124M, times faster than torch: p=2 1.41, p=3 1.49, p=4 1.51, p=6 1.52, p=8
# 1.47.
MAX_BLOCK_ROWS = 4
MIN_BLOCK = 128


def symm_gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """``alpha a @ b + beta c`` for a result that is symmetric in exact arithmetic; symmetric to the bit on return.

    a: (batch, m, k), b: (batch, k, m), c: (batch, m, m) or None, all of one floating dtype.  Products accumulate in
    fp32 (fp64 for fp64) and round once.  Only entries of ``c`` at and below the diagonal matter.  ``out`` takes the
    result; it may be ``c``, not ``a`` or ``b``.  No other argument is written.
    """
    if out is None:
        out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    if c is None:
        beta = 0.0
    elif c is not out:
        out.copy_(c)
    edges = block_edges(out.shape[-1]) if out.shape[0] == 1 and out.device.type == "cpu" else (0, out.shape[-1])
    if len(edges) == 2:
        out.baddbmm_(a, b, alpha=alpha, beta=beta)
    else:
        _lower_block_rows_(out[0], a[0], b[0], alpha, beta, edges)
    return mirror_(out, edges)


def block_edges(m: int) -> tuple[int, ...]:
    """Where the block rows of an m x m product begin and end: equal blocks, a multiple of 32, and what remains."""
    rows = min(MAX_BLOCK_ROWS, max(1, m // MIN_BLOCK))
    block = m if rows == 1 else 32 * -(-m // (32 * rows))
    return (*range(0, m, block), m)


def mirror_(out: Tensor, edges: tuple[int, ...]) -> Tensor:
    """Copy what lies below the diagonal onto what lies above it, in place.   out: (..., m, m).

    Block by block: mirroring the whole square at once costs as much as a block row saves.
    """
    block, whole = edges[1], edges[-1] - edges[-1] % edges[1]
    _mirror_corners_(
        out[..., :whole, :whole].unfold(-2, block, block).unfold(-2, block, block).diagonal(dim1=-4, dim2=-3)
    )
    if whole < edges[-1]:
        _mirror_corners_(out[..., whole:, whole:].unsqueeze(-1))
    for low, high in zip(edges[:-2], edges[1:-1], strict=True):
        out[..., low:high, high:].copy_(out[..., high:, low:high].mT)
    return out


def _mirror_corners_(corners: Tensor) -> None:
    """corners: (..., k, k, count).   tril_ on a strided view would copy it there and back."""
    index = torch.arange(corners.shape[-2], device=corners.device)
    below = (index[:, None] >= index)[..., None]
    corners.copy_(torch.where(below, corners, corners.transpose(-3, -2)))


def _lower_block_rows_(out: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float, edges: tuple[int, ...]) -> None:
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        out[low:high, :high].addmm_(a[low:high], b[:, :high], alpha=alpha, beta=beta)
