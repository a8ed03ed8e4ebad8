"""State in codes of sharded parameters: shards of dimension 0 have the blocks, and so the bits, of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import steepest
from distributed.test_fsdp_checkpoints import load_state, state_of
from steepest.optimizer import MatrixOptimizer
from support.processes import Processes
from support.sharded import different, full
from support.slow import slow
from support.training import noise

Weights = dict[str, Tensor]
#: One of each way in which what is coded may lie: elementwise, at owners, of transforms.
SOME = (slow(steepest.Muon), steepest.MuAdam, steepest.SOAP, slow(steepest.AdaMuon), slow(steepest.Adam))
OPTIONS: dict[str, Any] = {"lr": 0.02, "state_bits": 8}


class Model(nn.Module):
    """Layers of uneven rows, whose blocks end within them; fused ones; experts; what is too small to be coded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.fused = nn.Linear(80, 67), nn.Linear(64, 3 * 64, bias=False)
        self.down, self.small = nn.Linear(300, 64, bias=False), nn.Linear(8, 5)
        self.experts = nn.Parameter(torch.randn(3, 64, 64))
        self.embedding = nn.Embedding(101, 64)


def made(cls: type[MatrixOptimizer], model: nn.Module, **values: Any) -> MatrixOptimizer:
    options = {**OPTIONS, **({"precondition_frequency": 2} if cls is steepest.SOAP else {}), **values}
    overrides: dict[Any, Any] = {"*fused.weight": {"split_sizes": (64, 64, 64)}}
    return cls(steepest.param_groups(model, overrides=overrides), **options)


def train(model: nn.Module, optimizer: MatrixOptimizer, steps: range) -> None:
    """Gradients that depend on no weight."""
    for step in steps:
        for i, p in enumerate(model.parameters()):
            g = noise(tuple(p.shape), 1000 * (step + 1) + i)
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g
        optimizer.step()


def wrapped(kind: str) -> nn.Module:
    """experts: as fsdp, but the experts are cut along their rows."""
    model: Any = Model()
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "experts":
        return fully_shard(model, shard_placement_fn=lambda p: Shard(1) if p.ndim == 3 else Shard(0))
    return fully_shard(model) if kind == "fsdp" else model


def weights_of(model: nn.Module) -> Weights:
    return {name.removeprefix("module."): t for name, t in full(model).items()}


def trained(cls: type[MatrixOptimizer], kind: str, values: dict[str, Any]) -> tuple[Weights, int]:
    """(weights, coded state tensors)."""
    model = wrapped(kind)
    optimizer = made(cls, model, **values)
    train(model, optimizer, range(5))
    state = [t for each in optimizer.state.values() for t in each.values()]
    return weights_of(model), sum(t.dtype in (torch.int8, torch.uint8) for t in state)


