"""The kernel for small matrices through its door, and the fp64 polynomial that it is to compute."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ptx.kernels import Guards, Kernels
from steepest.linalg import coefficients as tables
from steepest.linalg.coefficients import Schedule
from steepest.ops import small_polar
from support.polar_error import polar_error
from support.singular_values import with_spectrum

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The exact polynomial's largest singular value and what rounding may add to it.
LARGEST = {"auto": 1.26, "turbo": 1.22, "exact": 1.22, "you": 1.18}


class SmallPolar:
    """Calls of the op on copies between guards, in one order of warps after another."""

    def __init__(self, kernels: Kernels, guards: Guards) -> None:
        self.kernels, self.guards = kernels, guards
        self.launches = kernels.launches

    def __call__(
        self,
        xs: Sequence[Tensor],
        plan: Schedule | str,
        *,
        outs: Sequence[Tensor] | None = None,
        eps: float = 1e-7,
        capability: int = 90,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Polar factors and slacks of batches (count, m, n) whose rows are contiguous, all in one call."""
        plan = tables.SCHEDULES[plan] if isinstance(plan, str) else plan
        if outs is None:
            outs = [self.guards.twin(torch.full(x.shape, torch.nan, dtype=x.dtype)) for x in xs]
        slacks = [self.guards.twin(torch.full((len(x),), -1.0)) for x in xs]
        flat = [value for table in plan.tables for step in table for value in small_polar._padded(step)]
        self.kernels.library.ptxsim_capability(capability)
        numbers = (flat, len(plan.tables), plan.slacks, plan.norm == "tight", eps)
        self.kernels.ops.small_polar(list(xs), list(outs), slacks, *numbers)
        return list(outs), slacks

    def one(self, x: Tensor, plan: Schedule | str, *, eps: float = 1e-7, capability: int = 90) -> Tensor:
        (out,), _ = self([x[None]], plan, eps=eps, capability=capability)
        return out[0]


def in_half_precision(x: Tensor) -> Tensor:
    """What the kernel works on: x times a power of two, in fp16; the rest is measured against that."""
    root = x.norm() / math.sqrt(min(x.shape))
    return (x * 2.0 ** -math.frexp(root)[1]).half().double()


def exact(x: Tensor, plan: Schedule) -> tuple[Tensor, float]:
    """The schedule's polynomial applied to the fp64 singular values, and the slack."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    trace, m = (s * s).sum(), len(s)
    bound = trace / m + (s * s - trace / m).norm() / math.sqrt(m) * math.sqrt(m - 1)
    norm = (bound if plan.norm == "tight" else trace).sqrt()
    slack = (trace.sqrt() / norm).item()
    table = next((t for t, least in zip(plan.tables, plan.slacks) if slack >= least), plan.tables[-1])
    values = [tables.evaluate(table, v) for v in (s / norm).tolist()]
    return (u * torch.tensor(values, dtype=torch.float64)) @ vh, slack


def assert_polynomial(
    kernel: SmallPolar,
    shape: tuple[int, int],
    preset: str,
    spectra: Sequence[str],
    *,
    off_diagonal: float,
    rounding: float,
) -> None:
    """The op's result and slack, of one batch with these spectra, are those of the preset's exact polynomial."""
    x = torch.stack([with_spectrum(*shape, name) for name in spectra])
    (found,), (slacks,) = kernel([x.float()], preset)
    for each, y, slack in zip(x, found, slacks):
        half = in_half_precision(each)
        wanted, wanted_slack = exact(half, tables.SCHEDULES[preset])
        assert slack.item() == pytest.approx(wanted_slack, rel=1e-5)
        error = polar_error(half, y)
        assert error.largest < LARGEST[preset], error
        assert error.off_diagonal < off_diagonal, error
        assert (y - wanted).norm() < rounding * wanted.norm(), error
