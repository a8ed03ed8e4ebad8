"""`optimizer.metrics()`: norms that agree with the tensors, without a host read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import steepest
from steepest.ops.chain_numbers import squared_norm_bound
from steepest.optimizer import MatrixOptimizer
from support.training import MATRICES, OPTIMIZERS, both_kinds, copies, give_gradients, train

CPU = torch.device("cpu")
both_paths = pytest.mark.parametrize("backend", ["auto", "torch"])
every_optimizer = pytest.mark.parametrize("cls", OPTIMIZERS[:2])


def norm(tensors: list[Tensor]) -> float:
    return float(torch.cat([t.detach().double().flatten() for t in tensors]).norm())


@every_optimizer
@both_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norms_are_those_of_the_tensors(cls: type[MatrixOptimizer], backend: str, dtype: torch.dtype) -> None:
    """weight_decay = 0, so that the update is what the parameters moved by."""
    optimizer, params = both_kinds(cls, dtype, weight_decay=0.0, adamw_weight_decay=0.0, backend=backend)
    train(optimizer, params, range(2))
    before = copies(params)
    train(optimizer, params, range(2, 3))
    found = optimizer.metrics()
    n = len(MATRICES)
    tight = 1e-5 if dtype == torch.float32 else 1e-12
    for group, (own, key) in enumerate([(slice(0, n), "momentum_buffer"), (slice(n, None), "exp_avg")]):
        moved = [p.detach() - b for p, b in zip(params[own], before[own], strict=True)]
        wanted = {
            "grad_norm": norm([p.grad for p in params[own] if p.grad is not None]),
            "momentum_norm": norm([optimizer.state[p][key] for p in params[own]]),
            "update_norm": norm(moved),
            "param_norm": norm(list(params[own])),
        }
        for name, value in wanted.items():
            assert found[f"{group}/{name}"].dtype == torch.float64
            assert float(found[f"{group}/{name}"]) == pytest.approx(
                value, rel=100 * tight if "update" in name else tight
            )
    assert int(found["skipped/cpu"]) == 0


@both_paths
def test_gradient_norm_is_unscaled_and_leaves_out_what_was_skipped(backend: str) -> None:
    optimizer, params = both_kinds(steepest.MuAdam, backend=backend)
    give_gradients(params, 0)
    wanted = norm([p.grad for p in params[1 : len(MATRICES)] if p.grad is not None])
    for p in params:
        p.grad = None if p.grad is None else 8 * p.grad
    params[0].grad[0, 0] = float("nan")  # type: ignore[index]
    optimizer.grad_scale = torch.tensor(8.0)  # type: ignore[attr-defined]
    optimizer.step()
    found = optimizer.metrics()
    assert float(found["0/grad_norm"]) == pytest.approx(wanted, rel=1e-6)
    assert int(found["skipped/cpu"]) == 1


def test_slack_is_that_of_the_norm_bound() -> None:
    """One number a matrix, as the bound on the first step's input gives it."""
    g = torch.randn(24, 16, generator=torch.Generator().manual_seed(3))
    p = torch.nn.Parameter(torch.zeros_like(g))
    optimizer = steepest.Muon([p], polar="auto", nesterov=False)
    p.grad = g
    optimizer.step()
    bound, trace = squared_norm_bound((g.double().T @ g.double())[None])
    (slack,) = optimizer.metrics()["0/polar_slack"]
    assert float(slack) == pytest.approx(float((trace / bound).sqrt()), rel=0.02)  # bf16 where its products are native
    exact = steepest.Muon([p], polar="svd")
    exact.step()
    assert exact.metrics()["0/polar_slack"].isnan().all()


@every_optimizer
def test_values_do_not_change_afterwards(cls: type[MatrixOptimizer]) -> None:
    optimizer, params = both_kinds(cls)
    assert optimizer.metrics() == {}
    train(optimizer, params, range(1))
    first = optimizer.metrics()
    kept = copies(first.values())
    train(optimizer, params, range(1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.values(), kept, strict=True))


@both_paths
def test_reads_no_value(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = both_kinds(steepest.MuAdam, backend=backend)
    train(optimizer, params, range(1))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("metrics() read a tensor")

    with monkeypatch.context() as patch:
        for name in ("item", "cpu", "tolist", "numpy", "__bool__", "__float__"):
            patch.setattr(Tensor, name, refuse)
        optimizer.metrics()
