"""Averages, kinds of decay, cautious updates and constraints of sharded parameters: as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

import steepest
from distributed.test_fsdp_checkpoints import load_state, state_of
from steepest.optimizer import MatrixOptimizer
from support.processes import Processes
from support.sharded import GPT, HEADS, different, full, optimizer, shard, train
from support.slow import slow
from support.training import noise

Weights = dict[str, Tensor]
EMA: dict[str, Any] = {"average": 0.8}
FREE: dict[str, Any] = {"average": "schedule_free"}
INDEPENDENT: dict[str, Any] = {"weight_decay_method": "independent", "weight_decay": 0.01, "adamw_weight_decay": 0.01}
L2: dict[str, Any] = {"weight_decay_method": "l2"}
CAUTIOUS: dict[str, Any] = {"cautious_update": True}
FROBENIUS: dict[str, Any] = {"constraint": "frobenius", "weight_decay": 0.0}
REDUCED: dict[str, Any] = {"variance_reduction": 0.05}
SPECTRAL: dict[str, Any] = {"constraint": "spectral", "weight_decay": 0.0}
OPTIONS = [
    *(FREE, SPECTRAL, REDUCED, slow(EMA), slow(INDEPENDENT), slow(CAUTIOUS), slow(FROBENIUS)),
    *(slow(L2), slow({**EMA, "backend": "torch"}), slow({**FREE, "keep_mantissa": True})),
    *(slow({**FROBENIUS, "backend": "torch"}), slow({**FROBENIUS, **REDUCED, **EMA, **CAUTIOUS})),
]


def noisy(model: nn.Module, step: int) -> None:
    """Gradients that depend on no weight: no rounding of one becomes a step of AdamW."""
    for i, p in enumerate(model.parameters()):
        g = noise(tuple(p.shape), 1000 * (step + 1) + i).to(p.dtype)
        p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g


def trained(cls: type[MatrixOptimizer], sharded: bool, values: dict[str, Any]) -> tuple[Weights, Weights]:
    """(the weights, what eval() shows)."""
    model = shard(GPT()) if sharded else GPT()
    made = optimizer(cls, model, **values)
    train(model, made, range(4), noisy)
    weights = full(model)
    made.eval()
    shown = full(model)
    made.train()
    assert not different(full(model), weights)
    return weights, shown


@pytest.mark.parametrize("values", OPTIONS, ids=str)
@pytest.mark.parametrize("cls", [steepest.MuAdam, slow(steepest.Muon), slow(steepest.SOAP)])
def test_with_the_bits_of_one_process(processes: Processes, cls: type[MatrixOptimizer], values: dict[str, Any]) -> None:
    wanted = processes.alone(trained, cls, False, values)
    for found in processes.run(trained, cls, True, values, ranks=3):
        for some, others in zip(found, wanted, strict=True):
            assert not different(some, others)


@pytest.mark.parametrize("values", [FROBENIUS, slow(SPECTRAL)], ids=str)
def test_norms_are_those_of_the_start(processes: Processes, values: dict[str, Any]) -> None:
    start, order = full(GPT()), "fro" if values is FROBENIUS else 2
    for weights, _ in processes.run(trained, steepest.Muon, True, values, ranks=3):
        for name in ("blocks.0.up.weight", "blocks.1.proj.weight", "blocks.0.experts"):
            both = weights[name], start[name]
            if "proj" in name:  # every head is a matrix
                both = tuple(t.unflatten(-1, (HEADS, -1)).movedim(-2, 0) for t in both)
            found, wanted = (torch.linalg.matrix_norm(t, order) for t in both)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


def radii(sharded: bool, dtype: torch.dtype) -> list[Tensor]:
    model = GPT().to(dtype)
    for i, p in enumerate(model.parameters()):
        p.data.copy_(noise(tuple(p.shape), i))
    made = optimizer(steepest.Muon, shard(model) if sharded else model, **FROBENIUS)
    made.init_state()
    train(model, made, range(2), noisy)
    weights = full(model).values() if dtype == torch.float64 else []
    return [*(made.state[p]["radius"] for p in model.parameters() if "radius" in made.state[p]), *weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ranks", [2, 3])
def test_radii_are_those_of_one_process(processes: Processes, ranks: int, dtype: torch.dtype) -> None:
    """Of fp64 weights to the last digit, and what is put back on these spheres too."""
    wanted = processes.alone(radii, False, dtype)
    assert sum(map(len, wanted)) > 30
    for found in processes.run(radii, True, dtype, ranks=ranks):
        assert all(map(torch.equal, found, wanted))


def resumed(kind: str, number: int, folder: Path, values: dict[str, Any]) -> Weights:
    """Loads what number - 1 has saved, trains on, saves; the weights at the end."""
    model = shard(GPT()) if kind == "fsdp" else GPT()
    made = optimizer(steepest.Muon, model, **values)
    if number:
        state = state_of(model, made)
        dcp.load(state, checkpoint_id=folder / str(number - 1))
        load_state(model, made, state)
    train(model, made, range(2 * number, 2 * number + 2), noisy)
    dcp.save(state_of(model, made), checkpoint_id=folder / str(number))
    made.eval()
    return full(model)


def alone(values: dict[str, Any]) -> Weights:
    model = GPT()
    made = optimizer(steepest.Muon, model, **values)
    train(model, made, range(4), noisy)
    made.eval()
    return full(model)


@pytest.mark.parametrize("values", [FREE, *map(slow, ({**EMA, **FROBENIUS}, REDUCED, SPECTRAL))], ids=str)
def test_checkpoints_for_other_ranks(processes: Processes, values: dict[str, Any], tmp_path: Path) -> None:
    wanted = processes.alone(alone, values)
    for number, (kind, ranks) in enumerate((("fsdp", 2), ("fsdp", 1))):
        results = processes.run(resumed, kind, number, tmp_path, values, ranks=ranks)
    for found in results:
        assert not different(found, wanted)
