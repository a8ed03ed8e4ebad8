"""Where a step lets others in: updates that are remembered, weights that moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.optimizer import MatrixOptimizer
from steepest.optimizer.group_options import Group
from steepest.optimizer.weights import Weights
from steepest.parts import Hyper, UpdateTransform
from steepest.parts.precondition import State
from steepest.recipe import Recipe
from steepest.state_layout import StateSpec
from support.problems import gap, gaussian, polar_by_svd
from support.training import (
    KRONECKER,
    all_same_bits,
    both_kinds,
    copies,
    give_gradients,
    made,
    parameters,
    same_states,
    state_copies,
    train,
)

both_backends = pytest.mark.parametrize("backend", ["auto", "torch"])
KINDS: tuple[type[MatrixOptimizer], ...] = (steepest.Muon, steepest.MuAdam, steepest.MuonMax, *KRONECKER)
every_kind = pytest.mark.parametrize("cls", KINDS, ids=lambda cls: cls.__name__)


# ---- (a) a new method: an update that is remembered ----------------------------------------------------------------


@dataclass(frozen=True)
class RowsOfOneSize(UpdateTransform):
    """Rows divided by a running root mean square of each, all together of rms 0.2 (NorMuon, arXiv:2510.05491)."""

    beta: float = 0.95

    @property
    def specs(self) -> tuple[StateSpec, ...]:
        return (StateSpec("row_second_moment", "row"),)

    def apply(self, state: State, u: Tensor, m: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
        u = u.to(state["row_second_moment"].dtype)
        v = self.beta * state["row_second_moment"] + (1 - self.beta) * u.square().mean(-1)
        u = u / (v.sqrt() + 1e-8).unsqueeze(-1)
        length = torch.linalg.vector_norm(u, dim=(-2, -1), keepdim=True)
        return u * (0.2 * (u.shape[-2] * u.shape[-1]) ** 0.5 / length), {"row_second_moment": v}


class ToyNorMuon(steepest.Muon):
    """Muon whose update goes through `RowsOfOneSize`."""

    def recipe(self, group: Group) -> Recipe:
        recipe = super().recipe(group)
        values = {name: getattr(recipe, name) for name in ("momentum", "direction", "decay", "rounding")}
        return Recipe(**values, transforms=(RowsOfOneSize(),))


def normuon(w: Tensor, gradients: Sequence[Tensor], lr: float, decay: float) -> Tensor:
    """Algorithm 1 of arXiv:2510.05491 with Muon's momentum (0.95, averages, no Nesterov), in fp64."""
    m, v = torch.zeros_like(w), torch.zeros(len(w), dtype=w.dtype)
    for g in gradients:
        m = 0.95 * m + 0.05 * g
        o = polar_by_svd(m)
        v = 0.95 * v + 0.05 * (o * o).sum(1) / o.shape[1]
        o = o / (v[:, None].sqrt() + 1e-8)
        w = w - lr * decay * w - lr * 0.2 * (o.numel() ** 0.5) / (o * o).sum().sqrt() * o
    return w


@both_backends
def test_a_new_method_is_a_part_and_a_recipe(backend: str) -> None:
    """Of plain, split and stacked weights: rows of a matrix have a number each, whatever they are part of."""
    shapes: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
        "plain": ((7, 5), {}),
        "split": ((9, 4), {"split_sizes": (4, 3, 2)}),
        "heads": ((6, 5), {"num_heads": 2}),
        "experts": ((3, 4, 5), {"batch_dims": 1}),
    }
    params = [nn.Parameter(gaussian(*shape, seed=i)) for i, (shape, _) in enumerate(shapes.values())]
    groups = [{"params": [p], "use_muon": True, **how} for p, (_, how) in zip(params, shapes.values(), strict=True)]
    options = {"lr": 0.02, "weight_decay": 0.1, "nesterov": False, "polar": "svd", "backend": backend}
    optimizer = ToyNorMuon(groups, **options)
    starts = copies(params)
    for step in range(6):
        give_gradients(params, step)
        optimizer.step()
    cuts = ([(0, 7)], [(0, 4), (4, 3), (7, 2)], [(0, 3), (3, 3)], [(0, 4)])
    for i, (p, start, rows) in enumerate(zip(params, starts, cuts, strict=True)):
        gradients = [_gradient(params, step, i) for step in range(6)]
        for b in range(p.shape[0] if p.ndim == 3 else 1):
            w, now, gs = (start[b], p[b], [g[b] for g in gradients]) if p.ndim == 3 else (start, p, gradients)
            for first, count in rows:
                some = slice(first, first + count)
                wanted = normuon(w[some], [g[some] for g in gs], 0.02, 0.1)
                assert gap(now.detach()[some], wanted) < 1e-11
    assert [tuple(optimizer.state[p]["row_second_moment"].shape) for p in params] == [(7,), (9,), (6,), (12,)]


def _gradient(params: Sequence[Tensor], step: int, i: int) -> Tensor:
    others = [nn.Parameter(p.detach().clone()) for p in params]
    give_gradients(others, step)
    gradient = others[i].grad
    assert gradient is not None
    return gradient


@both_backends
def test_a_new_method_resumes_and_leaves_out_bad_gradients(backend: str) -> None:
    optimizer, params = both_kinds(ToyNorMuon, backend=backend)
    train(optimizer, params, range(3))
    copy, others = both_kinds(ToyNorMuon, backend=backend)
    copy.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    train(optimizer, params, range(3, 6))
    train(copy, others, range(3, 6))
    assert all_same_bits(params, others)
    assert same_states(state_copies(optimizer), state_copies(copy))
    before = copies(params), state_copies(optimizer)
    give_gradients(params, 9)
    for p in params:
        assert p.grad is not None
        p.grad.view(-1)[0] = float("nan")
    optimizer.step()
    assert all_same_bits(params, before[0])
    assert same_states(state_copies(optimizer), before[1])


def test_a_new_method_goes_by_the_fused_ops() -> None:
    optimizer, params = both_kinds(ToyNorMuon)
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
