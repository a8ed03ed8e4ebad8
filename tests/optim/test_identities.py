"""What the theory of arXiv:2510.10777 says must hold, exactly: fp64 and the exact polar factor throughout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import steepest
from steepest.parts import Diagonal, Direction, Frobenius, Hyper, Identity, Momentum, Precondition, Sign
from steepest.recipe import Recipe, State, step_one
from support.problems import ADAM_AVERAGE, FEW, RECIPES, SVD, Network, RecipeOptimizer, gap, gaussian, polar_by_svd

# base norm N and its dual, written apart from the library
BASES: dict[str, tuple[Direction, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "frobenius": (Frobenius(), lambda x: x.square().sum().sqrt(), lambda x: x.square().sum().sqrt()),
    "sign": (Sign(), lambda x: x.abs().max(), lambda x: x.abs().sum()),
    "spectral": (SVD, lambda x: torch.linalg.svdvals(x)[0], lambda x: torch.linalg.svdvals(x).sum()),
}
PRECONDITIONERS: dict[str, Precondition] = {
    "none": Identity(),
    "diagonal 1/4": Diagonal(0.25),
    "diagonal 1/2": Diagonal(0.5, eps_inside=False),
    "diagonal 1/6": Diagonal(1 / 6, "sum", False),
}
HYPER = Hyper(0.02, beta1=0.9, beta2=0.95, eps=1e-3)

bases = pytest.mark.parametrize("base", BASES)
preconditioners = pytest.mark.parametrize("precondition", PRECONDITIONERS)


def properties(test: Callable[..., None]) -> Callable[..., None]:
    """Every base norm under every preconditioner, for a few seeds."""
    return bases(preconditioners(FEW(given(seed=st.integers(0, 999))(test))))


def back(recipe: Recipe, state: State, d: Tensor, hyper: Hyper) -> Tensor:
    """P^-1 d."""
    return recipe.precondition.back(state, d, hyper, state.get("step"))


def observed(recipe: Recipe, seed: int, hyper: Hyper = HYPER) -> tuple[State, Tensor, Tensor]:
    """(state after three gradients, momentum M as it is read, D of the preconditioned norm N(D o X))."""
    state = recipe.init(gaussian(5, 4))
    for k in range(3):
        state = recipe.update_moments(state, gaussian(5, 4, seed=10 * seed + k), hyper)
    m = recipe.momentum.read(state[recipe.momentum.key], gaussian(5, 4), hyper.beta1, state.get("step"))
    return state, m, 1 / back(recipe, state, torch.ones_like(m), hyper)


# ---- Theorem 2.3: the steepest direction of a preconditioned norm --------------------------------------------------


@properties
def test_the_step_attains_the_dual_norm_with_preconditioned_length_one(base: str, precondition: str, seed: int) -> None:
    direction, norm, dual = BASES[base]
    recipe = Recipe(precondition=PRECONDITIONERS[precondition], direction=direction)
    state, m, d = observed(recipe, seed)
    u = back(recipe, state, recipe.descent_direction(recipe.direction_input(state, m, HYPER), HYPER), HYPER)
    assert gap((m * u).sum(), dual(m / d)) < 1e-13
    assert gap(norm(d * u), torch.tensor(1.0)) < 1e-13


@properties
def test_no_step_of_preconditioned_length_one_goes_further(base: str, precondition: str, seed: int) -> None:
    direction, norm, dual = BASES[base]
    recipe = Recipe(precondition=PRECONDITIONERS[precondition], direction=direction)
    state, m, d = observed(recipe, seed)
    u = back(recipe, state, recipe.descent_direction(recipe.direction_input(state, m, HYPER), HYPER), HYPER)
    for trial in torch.cat([gaussian(10, 5, 4, seed=seed), u + 0.1 * gaussian(10, 5, 4, seed=seed + 1)]):
        assert (m * trial).sum() <= dual(m / d) * norm(d * trial) * (1 + 1e-13)


@properties
def test_the_scaled_step_minimizes_the_regularized_model(base: str, precondition: str, seed: int) -> None:
    """q(S) = <M, S> + ||S||^2 / (2 eta) is least at S = -eta u, where it is -eta dual^2 / 2."""
    direction, norm, dual = BASES[base]
    recipe = Recipe(precondition=PRECONDITIONERS[precondition], direction=direction, scale="dual")
    state, m, d = observed(recipe, seed)
    eta = 0.3
    best = -eta * back(recipe, state, recipe.descent_direction(recipe.direction_input(state, m, HYPER), HYPER), HYPER)

    def model(step: Tensor) -> Tensor:
        return (m * step).sum() + norm(d * step) ** 2 / (2 * eta)

    value = -eta * dual(m / d) ** 2 / 2
    assert gap(model(best), value) < 1e-12
    for trial in gaussian(20, 5, 4, seed=seed):
        for length in (1e-3, 1e-1, 1.0):
            assert model(best + length * best.abs().max() * trial) >= value * (1 + 1e-12)


@bases
@preconditioners
def test_a_short_step_goes_down(base: str, precondition: str) -> None:
    """On ||W - W*||^2 / 2, with the decrease that the dual norm promises: lr dual - O(lr^2)."""
    direction, _, dual = BASES[base]
    recipe = Recipe(precondition=PRECONDITIONERS[precondition], direction=direction)
    w, goal, lr = gaussian(5, 4, seed=1), gaussian(5, 4, seed=2), 1e-6
    g = w - goal
    hyper = Hyper(lr, beta1=0.0, beta2=0.95, eps=1e-3)
    moved, state = step_one(recipe, w, g, recipe.init(g), hyper)
    d = 1 / back(recipe, state, torch.ones_like(g), hyper)
    decrease = ((w - goal).square().sum() - (moved - goal).square().sum()) / 2
    assert decrease > 0
    assert gap(decrease / lr, dual(g / d)) < 1e-3


@pytest.mark.parametrize("power", [1 / 6, 1 / 4, 1 / 2])
def test_frobenius_scaled_by_its_dual_norm_is_the_adaptive_method(power: float) -> None:
    """M / D^2: MADGRAD's, Adam's and Adam-SANIA's update; unscaled, the same divided by ||M / D||_F."""
    recipe = Recipe(ADAM_AVERAGE, Diagonal(power), scale="dual")
    state, m, d = observed(recipe, seed=3)
    x = recipe.direction_input(state, m, HYPER)
    assert gap(back(recipe, state, recipe.descent_direction(x, HYPER), HYPER), m / d**2) < 1e-13
    unscaled = replace(recipe, scale="lmo")
    assert gap(back(unscaled, state, unscaled.descent_direction(x, HYPER), HYPER), m / d**2 / (m / d).norm()) < 1e-13


