"""The preconditioner in eigenbases against matrix functions of its factors, and what a refresh does to its state."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.parts import Diagonal, Hyper, Identity, Rotated, Sides
from steepest.parts.precondition import State
from steepest.recipe import ADAMW, step_one
from support.problems import gap, gaussian

HYPER = Hyper(0.1, beta1=0.9, beta2=0.9, eps=1e-3)
COUPLED = Sides(0.5, "average", 0.1, damping="outside", limited=True)
INNER: dict[str, Identity | Diagonal | Sides] = {
    "none": Identity(),
    "diagonal": Diagonal(0.25),
    "shampoo": Sides(0.25),
    "one-sided": Sides(0.5, damping="outside"),
    "kl": COUPLED,
    "kfac": Sides(1.0, damping="factored"),
}
SHAPES = [(2, 5, 4), (1, 4, 6), (3, 4, 4)]
OPTIONS: dict[str, dict[str, Any]] = {"whole": {}, "blocks": {"blocks": True, "max_dim": 3}, "short": {"max_dim": 4}}


def learned(part: Rotated, shape: tuple[int, int, int], steps: int = 6, hyper: Hyper = HYPER) -> State:
    """After a few gradients, refreshed exactly after the first and the last."""
    state = part.init(torch.zeros(shape, dtype=torch.float64))
    for step in range(steps):
        g = gaussian(*shape, seed=step)
        state |= part.observe(state, g, hyper)
        state |= part.update_factors(state, g, hyper)
        if step in (0, steps - 1):
            state |= refreshed(part, [state], exact=True)[0]
    state["exp_avg_sq"] = state.get("exp_avg_sq", torch.zeros(()))
    return state


def refreshed(part: Rotated, states: list[State], *, exact: bool | None = None) -> list[State]:
    """What a refresh of all of these changes in each."""
    found = part.refresh(part.gather(states, exact=exact), states)
    return [part.commit({**state, **own}) for state, own in zip(states, found)]


def function(factor: Tensor, f: Any) -> Tensor:
    values, q = torch.linalg.eigh(factor)
    return q @ torch.diag_embed(f(values.clamp(min=0))) @ q.mT


# ---- the change of variables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", INNER)
def test_into_and_back_are_adjoint(name: str, shape: tuple[int, int, int], options: dict[str, Any]) -> None:
    """<P^-T(Q_L^T x Q_R), d> = <x, Q_L (P^-1 d) Q_R^T>: what makes the direction steepest in the metric."""
    part = Rotated(INNER[name], coupling=COUPLED if name == "kl" else None, **options)
    state, step = learned(part, shape), torch.tensor(6.0)
    x = gaussian(*shape, seed=20)
    y = part.into(state, x, HYPER, step)
    assert y.shape == part.input_shape(shape)
    d = gaussian(*y.shape, seed=21)
    u = part.unblock(part.back(state, d, HYPER, step), *shape[1:])
    assert u.shape == shape
    assert gap((y * d).sum(), (x * u).sum()) < 1e-11


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("exponent", "ridge"), [(0.25, 1e-6), (0.5, 0.0), (1.0, 1e-2)])
def test_added_damping_is_a_power_of_the_factors(shape: tuple[int, int, int], exponent: float, ridge: float) -> None:
    """back(into(x)) = (L + eps + ridge max l)^-e x (R + ...)^-e."""
    part = Rotated(Sides(exponent, ridge=ridge))
    state, x = learned(part, shape), gaussian(*shape, seed=20)
    left, right = (
        function(state[key], lambda v: (v + 1e-3 + ridge * v.amax(-1, keepdim=True)) ** -exponent)
        for key in ("left", "right")
    )
    found = part.back(state, part.into(state, x, HYPER, None), HYPER, None)
    assert gap(found, left @ x @ right) < 1e-10


def test_factored_damping_is_that_of_kfac() -> None:
    part, shape = Rotated(Sides(1.0, damping="factored")), (2, 5, 4)
    state, x = learned(part, shape), gaussian(2, 5, 4, seed=20)
    means = [state[key].diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] for key in ("left", "right")]
    pi = (means[1] / means[0]).sqrt()
    left = torch.linalg.inv(state["left"] + 1e-3**0.5 / pi * torch.eye(5, dtype=torch.float64))
    right = torch.linalg.inv(state["right"] + 1e-3**0.5 * pi * torch.eye(4, dtype=torch.float64))
    assert gap(part.back(state, part.into(state, x, HYPER, None), HYPER, None), left @ x @ right) < 1e-10


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 4, 5), (2, 4, 4)], ids=str)
def test_the_smaller_side_alone(shape: tuple[int, int, int]) -> None:
    part = Rotated(Sides(0.5, damping="outside"), side="smaller")
    state, x = learned(part, shape), gaussian(*shape, seed=20)
    side, other = ("left", "right") if shape[1] <= shape[2] else ("right", "left")
    assert state[other].numel() == state[f"{other}_basis"].numel() == state[f"{other}_values"].numel() == 0
    root = function(state[side], lambda v: 1 / (v.sqrt() + 1e-3))
    wanted = root @ x if side == "left" else x @ root
    assert gap(part.back(state, part.into(state, x, HYPER, None), HYPER, None), wanted) < 1e-10


@pytest.mark.parametrize("beta", [None, 0.5, 0.0, 1.0])
def test_factors_are_averages_of_all_gradients_or_their_sums(beta: float | None) -> None:
    part, shape = Rotated(beta=beta), (2, 5, 4)
    state = learned(part, shape, steps=6)
    rate = HYPER.beta2 if beta is None else beta
    weights = [rate ** (5 - k) for k in range(6)]
    total = 1.0 if rate == 1 else sum(weights)
    grads = [gaussian(*shape, seed=k) for k in range(6)]
    assert gap(state["left"], sum(w / total * g @ g.mT for w, g in zip(weights, grads))) < 1e-13
    assert gap(state["right"], sum(w / total * g.mT @ g for w, g in zip(weights, grads))) < 1e-13
    assert state["learned"] == 6


@pytest.mark.parametrize("damping", ["added", "outside", "factored"])
def test_where_nothing_was_learned_there_is_no_step(damping: Any) -> None:
    """eps alone is no metric: a gradient divided by it would be a leap."""
    for side in ("both", "smaller"):
        part = Rotated(Sides(0.5, damping=damping), side=side)  # type: ignore[arg-type]
        state, x = part.init(gaussian(2, 5, 4)), gaussian(2, 5, 4)
        assert not part.into(state, x, HYPER, None).any()
        state |= part.update_factors(state, torch.stack([x[0], torch.zeros(5, 4)]), HYPER)
        state |= refreshed(part, [state])[0]
        found = part.into(state, x, HYPER, None)
        assert found[0].any()
        assert not found[1].any()


@pytest.mark.parametrize("eps", [0.0, 1e-12])
def test_directions_of_no_gradient_are_finite(eps: float) -> None:
    """Rank one, in fp32: what lies beside it is 0/0 = 0 with eps = 0, and rounding over the damping otherwise."""
    for name, inner in INNER.items():
        part, hyper = Rotated(inner, coupling=COUPLED if name == "kl" else None), replace(HYPER, eps=eps)
        g = (gaussian(1, 6, 1) @ gaussian(1, 1, 5)).float()
        state = part.init(g)
        for _ in range(3):
            state |= part.observe(state, g, hyper)
            state |= part.update_factors(state, g, hyper)
            state |= refreshed(part, [state], exact=True)[0]
        assert (
            part.back(state, part.into(state, g, hyper, torch.tensor(3.0)), hyper, torch.tensor(3.0)).isfinite().all()
        )


# ---- blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "diagonal", "shampoo", "kfac"])
def test_blocks_are_matrices_of_their_own(name: str) -> None:
    part, shape = Rotated(INNER[name], blocks=True, max_dim=4), (2, 8, 6)
    state, x, step = learned(part, shape), gaussian(2, 8, 6, seed=20), torch.tensor(6.0)
    found = part.unblock(part.back(state, part.into(state, x, HYPER, step), HYPER, step), 8, 6)
    alone = Rotated(INNER[name])
    for i in (0, 4):
        for j in (0, 3):
            own = alone.init(torch.zeros(2, 4, 3, dtype=torch.float64))
            for k in range(6):
                g = gaussian(*shape, seed=k)[:, i : i + 4, j : j + 3]
                own |= alone.observe(own, g, HYPER)
                own |= alone.update_factors(own, g, HYPER)
                own |= refreshed(alone, [own], exact=True)[0] if k in (0, 5) else {}
            block = alone.into(own, x[:, i : i + 4, j : j + 3], HYPER, step)
            assert gap(found[:, i : i + 4, j : j + 3], alone.back(own, block, HYPER, step)) < 1e-10


def test_zeros_that_fill_a_block_change_no_power_of_a_factor() -> None:
    """(1, 7, 5) in blocks of (4, 3): the last rows and columns are of (3, 2) gradients."""
    part, x = Rotated(Sides(0.25), blocks=True, max_dim=4), gaussian(1, 7, 5, seed=20)
    state = learned(part, (1, 7, 5))
    found = part.unblock(part.back(state, part.into(state, x, HYPER, None), HYPER, None), 7, 5)[:, 4:, 3:]
    own = Rotated(Sides(0.25)).init(torch.zeros(1, 3, 2, dtype=torch.float64))
    for k in range(6):
        own |= Rotated().update_factors(own, gaussian(1, 7, 5, seed=k)[:, 4:, 3:], HYPER)
    left, right = (
        function(own[key], lambda v: (v + 1e-3 + 1e-6 * v.amax(-1, keepdim=True)) ** -0.25) for key in ("left", "right")
    )
    assert gap(found, left @ x[:, 4:, 3:] @ right) < 1e-10


# ---- refreshes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["qr", "eigh"])
def test_what_lives_in_slots_follows_its_columns(method: Any) -> None:
    """Columns that are sorted take their second moments and values along: nothing in the metric moves."""
    part = Rotated(Diagonal(0.25), coupling=COUPLED, method=method)
    q = [torch.linalg.qr(gaussian(2, n, n, seed=n)).Q for n in (5, 4)]
    values = [torch.linspace(1, 3, n, dtype=torch.float64).expand(2, n) for n in (5, 4)]
    state = part.init(torch.zeros(2, 5, 4, dtype=torch.float64))
    for i, side in enumerate(("left", "right")):
        state[f"{side}_basis"], state[f"{side}_values"] = q[i], values[i] + i
        exact = torch.linalg.qr(q[i] + 1e-8 * gaussian(*q[i].shape, seed=40)).Q
        exact = exact * (exact * q[i]).sum(-2, keepdim=True).sign()
        state[side] = exact @ torch.diag_embed(values[i]) @ exact.mT  # only the order of the basis is wrong
    state["exp_avg_sq"] = gaussian(2, 5, 4, seed=1).square()
    fresh = state | refreshed(part, [state])[0]
    assert torch.equal(fresh["left_values"], values[0].flip(-1))
    assert torch.equal(fresh["right_values"], values[1].flip(-1) + 1)
    assert torch.equal(fresh["exp_avg_sq"], state["exp_avg_sq"].flip(-1, -2))
    x, step = gaussian(2, 5, 4, seed=2), torch.tensor(3.0)
    before, after = (part.back(s, part.into(s, x, HYPER, step), HYPER, step) for s in (state, fresh))
    assert gap(after, before) < 1e-6


def test_hadamard_transport_is_the_mean_of_a_rotated_variance() -> None:
    """E[(R_L^T X R_R)^2] of entries X that are independent with variances v; the sum stays."""
    part = Rotated(Diagonal(0.25), coupling=COUPLED, transport="hadamard", method="eigh")
    state = learned(part, (2, 5, 4))
    for k in range(6, 9):
        state |= part.update_factors(state, gaussian(2, 5, 4, seed=k), HYPER)
    v = state["exp_avg_sq"]
    fresh = state | refreshed(part, [state])[0]
    turns = [state[key].mT @ fresh[key] for key in ("left_basis", "right_basis")]
    wanted = torch.einsum("bki,bkl,blj->bij", turns[0].square(), v, turns[1].square())
    assert gap(fresh["exp_avg_sq"], wanted) < 1e-12
    assert gap(fresh["exp_avg_sq"].sum(), v.sum()) < 1e-12
    for turn, key in zip(turns, ("left_values", "right_values")):
        assert gap(fresh[key], torch.einsum("bki,bk->bi", turn.square(), state[key])) < 1e-12


@pytest.mark.parametrize("method", ["qr_sorted", "eigh"])
def test_fixed_transport_leaves_averages_in_their_places(method: Any) -> None:
    part = Rotated(Diagonal(0.25), transport="fixed", method=method)
    state = learned(part, (2, 5, 4))
    v = state["exp_avg_sq"] = gaussian(2, 5, 4, seed=1).square()
    for side in ("left", "right"):
        state[f"{side}_basis"] = state[f"{side}_basis"].flip(-1)
    fresh = state | refreshed(part, [state])[0]
    assert torch.equal(fresh["exp_avg_sq"], v)
    assert not torch.equal(fresh["left_basis"], state["left_basis"])


def test_a_refresh_of_several_is_that_of_each() -> None:
    part = Rotated(Sides(0.25), method="eigh")
    states = [learned(part, shape) for shape in SHAPES]
    for state, shape in zip(states, SHAPES):
        state |= part.update_factors(state, gaussian(*shape, seed=30), HYPER)
    for state, together in zip(states, refreshed(part, states)):
        (alone,) = refreshed(part, [state])
        assert together.keys() == alone.keys()
        assert all(gap(together[key], t) < 1e-12 for key, t in alone.items())


def test_nothing_given_is_changed() -> None:
    part = Rotated(Diagonal(0.25), coupling=COUPLED)
    state, g, step = learned(part, (2, 5, 4)), gaussian(2, 5, 4, seed=9), torch.tensor(6.0)
    kept, own = {key: t.clone() for key, t in state.items()}, g.clone()
    part.observe(state, g, HYPER)
    part.update_factors(state, g, HYPER)
    refreshed(part, [state])
    part.back(state, part.into(state, g, HYPER, step), HYPER, step)
    assert torch.equal(g, own)
    assert all(torch.equal(state[key], t) for key, t in kept.items())


# ---- in a recipe ----------------------------------------------------------------------------------------------------


def test_in_the_identity_bases_it_is_its_inner_part() -> None:
    recipe = replace(ADAMW, precondition=Rotated(ADAMW.precondition, first="identity", every=100, exact=0, method="jr"))
    recipe = replace(recipe, precondition=replace(recipe.precondition, external=True))  # factors stay 0, bases I
    w, hyper = gaussian(1, 5, 4), Hyper(0.02, 0.1, 0.9, 0.95, 1e-6)
    ours, theirs, states = w, w, [recipe.init(w), ADAMW.init(w)]
    for step in range(10):
        g = gaussian(1, 5, 4, seed=step)
        ours, states[0] = step_one(recipe, ours, g, states[0], hyper)
        theirs, states[1] = step_one(ADAMW, theirs, g, states[1], hyper)
    assert gap(ours, theirs) < 1e-14


PHASES = {
    # (first, current): does step 1, 2 and 3 of every=2  learn before, step, learn after, refresh
    ("learn", False): ["bs r", " sar", " sa "],
    ("learn", True): ["bs r", "bs r", "bs  "],
    ("identity", False): [" sar", " sar", " sa "],
    ("skip", False): ["  ar", " sa ", " sar"],
}


@pytest.mark.parametrize(("first", "current"), PHASES)
def test_phases(first: Any, current: bool) -> None:
    part = Rotated(first=first, update_first=current, every=2)
    for clock, wanted in enumerate(PHASES[first, current]):
        phase = part.phase(clock)
        flags = (phase.before, phase.steps, phase.after, phase.refreshes)
        assert "".join(letter if flag else " " for letter, flag in zip("bsar", flags)) == wanted


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("first", ["learn", "identity", "skip"])
@pytest.mark.parametrize("exact", [0, 1, 3])
def test_so_many_of_the_first_refreshes_are_exact(first: Any, every: int, exact: int) -> None:
    phases = map(Rotated(first=first, every=every, exact=exact).phase, range(30))
    kinds = [bool(phase.exact) for phase in phases if phase.refreshes]
    assert kinds == [i < exact for i in range(len(kinds))]


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "beta": (Rotated, {"beta": 1.1}, "beta of the factors should be in [0, 1] but is: 1.1"),
    "coupled sums": (Rotated, {"beta": 1.0, "coupling": COUPLED}, "of coupled factors should be below 1"),
    "every": (Rotated, {"every": 0}, "every should be a whole number of at least 1 but is: 0"),
    "max_dim": (Rotated, {"max_dim": 2.5}, "max_dim should be a whole number of at least 1 but is: 2.5"),
    "exact": (Rotated, {"exact": -1}, "exact should be a whole number of at least 0 but is: -1"),
    "method": (Rotated, {"method": "svd"}, "method 'svd' is not known; use one of auto, jr, qr, eigh"),
    "side": (Rotated, {"side": "left"}, "side 'left' is not known; use 'both' or 'smaller'"),
    "first": (Rotated, {"first": "adam"}, "first 'adam' is not known"),
    "transport": (Rotated, {"transport": "none"}, "transport 'none' is not known"),
    "exponent": (Sides, {"exponent": 0.0}, "exponent should be in (0, 1] but is: 0.0"),
    "damping": (Sides, {"damping": "none"}, "damping 'none' is not known"),
    "values": (Sides, {"values": "new"}, "values 'new' is not known"),
    "ridge": (Sides, {"ridge": -1.0}, "ridge and initial should be >= 0 but are: -1.0 and 0.0"),
}


@pytest.mark.parametrize(("part", "options", "text"), WRONG.values(), ids=WRONG)
def test_unsuitable_values_are_named(part: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        part(**options)
