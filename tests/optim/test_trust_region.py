"""Trust regions in every norm, and Muon's relatives, against rules and guarantees written here. fp64, exact polar."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.zoo.trust_region import NIGT, NORMS, Fromage, OrthogonalSGDM, TrustRegion
from steepest.zoo.vector import NormalizedSGD
from support.problems import gap, gaussian
from support.training import all_same_bits

LR, WD, BETA = 0.05, 0.3, 0.8


# norm: (length, dual norm)
TRUTH: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "spectral": (lambda x: torch.linalg.svdvals(x)[0], lambda x: torch.linalg.svdvals(x).sum()),
    "frobenius": (lambda x: x.norm(), lambda x: x.norm()),
    "sign": (lambda x: x.abs().max(), lambda x: x.abs().sum()),
    "rows": (lambda x: x.norm(dim=1).max(), lambda x: x.norm(dim=1).sum()),
    "columns": (lambda x: x.norm(dim=0).max(), lambda x: x.norm(dim=0).sum()),
    "nuclear": (lambda x: torch.linalg.svdvals(x).sum(), lambda x: torch.linalg.svdvals(x)[0]),
    "one_hot": (lambda x: x.abs().sum(), lambda x: x.abs().max()),
}
every_norm = pytest.mark.parametrize("norm", NORMS)
#: The direction of the nuclear norm is found by products, not by a decomposition.
SLACK = {"nuclear": 1e-6}
NEAREST = pytest.mark.parametrize("norm", ["spectral", "frobenius", "sign", "rows", "columns"])


def test_every_norm_is_tested() -> None:
    assert set(TRUTH) == set(NORMS)


def region(p: Tensor, **options: Any) -> TrustRegion:
    values = {"lr": LR, "weight_decay": WD, "momentum": BETA, "polar": "svd", **options}
    return TrustRegion([{"params": [p]}], **values)


@every_norm
def test_no_iterate_leaves_the_ball_of_one_over_the_decay(norm: str) -> None:
    """From its surface, with gradients of every size, and as far as the iterates are pushed outwards."""
    length = TRUTH[norm][0]
    start = gaussian(6, 4)
    p = nn.Parameter(start / length(start) / WD)
    optimizer = region(p, norm=norm, lr=0.5)
    for t in range(60):
        p.grad = -p.detach().clone() if t > 30 else gaussian(6, 4, seed=t) * 10.0 ** (t % 7 - 3)
        optimizer.step()
        assert length(p.detach()) <= (1 + 1e-9 + SLACK.get(norm, 0.0)) / WD
    assert length(p.detach()) > 0.9 / WD


@every_norm
def test_from_outside_the_ball_is_approached(norm: str) -> None:
    length = TRUTH[norm][0]
    p = nn.Parameter(gaussian(6, 4) * 1e3)
    optimizer = region(p, norm=norm, lr=0.5)
    for t in range(20):
        before = length(p.detach()) - 1 / WD
        p.grad = gaussian(6, 4, seed=t)
        optimizer.step()
        assert length(p.detach()) - 1 / WD <= (1 - 0.5 * WD) * before + 1e-6


@every_norm
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_goes_down_as_far_as_the_momentum_is_the_gradient(norm: str, momentum: float) -> None:
    """f(W+) <= f(W) - lr |grad|_* + 2 lr |m - grad|_* + L lr^2 / 2, f = |W - goal|_F^2 / 2 (arXiv:2503.12645)."""
    dual = TRUTH[norm][1]
    smooth = {"spectral": 4, "frobenius": 1, "sign": 24, "rows": 6, "columns": 4, "nuclear": 1, "one_hot": 1}[norm]
    goal, p = gaussian(6, 4, seed=9), nn.Parameter(gaussian(6, 4))
    optimizer = region(p, norm=norm, weight_decay=0.0, momentum=momentum)
    for t in range(40):
        w = p.detach().clone()
        p.grad = w - goal + 0.3 * gaussian(6, 4, seed=100 + t)
        optimizer.step()
        m = optimizer.state[p]["momentum_buffer"]
        bound = (w - goal).square().sum() / 2 - LR * dual(w - goal) + 2 * LR * dual(m - (w - goal))
        assert (p.detach() - goal).square().sum() / 2 <= bound + smooth * LR**2 / 2 + 1e-6


# ---- the quadratic term in the model ------------------------------------------------------------------------------


@NEAREST
@pytest.mark.parametrize("reach", [0.01, 1.0, 3.0])
def test_the_ridge_step_is_the_least_of_its_model(norm: str, reach: float) -> None:
    """<m, X> + decay / 2 |X|^2 over |X - W| <= reach: no feasible point is lower, nor is the way to any."""
    length = TRUTH[norm][0]
    p = nn.Parameter(gaussian(5, 4))
    w, m = p.detach().clone(), 0.5 * gaussian(5, 4, seed=1)
    optimizer = region(p, norm=norm, composite="ridge", lr=reach)
    p.grad = m.clone()
    optimizer.step()
    best = p.detach()
    assert length(best - w) <= reach * (1 + 1e-12)
    slope = m + WD * best
    for trial in (*gaussian(200, 5, 4, seed=2), -m / WD - w, best - w):
        feasible = w + trial * min(1.0, reach / float(length(trial)))
        assert (slope * (feasible - best)).sum() >= -1e-10


@NEAREST
def test_the_ridge_step_ends_at_a_minimiser_that_is_near(norm: str) -> None:
    p, m = nn.Parameter(gaussian(5, 4)), 0.1 * gaussian(5, 4, seed=1)
    optimizer = region(p, norm=norm, composite="ridge", lr=100.0)
    p.grad = m.clone()
    optimizer.step()
    assert gap(p.detach(), -m / WD) < 1e-12


@NEAREST
def test_without_a_ridge_it_is_the_linear_model(norm: str) -> None:
    found = []
    for composite in ("decay", "ridge"):
        p = nn.Parameter(gaussian(5, 4))
        optimizer = region(p, norm=norm, composite=composite, weight_decay=0.0)
        for t in range(10):
            p.grad = gaussian(5, 4, seed=t)
            optimizer.step()
        found.append(p.detach())
    assert gap(*found) < 1e-12


@NEAREST
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_a_ridge_where_products_run_in_bf16(
    norm: str, dtype: torch.dtype, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CPUs with native bf16: the input has the weight in it, and the decomposition is no product."""
    monkeypatch.setattr("steepest.linalg.polar.choice.native_bf16", lambda: True)
    found = []
    for of in (torch.float64, dtype):
        p = nn.Parameter(gaussian(6, 4).to(dtype).to(of))
        optimizer = region(p, norm=norm, composite="ridge", polar="auto")
        for t in range(10):
            p.grad = gaussian(6, 4, seed=t).to(dtype).to(of)
            optimizer.step()
        found.append(p.detach())
    assert gap(found[1], found[0]) < most


