"""What does not take sharded parameters says so, by name and before anything is written."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

import steepest
from support.processes import Processes


def sharded(placement: object, *shape: int) -> nn.Parameter:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [placement]))  # type: ignore[list-item]


def refused() -> dict[str, str]:
    said = {}

    def refuses(name: str, call: object, kind: type[Exception]) -> None:
        with pytest.raises(kind) as error:
            call()  # type: ignore[operator]
        said[name] = str(error.value)

    p = sharded(Shard(0), 8, 4)
    refuses("Fromage", lambda: steepest.Fromage([p]), ValueError)
    optimizer = steepest.Muon([p])
    refuses("graph", optimizer.make_capturable, RuntimeError)
    refuses("graphed", lambda: steepest.graphed(optimizer), RuntimeError)
    p.grad = torch.zeros_like(p).redistribute(placements=[Replicate()])  # type: ignore[attr-defined]
    before = p.full_tensor().clone()  # type: ignore[attr-defined]
    refuses("placements", optimizer.step, RuntimeError)
    p.grad = None
    assert torch.equal(before, p.full_tensor())  # type: ignore[attr-defined]
    p.grad = torch.zeros_like(p)
    optimizer.step()
    p.grad = torch.ones_like(p).redistribute(placements=[Shard(1)])  # type: ignore[attr-defined]
    before = p.full_tensor().clone()  # type: ignore[attr-defined]
    refuses("other placements later", optimizer.step, RuntimeError)
    p.grad = None
    assert torch.equal(before, p.full_tensor())  # type: ignore[attr-defined]
    model = nn.Linear(4, 8, bias=False)
    model.weight = p
    refuses("K-FAC", lambda: steepest.KFAC(model), RuntimeError)
    narrow = sharded(Shard(0), 8, 4).to(torch.bfloat16).detach().requires_grad_()
    refuses("Prodigy", lambda: steepest.ProdigyMuon([narrow]), ValueError)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    partial = torch.distributed.tensor.DTensor.from_local(torch.randn(4, 4), mesh, [Partial()], run_check=False)
    refuses("Partial", lambda: steepest.Muon([nn.Parameter(partial)]), ValueError)
    with torch.device("meta"):
        model = nn.Linear(4, 8)
    fully_shard(model)
    refuses("meta", lambda: steepest.SOAP(model), ValueError)
    model.to_empty(device="cpu")
    steepest.SOAP(model)
    return said


def test_by_name(processes: Processes) -> None:
    for said in processes.run(refused, ranks=2):
        assert "measures whole weights" in said["Fromage"]
        assert "ranks share its parameters" in said["graph"]
        assert "a CUDA graph holds the work of one CUDA device and the parameters are on cpu" in said["graphed"]
        assert "redistribute the gradient to the parameter's placements" in said["placements"]
        assert "redistribute the gradient to the parameter's placements" in said["other placements later"]
        assert "DistributedDataParallel" in said["K-FAC"]
        assert "keep_mantissa=True" in said["Prodigy"]
        assert "is Partial" in said["Partial"]
        assert "parameter 'weight' of shape (8, 4)" in said["meta"]
        assert "call model.to_empty(device=...) and initialize its weights before" in said["meta"]
