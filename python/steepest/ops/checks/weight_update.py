"""The product for Hopper that goes into weights, by torch's: both tiles, whole and shared among blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..polar_chain import device_reason
from ..selfcheck import Check
from .comparison import Comparison, rounded

F, H, B = torch.float32, torch.float16, torch.bfloat16
Shape = tuple[int, int, int, int]
#: batch, m, k, n
SMALL: tuple[Shape, ...] = ((3, 136, 136, 264), (2, 40, 64, 72))
LARGE: tuple[Shape, ...] = ((1, 256, 2048, 256), (1, 1032, 64, 2064), (1, 1536, 4096, 3072))


def run(backend: str, comparison: Comparison) -> None:
    check(torch.ops.steepest.weight_update, comparison, (*SMALL, *LARGE))


def check(update: Callable[..., None], comparison: Comparison, shapes: Sequence[Shape]) -> None:
    """update: torch.ops.steepest.weight_update."""
    for turn, (batch, m, k, n) in enumerate(shapes):
        dtype, stored = (H, B)[turn % 2], (F, B, H)[turn % 3]
        a = comparison.normal(batch, m, k, dtype=dtype, scale=k**-0.5)
        for b in (comparison.normal(batch, k, n, dtype=dtype), comparison.normal(batch, n, k, dtype=dtype).mT):
            alpha = comparison.numbers([0.5 + i for i in range(batch)])
            beta = comparison.numbers([0.75] * batch)
            factor = comparison.place(a)
            if batch > 1:  # what its product is does not count
                alpha[-1], beta[-1], factor[-1] = 0, 1, torch.nan
            weights = [comparison.normal(m, n, dtype=stored) for _ in range(batch)]
            old = [w.clone() for w in weights]
            update(factor, b, weights, comparison.place(alpha), comparison.place(beta))
            what = f"{(batch, m, k, n)}, {str(dtype).removeprefix('torch.')} into {str(stored).removeprefix('torch.')}"
            for i, (w, before) in enumerate(zip(weights, old)):
                if batch > 1 and i == batch - 1:
                    comparison.expect(f"a weight that stays, {what}", w, before)
                    continue
                x, y, decayed = factor[i].float(), b[i].float(), beta[i] * before.float()
                exact = decayed + alpha[i] * (x @ y)
                terms = decayed.abs() + alpha[i].abs() * (x.abs() @ y.abs())
                comparison.expect(f"a weight, {what}", w, exact, rounded(exact, stored, terms, 2.0**-17))


CHECK = Check(lambda backend, device: device_reason(device), run)
