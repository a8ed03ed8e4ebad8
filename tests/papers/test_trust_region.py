"""Trust regions, arXiv:2503.12645, and Muon's relatives.

TrustRegion       M = b M + (1 - b) G from the first gradient on;  W = (1 - lr wd) W - lr ratio dz(M), |dz| = 1
OrthogonalSGDM    M = b M + polar(G + wd W);  W = W - lr M            (Tuddenham et al. 2022)
NIGT              M = b M + (1 - b) G(X);  W' = (1 - lr wd) W - lr M / |M|;  X = W' + b / (1 - b) (W' - W)
                                                                      (arXiv:2002.03305)
Fromage           W = (W - lr |W| G / |G|) / sqrt(1 + lr^2)           (arXiv:2002.03432)
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from steepest import NIGT, Fromage, OrthogonalSGDM, TrustRegion
from support.references import DIRECTIONS, gap, gaussian, polar_by_svd

LR, WD, BETA = 0.05, 0.3, 0.8


@pytest.mark.parametrize("norm", DIRECTIONS)
def test_the_trust_region_is_its_rule(norm: str) -> None:
    """The direction of the nuclear norm is found by products, not by a decomposition."""
    p, m = nn.Parameter(gaussian(6, 4)), None
    options = {"norm": norm, "adjust_lr_fn": "spectral_unclamped", "polar": "svd"}
    optimizer, w = TrustRegion([p], lr=LR, weight_decay=WD, momentum=BETA, **options), p.detach().clone()
    for t in range(20):
        g = gaussian(6, 4, seed=t + 1)
        m = g if m is None else BETA * m + (1 - BETA) * g
        w = (1 - LR * WD) * w - LR * math.sqrt(6 / 4) * DIRECTIONS[norm](m)
        p.grad = g.clone()
        optimizer.step()
    assert gap(p.detach(), w) < (1e-6 if norm == "nuclear" else 1e-10)


@pytest.mark.parametrize("shape, how", [((6, 4), {}), ((4, 3, 2, 2), {}), ((6, 5), {"num_heads": 2})], ids=str)
def test_orthogonal_sgdm_is_its_rule(shape: tuple[int, ...], how: dict[str, Any]) -> None:
    p = nn.Parameter(gaussian(*shape))
    optimizer = OrthogonalSGDM([{"params": [p], **how}], LR, WD, BETA, polar="svd")
    w, m, heads = p.detach().clone(), torch.zeros(shape, dtype=torch.float64), how.get("num_heads", 1)
    for t in range(20):
        p.grad = gaussian(*shape, seed=t + 1)
        x = (p.grad + WD * w).reshape(heads, shape[0] // heads, -1)
        m = BETA * m + torch.stack([polar_by_svd(each) for each in x]).reshape(shape)
        w = w - LR * m
        optimizer.step()
    assert gap(p.detach(), w) < 1e-10


def test_nigt_is_its_rule() -> None:
    p = nn.Parameter(gaussian(6, 4))
    optimizer = NIGT([p], LR, WD, BETA)
    w, m = p.detach().clone(), torch.zeros(6, 4, dtype=torch.float64)
    x = w
    for t in range(20):
        lr = LR / (1 + t)
        optimizer.param_groups[0]["lr"] = lr
        assert gap(p.detach(), x) < 1e-10
        g = x.sin() + gaussian(6, 4, seed=t)
        p.grad = p.detach().sin() + gaussian(6, 4, seed=t)
        m = BETA * m + (1 - BETA) * g
        after = (1 - lr * WD) * w - lr * m / m.norm()
        x, w = after + BETA / (1 - BETA) * (after - w), after
        optimizer.step()
    optimizer.eval()
    assert gap(p.detach(), w) < 1e-10
    with pytest.raises(RuntimeError, match=r"call train\(\) before the next step"):
        optimizer.step()
    optimizer.train()
    assert gap(p.detach(), x) < 1e-10


def test_fromage_is_its_rule_for_every_shape() -> None:
    shapes = ((), (5,), (6, 4), (2, 3, 4))
    params = [nn.Parameter(gaussian(*shape, seed=i + 1)) for i, shape in enumerate(shapes)]
    wanted = [p.detach().clone() for p in params]
    optimizer = Fromage(params, LR)
    for t in range(25):
        for i, p in enumerate(params):
            p.grad = gaussian(*p.shape, seed=100 * t + i)
            w, g = wanted[i], p.grad
            turned = w - LR * g * w.square().sum().sqrt() / g.square().sum().sqrt()
            wanted[i] = turned / math.sqrt(1 + LR**2)
        optimizer.step()
    assert max(gap(p.detach(), w) for p, w in zip(params, wanted)) < 1e-10
