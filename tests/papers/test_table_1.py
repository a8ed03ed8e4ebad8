"""The rows of Table 1 of arXiv:2510.10777 that keep no factors, and Muon (kellerjordan.github.io/posts/muon).

M = b1 M + (1 - b1) G,  V = b2 V + (1 - b2) G o G,  a bar: over 1 - b1^t, 1 - b2^t;  ratio = max(1, m/n)^1/2

Muon            W -= lr ratio polar((1 - b1) G + b1 M)           NormalizedSGD    W -= lr M / |M|
MuAdam          D^2 = (sqrt V + eps) / (1 - b2^t)^1/2;           SignSGD          W -= lr sign M
                W -= lr ratio polar(bar M / D) / D               AdaGrad          W -= lr M / (sqrt(sum G^2) + eps)
MuAdamSANIA     the same, D^2 = (V + eps) / (1 - b2^t)           Adam, MADGRAD, AdamSANIA
                                                                 W -= lr bar M / (bar V^p + eps), p = 1/2, 1/3, 1
and before all of them W = (1 - lr wd) W
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest import (
    MADGRAD,
    SGD,
    AdaGrad,
    Adam,
    AdamSANIA,
    Lion,
    MuAdam,
    MuAdamSANIA,
    Muon,
    NormalizedSGD,
    SignSGD,
)
from support.references import gap, gaussian, polar_by_svd, trained

LR, WD, B1, B2, EPS = 0.02, 0.1, 0.9, 0.95, 1e-6
#: the update from G, M, V, sum of G o G, t and the ratio
Update = Callable[..., Tensor]
MOMENTUM: dict[str, Any] = {"momentum": B1}
BETAS: dict[str, Any] = {"betas": (B1, B2), "eps": EPS}


def adaptive(p: float) -> Update:
    return lambda G, M, V, total, t, ratio: M / (1 - B1**t) / ((V / (1 - B2**t)) ** p + EPS)


def spectral(p: float) -> Update:
    def update(G: Tensor, M: Tensor, V: Tensor, total: Tensor, t: int, ratio: float) -> Tensor:
        D = ((V**p + EPS) / (1 - B2**t) ** p).sqrt()
        return ratio * polar_by_svd(M / (1 - B1**t) / D) / D

    return update


RULES: dict[str, tuple[Any, dict[str, Any], Update]] = {
    "Muon": (
        Muon,
        {**MOMENTUM, "polar": "svd"},
        lambda G, M, V, total, t, ratio: ratio * polar_by_svd((1 - B1) * G + B1 * M),
    ),
    "MuAdam": (MuAdam, {**BETAS, "polar": "svd"}, spectral(1 / 2)),
    "MuAdamSANIA": (MuAdamSANIA, {**BETAS, "polar": "svd"}, spectral(1)),
    "NormalizedSGD": (NormalizedSGD, MOMENTUM, lambda G, M, V, total, t, ratio: M / M.norm()),
    "SignSGD": (SignSGD, MOMENTUM, lambda G, M, V, total, t, ratio: M.sign()),
    "AdaGrad": (
        AdaGrad,
        {**MOMENTUM, "eps": EPS},
        lambda G, M, V, total, t, ratio: M / (total.sqrt() + EPS),
    ),
    "Adam": (Adam, BETAS, adaptive(1 / 2)),
    "MADGRAD": (MADGRAD, BETAS, adaptive(1 / 3)),
    "AdamSANIA": (AdamSANIA, BETAS, adaptive(1)),
}


@pytest.mark.parametrize(("cls", "p"), [(MuAdam, 1 / 2), (MuAdamSANIA, 1)])
def test_an_entry_without_gradient_moves_by_what_eps_allows(cls: Any, p: float) -> None:
    """V is 0 there and polar(bar M / D) is not; with eps = 0 the weight stays."""
    start, g = gaussian(6, 5, seed=1), gaussian(6, 5, seed=2)
    g[::2, ::2] = 0
    moved = {}
    for eps in (1e-8, 1e-6, 0.0):
        options = {"lr": LR, "betas": (B1, B2), "eps": eps, "polar": "svd", "adjust_lr_fn": "none"}
        moved[eps] = float((trained(cls, iter([g]), start, **options) - start)[::2, ::2].abs().max())
        bound = LR * (1 - B2) ** (p / 2) / eps**0.5 if eps else 0.0
        assert bound / 20 <= moved[eps] <= bound
    assert abs(moved[1e-8] / moved[1e-6] / 10 - 1) < 0.1


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs(momentum: float, nesterov: bool) -> None:
    """The row SGD, in torch's convention for momentum."""
    start, grads = gaussian(7, 4, seed=1), gaussian(20, 7, 4, seed=2)
    weight = torch.nn.Parameter(start.clone())
    other = torch.optim.SGD([weight], lr=LR, momentum=momentum, nesterov=nesterov and momentum > 0)
    for g in grads:
        weight.grad = g.clone()
        other.step()
    now = trained(SGD, iter(grads), start, lr=LR, momentum=momentum, nesterov=nesterov and momentum > 0)
    assert gap(now, weight.detach()) < 1e-13


def test_a_heavy_ball_in_fp16_stays_finite() -> None:
    """A gradient that the sum has no room for is no step."""
    weight = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = SGD([weight], lr=1e-6, momentum_dtype=torch.float16)
    for size in (3e4, 3e4, 100.0, 100.0):
        weight.grad = torch.full((4, 3), size)
        optimizer.step()
    assert optimizer.state[weight]["momentum_buffer"].isfinite().all()
    assert weight.isfinite().all()
    assert int(optimizer.skipped_updates()[weight.device]) == 2


@pytest.mark.parametrize("shape", [(7, 4), (1, 6)], ids=str)
def test_lion(shape: tuple[int, int]) -> None:
    """Algorithm 2 of arXiv:2302.06675."""
    w = start = gaussian(*shape, seed=1)
    m, grads = torch.zeros_like(w), list(gaussian(25, *shape, seed=2))
    for g in grads:
        w = w - LR * (torch.sign(0.9 * m + (1 - 0.9) * g) + WD * w)
        m = 0.99 * m + (1 - 0.99) * g
    assert gap(trained(Lion, iter(grads), start, lr=LR, weight_decay=WD), w) < 1e-13


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (1, 6)], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_a_row_of_the_table(name: str, shape: tuple[int, int]) -> None:
    cls, options, update = RULES[name]
    w = start = gaussian(*shape, seed=1)
    M, V, total = (torch.zeros_like(w) for _ in range(3))
    grads = list(gaussian(25, *shape, seed=2))
    for t, G in enumerate(grads, 1):
        M, V, total = B1 * M + (1 - B1) * G, B2 * V + (1 - B2) * G**2, total + G**2
        w = (1 - LR * WD) * w - LR * update(G, M, V, total, t, max(1.0, shape[0] / shape[1]) ** 0.5)
    assert gap(trained(cls, iter(grads), start, lr=LR, weight_decay=WD, **options), w) < 1e-11
