"""`step_one` against the named methods, each written here as its formula or taken from torch.optim.

A reference is a function (weight, gradients) -> weight over 25 steps. The bars over m and v of the papers are the bias
corrections 1 - beta^t. Sources: Table 1 of arXiv:2510.10777 and the papers of the methods.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.parts import Decay, Diagonal, Hyper, Momentum, Normalize, Rounding, Sign, Submatrix
from steepest.recipe import ADAMW, Recipe, step_one
from support.problems import ADAM_AVERAGE, RECIPES, gap, gaussian, polar_by_svd

LR, WD, B1, B2, EPS = 0.02, 0.1, 0.9, 0.95, 1e-6
HYPER = Hyper(LR, WD, B1, B2, EPS)
FEEDBACK = Momentum("error_feedback")
Reference = Callable[[Tensor, list[Tensor]], Tensor]
Make = Callable[[list[Tensor]], torch.optim.Optimizer]


def follow(recipe: Recipe, w: Tensor, grads: list[Tensor], hyper: Hyper = HYPER) -> Tensor:
    state = recipe.init(grads[0])
    for g in grads:
        w, state = step_one(recipe, w, g, state, hyper)
    return w


def heavy_ball(direct: Callable[[Tensor, Tensor], Tensor]) -> Reference:
    def reference(w: Tensor, grads: list[Tensor]) -> Tensor:
        m = torch.zeros_like(w)
        for g in grads:
            m = B1 * m + g
            w = w - LR * WD * w - LR * direct(m, g)
        return w

    return reference


def adaptive(power: float, spectral: bool, eps_inside: bool) -> Reference:
    """M-hat over D^2, or polar(M-hat / D) / D with Muon's shape factor."""

    def reference(w: Tensor, grads: list[Tensor]) -> Tensor:
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        ratio = max(1.0, w.shape[0] / w.shape[1]) ** 0.5
        for t, g in enumerate(grads, 1):
            m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
            m_hat, v_hat = m / (1 - B1**t), v / (1 - B2**t)
            if eps_inside:
                squared = (v ** (2 * power) + EPS) / (1 - B2**t) ** (2 * power)
            else:
                squared = v_hat ** (2 * power) + EPS
            d = squared**0.5
            u = ratio * polar_by_svd(m_hat / d) / d if spectral else m_hat / squared
            w = (1 - LR * WD) * w - LR * u
        return w

    return reference


def muon(w: Tensor, grads: list[Tensor]) -> Tensor:
    m = torch.zeros_like(w)
    ratio = max(1.0, w.shape[0] / w.shape[1]) ** 0.5
    for g in grads:
        m = B1 * m + (1 - B1) * g
        w = (1 - LR * WD) * w - LR * ratio * polar_by_svd((1 - B1) * g + B1 * m)
    return w


REFERENCES: dict[str, Reference] = {
    "sgd": heavy_ball(lambda m, g: m),
    "sgd_nesterov": heavy_ball(lambda m, g: g + B1 * m),
    "normalized_sgd": heavy_ball(lambda m, g: m / m.norm()),
    "sign_sgd": heavy_ball(lambda m, g: m.sign()),
    "adamw": adaptive(1 / 4, spectral=False, eps_inside=False),
    "madgrad_power": adaptive(1 / 6, spectral=False, eps_inside=False),
    "adam_sania": adaptive(1 / 2, spectral=False, eps_inside=False),
    "muon": muon,
    "muadam": adaptive(1 / 4, spectral=True, eps_inside=True),
    "muadam_sania": adaptive(1 / 2, spectral=True, eps_inside=True),
}


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (1, 6)], ids=str)
@pytest.mark.parametrize("name", REFERENCES)
def test_step_one_is_the_method(name: str, shape: tuple[int, int]) -> None:
    w, grads = gaussian(*shape, seed=1), list(gaussian(25, *shape, seed=2))
    assert gap(follow(RECIPES[name], w, grads), REFERENCES[name](w, grads)) < 1e-11


@pytest.mark.parametrize(
    "recipe, weight_decay, make",
    [
        (RECIPES["sgd"], 0.0, lambda p: torch.optim.SGD(p, LR, momentum=B1)),
        (RECIPES["sgd_nesterov"], 0.0, lambda p: torch.optim.SGD(p, LR, momentum=B1, nesterov=True)),
        (ADAMW, 0.0, lambda p: torch.optim.Adam(p, LR, (B1, B2), EPS)),
        (ADAMW, WD, lambda p: torch.optim.AdamW(p, LR, (B1, B2), EPS, weight_decay=WD)),
    ],
    ids=["SGD", "SGD-nesterov", "Adam", "AdamW"],
)
def test_torch_optim_is_the_same_method(recipe: Recipe, weight_decay: float, make: Make) -> None:
    w, grads = gaussian(6, 5, seed=1), list(gaussian(25, 6, 5, seed=2))
    assert gap(follow(recipe, w, grads, Hyper(LR, weight_decay, B1, B2, EPS)), trained_by_torch(make, w, grads)) < 1e-12


def test_adagrad_is_that_of_torch() -> None:
    """torch adds eps to sqrt(sum): that is eps outside the power, and with a sum both places are one."""
    w, grads = gaussian(6, 5, seed=1), list(gaussian(25, 6, 5, seed=2))
    theirs = trained_by_torch(lambda p: torch.optim.Adagrad(p, LR, eps=EPS), w, grads)
    assert gap(follow(RECIPES["adagrad"], w, grads, Hyper(LR, beta1=0.0, eps=EPS)), theirs) < 1e-12
    inside = Recipe(precondition=Diagonal(0.25, "sum", False, eps_inside=True), scale="dual")
    assert gap(follow(inside, w, grads, Hyper(LR, beta1=0.0, eps=EPS)), theirs) < 1e-12


