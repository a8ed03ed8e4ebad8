"""Checkpoints that another number of ranks loads, and another wrapper: training goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

import steepest
from steepest.optimizer import MatrixOptimizer
from support.processes import Processes
from support.sharded import GPT, different, digest, full, optimizer, shard, train
from support.slow import slow

Weights = dict[str, Tensor]
SOME = (slow(steepest.Muon), slow(steepest.MuAdam), steepest.SOAP, slow(steepest.Dion2))
STEPS = 2  # between one checkpoint and the next


def options_of(cls: type[MatrixOptimizer]) -> dict[str, Any]:
    return {"precondition_frequency": 3} if cls is steepest.SOAP else {}


def wrapped(kind: str) -> nn.Module:
    """fsdp: sharded. ddp: whole on every rank. plain: of one process."""
    model: Any = GPT()
    return {"fsdp": shard, "ddp": DistributedDataParallel, "plain": lambda model: model}[kind](model)


def names_of(weights: Weights) -> Weights:
    return {name.removeprefix("module."): t for name, t in weights.items()}


def alone(cls: type[MatrixOptimizer], steps: int) -> Weights:
    model = GPT()
    train(model, optimizer(cls, model, **options_of(cls)), range(steps))
    return full(model)


def state_of(model: nn.Module, made: MatrixOptimizer, **options: Any) -> dict[str, Any]:
    chosen = StateDictOptions(**options)
    return {
        "model": get_model_state_dict(model, options=chosen),
        "optimizer": get_optimizer_state_dict(model, made, options=chosen),
    }


def load_state(model: nn.Module, made: MatrixOptimizer, state: dict[str, Any], **options: Any) -> None:
    chosen = StateDictOptions(**options)
    set_model_state_dict(model, state["model"], options=chosen)
    set_optimizer_state_dict(model, made, state["optimizer"], options=chosen)


# ---- torch.distributed.checkpoint -----------------------------------------------------------------------------------


def part(cls: type[MatrixOptimizer], kind: str, number: int, folder: Path, how: str) -> Weights:
    """Loads what part number - 1 has saved, trains on, saves; the weights at the end."""
    model = wrapped(kind)
    made = optimizer(cls, model, **options_of(cls))
    names = {"flatten_optimizer_state_dict": how == "flat"}
    if number:
        state = state_of(model, made, **names)
        dcp.load(state, checkpoint_id=folder / str(number - 1))
        load_state(model, made, state, **names)
    train(model, made, range(STEPS * number, STEPS * (number + 1)))
    state = state_of(model, made, **names)
    if how == "async":
        group = dist.new_group(backend="gloo")  # its thread must not meet the collectives of training
        saved = dcp.async_save(state, checkpoint_id=folder / str(number), process_group=group)
        train(model, made, range(1000, 1001))  # the checkpoint is of before
        saved.result()
        load_state(model, made, state)
    else:
        dcp.save(state, checkpoint_id=folder / str(number))
    return names_of(full(model))


@pytest.mark.parametrize(
    "ways",
    [
        (("fsdp", 2), ("fsdp", 1)),
        slow((("fsdp", 1), ("fsdp", 2), ("fsdp", 4), ("fsdp", 2))),
        slow((("fsdp", 2), ("ddp", 2), ("plain", 1), ("fsdp", 4))),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", SOME, ids=lambda cls: cls.__name__)
def test_training_goes_on_with_other_ranks(
    processes: Processes, cls: type[MatrixOptimizer], ways: tuple[tuple[str, int], ...], tmp_path: Path
) -> None:
    for number, (kind, ranks) in enumerate(ways):
        wanted = processes.alone(alone, cls, STEPS * (number + 1))
        for weights in processes.run(part, cls, kind, number, tmp_path, "at once", ranks=ranks):
            assert digest(weights) == digest(wanted), f"{kind} on {ranks}: {different(weights, wanted)}"


@pytest.mark.slow
@pytest.mark.parametrize("cls", [steepest.MuAdam, steepest.SOAP], ids=lambda cls: cls.__name__)
def test_a_checkpoint_that_is_written_meanwhile(
    processes: Processes, cls: type[MatrixOptimizer], tmp_path: Path
) -> None:
    processes.run(part, cls, "fsdp", 0, tmp_path, "async", ranks=2)
    wanted = processes.alone(alone, cls, 2 * STEPS)
    for weights in processes.run(part, cls, "fsdp", 1, tmp_path, "at once", ranks=2):
        assert digest(weights) == digest(wanted), different(weights, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [(("fsdp", 1), ("fsdp", 2)), (("ddp", 2), ("fsdp", 4))], ids=str)
@pytest.mark.parametrize("cls", SOME, ids=lambda cls: cls.__name__)
def test_flat_names(
    processes: Processes, cls: type[MatrixOptimizer], first: tuple[str, int], then: tuple[str, int], tmp_path: Path
) -> None:
    """As torchtitan saves them. Each rank loads what its own state has names of, so it has those of other owners."""
    wanted = processes.alone(alone, cls, 2 * STEPS)
    for number, (kind, ranks) in enumerate((first, then)):
        found = processes.run(part, cls, kind, number, tmp_path, "flat", ranks=ranks)
    for weights in found:
        assert digest(weights) == digest(wanted), different(weights, wanted)


# ---- full state dicts -----------------------------------------------------------------------------------------------


def saved_whole(cls: type[MatrixOptimizer], kind: str, file: Path) -> list[str]:
    """Rank 0 has the state of all, as one process would save it; the keys of the others'."""
    model = wrapped(kind)
    made = optimizer(cls, model, **options_of(cls))
    train(model, made, range(STEPS))
    state = state_of(model, made, full_state_dict=True, cpu_offload=True)
    if dist.get_rank() == 0:
        torch.save(state, file)
    return sorted(state["optimizer"].get("state", {}))