@pytest.mark.parametrize(
    ("kind", "ranks", "values"),
    [
        ("fsdp", 2, {}),
        ("experts", 2, {}),
        slow("fsdp", 3, {"max_workspace_bytes": 1}),
        slow("fsdp", 2, {"backend": "torch"}),
        slow("ddp", 2, {"share_work": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", SOME, ids=lambda cls: cls.__name__)
def test_the_bits_of_one_process(
    processes: Processes, cls: type[MatrixOptimizer], kind: str, ranks: int, values: dict[str, Any]
) -> None:
    wanted, coded = processes.alone(trained, cls, "plain", values)
    assert coded >= 5
    for found, here in processes.run(trained, cls, kind, values, ranks=ranks):
        assert not different(found, wanted)
        assert here >= 5


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def part(cls: type[MatrixOptimizer], kind: str, number: int, folder: Path) -> Weights:
    """Loads what part number - 1 has saved, trains on, saves; the weights at the end."""
    model = wrapped(kind)
    optimizer = made(cls, model)
    if number:
        state = state_of(model, optimizer)
        dcp.load(state, checkpoint_id=folder / str(number - 1))
        load_state(model, optimizer, state)
    train(model, optimizer, range(2 * number, 2 * number + 2))
    dcp.save(state_of(model, optimizer), checkpoint_id=folder / str(number))
    return weights_of(model)


def alone(cls: type[MatrixOptimizer], steps: int) -> Weights:
    model = wrapped("plain")
    train(model, made(cls, model), range(steps))
    return weights_of(model)


@pytest.mark.parametrize(
    "ways",
    [
        (("fsdp", 2), ("fsdp", 1), ("experts", 2)),
        slow((("fsdp", 2), ("ddp", 2), ("plain", 1), ("fsdp", 3))),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [SOME[0], slow(steepest.MuAdam), *SOME[2:]], ids=lambda cls: cls.__name__)
def test_training_goes_on_with_other_ranks(
    processes: Processes, cls: type[MatrixOptimizer], ways: tuple[tuple[str, int], ...], tmp_path: Path
) -> None:
    wanted = processes.alone(alone, cls, 2 * len(ways))
    for number, (kind, ranks) in enumerate(ways):
        found = processes.run(part, cls, kind, number, tmp_path, ranks=ranks)
    for weights in found:
        assert not different(weights, wanted)


def whole_file(cls: type[MatrixOptimizer], kind: str, file: Path, save: bool) -> Weights:
    """Saves a full state dict after two steps, or loads one and takes the next two."""
    model = wrapped(kind)
    optimizer = made(cls, model)
    if save:
        train(model, optimizer, range(2))
        state = state_of(model, optimizer, full_state_dict=True)
        if torch.distributed.get_rank() == 0:
            torch.save(state, file)
        return {}
    load_state(model, optimizer, torch.load(file, weights_only=True), full_state_dict=True)
    train(model, optimizer, range(2, 4))
    return weights_of(model)


@pytest.mark.parametrize(("first", "then"), [("fsdp", "plain"), slow("plain", "fsdp")])
def test_full_state_dicts(processes: Processes, first: str, then: str, tmp_path: Path) -> None:
    for cls in (steepest.MuAdam, steepest.SOAP):
        wanted = processes.alone(alone, cls, 4)
        file = tmp_path / f"{cls.__name__}.pt"
        processes.run(whole_file, cls, first, file, True, ranks=1 if first == "plain" else 2)
        for weights in processes.run(whole_file, cls, then, file, False, ranks=1 if then == "plain" else 2):
            assert not different(weights, wanted)


def changes_its_mind() -> list[torch.dtype]:
    """A group's value changes before state_dict(), which all ranks then have in the same tensors."""
    model = wrapped("fsdp")
    optimizer = made(steepest.SOAP, model)
    train(model, optimizer, range(1))
    for group in optimizer.param_groups:
        group["state_bits"] = None
    optimizer.state_dict()
    train(model, optimizer, range(1, 2))
    return sorted({t.dtype for each in optimizer.state.values() for t in each.values()}, key=str)


def test_a_group_that_changes_its_mind(processes: Processes) -> None:
    for dtypes in processes.run(changes_its_mind, ranks=2):
        assert torch.int8 not in dtypes
        assert torch.uint8 not in dtypes


# ---- refused --------------------------------------------------------------------------------------------------------


def of_cut_blocks() -> str:
    model = nn.Sequential(nn.Linear(600, 64, bias=False))
    fully_shard(model, shard_placement_fn=lambda p: Shard(1))
    with pytest.raises(ValueError, match="state_bits=8 has blocks of 256 elements") as error:
        steepest.Muon(model, state_bits=8)
    steepest.Muon(model)
    return str(error.value)


def of_whole_blocks() -> bool:
    """Two blocks a shard: cut where blocks end."""
    found = []
    for sharded in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1024, 64, bias=False))
        if sharded:
            fully_shard(model, shard_placement_fn=lambda p: Shard(1))
        train(model, optimizer := steepest.Muon(model, state_bits=8), range(3))
        scale = next(iter(optimizer.state.values()))["momentum_buffer_scale"]
        found.append((full(model), tuple(scale.shape)))
    return not different(found[0][0], found[1][0]) and found[0][1] == found[1][1] == (64, 4)


def test_shards_that_cut_blocks_are_refused_by_name(processes: Processes) -> None:
    for text in processes.run(of_cut_blocks, ranks=2):
        assert "which shards cut; found parameter '0.weight' of shape (64, 600) with placements (Shard(dim=1),)" in text
        assert text.endswith("shard dimension 0, or give its group state_bits=None")
    assert all(processes.run(of_whole_blocks, ranks=2))