# ---- degenerate cases of MuAdam and MuAdam-SANIA ------------------------------------------------------------------


def signs(step: int, shape: tuple[int, int] = (7, 4)) -> Tensor:
    return gaussian(*shape, seed=40 + step).sign()


def trained(kind: type[torch.optim.Optimizer], grads: Callable[[int], Tensor], **options: Any) -> Tensor:
    p = torch.nn.Parameter(gaussian(7, 4, seed=7))
    optimizer = kind([p], **options)  # type: ignore[arg-type]
    for step in range(12):
        p.grad = grads(step)
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("polar", ["svd", "jordan"])
@pytest.mark.parametrize("kind, power", [(steepest.MuAdam, 0.5), (steepest.MuAdamSANIA, 1.0)])
@pytest.mark.parametrize("c", [1.0, 9.0, 1e-3])
def test_with_a_constant_preconditioner_muadam_is_muon(
    kind: type[steepest.MuAdam], power: float, c: float, polar: str
) -> None:
    """Gradients of constant magnitude c have v / (1 - beta2^t) = c^2: D = c^power, and a step is Muon's over D."""
    shared: dict[str, Any] = {"weight_decay": 0.0, "polar": polar}
    ours = trained(kind, lambda t: c * signs(t), lr=0.1 * c**power, betas=(0.9, 0.99), eps=0.0, **shared)
    theirs = trained(steepest.Muon, signs, lr=0.1, momentum=0.9, nesterov=False, **shared)
    assert gap(ours, theirs) < 1e-12


def test_with_a_constant_preconditioner_muadam_is_muon_decay_included() -> None:
    ours = trained(steepest.MuAdam, signs, lr=0.1, weight_decay=0.2, betas=(0.9, 0.99), eps=0.0, polar="svd")
    theirs = trained(steepest.Muon, signs, lr=0.1, weight_decay=0.2, momentum=0.9, nesterov=False, polar="svd")
    assert gap(ours, theirs) < 1e-12


def test_without_a_preconditioner_the_recipe_of_muadam_is_that_of_muon() -> None:
    muon = replace(RECIPES["muon"], momentum=Momentum())
    bare = replace(RECIPES["muadam"], precondition=Identity())
    w, hyper = gaussian(7, 4, seed=1), Hyper(0.1, 0.1, 0.9)
    ours, theirs, states = w, w, [bare.init(w), muon.init(w)]
    for step in range(10):
        g = gaussian(7, 4, seed=20 + step)
        ours, states[0] = step_one(bare, ours, g, states[0], hyper)
        theirs, states[1] = step_one(muon, theirs, g, states[1], hyper)
    assert gap(ours, theirs) < 1e-12


