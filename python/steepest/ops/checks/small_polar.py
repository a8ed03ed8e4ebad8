"""The kernel that keeps a matrix in shared memory, against the same polynomials in fp64.

A block and a cluster of blocks for a matrix, up to the largest that the device has room for; wide, tall and square, odd
sides, rows apart, every dtype, both norms and two tables; a matrix with a NaN among others, and a zero matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..chain_numbers import squared_norm_bound
from ..selfcheck import Check
from ..small_polar import MOST_ALONE, _capability, _most_rows, small_polar
from . import cuda_reason
from .comparison import Comparison

F, B, H = torch.float32, torch.bfloat16, torch.float16
CONVERGENT, FASTER = (1.875, -1.25, 0.375), (2.6, -2.4, 0.8)
TABLES = ((FASTER, CONVERGENT, CONVERGENT), (CONVERGENT,) * 3)
LEAST = (1.5,)
# Of the largest entry: a block keeps 22 bits, a cluster 16, and what is stored in bf16 is rounded once more.
BOUND, BOUND_OF_A_CLUSTER = 0.02, 0.03


def run(backend: str, comparison: Comparison) -> None:
    index = comparison.device.index
    check(small_polar, comparison, _most_rows(_capability(index)))


def check(kernel: Callable[..., None], comparison: Comparison, most: int) -> None:
    """kernel: `steepest.ops.small_polar.small_polar`; most: the longest short side."""
    alone = min(most, MOST_ALONE)
    shapes = [(3, 40, 24), (2, 24, 101), (1, 5, 3), (2, alone, alone), (1, alone, 264)]
    if most > MOST_ALONE:
        shapes += [(2, most - 7, most + 9), (1, most, most), (1, 264, 136)]
    for tight in (True, False):
        xs = [_matrices(comparison, shape, (F, B, H)[i % 3]) for i, shape in enumerate(shapes)]
        xs[0][1, 0, 0] = torch.nan
        xs[1][1] = 0
        outs = [comparison.empty(*x.shape, dtype=x.dtype) for x in xs]
        slacks = [comparison.empty(len(x), dtype=F) for x in xs]
        kernel(xs, outs, slacks, TABLES, LEAST, tight=tight, eps=1e-7)
        for i, (x, out, slack) in enumerate(zip(xs, outs, slacks)):
            what = f"{tuple(x.shape)}, {str(x.dtype).removeprefix('torch.')}"
            clean = [0, 2] if i == 0 else list(range(len(x)))
            wanted, wanted_slack = reference(x[clean].double(), tight)
            cluster = min(x.shape[1:]) > MOST_ALONE
            bound = wanted.abs().amax((-2, -1), keepdim=True) * (BOUND_OF_A_CLUSTER if cluster else BOUND)
            comparison.expect(f"polar factors of {what}", out[clean], wanted, bound)
            comparison.expect(f"slack of {what}", slack[clean], wanted_slack, wanted_slack * 1e-3)
            if i == 0:
                comparison.expect(f"NaN of {what}", out[1].isnan(), 1.0)


def _matrices(comparison: Comparison, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Rows are apart; the last matrix of several has a large singular value, and so another slack."""
    batch, m, n = shape
    x = comparison.normal(batch, m, n + 3, dtype=dtype)[..., :n]
    if batch > 1:
        x[-1] += 2
    return x


def reference(x: Tensor, tight: bool) -> tuple[Tensor, Tensor]:
    """What the polynomials make of x, (batch, m, n) fp64, and the slacks."""
    x = x.mT if (tall := x.shape[1] > x.shape[2]) else x
    bound, trace = squared_norm_bound(x @ x.mT)
    square = bound if tight else trace
    square = torch.where(square == 0, 1.0, square)
    slack = (trace / square).sqrt()
    x = x * square.rsqrt()[:, None, None]
    iterated = []
    for table in TABLES:
        y = x
        for a, b, c in table:
            gram = y @ y.mT
            y = a * y + (b * gram + c * (gram @ gram)) @ y
        iterated.append(y)
    y = torch.where((slack >= LEAST[0])[:, None, None], iterated[0], iterated[1])
    return y.mT if tall else y, slack


CHECK = Check(lambda backend, device: cuda_reason(device), run)
