"""Wrappers of torch that make an optimizer, or its parameters, on several processes: equal to one process, or refused
by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer, _apply_optimizer_in_backward
from torch.nn.parallel import DistributedDataParallel

import steepest
from support.processes import Processes
from support.training import noise

pytestmark = pytest.mark.slow

STEPS = 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Embedding(11, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5)
    return nn.Sequential(*layers).double()


def backward(model: nn.Module, step: int) -> None:
    """The same batch on every rank, so that the mean of gradients is exact."""
    tokens = torch.randint(11, (16,), generator=torch.Generator().manual_seed(step))
    (model(tokens) - noise((16, 5), step, torch.float64)).square().mean().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(STEPS)) -> list[Tensor]:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return steepest.param_groups(model, names=False, adamw={"weight_decay": 0.2})


METHODS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "Muon": (steepest.Muon, {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9}),
    "MuAdam": (steepest.MuAdam, {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3}),
    "SOAP": (steepest.SOAP, {"lr": 0.05, "precondition_frequency": 2}),
}

# ---- ZeroRedundancyOptimizer ----------------------------------------------------------------------------------------


def alone(method: str) -> list[Tensor]:
    cls, values = METHODS[method]
    model = network()
    return train(model, cls(steepest.param_groups(model, adamw={"weight_decay": 0.2}), **values))


def zero(method: str, as_bucket_views: bool) -> list[Tensor]:
    cls, values = METHODS[method]
    model = DistributedDataParallel(network())
    made = groups(model.module)
    optimizer = ZeroRedundancyOptimizer(made, cls, parameters_as_bucket_view=as_bucket_views, **values)
    for group in optimizer.param_groups:  # as schedulers do: the wrapper tells the optimizer
        group["lr"] *= 1.0
    return train(model, optimizer)


def zero_resumed(method: str) -> list[Tensor]:
    """Half of the steps, and the others by a new optimizer with the state of all ranks."""
    cls, values = METHODS[method]
    model = DistributedDataParallel(network())
    optimizer = ZeroRedundancyOptimizer(groups(model.module), cls, **values)
    train(model, optimizer, range(STEPS // 2))
    optimizer.consolidate_state_dict(to=0)
    saved = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved, 0)
    again = ZeroRedundancyOptimizer(groups(model.module), cls, **values)
    again.load_state_dict(saved[0])
    return train(model, again, range(STEPS // 2, STEPS))


def zero_of_tensors(method: str, kind: str) -> list[Tensor]:
    cls, values = METHODS[method]
    model = network()
    given: Any = list(model.parameters()) if kind == "mixed" else [model[1].weight, model[3].weight]
    if kind == "adamw_lr":
        return train(model, ZeroRedundancyOptimizer(groups(model), cls, adamw_lr=0.1, **values))
    optimizer = (ZeroRedundancyOptimizer if dist.get_world_size() > 1 else _made)(given, cls, **values)
    return train(model, optimizer)


def _made(params: Any, cls: type[Any], **values: Any) -> Any:
    return cls(params, **values)


@pytest.mark.parametrize("as_bucket_views", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_zero_trains_as_one_process(processes: Processes, method: str, as_bucket_views: bool) -> None:
    wanted = processes.alone(alone, method)
    for weights in processes.run(zero, method, as_bucket_views, ranks=2):
        assert all(map(torch.equal, weights, wanted))


def test_zero_resumes(processes: Processes) -> None:
    wanted = processes.alone(alone, "MuAdam")
    for weights in processes.run(zero_resumed, "MuAdam", ranks=2):
        assert all(map(torch.equal, weights, wanted))


def test_zero_takes_matrices_alone(processes: Processes) -> None:
    wanted = processes.alone(zero_of_tensors, "Muon", "matrices")
    for weights in processes.run(zero_of_tensors, "Muon", "matrices", ranks=2):
        assert all(map(torch.equal, weights, wanted))


@pytest.mark.parametrize(
    "kind, message",
    [
        ("mixed", r"and group 0 has a parameter of shape \(8,\): pass steepest.param_groups\(model, names=False"),
        ("adamw_lr", "fills Muon's options into all groups, adamw_ ones too: pass steepest.param_groups"),
    ],
)
def test_what_zero_cannot_share_out_is_refused_on_every_rank(processes: Processes, kind: str, message: str) -> None:
    for outcome in processes.outcomes(zero_of_tensors, "Muon", kind, ranks=4):
        with pytest.raises(ValueError, match=message):
            raise outcome.error or AssertionError(outcome)


# ---- FSDP1 and fully_shard ------------------------------------------------------------------------------------------


def made_of_flat_parameters(use_orig_params: bool, give: Callable[[nn.Module], Any]) -> list[str]:
    model = FullyShardedDataParallel(network(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    said = []
    for make in (steepest.Muon, steepest.MuAdam, steepest.param_groups):
        with pytest.raises(RuntimeError) as error:
            make(give(model))
        said.append(str(error.value))
    return said


def the_module(model: nn.Module) -> Any:
    return model


def their_names(model: nn.Module) -> Any:
    return model.named_parameters()


def their_tensors(model: nn.Module) -> Any:
    return list(model.parameters())


@pytest.mark.parametrize("give", [the_module, their_names, their_tensors])
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_flat_parameters_are_refused(processes: Processes, use_orig_params: bool, give: Any) -> None:
    first = ("parameter 0 ", "parameter 'param_0' ") if give is their_tensors else "parameter '_fsdp_wrapped_module."
    for said in processes.run(made_of_flat_parameters, use_orig_params, give, ranks=2):
        for text in said:
            assert text.startswith(first)
            assert "is flattened by FullyShardedDataParallel (FSDP1)" in text
            assert "torch.distributed.fsdp.fully_shard" in text


def made_of_a_flat_group(use_orig_params: bool) -> None:
    model = FullyShardedDataParallel(network(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"parameter 0 of shape \(.*\) is flattened by FullyShardedDataParallel"):
        steepest.Muon([{"params": list(model.parameters()), "use_muon": False}])


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_flat_parameters_are_refused_in_groups(processes: Processes, use_orig_params: bool) -> None:
    processes.run(made_of_a_flat_group, use_orig_params, ranks=2)


def steps_before_sharding(give: Callable[[nn.Module], Any], sharded: str) -> list[str]:
    """Errors and warnings of five steps of an optimizer that was made before `fully_shard`."""
    model = network()
    optimizer = steepest.Muon(give(model))
    fully_shard(model if sharded == "" else model.get_submodule(sharded))
    said = []
    for step in range(5):
        backward(model, step)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                optimizer.step()
            except RuntimeError as error:
                said.append(f"{step}: {error}")
        said += [f"{step}: {each.message}" for each in caught if each.category is UserWarning]
    return said


@pytest.mark.parametrize("sharded, stale", [("", "9 names (1.weight, 3.weight, 5.weight, ...)"), ("3", "2 names (3.")])
def test_an_optimizer_made_before_sharding_says_so(processes: Processes, sharded: str, stale: str) -> None:
    for said in processes.run(steps_before_sharding, the_module, sharded, ranks=2):
        assert len(said) == 5
        for step, text in enumerate(said):
            assert text.startswith(f"{step}: the model holds other parameters than this Muon under {stale}")
            assert "Make the optimizer from the model as it is trained, after fully_shard" in text


def test_an_optimizer_made_from_names_before_sharding_says_so_after_three_steps(processes: Processes) -> None:
    for said in processes.run(steps_before_sharding, their_names, "", ranks=2):
        [text] = said
        assert text.startswith("2: none of the 9 parameters of this Muon (0.weight, 1.weight, 3.weight, ...) has")
        assert "it trains nothing" in text


# ---- steps in backward ----------------------------------------------------------------------------------------------


def layers(sharded: bool) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 5, bias=False)).double()
    if sharded:
        for layer in (model[0], model[2], model):
            fully_shard(layer)
    return model


def stepped_in_backward(sharded: bool) -> list[Tensor]:
    """An optimizer a parameter, as torch's tutorial on steps in backward has them."""
    model = layers(sharded)
    optimizers = {p: steepest.Muon([p], lr=0.05) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for seed in range(STEPS):
        model(noise((16, 6), seed, torch.float64)).square().mean().backward()
    return [p.full_tensor().detach() if sharded else p.detach() for p in model.parameters()]  # type: ignore[attr-defined]


def test_hooks_step_sharded_parameters(processes: Processes) -> None:
    wanted = processes.alone(stepped_in_backward, False)
    for weights in processes.run(stepped_in_backward, True, ranks=2):
        assert all(map(torch.equal, weights, wanted))


def applied_in_backward() -> str:
    with pytest.raises(ValueError, match="_apply_optimizer_in_backward waits for autograd") as error:
        _apply_optimizer_in_backward(steepest.Muon, layers(True).parameters(), {"lr": 0.05})
    return str(error.value)


def test_hooks_of_autograd_are_refused_where_it_has_no_gradients(processes: Processes) -> None:
    for text in processes.run(applied_in_backward, ranks=2):
        assert "found parameter 0 of shape (8, 6) with placements (Shard(dim=0),)" in text
        assert "p.register_post_accumulate_grad_hook" in text