def trained_by_torch(make: Make, w: Tensor, grads: list[Tensor]) -> Tensor:
    p = torch.nn.Parameter(w.clone())
    optimizer = make([p])
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("name", RECIPES)
def test_step_one_treats_a_batch_as_its_matrices_and_changes_no_input(name: str) -> None:
    recipe, w, g = RECIPES[name], gaussian(3, 4, 5, seed=1), gaussian(3, 4, 5, seed=2)
    state = recipe.update_moments(recipe.init(g), gaussian(3, 4, 5, seed=3), HYPER)
    kept = w.clone(), g.clone(), {key: t.clone() for key, t in state.items()}
    together, after = step_one(recipe, w, g, state, HYPER)
    for i in range(3):
        alone = step_one(recipe, w[i], g[i], {k: t[i] if t.ndim else t for k, t in state.items()}, HYPER)[0]
        assert gap(together[i], alone) < 1e-12
    assert after.keys() == set(recipe.keys)
    assert torch.equal(w, kept[0])
    assert torch.equal(g, kept[1])
    assert all(torch.equal(state[key], kept[2][key]) for key in state)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", RECIPES)
def test_a_gradient_that_is_not_finite_changes_nothing(name: str, bad: float) -> None:
    recipe, w, g = RECIPES[name], gaussian(4, 5, seed=1), gaussian(4, 5, seed=2)
    state = recipe.update_moments(recipe.init(g), g, HYPER)
    spoiled = g.clone()
    spoiled[1, 2] = bad
    for before in (recipe.init(g), state):
        moved, after = step_one(recipe, w, spoiled, before, HYPER)
        assert torch.equal(moved, w)
        assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", RECIPES)
def test_a_zero_gradient_only_decays(name: str) -> None:
    w, g = gaussian(4, 5), torch.zeros(4, 5, dtype=torch.float64)
    for eps in (0.0, 1e-8):
        moved = follow(RECIPES[name], w, [g, g], Hyper(LR, WD, B1, B2, eps))
        assert gap(moved, (1 - LR * WD) ** 2 * w) < 1e-15


def test_numbers_may_be_tensors() -> None:
    w, grads = gaussian(4, 5, seed=1), list(gaussian(5, 4, 5, seed=2))
    tensors = Hyper(*(torch.tensor(n, dtype=torch.float64) for n in (LR, WD, B1, B2, EPS)))
    for recipe in RECIPES.values():
        assert gap(follow(recipe, w, grads, tensors), follow(recipe, w, grads)) < 1e-12


def test_state_dtypes_and_steps() -> None:
    g = gaussian(4, 5, dtype=torch.bfloat16)
    recipe = Recipe(Momentum(bias_correction=True, dtype=torch.float32), Diagonal(), Sign())
    state = recipe.init(g)
    for _ in range(3):
        w, state = step_one(recipe, g, g, state, HYPER)
    assert w.dtype == torch.bfloat16
    assert {key: t.dtype for key, t in state.items()} == dict.fromkeys(recipe.keys, torch.float32)
    assert state["step"].item() == 3


def test_keys_and_counting() -> None:
    assert RECIPES["muon"].keys == ("momentum_buffer",)
    assert RECIPES["muadam"].keys == ("momentum_buffer", "exp_avg_sq", "step")
    assert ADAMW.keys == ("exp_avg", "exp_avg_sq", "step")
    assert RECIPES["adagrad"].keys == ("momentum_buffer", "exp_avg_sq")
    assert Recipe(rounding=Rounding("stochastic")).counts_steps


def test_equal_recipes_are_one_program() -> None:
    assert Recipe(ADAM_AVERAGE, Diagonal(), decay=Decay(True)) == Recipe(ADAM_AVERAGE, Diagonal(), decay=Decay(True))
    assert len({*RECIPES.values(), *RECIPES.values()}) == len(RECIPES)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"scale": "unit"}, "scale 'unit' is not known; use 'lmo' (length lr in the norm) or 'dual'"),
        ({"adjust_lr": "rms"}, "Adjust learning rate function rms is not supported; use one of original"),
        ({"submatrix": Submatrix()}, "a submatrix and momentum of kind 'error_feedback' go together, but here is Sub"),
        ({"submatrix": Submatrix(), "momentum": None}, "momentum of kind None: give both or none"),
        ({"momentum": FEEDBACK}, "here is None with momentum of kind 'error_feedback': give both or none"),
        (
            {"submatrix": Submatrix(), "momentum": FEEDBACK, "precondition": Diagonal()},
            "a submatrix is of the momentum, not of the variables of Diagonal: use Identity()",
        ),
        (
            {"submatrix": Submatrix(), "momentum": FEEDBACK, "transforms": (Normalize("rows"),)},
            "a submatrix along 'shorter' does not go with transforms that remember ['row']",
        ),
        (
            {"submatrix": Submatrix(0.5, "rows"), "momentum": FEEDBACK, "transforms": (Normalize("elements"),)},
            "a submatrix along 'rows' does not go with transforms that remember ['elementwise']",
        ),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Recipe(**arguments)
