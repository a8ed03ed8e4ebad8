"""A step of all parameters does what `step_one` says, for every recipe, shape class and dtype, fused and by parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.matrices import Piece, pieces
from steepest.parts import Decay, Hyper, Momentum, Normalize, Rounding, Spectral, Submatrix, VarianceReduction
from steepest.recipe import Recipe, State
from steepest.step import Parameter, Plan, StepOptions
from support.problems import RECIPES, SHAPES, TOLERANCE, gap, gaussian, refer
from support.slow import slow

HYPER = Hyper(0.02, 0.1, 0.9, 0.95, 1e-6)


@dataclass
class World:
    """Parameters of all shape classes, twice each, with their states and gradients."""

    params: list[Tensor]
    states: list[State]
    pieces: list[tuple[Piece, ...]]
    skipped: Tensor

    @staticmethod
    def of(recipe: Recipe, dtype: torch.dtype, names: Sequence[str] = tuple(SHAPES) * 2) -> World:
        params = [gaussian(*SHAPES[name][0], seed=i, dtype=dtype) for i, name in enumerate(names)]
        states = [recipe.init(p) for p in params]
        read = [pieces(p.shape, **SHAPES[name][1]) for p, name in zip(params, names)]
        return World(params, states, read, torch.zeros((), dtype=torch.int64))

    def grads(self, step: int) -> list[Tensor]:
        return [gaussian(*p.shape, seed=1000 * step + i, dtype=p.dtype) for i, p in enumerate(self.params, 1)]

    def planned(self, recipe: Recipe, hyper: Hyper, grads: list[Tensor], **options: Any) -> Plan:
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g
        parameters = [
            Parameter(p, state, recipe, pieces, 0, i, StepOptions(**options))
            for i, (p, state, pieces) in enumerate(zip(self.params, self.states, self.pieces, strict=True))
        ]
        plan = Plan(parameters, {torch.device("cpu"): self.skipped})
        plan.step([hyper])
        return plan

    def referred(self, recipe: Recipe, hyper: Hyper, grads: list[Tensor]) -> None:
        for i, g in enumerate(grads):
            self.params[i], self.states[i] = refer(recipe, hyper, self.params[i], g, self.states[i], self.pieces[i])


def compare(
    recipe: Recipe, dtype: torch.dtype, tolerance: float, names: Sequence[str] = tuple(SHAPES) * 2, **options: Any
) -> None:
    ours, wanted = World.of(recipe, dtype, names), World.of(recipe, dtype, names)
    for step in range(3):
        grads = ours.grads(step)
        ours.planned(recipe, HYPER, grads, **options)
        wanted.referred(recipe, HYPER, grads)
    for i, (a, b) in enumerate(zip(ours.params, wanted.params)):
        assert gap(a, b) < tolerance, tuple(a.shape)
        for key, value in wanted.states[i].items():
            assert ours.states[i][key].dtype == value.dtype
            assert gap(ours.states[i][key], value) < tolerance, key


DION2 = replace(RECIPES["muon"], momentum=Momentum("error_feedback"), submatrix=Submatrix(0.3))
VARIANTS = {
    **RECIPES,
    "muon, cautious": replace(RECIPES["muon"], decay=Decay(cautious=True)),
    "muadam, cautious": replace(RECIPES["muadam"], decay=Decay(cautious=True)),
    "sgd, cautious": replace(RECIPES["sgd"], decay=Decay(cautious=True)),
    "muadam, dual": replace(RECIPES["muadam"], scale="dual"),
    "muadam_sania, match_rms": replace(RECIPES["muadam_sania"], adjust_lr="match_rms_adamw"),
    "muon, unclamped": replace(RECIPES["muon"], adjust_lr="spectral_unclamped"),
    "muadam, bf16 momentum": replace(RECIPES["muadam"], momentum=Momentum(bias_correction=True, dtype=torch.bfloat16)),
    "muadam, mantissa": replace(RECIPES["muadam"], rounding=Rounding("mantissa")),
    "sign_sgd, original": replace(RECIPES["sign_sgd"], adjust_lr="original"),
    "sign_sgd, dual": replace(RECIPES["sign_sgd"], scale="dual"),
    "adamw, match_rms": replace(RECIPES["adamw"], adjust_lr="match_rms_adamw"),
    "adamw, fp16 momentum": replace(RECIPES["adamw"], momentum=Momentum(bias_correction=True, dtype=torch.float16)),
    "muon, heavy ball": replace(RECIPES["muon"], momentum=Momentum("heavy_ball", nesterov=True)),
    "normuon": replace(RECIPES["muon"], transforms=(Normalize(),)),
    "normuon, rms, cautious": replace(
        RECIPES["muon"], transforms=(Normalize(rms=0.2),), decay=Decay(cautious=True), rounding=Rounding("mantissa")
    ),
    "adamuon": replace(RECIPES["muon"], transforms=(Normalize("elements", rms=0.2),)),
    "muadam, rows": replace(RECIPES["muadam"], transforms=(Normalize(),)),
    "muon, l2": replace(RECIPES["muon"], decay=Decay(method="l2")),
    "muadam, l2": replace(RECIPES["muadam"], decay=Decay(method="l2"), rounding=Rounding("mantissa")),
    "adamw, l2": replace(RECIPES["adamw"], decay=Decay(method="l2")),
    "normuon, l2": replace(RECIPES["muon"], decay=Decay(method="l2"), transforms=(Normalize(),)),
    "dion2": DION2,
    "dion3": replace(DION2, submatrix=Submatrix(0.3, "rows"), transforms=(Normalize(),)),
}


REDUCED = VarianceReduction(0.3)
REDUCING = {
    "muon": replace(RECIPES["muon"], variance_reduction=REDUCED),
    "muadam, l2": replace(RECIPES["muadam"], variance_reduction=REDUCED, decay=Decay(method="l2")),
    "adamw": replace(RECIPES["adamw"], variance_reduction=REDUCED),
    "sign_sgd": replace(RECIPES["sign_sgd"], variance_reduction=REDUCED),
    "normuon": replace(RECIPES["muon"], variance_reduction=REDUCED, transforms=(Normalize(),)),
}

#: "auto" is the fused ops, "torch" the parts.
both_paths = pytest.mark.parametrize("backend", ["auto", "torch"])


#: The fused ops have code for each dtype, of which those of 64 and of 16 bits are at the ends. The parts are torch's
#: operations, which know it by its promotions alone; that both do the same test_executors.py says of every class.
PATHS = [("auto", torch.float64), ("auto", torch.bfloat16), slow("auto", torch.float32)]
PATHS += [slow("torch", dtype) for dtype in TOLERANCE]


@pytest.mark.parametrize("backend, dtype", PATHS, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_plan_agrees_with_step_one(name: str, dtype: torch.dtype, backend: str) -> None:
    # D of SANIA spans four decades here: step_one in fp32 is itself 2e-5 off fp64.
    factor = 10 if name.startswith("muadam_sania") and dtype == torch.float32 else 1
    compare(VARIANTS[name], dtype, factor * TOLERANCE[dtype], backend=backend)


@pytest.mark.parametrize("backend, dtype", PATHS, ids=str)
@pytest.mark.parametrize("name", REDUCING)
def test_plan_agrees_with_step_one_on_gradients_of_less_variance(name: str, dtype: torch.dtype, backend: str) -> None:
    """Those of a fused weight are clipped by the norm of all its pieces, of which `step_one` sees one at a time."""
    whole = [name for name in SHAPES if "split" not in name] * 2
    compare(REDUCING[name], dtype, TOLERANCE[dtype], whole, backend=backend)


def test_no_gradient_is_kept_between_steps() -> None:
    world = World.of(REDUCING["muadam, l2"], torch.float32)
    plan = world.planned(REDUCING["muadam, l2"], HYPER, world.grads(0))
    assert [p for p in plan.parameters if p.corrected is not None or p.step is not None] == []


@pytest.mark.parametrize("preset", ["auto", *map(slow, ("turbo", "jordan"))])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["muon", "muadam"])
@both_paths
def test_plan_agrees_with_step_one_for_the_iterations(backend: str, name: str, dtype: torch.dtype, preset: str) -> None:
    """Stacked or alone, a bf16 iteration differs in its last bits, which three steps of length 0.02 carry over."""
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-3, torch.bfloat16: 2e-2}[dtype]
    compare(replace(RECIPES[name], direction=Spectral(preset)), dtype, tolerance, backend=backend)


@pytest.mark.parametrize("name", ["muon", "muadam", "muadam, cautious", "sgd"])
@both_paths
def test_one_matrix_at_a_time_is_all_at_once(backend: str, name: str) -> None:
    compare(VARIANTS[name], torch.float64, 1e-12, max_workspace_bytes=1, backend=backend)
    small, large = (World.of(VARIANTS[name], torch.float64) for _ in range(2))
    for step in range(3):
        small.planned(VARIANTS[name], HYPER, small.grads(step), max_workspace_bytes=1, backend=backend)
        large.planned(VARIANTS[name], HYPER, large.grads(step), backend=backend)
    assert all(gap(a, b) < 1e-13 for a, b in zip(small.params, large.params))


@pytest.mark.parametrize("shape", ["tall", "conv", "heads", "experts"])
@pytest.mark.parametrize("name", ["muon", "muadam", "sign_sgd"])
@both_paths
def test_stochastic_rounding_is_bit_for_bit_that_of_step_one(backend: str, name: str, shape: str) -> None:
    """`step_one` rounds as the parameter at place 0, so the world has one parameter of one piece."""
    recipe = replace(RECIPES[name], rounding=Rounding("stochastic"))
    ours, wanted = (World.of(recipe, torch.bfloat16, [shape]) for _ in range(2))
    nearest = World.of(RECIPES[name], torch.bfloat16, [shape])
    for step in range(6):
        grads = ours.grads(step)
        ours.planned(recipe, HYPER, grads, backend=backend)
        wanted.referred(recipe, HYPER, grads)
        nearest.planned(RECIPES[name], HYPER, grads, backend=backend)
    assert torch.equal(ours.params[0], wanted.params[0])
    assert not torch.equal(ours.params[0], nearest.params[0])


@pytest.mark.parametrize("backend", ["auto", slow("torch")])
@pytest.mark.parametrize(
    "dtype, rounding",  # which is of bf16 alone
    [*((dtype, "nearest") for dtype in TOLERANCE), (torch.bfloat16, "stochastic"), (torch.bfloat16, "mantissa")],
    ids=str,
)
@pytest.mark.parametrize(
    "name",
    [
        *("adamw", "muon", "muadam", "muadam, cautious", "sgd", "sign_sgd"),
        *("normuon", "adamuon", "muon, l2", "adamw, l2", "dion2", "dion3"),
    ],
)
def test_gradients_that_are_not_finite_are_isolated(name: str, dtype: torch.dtype, rounding: str, backend: str) -> None:
    """Bit for bit unchanged where the gradient is bad, elsewhere as if none were; counted on the device."""
    recipe = replace(VARIANTS[name], rounding=Rounding(rounding))  # type: ignore[arg-type]
    ours, clean = World.of(recipe, dtype), World.of(recipe, dtype)
    for world in (ours, clean):
        world.planned(recipe, HYPER, world.grads(0), backend=backend)
    before = [p.clone() for p in ours.params], [{k: t.clone() for k, t in s.items()} for s in ours.states]
    grads = ours.grads(1)
    clean.planned(recipe, HYPER, [g.clone() for g in grads], backend=backend)
    bad = [i for i, g in enumerate(grads) if g.numel() and i % 3 == 0]
    for i in bad:
        grads[i].view(-1)[-1] = (float("nan"), float("inf"), float("-inf"))[i % 2 + (i > 9)]
    ours.planned(recipe, HYPER, grads, backend=backend)
    assert ours.skipped.item() == len(bad)
    for i, p in enumerate(ours.params):
        same_p, same_state = (before[0][i], before[1][i]) if i in bad else (clean.params[i], clean.states[i])
        assert torch.equal(p, same_p)
        assert all(torch.equal(ours.states[i][key], same_state[key]) for key in same_state)
