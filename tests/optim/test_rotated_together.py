"""Matrices of one shape that calls rotate together in fp32: what each gives by itself, by torch operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.ops import rotated
from steepest.optimizer import MatrixOptimizer
from support.problems import gap
from support.training import copies, noise

pytestmark = pytest.mark.skipif(
    not rotated.supports(torch.zeros(1, 2, 2)), reason="no products are compiled for this processor"
)
#: of one shape some, and others; then those with several matrices in a tensor
SHAPES = ((12, 8), (12, 8), (8, 12), (20, 20), (3, 14, 8), (2, 14, 8))
CASES: list[tuple[type[MatrixOptimizer], dict[str, Any]]] = [
    (steepest.KLShampoo, {}),
    (steepest.KLShampoo, {"parity": "authors"}),
    (steepest.KLShampoo, {"max_preconditioner_dim": 10}),
    (steepest.KLSOAP, {}),
    (steepest.Shampoo, {"inverse_root": "basis"}),
    (steepest.OneSidedShampoo, {"inverse_root": "basis"}),
    (steepest.SPlus, {}),
    (steepest.KLShampoo, {"after": "rows"}),
    (steepest.Shampoo, {"inverse_root": "basis", "norm": "spectral"}),
    (steepest.Shampoo, {"inverse_root": "basis", "shampoo_beta": 1.0}),
]


def trained(cls: type[MatrixOptimizer], **options: Any) -> tuple[list[Tensor], int]:
    params = [nn.Parameter(noise(shape, seed)) for seed, shape in enumerate(SHAPES)]
    groups = [{"params": params[:4]}, {"params": params[4:], "batch_dims": 1}]
    optimizer = cls(groups, lr=0.02, precondition_frequency=3, **options)
    for step in range(8):
        for i, p in enumerate(params):
            # Each of a size of its own, so that no matrix has what belongs to another.
            p.grad = noise(p.shape, 100 * step + i) * 4.0**i
        optimizer.step()
    return copies(params), sum(int(count) for count in optimizer.skipped_updates().values())


@pytest.mark.parametrize(("cls", "options"), CASES, ids=[f"{cls.__name__}-{options}" for cls, options in CASES])
def test_each_has_the_step_that_it_has_alone(
    cls: type[MatrixOptimizer], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("rotate_all", "adam"):
        call = getattr(rotated, name)
        monkeypatch.setattr(rotated, name, lambda *a, call=call, **k: (calls.append(call.__name__), call(*a, **k))[1])
    weights, skipped = trained(cls, **options)
    assert calls
    wanted, counted = trained(cls, backend="torch", **options)
    assert skipped == counted == 0
    assert max(gap(p, q) for p, q in zip(weights, wanted, strict=True)) < 1e-4


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("cls", [steepest.KLShampoo, steepest.KLSOAP])
def test_a_gradient_is_too_large_for_the_factors_of_its_own_matrix(
    cls: type[MatrixOptimizer], backend: str, first: int
) -> None:
    """G R^-1 G^T of entries of 1e15 is finite in fp32 where R has learned from entries of 1e6, not of 1e-6."""
    params = [nn.Parameter(noise((32, 32), seed)) for seed in range(2)]
    optimizer = cls(params, lr=0.01, backend=backend)
    sizes = [1e-6, 1e6] if first == 0 else [1e6, 1e-6]
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = noise(p.shape, 10 * step + i) * sizes[i]
        optimizer.step()
    before, state = copies(params), [{key: t.clone() for key, t in optimizer.state[p].items()} for p in params]
    for p in params:
        p.grad = noise(p.shape, 99) * 1.5e17
    optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(params, before, strict=True)]
    assert moved == [size == 1e6 for size in sizes]
    assert sum(int(count) for count in optimizer.skipped_updates().values()) == 1
    assert all(bool(t.isfinite().all()) for p in params for t in optimizer.state[p].values())
    skipped = params[first]
    changed = [key for key, t in optimizer.state[skipped].items() if not torch.equal(t, state[first][key])]
    assert set(changed) <= {"clock"}
