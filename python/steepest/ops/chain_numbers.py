"""The norm of a matrix from its Gram product, and the numbers that a chain of products takes from it.

    norm       ||X||_F, or an upper bound of ||X||_2
    slack      ||X||_F / norm
    numbers    (matrices, columns), constants[table][column] norm^-powers[column], of the first table whose slack is
               reached

The largest eigenvalue of R = X X^T >= 0 is at most mu + sd sqrt(m - 1), mu and sd the mean and the spread of its
eigenvalues, which tr R and ||R||_F give (Wolkowicz and Styan, 1980). Never above ||R||_F, equal to it at rank 1, and
blind to a change of basis, unlike a bound by row sums, so that a polar factor that uses it commutes with orthogonal
matrices. On Gaussian matrices of 256 to 1024 rows its root exceeds ||X||_2 by 1.4 to 2.9, where ||X||_F exceeds it by 8
to 16.

On a GPU one kernel (csrc/polar/numbers.cu) reads the lower triangle once; the reference in torch ops runs elsewhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import backend as _backend
from .fakes import register_fake
from .power import power
from .reductions import total, vector_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_TABLES, MOST_NUMBERS = 4, 320  # kMostTables, kMostNumbers in csrc/polar/params.h
SCRATCH = 1 + 3 * 64  # fp64 numbers a matrix; kSpreadSums and blocks_of there


def chain_numbers(
    gram: Tensor,
    constants: Sequence[Sequence[float]],
    powers: Sequence[int],
    slacks: Sequence[float],
    *,
    tight: bool,
    eps: float,
    slack: Tensor,
) -> Tensor:
    """The numbers of every matrix, fp32 (fp64 for fp64); fills ``slack``, (matrices,) fp32.

    gram: (matrices, m, m), m > 0, symmetric, fp16, bf16, fp32 or fp64; sums are taken in fp32 at least. slacks: one for
    every table but the last, falling. tight: the bound of ||X||_2, else ||X||_F; never taken below eps, and 1 for a
    zero matrix, whose slack is 0. A matrix with an entry that is not finite gets numbers that are NaN where its norm is
    in them.
    """
    if _route(gram, constants) == "torch":
        return _numbers(gram, constants, powers, slacks, tight, eps, slack)
    numbers = torch.empty(len(gram), len(powers), dtype=torch.float32, device=gram.device)
    scratch = torch.zeros(len(gram) * SCRATCH, dtype=torch.float64, device=gram.device)
    flat = [value for row in constants for value in row]
    torch.ops.steepest.chain_numbers(gram, numbers, slack, scratch, flat, powers, slacks, tight, eps)
    return numbers


def too_many(constants: Sequence[Sequence[float]]) -> bool:
    """Whether a launch's arguments do not hold them."""
    return len(constants) > MOST_TABLES or sum(map(len, constants)) > MOST_NUMBERS


def _route(gram: Tensor, constants: Sequence[Sequence[float]]) -> str:
    if not gram.is_cuda or torch.compiler.is_compiling():  # what is traced is torch's own operations
        return "torch"
    return _backend.choose("chain_numbers", "auto", {"cuda": _reason(gram, constants)}, gram.device, "chain numbers")


def _reason(gram: Tensor, constants: Sequence[Sequence[float]]) -> str | None:
    """Why the kernel does not take these; None where it does."""
    if (why := _backend.cuda_reason(gram.device.index)) is not None:
        return why
    if gram.dtype not in DTYPES:
        return f"the compute dtype is {gram.dtype}"
    if too_many(constants):
        return "the schedule has too many numbers"
    return None if gram.is_contiguous() else "the matrices are not contiguous"


def _numbers(
    gram: Tensor,
    constants: Sequence[Sequence[float]],
    powers: Sequence[int],
    slacks: Sequence[float],
    tight: bool,
    eps: float,
    slack: Tensor,
) -> Tensor:
    bound, trace = squared_norm_bound(gram)
    floor = eps * eps
    square = (bound if tight else trace).clamp_min(floor if floor <= torch.finfo(trace.dtype).max else math.inf)
    square = torch.where(square == 0, torch.ones_like(square), square)
    ratio = (trace / square).sqrt()
    slack.copy_(ratio)
    # What is traced or fake is no constant to keep.
    table_of = _table if type(gram) is Tensor and not torch.compiler.is_compiling() else _table.__wrapped__
    table = table_of((*map(tuple, constants), tuple(powers)), square.dtype, square.device)
    chosen = table[len(constants) - 1]
    for row, least in zip(table[: len(slacks)].flip(0), slacks[::-1], strict=True):
        chosen = torch.where(ratio[:, None] >= least, row, chosen)
    return chosen * power(square[:, None].rsqrt(), table[-1])


@functools.lru_cache(maxsize=256)
def _table(rows: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=dtype, device=device)


def squared_norm_bound(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Bound on the largest eigenvalue of ``gram`` and its trace, which is ||X||_F^2; both (batch,).

    gram: (batch, m, m), symmetric.  The mean is taken off the diagonal before the norm, in fp32 (fp64 for fp64): from
    tr R and ||R||_F alone the spread is the difference of two nearly equal numbers where the singular values are, and
    the bound could fall below them.
    """
    centred = gram.to(torch.promote_types(gram.dtype, torch.float32), copy=True)
    m = gram.shape[-1]
    diagonal = centred.diagonal(dim1=-2, dim2=-1)
    trace = total(diagonal, -1)
    mean = trace / m
    diagonal.sub_(mean[:, None])
    spread = vector_norm(centred) / m**0.5
    return mean + spread * (m - 1) ** 0.5, trace


if _backend.extension is not None:

    @register_fake("chain_numbers")
    def _(*arguments: object) -> None:
        """Mutates numbers, slack and scratch; no metadata changes."""
