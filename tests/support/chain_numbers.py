"""Gram products, and the op that takes the numbers of a chain from them, for tests of its versions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.linalg.chain import chain
from steepest.linalg.coefficients import Schedule
from steepest.ops.chain_numbers import SCRATCH
from support.singular_values import SPECTRA, with_spectrum

Arguments = tuple[Sequence[Sequence[float]], Sequence[int], Sequence[float]]


def grams(m: int, dtype: torch.dtype) -> Tensor:
    """Gram products of every spectrum, largest entry 1, with a zero matrix and one that is not finite."""
    found = []
    for name in ("gaussian", *SPECTRA):
        x = with_spectrum(m, 2 * m, name)
        found.append(x @ x.mT / (x @ x.mT).amax())
    stack = torch.stack([*found, torch.zeros(m, m), torch.full((m, m), torch.nan)]).to(dtype)
    return stack.tril() + stack.tril(-1).mT


def given(schedule: Schedule) -> Arguments:
    plan = chain(schedule, ())
    return plan.constants, plan.powers, schedule.slacks


def kernel(ops: Any, gram: Tensor, arguments: Arguments, tight: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Numbers and slack from the op itself."""
    constants, powers, slacks = arguments
    numbers, slack = torch.empty(len(gram), len(powers)), torch.empty(len(gram))
    flat = [value for row in constants for value in row]
    scratch = torch.zeros(len(gram) * SCRATCH, dtype=torch.float64)
    for _ in range(2):  # the second finds what the first left in the scratch
        ops.chain_numbers(gram, numbers, slack, scratch, flat, powers, slacks, tight, eps)
    return numbers, slack