def loaded_whole(cls: type[MatrixOptimizer], kind: str, file: Path) -> Weights:
    """Rank 0 has read the file, and the others take what it sends."""
    model = wrapped(kind)
    made = optimizer(cls, model, **options_of(cls))
    state = torch.load(file, weights_only=True) if dist.get_rank() == 0 else {"model": {}, "optimizer": {}}
    load_state(model, made, state, full_state_dict=True, broadcast_from_rank0=dist.get_world_size() > 1)
    train(model, made, range(STEPS, 2 * STEPS))
    return names_of(full(model))


@pytest.mark.parametrize(
    "first, then",
    [
        (("fsdp", 2), ("plain", 1)),
        slow(("plain", 1), ("fsdp", 2)),
        slow(("fsdp", 4), ("fsdp", 2)),
        slow(("fsdp", 2), ("ddp", 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", SOME, ids=lambda cls: cls.__name__)
def test_a_full_state_dict(
    processes: Processes,
    cls: type[MatrixOptimizer],
    first: tuple[str, int],
    then: tuple[str, int],
    tmp_path: Path,
) -> None:
    processes.run(saved_whole, cls, first[0], tmp_path / "state.pt", ranks=first[1])
    wanted = processes.alone(alone, cls, 2 * STEPS)
    for weights in processes.run(loaded_whole, cls, then[0], tmp_path / "state.pt", ranks=then[1]):
        assert digest(weights) == digest(wanted), different(weights, wanted)


# ---- state_dict of the optimizer itself -----------------------------------------------------------------------------


def by_itself(cls: type[MatrixOptimizer]) -> Weights:
    """state_dict and load_state_dict of another optimizer on the same ranks."""
    model = wrapped("fsdp")
    made = optimizer(cls, model, **options_of(cls))
    train(model, made, range(STEPS))
    again = optimizer(cls, model, **options_of(cls))
    again.load_state_dict(made.state_dict())
    train(model, again, range(STEPS, 2 * STEPS))
    return full(model)


@pytest.mark.parametrize("cls", SOME, ids=lambda cls: cls.__name__)
def test_state_dict(processes: Processes, cls: type[MatrixOptimizer]) -> None:
    wanted = processes.alone(alone, cls, 2 * STEPS)
    for weights in processes.run(by_itself, cls, ranks=2):
        assert digest(weights) == digest(wanted), different(weights, wanted)
