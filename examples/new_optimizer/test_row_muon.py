"""RowMuon is its equations, in fp64:

m = b m + (1 - b) g;   o = polar(m);   v_i = c v_i + (1 - c) mean_j o_ij^2
W = (1 - lr wd) W - lr sqrt(max(1, rows / cols)) s o_i / sqrt(v_i),   s for ||o||_F in all
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import steepest

LR, WD, B, C = 0.02, 0.1, 0.9, 0.8


class Reference:
    def __init__(self, w: Tensor) -> None:
        self.w, self.m, self.v = w.clone(), torch.zeros_like(w), [0.0] * len(w)

    def step(self, g: Tensor) -> None:
        self.m = B * self.m + (1 - B) * g
        left, _, right = torch.linalg.svd(self.m, full_matrices=False)
        o = left @ right
        self.v = [C * v + (1 - C) * float(sum(x * x for x in row)) / len(row) for v, row in zip(self.v, o, strict=True)]
        rows = torch.stack([row / v**0.5 for row, v in zip(o, self.v, strict=True)])
        ratio = max(1.0, len(o) / len(o[0])) ** 0.5
        self.w = (1 - LR * WD) * self.w - LR * ratio * (o.norm() / rows.norm()) * rows


def gaussian(seed: int) -> Tensor:
    return torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_steps_are_those_of_the_equations(backend: str) -> None:
    """Of the two matrices of a fused weight."""
    p = nn.Parameter(gaussian(0))
    wanted = [Reference(w) for w in p.detach().split((4, 5))]
    groups = [{"params": [p], "split_sizes": (4, 5)}]
    optimizer = steepest.RowMuon(groups, LR, WD, B, row_beta=C, polar="svd", backend=backend)
    for t in range(20):
        p.grad = gaussian(t + 1)
        for each, g in zip(wanted, p.grad.split((4, 5)), strict=True):
            each.step(g)
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.cat([each.w for each in wanted]), rtol=0, atol=1e-10)


def test_a_gradient_may_have_any_scale() -> None:
    """Powers of two of all gradients change no bit."""
    moved = []
    for scale in (1.0, 2.0**-20):
        p = nn.Parameter(gaussian(0))
        optimizer = steepest.RowMuon([p], LR, WD, B, row_beta=C, polar="svd")
        for t in range(3):
            p.grad = gaussian(t + 1) * scale
            optimizer.step()
        moved.append(p.detach())
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-9, atol=0)
