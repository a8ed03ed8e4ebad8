"""Where a step lets others in: updates that are remembered, weights that moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import steepest
from steepest.optimizer import MatrixOptimizer
from steepest.optimizer.weights import Weights
from steepest.parts import Hyper, Momentum, Spectral, UpdateTransform
from steepest.recipe import Recipe
from steepest.state_layout import StateSpec
from steepest.zoo.shared import defaults_of, recipe_of
from support.training import (
    all_same_bits,
    both_backends,
    both_kinds,
    check_resume_and_bad_gradients,
    give_gradients,
    made,
    name_of,
    parameters,
)

# ---- (a) an update that is remembered ------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("cls", [steepest.NorMuon, steepest.AdaMuon, steepest.NAMO], ids=name_of)
def test_a_transform_resumes_and_leaves_out_bad_gradients(cls: type[MatrixOptimizer], backend: str) -> None:
    check_resume_and_bad_gradients(lambda: both_kinds(cls, backend=backend))


def test_a_transform_goes_by_the_fused_ops() -> None:
    optimizer, params = both_kinds(steepest.NorMuon)
    give_gradients(params, 0)
    assert optimizer.prepare() == steepest.MuAdam(params).prepare()


# ---- what a stranger writes: a part and a class ---------------------------------------------------------------------


@dataclass(frozen=True)
class RowScales(UpdateTransform):
    """NorMuon's rows, as CONTRIBUTING.md has a newcomer write them: v <- b v + (1 - b) mean_j u_ij^2; u / sqrt(v)."""

    @property
    def specs(self) -> tuple[StateSpec, ...]:
        return (StateSpec("row_scales", "row"),)

    def apply(self, state: dict[str, Tensor], u: Tensor, m: Tensor, hyper: Hyper) -> tuple[Tensor, dict[str, Tensor]]:
        v = hyper.beta2 * state["row_scales"] + (1 - hyper.beta2) * u.square().mean(-1).to(state["row_scales"].dtype)
        rows = u / v.sqrt().clamp_min(1e-20).unsqueeze(-1).to(u.dtype)
        return rows * (u.norm(dim=(-2, -1)) / rows.norm(dim=(-2, -1)))[:, None, None].nan_to_num(), {"row_scales": v}


class Newcomer(MatrixOptimizer):
    """A class outside of the package: signature, recipe, numbers."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0, **extra: Any) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, "adjust_lr_fn": None}
        super().__init__(params, *defaults_of(type(self).__name__, options, extra))

    def recipe(self, group: dict[str, Any]) -> Recipe:
        return recipe_of(group, ratio="none", momentum=Momentum(), direction=Spectral("svd"), transforms=(RowScales(),))

    def hyper(self, group: dict[str, Any]) -> Hyper:
        return Hyper(group["lr"], group["weight_decay"], 0.9, 0.8)


def test_a_newcomers_optimizer_is_its_equation() -> None:
    """Of a matrix and of the matrices of a split parameter, in fp64."""
    p = parameters([(9, 4)], torch.float64)[0]
    optimizer = Newcomer([{"params": [p], "split_sizes": (4, 5)}], weight_decay=0.1)
    w = [t.clone() for t in p.detach().split((4, 5))]
    m, v = [torch.zeros_like(t) for t in w], [t.new_zeros(len(t)) for t in w]
    for step in range(20):
        give_gradients([p], step)
        assert p.grad is not None
        for k, g in enumerate(p.grad.split((4, 5))):
            m[k] = 0.9 * m[k] + 0.1 * g
            u, _, vh = torch.linalg.svd(m[k], full_matrices=False)
            o = u @ vh
            for row in range(len(o)):
                v[k][row] = 0.8 * v[k][row] + 0.2 * sum(float(x) ** 2 for x in o[row]) / len(o[row])
            scaled = torch.stack([o[row] / v[k][row] ** 0.5 for row in range(len(o))])
            w[k] = (1 - 0.1 * 0.1) * w[k] - 0.1 * scaled * (o.norm() / scaled.norm())
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.cat(w), rtol=0, atol=1e-10)


@both_backends
def test_a_newcomers_optimizer_has_what_all_have(backend: str) -> None:
    """Checkpoints, bad gradients, AdamW beside it and the fused ops, without a line about any of them."""
    check_resume_and_bad_gradients(lambda: both_kinds(Newcomer, backend=backend))
    optimizer, params = both_kinds(Newcomer)
    give_gradients(params, 0)
    assert optimizer.prepare() == steepest.MuAdam(params).prepare()


# ---- (b) weights that moved ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"keep_mantissa": True}, {"stochastic_rounding": True}], ids=str)
@both_backends
def test_a_hook_sees_and_stores_weights_as_they_are(backend: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Halving in the hook is halving the true weight: with keep_mantissa to the last bit of fp32."""
    optimizer, params = both_kinds(steepest.Muon, dtype, backend=backend, **options)
    plain, others = both_kinds(steepest.Muon, dtype, backend=backend, **options)
    seen: list[Tensor] = []

    def halve(weights: Weights) -> None:
        assert params[0] in weights
        assert params[-1] not in weights
        seen.append(weights.value(params[0]).clone())
        weights.store(params[0], weights.value(params[0]) / 2)

    handle = optimizer.register_weight_hook(halve)
    for each, some in ((optimizer, params), (plain, others)):
        give_gradients(some[:-1], 0)
        each.step()
    recipe = plain.recipe(plain.param_groups[0])
    true = recipe.rounding.value(others[0], plain.state[others[0]])
    assert torch.equal(seen[0], true)
    after = recipe.rounding.value(params[0], optimizer.state[params[0]])
    tolerance = 0 if dtype is torch.float32 or options.get("keep_mantissa") else 2**-7
    torch.testing.assert_close(after.detach(), true.detach() / 2, rtol=tolerance, atol=0)
    assert all_same_bits(params[1:-1], others[1:-1])
    handle.remove()
    give_gradients(params[:-1], 1)
    optimizer.step()
    assert len(seen) == 1


@pytest.mark.slow
def test_a_hook_runs_in_a_compiled_step() -> None:
    params = parameters([(8, 5), (7,)])
    optimizer = made(steepest.MuAdam, [{"params": params[:1]}, {"params": params[1:], "use_muon": False}], lr=0.02)
    optimizer.register_weight_hook(lambda weights: weights.store(params[0], weights.value(params[0]).clamp(-0.5, 0.5)))
    give_gradients(params, 0)
    optimizer.step()
    compiled = torch.compile(optimizer.step, backend="eager")
    for step in range(1, 3):
        give_gradients(params, step)
        compiled()
        assert params[0].abs().max() <= 0.5
