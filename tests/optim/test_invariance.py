"""Which change of variables a method does not notice, and which it does.

Training f(read(W')) from read^-1(W_0) with the same minibatches must visit read^-1(W_t). Observed gaps are given beside
the bounds; a method without the invariance must miss by more than 1e-2, so that a test which cannot fail is noticed.
Source: arXiv:2510.10777, Theorem 2.4 and the corollary on MuAdam-SANIA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import steepest
from steepest.parts import Hyper
from steepest.recipe import Recipe
from support.problems import RECIPES, Change, Network, RecipeOptimizer, gap, gaussian, minibatches, mushrooms, uniform
from support.slow import slow

Make = Callable[[list[Tensor]], torch.optim.Optimizer]
NET = Network()


def named(kind: type[torch.optim.Optimizer], lr: float = 0.01, **options: Any) -> Make:
    return lambda params: kind(params, lr=lr, **options)  # type: ignore[call-arg]


def following(recipe: Recipe, lr: float = 0.01, **numbers: float) -> Make:
    return lambda params: RecipeOptimizer(params, recipe, Hyper(lr, **numbers))


def sania(eps: float = 0.0, **options: Any) -> Make:
    """The update grows as one over the gradient, hence this learning rate: with longer steps training is chaotic."""
    return named(steepest.MuAdamSANIA, lr=1e-4, eps=eps, **options)


def worst(make: Make, read: Change, write: Change) -> float:
    changed, plain = NET.train(make, read=read, write=write), NET.train(make)
    assert max(gap(w, start) for w, start in zip(plain, NET.start())) > 1e-2, "the weights did not move"
    return max(map(gap, changed, plain))


# ---- elementwise rescaling ---------------------------------------------------------------------------------------

SCALES = [uniform(*w.shape, low=0.0, high=10.0, seed=30 + i).exp() for i, w in enumerate(NET.start())]

SCALE_INVARIANT = {
    "svd": sania(polar="svd"),
    "normal preset": sania(),
    "jordan": sania(polar="jordan"),
    "decoupled decay": sania(polar="svd", weight_decay=0.1),
    "cautious decay": sania(polar="svd", weight_decay=0.1, cautious_wd=True),
    "dual": following(replace(RECIPES["muadam_sania"], scale="dual"), lr=1e-5, eps=0.0),
    "adam_sania": following(RECIPES["adam_sania"], lr=1e-5, eps=0.0),
}
NOT_SCALE_INVARIANT = {
    "muadam": named(steepest.MuAdam, eps=0.0, polar="svd"),
    "muon": named(steepest.Muon, polar="svd"),
    "adamw": following(RECIPES["adamw"]),
    "torch adamw": named(torch.optim.AdamW),
    "sign": following(RECIPES["sign_sgd"]),
    "normalized sgd": following(RECIPES["normalized_sgd"]),
    "madgrad": following(RECIPES["madgrad_power"]),
    "eps": sania(eps=1e-8, polar="svd"),
}


def rescaled(w: Tensor, i: int) -> Tensor:
    return w * SCALES[i]


def unscaled(w: Tensor, i: int) -> Tensor:
    return w / SCALES[i]


@pytest.mark.parametrize("name", SCALE_INVARIANT)
def test_elementwise_rescaling_is_not_noticed(name: str) -> None:
    assert worst(SCALE_INVARIANT[name], rescaled, unscaled) < 1e-12


@pytest.mark.parametrize("name", NOT_SCALE_INVARIANT)
def test_elementwise_rescaling_is_noticed(name: str) -> None:
    assert worst(NOT_SCALE_INVARIANT[name], rescaled, unscaled) > 1e-2


# ---- orthogonal changes of basis ---------------------------------------------------------------------------------

LEFT = [torch.linalg.qr(gaussian(w.shape[0], w.shape[0], seed=50 + i)).Q for i, w in enumerate(NET.start())]
RIGHT = [torch.linalg.qr(gaussian(w.shape[1], w.shape[1], seed=60 + i)).Q for i, w in enumerate(NET.start())]

ORTHOGONAL_INVARIANT = {
    "muon, svd": named(steepest.Muon, polar="svd"),
    "muon, default": named(steepest.Muon),
    "muon, normal preset": named(steepest.Muon, polar="auto"),
    "sgd": following(RECIPES["sgd"]),
    "normalized sgd": following(RECIPES["normalized_sgd"]),
}
NOT_ORTHOGONAL_INVARIANT = {
    "adamw": following(RECIPES["adamw"]),
    "muadam": named(steepest.MuAdam, polar="svd"),
    "muadam_sania": sania(polar="svd"),
    "sign": following(RECIPES["sign_sgd"]),
}


def rotated(w: Tensor, i: int) -> Tensor:
    return LEFT[i] @ w @ RIGHT[i]


def unrotated(w: Tensor, i: int) -> Tensor:
    return LEFT[i].mT @ w @ RIGHT[i].mT


@pytest.mark.parametrize("name", ORTHOGONAL_INVARIANT)
def test_an_orthogonal_change_of_basis_is_not_noticed(name: str) -> None:
    assert worst(ORTHOGONAL_INVARIANT[name], rotated, unrotated) < 1e-12


@pytest.mark.parametrize("name", NOT_ORTHOGONAL_INVARIANT)
def test_an_orthogonal_change_of_basis_is_noticed(name: str) -> None:
    assert worst(NOT_ORTHOGONAL_INVARIANT[name], rotated, unrotated) > 1e-2


# ---- LIBSVM mushrooms with rescaled features ---------------------------------------------------------------------


class Mushrooms:
    """A 112-10-2 network on features x or x * s: losses of every step, and the final test loss."""

    def __init__(self) -> None:
        self.x, self.y = mushrooms()
        self.scale = uniform(112, low=0.0, high=20.0, seed=5).exp()
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(1))
        self.training, self.test = order[:6000], order[6000:]

    def curve(self, make: Make, scale: Tensor, steps: int = 200) -> Tensor:
        """Training starts from the same function whatever the scale: W1 / s on features x * s."""
        start = [gaussian(10, 112, seed=1) / 112**0.5 / scale, gaussian(2, 10, seed=2) / 10**0.5]
        weights = [torch.nn.Parameter(w) for w in start]
        optimizer = make(list(weights))
        losses = []
        for rows in minibatches(len(self.training), 128, steps):
            optimizer.zero_grad()
            loss = self.loss(weights, self.training[rows], scale)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        with torch.no_grad():
            return torch.stack([*losses, self.loss(weights, self.test, scale)])

    def loss(self, weights: list[torch.nn.Parameter], rows: Tensor, scale: Tensor) -> Tensor:
        logits = torch.relu((self.x[rows] * scale) @ weights[0].mT) @ weights[1].mT
        return torch.nn.functional.cross_entropy(logits, self.y[rows])


@pytest.fixture(scope="module")
def data() -> Mushrooms:
    return Mushrooms()


@pytest.mark.parametrize(
    "make",
    [
        sania(polar="svd"),
        slow(sania()),
        following(RECIPES["adam_sania"], lr=1e-5, eps=0.0),
    ],
    ids=["muadam_sania, svd", "muadam_sania, normal preset", "adam_sania"],
)
def test_mushrooms_feature_scale_is_not_noticed(data: Mushrooms, make: Make) -> None:
    plain, scaled = data.curve(make, torch.ones(112, dtype=torch.float64)), data.curve(make, data.scale)
    assert plain[-1] < 0.9 * plain[0], "nothing was learned"
    assert ((scaled - plain).abs() / plain).max() < 1e-12


@pytest.mark.parametrize(
    "make",
    [
        named(steepest.Muon, lr=0.02, polar="svd", weight_decay=0.0),
        named(steepest.MuAdam, lr=1e-3, polar="svd"),
        named(torch.optim.AdamW, lr=1e-2, weight_decay=0.0),
    ],
    ids=["muon", "muadam", "adamw"],
)
def test_mushrooms_feature_scale_is_noticed(data: Mushrooms, make: Make) -> None:
    plain, scaled = data.curve(make, torch.ones(112, dtype=torch.float64)), data.curve(make, data.scale)
    assert plain[-1] < 0.9 * plain[0], "nothing was learned"
    assert abs(scaled[-1] / plain[-1] - 1) > 1e-2