@NEAREST
def test_numbers_of_a_ridge_may_be_tensors(norm: str) -> None:
    found = []
    for as_number in (float, lambda x: torch.tensor(x, dtype=torch.float64)):
        p = nn.Parameter(gaussian(5, 4))
        optimizer = region(p, norm=norm, composite="ridge", lr=as_number(LR), weight_decay=as_number(WD))
        for t in range(5):
            p.grad = gaussian(5, 4, seed=t)
            optimizer.step()
        found.append(p.detach())
    assert gap(*found) < 1e-12


def test_what_does_not_go_together_is_named() -> None:
    p = nn.Parameter(gaussian(5, 4))
    for options, text in (
        ({"norm": "octahedral"}, "norm 'octahedral' is not known"),
        ({"composite": "lasso"}, "composite 'lasso' is not known"),
        ({"norm": "nuclear", "composite": "ridge"}, "has no closed form"),
        ({"momentum": 1.0}, r"momentum should be in \[0, 1\) but is: 1.0"),
    ):
        with pytest.raises(ValueError, match=text):
            region(p, **options)
    for cls, options in ((TrustRegion, {"composite": "ridge"}), (OrthogonalSGDM, {}), (Fromage, {})):
        with pytest.raises(ValueError, match="no decay to be cautious"):
            cls([{"params": [p], "use_muon": True}], cautious_wd=True, **options)


