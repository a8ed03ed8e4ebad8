"""A step's memory: beyond parameters, gradients and state it holds one chunk's workspace, not the model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import steepest
from steepest.chunking import default_workspace
from steepest.optimizer import MatrixOptimizer
from steepest.tools.bench.counting import Peak
from support.training import KRONECKER, OPTIMIZERS, all_same_bits, give_gradients, parameters, train

SIDE, COUNT = 64, 16
MATRIX_BYTES = SIDE * SIDE * 4  # fp32


def peak_of_a_step(cls: type[MatrixOptimizer], count: int, **options: Any) -> int:
    params = parameters([(SIDE, SIDE)] * count)
    optimizer = cls(params, **options)
    give_gradients(params, 0)
    optimizer.init_state()
    optimizer.step()
    with Peak() as peak:
        optimizer.step()
    return peak.peak


def test_the_meter_sees_what_is_alive() -> None:
    x = torch.ones(1000)
    with Peak() as peak:
        y = x + 1
        del y
        (x * 2).add_(1).view(10, 100)
    assert peak.peak == 4000


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_one_chunk_at_a_time(cls: type[MatrixOptimizer]) -> None:
    """With room for one matrix a chunk, sixteen matrices need no more than one does, but for a few scalars each."""
    alone = peak_of_a_step(cls, 1, max_workspace_bytes=1)
    many = peak_of_a_step(cls, COUNT, max_workspace_bytes=1)
    assert many <= alone + COUNT * 256 + MATRIX_BYTES


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_the_bound_is_respected(cls: type[MatrixOptimizer]) -> None:
    """Square matrices are the worst case: the products of the iteration are as large as its input."""
    bound = 10 * MATRIX_BYTES
    assert peak_of_a_step(cls, COUNT, max_workspace_bytes=bound) <= 2 * bound
    assert peak_of_a_step(cls, COUNT, max_workspace_bytes=bound) < peak_of_a_step(cls, COUNT)


def test_nobody_asks_for_all_matrices_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    bits = []
    for options in ({}, {"max_workspace_bytes": 1 << 30}):
        params = parameters([(512, 512)] * 48)
        optimizer = steepest.Muon(params, **options)
        train(optimizer, params, range(1))
        give_gradients(params, 1)
        with Peak() as peak:
            optimizer.step()
        bits.append(params)
        if not options:
            assert peak.peak <= 1 << 25
    assert peak.peak > 1 << 25
    assert all_same_bits(*bits)


@pytest.mark.parametrize(
    ("device", "threads", "shared", "room"),
    [("cpu", 1, False, 1 << 25), ("cpu", 3, False, 3 << 25), ("cpu", 96, False, 1 << 30)]
    + [("cpu", 1, True, 1 << 30), ("cuda", 1, False, 1 << 30)],
)
def test_what_a_step_borrows_where_nobody_says_it(
    monkeypatch: pytest.MonkeyPatch, device: str, threads: int, shared: bool, room: int
) -> None:
    """Ranks may have other numbers of threads, and cut what they share alike."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert default_workspace(torch.device(device), shared=shared) == room


# Every class, and every way to refresh for one of them: how bases are refreshed knows nothing of the class.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "refresh"), [*((cls, "eigh") for cls in KRONECKER), (KRONECKER[0], "jr"), (KRONECKER[0], "qr")]
)
def test_refreshes_share_the_bound(cls: type[MatrixOptimizer], refresh: str) -> None:
    """All matrices are due in every step; two factors of each."""
    options: dict[str, Any] = {"precondition_frequency": 1, "refresh": refresh, "exact_refreshes": 0}
    bound = 60 * MATRIX_BYTES
    assert peak_of_a_step(cls, COUNT, max_workspace_bytes=bound, **options) <= 1.5 * bound
    assert peak_of_a_step(cls, COUNT, **options) > 2 * bound


@pytest.mark.parametrize("cls", KRONECKER)
def test_refreshes_in_parts_are_the_refreshes(cls: type[MatrixOptimizer]) -> None:
    found = []
    for bound in (1, 1 << 30):
        params = parameters([(12, 8)] * 5 + [(8, 8)])
        optimizer = cls(params, lr=0.02, precondition_frequency=2, max_workspace_bytes=bound)
        train(optimizer, params, range(5))
        found.append(params)
    assert all_same_bits(*found)
