"""Ranks that are about to do different things all say so, and none waits for ever."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import steepest
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
        assert "rank 1 cannot take this step" in text
        assert kept