def test_a_model_is_routed_and_a_group_may_hold_any_shape() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    assert [group["use_muon"] for group in TrustRegion(model).param_groups] == [True, False]
    TrustRegion([{"params": [nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(3))], "norm": "frobenius"}])


# ---- Orthogonal-SGDM ------------------------------------------------------------------------------------------------


def test_orthogonal_sgdm_without_momentum_is_muon_without() -> None:
    found = []
    for cls in (OrthogonalSGDM, steepest.Muon):
        p = nn.Parameter(gaussian(4, 6))
        optimizer = cls([p], LR, 0.0, 0.0, polar="auto", adjust_lr_fn="none")  # type: ignore[operator]
        for t in range(10):
            p.grad = gaussian(4, 6, seed=t)
            optimizer.step()
        found.append(p.detach())
    assert gap(*found) < 1e-12


# ---- NIGT -----------------------------------------------------------------------------------------------------------


def quadratic(steps: int, shape: tuple[int, ...] = (6, 4)) -> tuple[NIGT, nn.Parameter, list[float]]:
    """Training on <W, H W> / 2; the distance of the average from the gradient at the iterate, step by step."""
    p, h = nn.Parameter(gaussian(*shape)), 1 + gaussian(*shape, seed=1).abs()
    optimizer, off = NIGT([p], LR, momentum=BETA), []
    for _ in range(steps):
        w = optimizer.state[p]["weights"].clone() if optimizer.state[p] else p.detach().clone()
        p.grad = h * p.detach()
        optimizer.step()
        off.append(float((optimizer.state[p]["momentum_buffer"] - h * w).norm()))
    return optimizer, p, off


def test_on_a_quadratic_the_transported_average_forgets_its_start_and_nothing_else() -> None:
    """m - grad f(W) = momentum^t times what it was, wherever the iterates went."""
    _, _, off = quadratic(30)
    assert max(abs(b / a - BETA) for a, b in zip(off, off[1:])) < 1e-10


def test_nigt_without_momentum_is_normalized_sgd() -> None:
    found = []
    for cls in (NIGT, NormalizedSGD):
        p = nn.Parameter(gaussian(5))
        optimizer = cls([p], LR, momentum=0.0)
        for t in range(10):
            p.grad = gaussian(5, seed=t)
            optimizer.step()
        found.append(p.detach())
    assert all_same_bits(found[:1], found[1:])


def test_a_gradient_that_is_not_finite_leaves_the_point_ahead() -> None:
    optimizer, p, _ = quadratic(5)
    before = [p.detach().clone(), optimizer.state[p]["weights"].clone()]
    p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert all_same_bits([p.detach(), optimizer.state[p]["weights"]], before)


# ---- Fromage --------------------------------------------------------------------------------------------------------


def test_fromage_keeps_the_norm_where_the_gradient_is_orthogonal() -> None:
    p = nn.Parameter(gaussian(6, 4))
    optimizer, norm = Fromage([p], 0.5), p.detach().norm()
    for t in range(20):
        w, g = p.detach(), gaussian(6, 4, seed=t + 1)
        p.grad = g - w * (g * w).sum() / w.square().sum()
        optimizer.step()
    assert gap(p.detach().norm(), norm) < 1e-13


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_fromage_steps_plainly_where_a_norm_is_zero(zero: str) -> None:
    w, g = gaussian(3, 4) * (zero != "weight"), gaussian(3, 4, seed=1) * (zero != "gradient")
    p = nn.Parameter(w.clone())
    p.grad = g
    Fromage([p], LR).step()
    assert gap(p.detach(), (w - LR * g) / math.sqrt(1 + LR**2)) < 1e-14


def test_fromage_refuses_what_it_does_not_know() -> None:
    p = nn.Parameter(gaussian(6, 4))
    for values, text in (
        ({"num_heads": 2}, "leave out num_heads=2"),
        ({"split_sizes": (2, 4)}, r"leave out split_sizes=\(2, 4\)"),
        ({"weight_decay": 0.1}, "Fromage has no weight decay"),
        ({"adjust_lr_fn": "original"}, "has no ratio of a shape"),
    ):
        with pytest.raises(ValueError, match=text):
            Fromage([{"params": [p], **values}])
