"""Where a step lets others in: updates that are remembered, weights that moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import steepest
from steepest.optimizer import MatrixOptimizer
from steepest.optimizer.weights import Weights
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
