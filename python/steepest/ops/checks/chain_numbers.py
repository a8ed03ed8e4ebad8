"""The kernel that takes norms and coefficients from Gram matrices, against its reference in torch's operations.

One element, odd sizes, more rows than a block has, every dtype; a zero matrix and one with a NaN among others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..chain_numbers import SCRATCH, _numbers
from ..selfcheck import Check
from . import cuda_reason
from .comparison import Comparison

SIZES = (1, 3, 131, 320)
CONSTANTS, POWERS, LEAST = ((1.5, -2.0, 0.25), (3.0, -1.0, 0.5)), (0, 2, 4), (2.0,)


def run(backend: str, comparison: Comparison) -> None:
    check(torch.ops.steepest.chain_numbers, comparison)


def check(op: Callable[..., None], comparison: Comparison) -> None:
    """op: torch.ops.steepest.chain_numbers."""
    for turn, m in enumerate(SIZES):
        for at, dtype in enumerate((torch.float16, torch.bfloat16, torch.float32)):
            _expect(op, comparison, m, dtype, tight=(turn + at) % 2 == 0)


def _expect(op: Callable[..., None], comparison: Comparison, m: int, dtype: torch.dtype, tight: bool) -> None:
    x = comparison.normal(4, m, 2 * m, scale=m**-0.5)
    x[1, 1:] *= 0.01  # of another slack
    x[2] = 0
    gram = comparison.place((x @ x.mT).to(dtype))
    gram.copy_(gram.tril() + gram.tril(-1).mT)
    gram[3, -1, -1] = torch.nan
    numbers, slack = comparison.empty(4, len(POWERS), dtype=torch.float32), comparison.empty(4, dtype=torch.float32)
    scratch = comparison.place(torch.zeros(4 * SCRATCH, dtype=torch.float64, device=comparison.device))
    flat = [value for row in CONSTANTS for value in row]
    for _ in range(2):  # the second finds what the first left in the scratch
        op(gram, numbers, slack, scratch, flat, list(POWERS), list(LEAST), tight, 1e-7)
    wanted_slack = torch.empty_like(slack)
    wanted = _numbers(gram.double(), CONSTANTS, POWERS, LEAST, tight, 1e-7, wanted_slack)
    what = f"{m} x {m}, {str(dtype).removeprefix('torch.')}, {'bound' if tight else 'Frobenius norm'}"
    comparison.expect(f"numbers of {what}", numbers[:3], wanted[:3], wanted[:3].abs() * 1e-5)
    comparison.expect(f"slack of {what}", slack[:3], wanted_slack[:3], wanted_slack[:3] * 1e-5)
    comparison.expect(f"NaN of {what}", numbers[3, 1:].isnan(), 1.0)


CHECK = Check(lambda backend, device: cuda_reason(device), run)
