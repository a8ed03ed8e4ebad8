"""The whole polar iteration of small matrices, each in the shared memory of a block or of a cluster of four.

    out = s Q X of every matrix X, with Q and s as in `steepest.linalg.chain`, in the Gram form without restarts

One launch for all matrices with a short side up to 128, one for all from there to 256, which need sm_90 or newer. R and
Q are kept to 22 bits, as an fp16 high and low half, because 16 bits do not bear that form on a short side below 128; in
a cluster Q is 16 bits and its diagonal fp32 (csrc/small_polar/params.h; the table of arrangements is in
small_polar.cu). CUDA only; elsewhere the chain of products takes small matrices like all others.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import backend as _backend
from .fakes import register_fake

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_TERMS = 5  # kMostTerms in csrc/small_polar/params.h
MOST_ALONE, MOST_ROWS = 128, 256  # kMostAlone, kMostRows
CLUSTERS = (9, 0)  # no compute capability below has them, and those from here on are asked
Tables = tuple[tuple[tuple[float, ...], ...], ...]


def small_polar(
    xs: Sequence[Tensor],
    outs: Sequence[Tensor],
    slacks: Sequence[Tensor],
    tables: Tables,
    least: Sequence[float],
    *,
    tight: bool,
    eps: float,
) -> None:
    """Fills outs with the polar factors of xs, and slacks.

    xs, outs: (batch, m, n), contiguous rows, fp16, bf16 or fp32, min(m, n) such that `too_long` has nothing against it;
    slacks: (batch,) fp32 for each, ||X||_F over the norm taken. tables: steps of coefficients, least: the slack from
    which each table but the last is taken; tight: the norm is the bound of `chain_numbers`, else ||X||_F. A matrix that
    is not finite gives NaN and leaves the others alone.
    """
    flat = [value for table in tables for step in table for value in _padded(step)]
    torch.ops.steepest.small_polar(xs, outs, slacks, flat, len(tables), least, tight, eps)


def supports(xs: Sequence[Tensor], tables: Tables, least: tuple[float, ...]) -> bool:
    """Whether the kernel takes all of these matrices and this schedule."""
    if not _backend.compiled_wanted():
        return False
    device = xs[0].device
    if not xs[0].is_cuda or _backend.cuda_reason(device.index) is not None or _refusal(tables, least) is not None:
        return False
    capability = _capability(device.index)
    fits = (x.numel() > 0 and too_long(min(x.shape[-2:]), capability) is None for x in xs)
    if not all(x.dtype in DTYPES and x.stride(-1) == 1 for x in xs) or not all(fits):
        return False
    reason = _backend.checked("small polar", device)
    if reason is not None:
        _backend.log_once("small_polar", "torch", {"cuda": reason}, device)
    return reason is None


def too_long(short: int, capability: tuple[int, int]) -> str | None:
    """Why the kernel does not take matrices of this short side on a device of this capability; None where it does."""
    most = _most_rows(capability)
    if short <= most:
        return None
    reason = f"the kernel for small matrices takes a short side up to {most}"
    if short > MOST_ROWS:
        return reason
    memory = short <= MOST_ALONE or capability >= CLUSTERS
    why = "a block has less shared memory" if memory else "blocks do not form clusters"
    return f"{reason} on compute capability {capability[0]}.{capability[1]}, where {why}"


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    """The compute capability of a device; (8, 9) where it has no clusters, or runs code that was made without them."""
    assert _backend.extension is not None
    capability = torch.cuda.get_device_capability(index)
    if capability < CLUSTERS:
        return capability
    built = [name for name in _backend.extension.build_info()["architectures"] if _backend.target(name) >= CLUSTERS]
    clusters = _backend.covers(built, capability) and torch.ops.steepest.cluster_launch(index)
    return capability if clusters else (8, 9)


def _padded(step: Sequence[float]) -> list[float]:
    return [*step, *[math.nan] * (MOST_TERMS - len(step))]


def _most_rows(capability: tuple[int, int]) -> int:
    assert _backend.extension is not None
    return _backend.extension.small_polar_rows(10 * capability[0] + capability[1])


@functools.cache
def _refusal(tables: Tables, least: tuple[float, ...]) -> str | None:
    """Why the kernel does not bear this schedule, None where it does."""
    assert _backend.extension is not None
    return _backend.extension.small_polar_refusal(tables, least)


if _backend.extension is not None:

    @register_fake("small_polar")
    def _(*arguments: object) -> None:
        """Mutates outs and slacks; no metadata changes."""
