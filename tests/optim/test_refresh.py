"""Matrices that a refresh got no hold of: the next one solves them exactly, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import steepest
from steepest.linalg.basis import ACCEPTED, FELL_BACK, WANTS_EXACT, Refreshed, eigh_refresh
from steepest.parts import Rotated, Sides
from steepest.parts.precondition import rotated
from steepest.zoo.kronecker import KroneckerOptimizer
from support.eigenvalues import FLOOR, whitening
from support.problems import gap, gaussian
from support.training import KRONECKER

every_class = pytest.mark.parametrize("cls", KRONECKER)
Maker = type[KroneckerOptimizer]

# ---- matrices that want an exact solver -----------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tensor]]:
    """(method, factors) of every refresh from now on, as on a GPU, where "auto" does not read the device."""
    seen: list[tuple[str, Tensor]] = []

    def watched(p: Tensor, q: Tensor, *, method: Any) -> Refreshed:
        seen.append((method, p))
        return eigh_refresh(p, q, method=method, exact=False)

    monkeypatch.setattr(rotated, "_tracks", lambda device: False)
    monkeypatch.setattr(rotated, "eigh_refresh", watched)
    return seen


def flag(monkeypatch: pytest.MonkeyPatch, unsure: Callable[[Tensor], bool]) -> None:
    """Every refresh but an exact one wants an exact solver for the factors that this says."""
    refresh = rotated.eigh_refresh

    def flagged(p: Tensor, q: Tensor, *, method: Any) -> Refreshed:
        found = refresh(p, q, method=method)
        wish = torch.tensor([WANTS_EXACT if method != "eigh" and unsure(matrix) else 0 for matrix in p])
        return found._replace(status=found.status & ~WANTS_EXACT | wish.int())

    monkeypatch.setattr(rotated, "eigh_refresh", flagged)


def gradients_of(step: int, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Those of expert 1 and of the last matrix are ten times as long."""
    found = [gaussian(*shape, seed=100 * step + i) for i, shape in enumerate(shapes)]
    found[0][1] *= 10
    found[-1] *= 10
    return found


SHAPES: list[tuple[int, ...]] = [(3, 6, 6), (6, 6), (6, 6)]


def optimizer_of(cls: Maker = steepest.SOAP, **options: Any) -> tuple[KroneckerOptimizer, list[torch.nn.Parameter]]:
    params = [torch.nn.Parameter(gaussian(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    groups = [{"params": params[:1], "batch_dims": 1}, {"params": params[1:]}]
    return cls(groups, precondition_frequency=2, **options), params


def test_what_a_refresh_got_no_hold_of_is_solved_exactly_in_the_next(
    asked: list[tuple[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    flag(monkeypatch, lambda p: bool(p.trace() > 500))
    optimizer, params = optimizer_of()
    calls = []
    for step in range(9):
        for p, g in zip(params, gradients_of(step, SHAPES)):
            p.grad = g
        asked.clear()
        optimizer.step()
        calls.append([(method, len(p)) for method, p in asked])
        for method, factors in asked:
            if method == "eigh" and step:
                assert all(p.trace() > 500 for p in factors)  # those and no others
    jr, split = [("auto", 6), ("auto", 4)], [("eigh", 2), ("auto", 4), ("eigh", 2), ("auto", 2)]
    assert calls[0] == [("eigh", 6), ("eigh", 4)]
    assert calls[2::2] == [jr, split, jr, split]
    assert not any(calls[1::2])


@pytest.mark.parametrize("method", ["jr", "qr"])
def test_a_method_that_was_chosen_is_kept_to(
    method: str, asked: list[tuple[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    flag(monkeypatch, lambda p: True)
    optimizer, params = optimizer_of(refresh=method)
    for step in range(7):
        for p, g in zip(params, gradients_of(step, SHAPES)):
            p.grad = g
        optimizer.step()
    assert [method for method, _ in asked] == ["eigh"] * 2 + [method] * 6


def test_both_ways_together_are_each_by_itself(asked: list[tuple[str, Tensor]]) -> None:
    """Every matrix gets its own result back."""
    part = Rotated(Sides(0.25))
    state = part.init(torch.zeros(5, 4, 3, dtype=torch.float64))
    for step in range(3):
        state |= part.update_factors(state, gaussian(5, 4, 3, seed=step), steepest.parts.Hyper(0.1))
    flags = [False, True, True, False, True]
    state["left_status"] = torch.tensor(flags).int() * WANTS_EXACT | FELL_BACK | ACCEPTED
    (found,) = part.refresh(part.gather([state]), [state])
    for i, flagged in enumerate(flags):
        method = "eigh" if flagged else "auto"
        one = eigh_refresh(state["left"][i], state["left_basis"][i], method=method, exact=False)
        for key, t in (("left_next", one.basis), ("left_order", one.order), ("left_status", one.status)):
            assert gap(found[key][i], t) < 1e-12
    assert torch.equal(found["right_next"], eigh_refresh(state["right"], state["right_basis"], exact=False).basis)


def test_a_gradient_that_is_not_finite_takes_no_wish_away(
    asked: list[tuple[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    flag(monkeypatch, lambda p: True)
    optimizer, params = optimizer_of()
    for step in range(7):
        for p, g in zip(params, gradients_of(step, SHAPES)):
            p.grad = g * (float("nan") if step == 4 and p is params[1] else 1.0)
        asked.clear()
        optimizer.step()
    # At step 2 all of them asked for it, at step 4 all but one had it.
    assert [(method, len(p)) for method, p in asked] == [("auto", 6), ("eigh", 2), ("auto", 2)]


def test_a_wish_survives_a_checkpoint(asked: list[tuple[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    flag(monkeypatch, lambda p: bool(p.trace() > 500))
    optimizer, params = optimizer_of()
    for step in range(3):
        for p, g in zip(params, gradients_of(step, SHAPES)):
            p.grad = g
        optimizer.step()
    other, copies = optimizer_of()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [bool(bits & WANTS_EXACT) for bits in other.state[copies[0]]["left_status"]] == [False, True, False]
    for step in range(3, 5):
        for p, g in zip(copies, gradients_of(step, SHAPES)):
            p.grad = g
        asked.clear()
        other.step()
    assert [method for method, _ in asked] == ["eigh", "auto", "eigh", "auto"]


def test_gradients_of_rank_one_as_on_a_gpu(asked: list[tuple[str, Tensor]]) -> None:
    """Rotations get no hold of a null space that fills up: the exact solver does, one refresh later."""
    p = torch.nn.Parameter(gaussian(8, 8).float())
    optimizer = steepest.SOAP([p], precondition_frequency=1)
    for step in range(12):
        p.grad = (gaussian(8, 1, seed=step) @ gaussian(1, 8, seed=50 + step)).float()
        optimizer.step()
    methods = [method for method, _ in asked[1:]]
    assert "eigh" in methods[1:]
    assert "auto" in methods
    state = optimizer.state[p]
    pairs = zip(state["left"].view(-1, 8, 8), state["left_basis"].view(-1, 8, 8), strict=True)
    assert all(whitening(P, Q, FLOOR) < 0.3 for P, Q in pairs)
