"""torchtitan's container of optimizers: names, its switches, its flat checkpoints of sharded parameters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard

titan = pytest.importorskip(
    "torchtitan.components.optimizer", reason="torchtitan is not installed (make test-integrations)"
)

import steepest  # noqa: E402
from steepest.integrations.torchtitan import OptimizersContainer  # noqa: E402
from support.processes import GLOO  # noqa: E402


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tok_embeddings = nn.Embedding(64, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 16)])
        self.output = nn.Linear(16, 64, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        first, second = self.layers
        return self.output(second(first(self.tok_embeddings(tokens)).relu()))


@pytest.fixture
def process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in GLOO.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def container(name: str, model: nn.Module, implementation: Any = "fused", **values: Any) -> Any:
    options = {"lr": 0.02, "adamw_lr": 1e-3, **values}
    group = titan.ParamGroupConfig(pattern=".*", optimizer_name=name, optimizer_kwargs=options)
    config = OptimizersContainer.Config(param_groups=[group], implementation=implementation)
    return config.build(model_parts=[model])


def train(model: nn.Module, optimizers: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        tokens = torch.randint(64, (4, 5), generator=torch.Generator().manual_seed(step))
        loss = model(tokens).square().mean()
        optimizers.zero_grad()
        loss.backward()
        optimizers.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_a_group_is_routed_by_names(implementation: str) -> None:
    model = Network()
    (optimizer,) = container("MuAdam", model, implementation)
    of = {p: group for group in optimizer.param_groups for p in group["params"]}
    assert [of[layer.weight]["use_muon"] for layer in (*model.layers, model.tok_embeddings, model.output)] == [
        *(True, True, False, False)
    ]
    assert (of[model.layers[0].weight]["lr"], of[model.output.weight]["lr"]) == (0.02, 1e-3)
    at_once = of[model.layers[0].weight]["max_workspace_bytes"] != 1
    assert at_once == (implementation != "for-loop")
    assert sorted(name for group in optimizer.param_groups for name in group["param_names"]) == sorted(
        name for name, _ in model.named_parameters()
    )


def test_the_other_names_stay_torchtitans() -> None:
    model = Network()
    groups = [
        titan.ParamGroupConfig(pattern=r"layers.*weight", optimizer_name="Muon", optimizer_kwargs={"lr": 0.02}),
        titan.ParamGroupConfig(pattern=r".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3}),
    ]
    optimizers = OptimizersContainer.Config(param_groups=groups).build(model_parts=[model])
    assert [type(optimizer) for optimizer in optimizers] == [steepest.Muon, torch.optim.AdamW]
    with pytest.raises(NotImplementedError, match="Optimizer Muno not added"):
        container("Muno", model)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", ["Muon", "SOAP", "KLShampoo", "ProdigyMuon"])
def test_a_flat_checkpoint_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, Any]:
        model = Network()
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
        return model, container(name, model)

    model, optimizers = made()
    train(model, optimizers, range(3))
    dcp.save({"model": model.state_dict(), "optimizer": optimizers.state_dict()}, checkpoint_id=tmp_path / "saved")
    wanted = train(model, optimizers, range(3, 6))
    model, optimizers = made()
    loaded = {"model": model.state_dict(), "optimizer": optimizers.state_dict()}
    dcp.load(loaded, checkpoint_id=tmp_path / "saved")
    model.load_state_dict(loaded["model"])
    optimizers.load_state_dict(loaded["optimizer"])
    assert train(model, optimizers, range(3, 6)) == wanted
    del loaded["optimizer"]["state.layers.0.weight.momentum_buffer"]
    with pytest.raises(ValueError, match="lacks 1 entries that .* 'state.layers.0.weight.momentum_buffer' first"):
        optimizers.load_state_dict(loaded["optimizer"])
