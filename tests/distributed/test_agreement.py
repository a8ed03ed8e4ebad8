"""Ranks that are about to do different things all say so, and none waits for ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import steepest
from steepest.ops import backend
from steepest.step import plan
from support.processes import Processes
from support.slow import slow
from support.training import noise


def made(seed: int, *shape: int) -> nn.Parameter:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return nn.Parameter(distribute_tensor(noise(shape, seed), mesh, [Shard(0)]))


def with_other_values(key: str, value: object, at: str) -> str:
    """What this rank is told where rank 1 has another value, given to the constructor or set before the second step."""
    p = made(0, 6, 4)
    name = [{"params": [p], "param_names": ["layer.weight"]}]
    other = {key: value} if dist.get_rank() == 1 else {}
    p.grad = torch.zeros_like(p)
    if at == "construction":
        with pytest.raises(RuntimeError) as error:
            steepest.Muon(name, **other)  # type: ignore[arg-type]
        return str(error.value)
    optimizer = steepest.Muon(name)
    optimizer.step()
    optimizer.param_groups[0].update(other)
    optimizer._plan = None  # a value that the recipe does not depend on is compared when the plan is a new one
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    return str(error.value)


@pytest.mark.parametrize(
    "key, value, at",
    [
        *(("lr", 0.5, "construction"), ("weight_decay", 0.3, "step"), ("nesterov", False, "step")),
        *(slow("lr", 0.5, "step"), slow("weight_decay", 0.3, "construction"), slow("nesterov", False, "construction")),
    ],
)
def test_other_values(processes: Processes, key: str, value: object, at: str) -> None:
    first, second = processes.run(with_other_values, key, value, at, ranks=2)
    assert first == second
    assert "ranks are about to take different steps" in first
    assert "group 0" in first
    assert f"{key}={value}" in first


def one_rank_cannot() -> tuple[str, bool]:
    p = made(0, 6, 4)
    optimizer = steepest.Muon([p])
    p.grad = torch.zeros_like(p)
    optimizer.step()
    before = p.to_local().clone()  # type: ignore[attr-defined]
    if dist.get_rank() == 1:
        optimizer.param_groups[0]["backend"] = "nothing"
    with pytest.raises((RuntimeError, ValueError)) as error:
        optimizer.step()
    return str(error.value), torch.equal(before, p.to_local())  # type: ignore[attr-defined]


def test_a_rank_that_cannot_go_on(processes: Processes) -> None:
    for text, kept in processes.run(one_rank_cannot, ranks=2):
        assert "nothing" in text
        assert "rank 1 cannot go on with the step" in text
        assert kept


def stepped_otherwise() -> str:
    """What this rank is told where rank 1 steps a parameter by torch operations and the others do not."""
    p = made(0, 6, 4)
    optimizer = steepest.Muon([{"params": [p], "param_names": ["layer.weight"]}])
    p.grad = torch.zeros_like(p)
    if dist.get_rank() == 1:
        plan._backend = lambda p, packed: "torch"
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    return str(error.value)


@pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")
def test_ranks_that_step_a_parameter_in_other_ways(processes: Processes) -> None:
    first, second = processes.run(stepped_otherwise, ranks=2)
    assert first == second
    assert "ranks are about to take different steps" in first
    assert "'layer.weight' (group 0) stepped by cpu" in first
    assert "stepped by torch" in first


#: Shards of which Triton takes some, for the last one is a single row or has none, and not the others.
UNEVEN: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "transposed": ((5, 48), {"transposed": True}),
    "side by side": ((5, 48), {"num_heads": 3, "split_columns": True}),
    "experts in splits": ((5, 8, 48), {"batch_dims": 1, "split_sizes": (4, 4)}),
    "heads": ((12, 8), {"num_heads": 3}),
}


def taken_by_triton() -> dict[str, bool]:
    """Of this rank: whether Triton would take each of them, but for there being a GPU."""
    found = {}
    for name, (shape, layout) in UNEVEN.items():
        p = made(0, *shape)
        optimizer = steepest.Muon([{"params": [p], **layout}])
        p.grad = torch.zeros_like(p)
        seen = optimizer._parameter(0, 0, p, optimizer._state_here(p))
        packed = plan.program(seen.recipe)
        assert not isinstance(packed, str)
        found[name] = plan._triton_reason(seen, packed) is None
    return found


@pytest.mark.parametrize("ranks", [3, slow(4)])
def test_ranks_choose_alike_whatever_their_shards(processes: Processes, ranks: int) -> None:
    first, *others = processes.run(taken_by_triton, ranks=ranks)
    assert first["heads"]
    assert not first["transposed"]
    assert all(other == first for other in others)
