"""What people do with an optimizer of sharded parameters besides stepping it, and what they get wrong."""

from __future__ import annotations

import copy
import io
import pickle
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import steepest
from steepest.optimizer.weights import Weights
from support.processes import Processes

pytestmark = pytest.mark.slow

WAY_OUT = "All ranks call the constructor, add_param_group, step, state_dict, load_state_dict and metrics together"


def network(sharded: bool) -> nn.Sequential:
    """Shards are uneven on two ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 7, bias=False), nn.Tanh(), nn.Linear(7, 5))
    if sharded:
        fully_shard(model[2])
        fully_shard(model)
    return model


def backward(model: nn.Module, step: int = 0) -> None:
    generator = torch.Generator().manual_seed(step)
    model.zero_grad()
    model(torch.randn(8, 6, generator=generator)).square().mean().backward()


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def weights(model: nn.Module) -> list[Tensor]:
    return [whole(p) for p in model.parameters()]


def train(model: nn.Module, step: Any, steps: range = range(3)) -> list[Tensor]:
    for i in steps:
        backward(model, i)
        step()
    return weights(model)


def in_one_process() -> list[Tensor]:
    model = network(sharded=False)
    return train(model, steepest.Muon(model).step)


@pytest.fixture(scope="module")
def alone(processes: Processes) -> list[Tensor]:
    """Of a process with as many threads as a rank."""
    found = processes.alone(in_one_process)
    return list(found)


def check_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def message(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return str(error)
    return ""


# ---- ranks that differ -----------------------------------------------------------------------------------------------


def with_other_options() -> str:
    return message(lambda: steepest.Muon(network(sharded=True), momentum=0.9 - 0.1 * dist.get_rank()))


def with_other_parameters() -> str:
    named = dict(network(sharded=True).named_parameters())
    if dist.get_rank():
        named.pop("2.weight")
    return message(lambda: steepest.Muon(list(named.items())))


def with_another_rate_later() -> str:
    model = network(sharded=True)
    optimizer = steepest.Muon(model, lr=0.1)
    backward(model)
    optimizer.param_groups[-1]["lr"] = 0.5 * dist.get_rank()
    return message(optimizer.step)


def test_what_differs_is_named_on_all_ranks(processes: Processes) -> None:
    for text in processes.run(with_other_options, ranks=2):
        assert "rank 0 has group 0 with momentum=0.9 and rank 1 has group 0 with momentum=0.8" in text
    for text in processes.run(with_other_parameters, ranks=2):
        assert "rank 0 has parameter '2.weight' (group 0) of shape (7, 9)" in text
        assert "rank 1 has parameter '4.weight' (group 0) of shape (5, 7)" in text
    for text in processes.run(with_another_rate_later, ranks=2):
        assert "rank 0 has group 1 with lr=0.0 and rank 1 has group 1 with lr=0.5" in text


def with_a_late_group(same: bool) -> tuple[bool, list[Tensor], str]:
    """(whether the group had state at once, the weights after steps, the error)."""
    model = network(sharded=True)
    named = dict(model.named_parameters())
    late = [(name, named.pop(name)) for name in ("2.weight", "4.weight")]
    optimizer = steepest.Muon(list(named.items()))
    give = late if same else late[dist.get_rank() :][:1]
    text = message(lambda: optimizer.add_param_group({"params": give, "use_muon": True}))
    had = all(p in optimizer.state for _, p in late)
    assert len(optimizer.param_groups) == (3 if same else 2)
    return had, train(model, optimizer.step), text


def test_a_late_group_has_its_state_at_once(processes: Processes, alone: list[Tensor]) -> None:
    for had, found, text in processes.run(with_a_late_group, True, ranks=2):
        assert had
        assert not text
        check_equal(found, alone)


def test_a_late_group_that_differs_is_left_out_on_all_ranks(processes: Processes) -> None:
    for had, _, text in processes.run(with_a_late_group, False, ranks=2):
        assert not had
        assert "rank 0 has parameter '2.weight' (group 2)" in text
        assert "rank 1 has parameter '4.weight' (group 2)" in text


def called_on_one_rank(call: str) -> str:
    model = network(sharded=True)
    if call == "the constructor":
        make = partial(steepest.SOAP, model)
    else:
        optimizer = steepest.SOAP(model)
        train(model, optimizer.step)
        make = getattr(optimizer, call.removesuffix("()"))
    if dist.get_rank() == 0:
        return message(make)
    time.sleep(2)
    return ""


@pytest.mark.parametrize("call", ["the constructor", "metrics()", "state_dict()"])
def test_a_call_that_other_ranks_do_not_make_is_named(processes: Processes, call: str) -> None:
    first, _ = processes.outcomes(called_on_one_rank, call, ranks=2, timeout=60, group_timeout=1)
    assert first.value.startswith(f"a collective of {call} failed on rank 0 among the ranks (0, 1), waiting for ")
    assert WAY_OUT in first.value


# ---- beside the steps ------------------------------------------------------------------------------------------------


def with_a_hook(sharded: bool) -> tuple[list[Tensor], list[bool]]:
    model = network(sharded)
    optimizer = steepest.Muon(model)
    kinds = []

    def halve(moved: Weights) -> None:
        w = model[2].weight
        assert w in moved
        value = moved.value(w)
        kinds.append(isinstance(value, DTensor))
        moved.store(w, value / torch.linalg.matrix_norm(value))

    optimizer.register_weight_hook(halve)
    return train(model, optimizer.step), kinds


def test_weight_hooks_see_whole_weights(processes: Processes) -> None:
    wanted, kinds = with_a_hook(False)
    assert not any(kinds)
    for found, sharded in processes.run(with_a_hook, True, ranks=2):
        assert sharded == [True] * 3
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # norms are sums over ranks


def watched(sharded: bool) -> list[dict[str, float]]:
    model = network(sharded)
    optimizer = steepest.Muon(model)
    seen: list[dict[str, float]] = []
    steepest.watch(optimizer, seen.append, every=2, model=model)
    train(model, optimizer.step)
    return seen


def test_watch_measures_whole_steps(processes: Processes) -> None:
    wanted = watched(False)
    assert len(wanted) == 2
    for found in processes.run(watched, True, ranks=2):
        for ours, theirs in zip(found, wanted, strict=True):
            names = [name for name in theirs if not name.endswith("polar_slack")]
            assert {name: ours[name] for name in names} == pytest.approx(
                {name: theirs[name] for name in names}, rel=1e-5, abs=1e-7
            )


def copied(how: str) -> tuple[list[Tensor], list[Tensor]]:
    """Weights of the original and of a copy, after the same steps."""
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(distribute_tensor(torch.randn(9, 4, generator=generator), mesh, [Shard(0)])) for _ in "ab"]
    optimizer = steepest.SOAP(params, precondition_frequency=2)

    def steps(one: torch.optim.Optimizer, numbers: range) -> list[Tensor]:
        moved = one.param_groups[0]["params"]
        for i in numbers:
            generator = torch.Generator().manual_seed(i)
            for p in moved:
                p.grad = distribute_tensor(torch.randn(9, 4, generator=generator), mesh, [Shard(0)])
            one.step()
        return [whole(p) for p in moved]

    steps(optimizer, range(3))
    if how == "state_dict":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other = steepest.SOAP([nn.Parameter(p.detach().clone()) for p in params], precondition_frequency=2)
        other.load_state_dict(torch.load(file, weights_only=False))
    else:
        other = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert message(partial(one_sided_gradient, other)) if how != "state_dict" else True
    return steps(optimizer, range(3, 6)), steps(other, range(3, 6))


def one_sided_gradient(optimizer: torch.optim.Optimizer) -> None:
    """A copy's ranks agree on their steps, too."""
    p = optimizer.param_groups[0]["params"][0]
    for q in optimizer.param_groups[0]["params"]:
        q.grad = torch.zeros_like(q)
    if dist.get_rank():
        p.grad = None
    optimizer.step()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_go_on(processes: Processes, how: str) -> None:
    for original, other in processes.run(copied, how, ranks=2):
        check_equal(other, original)


def compiled() -> tuple[list[Tensor], str]:
    model = network(sharded=True)
    optimizer = steepest.Muon(model)
    found = train(model, torch.compile(optimizer.step, backend="eager"))
    torch._dynamo.reset()
    return found, message(torch.compile(optimizer.step, backend="eager", fullgraph=True))


def test_a_compiled_step_stays_as_it_is(processes: Processes, alone: list[Tensor]) -> None:
    for found, text in processes.run(compiled, ranks=2):
        check_equal(found, alone)
        assert "cannot be traced by torch.compile with sharded parameters" in text