@bases
@pytest.mark.parametrize("scale, exponent", [("lmo", 1), ("dual", 2)])
def test_a_constant_preconditioner_c_divides_the_step(base: str, scale: str, exponent: int) -> None:
    """D = c 1 shortens the constrained step by c and the regularized one by c^2."""
    recipe = Recipe(precondition=Diagonal(0.5, bias_correction=False), direction=BASES[base][0], scale=scale)  # type: ignore[arg-type]
    x, hyper = gaussian(5, 4), Hyper(0.1, eps=0.0)
    steps = []
    for c in (1.0, 7.0):
        state = {"momentum_buffer": x, "exp_avg_sq": torch.full_like(x, c**2)}
        steps.append(
            back(recipe, state, recipe.descent_direction(recipe.direction_input(state, x, hyper), hyper), hyper)
        )
    assert gap(steps[1] * 7.0**exponent, steps[0]) < 1e-13


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)], ids=str)
def test_without_averages_the_methods_are_functions_of_sign_and_magnitude(shape: tuple[int, int]) -> None:
    g, w = gaussian(*shape, seed=5), torch.zeros(*shape, dtype=torch.float64)
    hyper = Hyper(1.0, beta1=0.0, beta2=0.0, eps=0.0)

    def first(name: str) -> Tensor:
        recipe = replace(RECIPES[name], adjust_lr="none")
        return -step_one(recipe, w, g, recipe.init(g), hyper)[0]

    assert gap(first("adamw"), g.sign()) < 1e-15
    assert gap(first("adam_sania"), 1 / g) < 1e-15
    assert gap(first("muadam_sania"), polar_by_svd(g.sign()) / g.abs()) < 1e-12
    root = g.abs().sqrt()
    assert gap(first("muadam"), polar_by_svd(g.sign() * root) / root) < 1e-12


@pytest.mark.parametrize("kind, power", [(steepest.MuAdam, 0.5), (steepest.MuAdamSANIA, 1.0)])
def test_the_first_step_is_the_one_without_averages(kind: type[steepest.MuAdam], power: float) -> None:
    """Bias correction undoes both averages after one gradient, whatever the betas."""
    p, g = torch.nn.Parameter(torch.zeros(5, 6, dtype=torch.float64)), gaussian(5, 6)
    optimizer = kind([p], lr=1.0, eps=0.0, polar="svd")
    p.grad = g
    optimizer.step()
    d = g.abs() ** power
    assert gap(-p.detach(), polar_by_svd(g / d) / d) < 1e-12


@pytest.mark.parametrize("kind", [steepest.MuAdam, steepest.MuAdamSANIA])
def test_a_constant_gradient_gives_equal_steps(kind: type[steepest.MuAdam]) -> None:
    """The step count advances: with a count stuck at 1 the steps of beta2 = 0.999 would shrink as t grows."""
    p, g, seen = torch.nn.Parameter(torch.zeros(6, 4, dtype=torch.float64)), gaussian(6, 4), []
    optimizer = kind([p], lr=1.0, eps=0.0, polar="svd")
    for _ in range(50):
        before = p.detach().clone()
        p.grad = g.clone()
        optimizer.step()
        seen.append(before - p.detach())
    assert optimizer.state[p]["step"].item() == 50
    assert max(gap(u, seen[0]) for u in seen) < 1e-11


# ---- what a loss multiplied by c does -----------------------------------------------------------------------------


def named(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[[list[Tensor], float], torch.optim.Optimizer]:
    return lambda params, factor: kind(params, lr=0.01 * factor, **options)  # type: ignore[arg-type, call-arg]


def recipe(name: str, **changes: Any) -> Callable[[list[Tensor], float], torch.optim.Optimizer]:
    parts = replace(RECIPES[name], **changes)
    return lambda params, factor: RecipeOptimizer(params, parts, Hyper(0.01 * factor, eps=0.0))


# method, exponent k: with the loss times c, the learning rate times c^k gives the same iterates
EXPONENTS = {
    "muon": (named(steepest.Muon, polar="svd"), 0.0),
    "muon, default": (named(steepest.Muon), 0.0),
    "muadam": (named(steepest.MuAdam, polar="svd", eps=0.0), 0.5),
    "muadam_sania": (named(steepest.MuAdamSANIA, polar="svd", eps=0.0), 1.0),
    "adam": (recipe("adamw"), 0.0),
    "sign_sgd": (recipe("sign_sgd"), 0.0),
    "normalized_sgd": (recipe("normalized_sgd"), 0.0),
    "sgd": (recipe("sgd"), -1.0),
    "adam_sania": (recipe("adam_sania"), 1.0),
    "madgrad_power": (recipe("madgrad_power"), -1 / 3),
    "muadam, dual": (recipe("muadam", scale="dual"), 0.0),
}


@pytest.mark.parametrize("name", EXPONENTS)
def test_loss_scale_exponents(name: str) -> None:
    make, exponent = EXPONENTS[name]
    c, net = 100.0, Network()
    plain = net.train(lambda p: make(p, 1.0), steps=20)
    corrected = net.train(lambda p: make(p, c**exponent), steps=20, loss_scale=c)
    assert max(map(gap, corrected, plain)) < 1e-11
    if exponent:
        uncorrected = net.train(lambda p: make(p, 1.0), steps=20, loss_scale=c)
        assert max(map(gap, uncorrected, plain)) > 1e-2
