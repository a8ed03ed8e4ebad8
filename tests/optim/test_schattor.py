"""Schattor between SGD and Muon: its endpoints are those optimizers. Its formula is in tests/papers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from steepest.zoo.schattor import Schattor
from support.problems import gap, gaussian, polar_by_svd
from support.quadratic import STEPS, gradient, run, start

LR, DECAY, BETA = 0.05, 0.1, 0.9


def schattor(params: list[nn.Parameter], **options: Any) -> Schattor:
    groups: list[dict[str, Any]] = [{"params": params[:3]}, {"params": params[3:], "use_muon": False}]
    return Schattor(groups[: 2 if len(params) > 3 else 1], lr=LR, weight_decay=DECAY, momentum=BETA, **options)


def test_p_2_is_sgd_with_momentum() -> None:
    """torch.optim.SGD for the regularization oracle; for the ball one the same along a unit vector."""
    ours, theirs = start(), start()
    for a, b in zip(ours, theirs):
        a.data, b.data = a.data[:4], b.data[:4]
    sgd = torch.optim.SGD(theirs, lr=LR, momentum=BETA, dampening=BETA)
    mine = Schattor(
        [{"params": ours[:3]}, {"params": ours[3:], "use_muon": False}],
        lr=LR, momentum=BETA, p=2.0, block_norm="l2", scale="dual", start="first",
    )  # fmt: skip
    assert max(map(gap, run(mine, ours), run(sgd, theirs))) < 1e-13
    p, w, m = nn.Parameter(gaussian(6, 4)), gaussian(6, 4), torch.zeros(6, 4, dtype=torch.float64)
    normalized = Schattor([p], lr=LR, momentum=BETA, p=2.0)
    for step in range(STEPS):
        p.grad = gradient(step, 0, p.detach())
        m = BETA * m + (1 - BETA) * gradient(step, 0, w)
        w = w - LR * m / m.norm()
        normalized.step()
    assert gap(p.detach(), w) < 1e-13


@pytest.mark.parametrize("polar", ["svd", "auto"])
def test_p_infinite_is_muon(polar: str) -> None:
    ours, theirs = start()[:3], start()[:3]
    muon = steepest.Muon(theirs, LR, DECAY, BETA, nesterov=False, adjust_lr_fn="none", polar=polar)
    assert max(map(gap, run(schattor(ours, p=math.inf, polar=polar), ours), run(muon, theirs))) < 1e-13


def test_a_larger_p_comes_closer_to_muon_and_a_group_has_its_own() -> None:
    g, gaps = gaussian(6, 4, seed=9), []
    for p in (2.0, 4.0, 32.0, 1e3, 1e6):
        w = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
        optimizer = Schattor([{"params": [w], "p": p}], lr=1.0, momentum=0.0, p=7.0, method="eigh")
        w.grad = g
        optimizer.step()
        gaps.append(gap(-w.detach(), polar_by_svd(g)))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-4


def test_products_alone_come_near_the_exact_direction() -> None:
    exact, fast = ([p.detach() for p in start()] for _ in range(2))
    for method in ("eigh", "matmul"):
        params = start()
        run(schattor(params, p=4.0, method=method), params)
        exact, fast = fast, [p.detach() for p in params]
    moved = [a - b.detach() for a, b in zip(exact, start())]
    error = [float((a - b).norm() / d.norm()) for a, b, d in zip(exact, fast, moved)]
    assert 0 < max(error[:3]) < 0.1
    assert error[3] < 1e-12  # a vector has no singular values to approximate


@pytest.mark.parametrize("block_norm, scale", [("max", "lmo"), ("l2", "dual")])
def test_rules_that_do_not_couple_blocks_take_the_fused_step(block_norm: Any, scale: Any) -> None:
    params = start()
    optimizer = schattor(params, block_norm=block_norm, scale=scale)
    for p in params:
        p.grad = torch.ones_like(p)
    fused = steepest.Muon(start()[:3])
    for p in fused.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    assert optimizer.prepare() == fused.prepare()


@pytest.mark.parametrize("block_norm", ["max", "l2"])
@pytest.mark.parametrize("scale", ["lmo", "dual"])
def test_a_lower_bound_truncates(block_norm: Any, scale: Any) -> None:
    """With no momentum the model is the tangent: t = min(1, (loss - lb)_+ / <G, D>)."""
    whole, cut = start(), start()
    for params, options in ((whole, {}), (cut, {"lower_bound": 1.0})):
        options |= {"block_norm": block_norm, "scale": scale, "p": 3.0, "method": "eigh"}
        groups: list[dict[str, Any]] = [{"params": params[:3]}, {"params": params[3:], "use_muon": False}]
        optimizer = Schattor(groups, lr=LR, momentum=0.0, **options)
        for i, p in enumerate(params):
            p.grad = gradient(0, i, p.detach())
        optimizer.step(loss=1.03)
    moves = [[p.detach() - w.detach() for p, w in zip(params, start())] for params in (whole, cut)]
    promised = -sum((gradient(0, i, w.detach()) * d).sum() for i, (w, d) in enumerate(zip(start(), moves[0])))
    share = min(1.0, 0.03 / float(promised))
    assert share < 1
    assert max(gap(b, share * a) for a, b in zip(*moves)) < 1e-12


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_norm": "hybrid"}, "block_norm 'hybrid' is not known; use 'max' or 'l2'"),
        ({"scale": "x"}, "scale 'x' is not known"),
        ({"p": 0.5}, "0.5"),
        ({"momentum": 1.0}, "momentum should be in"),
        ({"start": "last"}, "momentum start 'last' is not known"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schattor([nn.Parameter(torch.zeros(3, 2))], **options)
