"""The two executors of a step agree: the fused ops and torch operations, for every class, whatever a run meets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.ops import backend
from steepest.optimizer import MatrixOptimizer
from support.problems import gap
from support.slow import slow
from support.training import EVERY, both_kinds, give_gradients

pytestmark = pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")

#: Those that the fused ops leave to torch operations; step/program.py says why.
BY_TORCH = (steepest.OrthogonalSGDM, steepest.Fromage)


def run(cls: type[MatrixOptimizer], steps: int = 8, **options: Any) -> tuple[list[nn.Parameter], list[int]]:
    """Parameters that come late, miss steps, have gradients that are not finite, strided or scaled."""
    optimizer, params = both_kinds(cls, torch.float64, **options)
    for step in range(steps):
        give_gradients(params, step)
        for p in params:
            assert p.grad is not None
            p.grad *= 1024
        first, second, third = (p.grad for p in params[:3])
        assert first is not None
        assert third is not None
        params[0].grad = first.t().contiguous().t()
        third[0, 0] = math.inf if step == 5 else third[0, 0]
        params[1].grad = None if step < 3 else second
        if step % 3 == 2:
            params[-1].grad = None
        optimizer.grad_scale = torch.tensor(1024.0)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(float(step == 4))  # type: ignore[attr-defined]
        optimizer.step()
    return params, [int(count) for count in optimizer.skipped_updates().values()]


@pytest.mark.parametrize("options", [{}, slow({"maximize": True, "max_workspace_bytes": 1})], ids=str)
@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
def test_fused_is_eager(cls: type[MatrixOptimizer], options: dict[str, Any]) -> None:
    params, skipped = run(cls, **options)
    wanted, counted = run(cls, backend="torch", **options)
    assert skipped == counted
    assert max(gap(p.detach(), q.detach()) for p, q in zip(params, wanted, strict=True)) < 1e-10


#: Options whose steps go by other gradients than those of the loss; Momo and others refuse some of them.
CORRECTED: list[dict[str, Any]] = [{"weight_decay_method": "l2"}, {"variance_reduction": 0.3}]
CORRECTED += [{"weight_decay_method": "l2", "variance_reduction": 0.3, "maximize": True}]
#: of each executor's way with a recipe one
WAYS = (steepest.Muon, steepest.MuAdam, steepest.Lion, steepest.NorMuon, steepest.SOAP, steepest.MuonMax)


@pytest.mark.parametrize("options", CORRECTED, ids=str)
@pytest.mark.parametrize("cls", WAYS, ids=lambda cls: cls.__name__)
def test_fused_is_eager_by_corrected_gradients(cls: type[MatrixOptimizer], options: dict[str, Any]) -> None:
    test_fused_is_eager(cls, options)
    optimizer, params = both_kinds(cls, **options)
    give_gradients(params, 0)
    assert optimizer.prepare() == {"cpu"}


@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
def test_the_fused_ops_serve_every_recipe(cls: type[MatrixOptimizer]) -> None:
    optimizer, params = both_kinds(cls)
    give_gradients(params, 0)
    assert optimizer.prepare() == ({"cpu", "torch"} if cls in BY_TORCH else {"cpu"})


def test_a_direction_of_the_weight_itself_is_left_to_torch_operations() -> None:
    optimizer, params = both_kinds(steepest.TrustRegion, composite="ridge")
    give_gradients(params, 0)
    assert "torch" in optimizer.prepare()


def test_layers_that_wait_may_do_so_from_a_step_on() -> None:
    """A bound that comes, and goes again, between steps."""
    optimizer, params = both_kinds(steepest.MuonMax)
    plain, others = both_kinds(steepest.MuonMax)
    for step in range(3):
        for some in (params, others):
            give_gradients(some, step)
        optimizer.lower_bound = -1e9 if step == 1 else None  # type: ignore[attr-defined]
        optimizer.step(loss=torch.tensor(3.0))  # type: ignore[call-arg]
        plain.step()

    def distance(p: Tensor, q: Tensor) -> float:
        return gap(p.detach(), q.detach())

    assert max(distance(p, q) for p, q in zip(params, others, strict=True)) < 1e-5
