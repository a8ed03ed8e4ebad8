"""What one rank alone cannot do, all ranks refuse together, before anything is written; none waits for another."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard, distribute_tensor

import steepest
from steepest.optimizer import MatrixOptimizer
from steepest.optimizer.shards import Shards
from steepest.sharding.local import local_tensor
from support.processes import Processes
from support.training import noise

NAMES, ROWS = ("a", "b"), (Shard(0),)


def parameter(seed: int, *shape: int, sizes: tuple[int, ...] = (2,), placements: Any = ROWS) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(noise(shape, seed), init_device_mesh("cpu", sizes), list(placements)))


def made(params: list[nn.Parameter], **values: Any) -> MatrixOptimizer:
    return steepest.Muon([{"params": params, "param_names": [f"layer.{i}" for i in range(len(params))]}], **values)


def with_gradients(params: list[nn.Parameter]) -> list[nn.Parameter]:
    for p in params:
        p.grad = torch.ones_like(p)
    return params


def said(call: Callable[[], object], *params: nn.Parameter) -> tuple[str, bool]:
    """(the error's text, whether the parameters are as they were)."""
    before = [p.to_local().clone() for p in params]  # type: ignore[attr-defined]
    with pytest.raises((RuntimeError, ValueError, TypeError, ArithmeticError)) as error:
        call()
    return str(error.value), all(map(torch.equal, before, (p.to_local() for p in params)))  # type: ignore[attr-defined]


# ---- the constructor and the calls that follow it --------------------------------------------------------------------


def bad_number() -> tuple[str, bool]:
    p = parameter(0, 6, 4)
    return said(lambda: made([p], lr=-1.0 if dist.get_rank() == 1 else 0.1), p)


def bad_choice() -> tuple[str, bool]:
    p = parameter(0, 6, 4)
    return said(lambda: made([p], polar="nothing" if dist.get_rank() == 1 else "auto"), p)


def bad_number_of_shared_work() -> tuple[str, bool]:
    p = nn.Parameter(torch.ones(6, 4))
    text, _ = said(lambda: made([p], share_work=True, lr=-1.0 if dist.get_rank() == 1 else 0.1))
    return text, True


def bad_group() -> tuple[str, bool]:
    p = parameter(0, 6, 4)
    groups = [{"params": [p], "use_muon": True, "num_heads": 5 if dist.get_rank() == 1 else None}]
    return said(lambda: steepest.Muon(iter(groups)), p)


def unknown_argument() -> tuple[str, bool]:
    p = parameter(0, 6, 4)
    more: Any = {"no_such_argument": 1} if dist.get_rank() == 1 else {}
    return said(lambda: steepest.Muon(iter([p]), lr=0.1, **more), p)


def unknown_argument_of_shared_work() -> tuple[str, bool]:
    p = nn.Parameter(torch.ones(6, 4))
    more: Any = {"no_such_argument": 1} if dist.get_rank() == 1 else {}
    return said(lambda: steepest.SOAP([p], share_work=True, **more))[0], True


def bad_bound() -> tuple[str, bool]:
    p = parameter(0, 6, 4)
    return said(lambda: steepest.MuonMax([p], lower_bound="low" if dist.get_rank() == 1 else 0.0), p)  # type: ignore[arg-type]


def late_group() -> tuple[str, bool]:
    p, q = parameter(0, 6, 4), parameter(1, 6, 4)
    optimizer = made([p])
    lr = -1.0 if dist.get_rank() == 1 else 0.1
    text, kept = said(lambda: optimizer.add_param_group({"params": [("late", q)], "use_muon": True, "lr": lr}), p)
    return text, kept and len(optimizer.param_groups) == 1 and q not in optimizer.state


def prepared() -> tuple[str, bool]:
    params = with_gradients([parameter(0, 6, 4), parameter(1, 6, 4)])
    optimizer = made(params)
    if dist.get_rank() == 1:
        optimizer.param_groups[0]["momentum"] = -1.0
    return said(optimizer.prepare, *params)


def stepping(cls: type[MatrixOptimizer], step: Callable[[MatrixOptimizer, bool], object]) -> tuple[str, bool]:
    """What a step says of which this rank, where it is rank 1, cannot have the loss."""
    params = with_gradients([parameter(0, 6, 4), parameter(1, 6, 4)])
    optimizer = cls([{"params": params}], **({"lower_bound": 0.0} if cls is steepest.MuonMax else {}))  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return said(lambda: step(optimizer, dist.get_rank() == 1), *params)


def evaluated(fails: bool, what: Any) -> float:
    if fails and isinstance(what, Exception):
        raise what
    return what if fails else 1.0


def closure_raises() -> tuple[str, bool]:
    error = ZeroDivisionError("of a batch")
    return stepping(steepest.Muon, lambda optimizer, fails: optimizer.step(lambda: evaluated(fails, error)))


def closure_gives_nothing() -> tuple[str, bool]:
    return stepping(steepest.MuonMax, lambda optimizer, fails: optimizer.step(lambda: evaluated(fails, None)))


def no_loss() -> tuple[str, bool]:
    return stepping(steepest.MuonMax, lambda optimizer, fails: optimizer.step(**({} if fails else {"loss": 1.0})))  # type: ignore[arg-type]


def many_losses() -> tuple[str, bool]:
    return stepping(steepest.MuonMax, lambda optimizer, fails: optimizer.step(loss=torch.ones(1 + fails)))  # type: ignore[call-arg]


#: The calls, with what an error says: of the call on the others, of the reason on all.
CALLS: tuple[tuple[Callable[[], tuple[str, bool]], str, str], ...] = (
    (bad_number, "the constructor", "Learning rate should be >= 0 but is: -1.0"),
    (bad_choice, "the constructor", "polar='nothing'"),
    (bad_number_of_shared_work, "the constructor", "Learning rate should be >= 0 but is: -1.0"),
    (bad_group, "the constructor", "num_heads=5"),
    (unknown_argument, "the constructor", "no_such_argument"),
    (unknown_argument_of_shared_work, "the constructor", "no_such_argument"),
    (bad_bound, "the constructor", "lower_bound"),
    (late_group, "add_param_group()", "Learning rate should be >= 0 but is: -1.0"),
    (prepared, "the step", "momentum"),
    (closure_raises, "the step", "of a batch"),
    (closure_gives_nothing, "the step", "the closure returned None: let it return the loss"),
    (no_loss, "the step", "MuonMax has a lower bound and needs the loss"),
    (many_losses, "the step", "the loss should have one element but has 2"),
)


def calls(device: bool) -> list[tuple[str, bool]]:
    """device: ranks agree as they do where the host would have to wait, which of first steps makes no difference."""
    if device:
        Shards._agrees_on_host = False  # type: ignore[assignment,method-assign]
    return [call() for call, _, _ in CALLS]


@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
def test_a_call_that_one_rank_refuses(processes: Processes, device: bool) -> None:
    for rank, results in enumerate(processes.run(calls, device, ranks=2, group_timeout=20)):
        for (_, call, why), (text, kept) in zip(CALLS, results, strict=True):
            assert why in text
            assert kept
            assert rank == 1 or f"rank 1 cannot go on with {call}: " in text


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def broken(saved: dict[str, Any], how: str) -> Any:
    state = saved["state"][1]
    if how == "no dictionary":
        return [saved]
    if how == "lacks an entry":
        del saved["state"][1]
    elif how == "lacks a tensor":
        del state["step"]
    elif how == "of another shape":
        state["momentum_buffer"] = torch.zeros(3)
    elif how == "not finite":
        state["momentum_buffer"] = torch.full_like(state["momentum_buffer"], torch.inf)
    else:
        saved["param_groups"][0]["lr"] = -1.0
    return saved


#: What rank 1 does to a checkpoint, and what is said of it on all ranks.
BROKEN = {
    "no dictionary": "load_state_dict takes what state_dict() gives",
    "lacks an entry": "ranks load different states: rank 0 has parameter 'layer.1' with ",
    "lacks a tensor": "the checkpoint's state of parameter 'layer.1'",
    "of another shape": "ranks load different states: rank 0 has parameter 'layer.1' with momentum_buffer",
    "not finite": "the checkpoint's 'momentum_buffer' of parameter 'layer.1' is not finite",
    "a bad option": "the checkpoint's group 0: Learning rate should be >= 0 but is: -1.0",
}


def loads(cls: type[MatrixOptimizer]) -> list[tuple[str, bool]]:
    """What this rank is told, and whether state and options are as they were."""
    params = with_gradients([parameter(0, 6, 4), parameter(1, 6, 4)])
    optimizer = cls([{"params": params, "param_names": ["layer.0", "layer.1"]}])
    optimizer.step()
    results = []
    for how in BROKEN:
        saved = optimizer.state_dict()
        given = broken(saved, how) if dist.get_rank() == 1 else saved
        before = tensors_of(optimizer)
        optimizer.param_groups[0]["lr"] = 0.3
        text, _ = said(lambda given=given: optimizer.load_state_dict(given))
        same = all(map(torch.equal, before, tensors_of(optimizer)))
        results.append((text, same and optimizer.param_groups[0]["lr"] == 0.3))
    return results


def tensors_of(optimizer: MatrixOptimizer) -> list[Tensor]:
    state = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
    return [local_tensor(of_parameter[key]).clone() for of_parameter in state for key in sorted(of_parameter)]


@pytest.mark.parametrize("cls", [steepest.MuAdam, steepest.SOAP], ids=lambda cls: cls.__name__)
def test_a_checkpoint_that_one_rank_refuses(processes: Processes, cls: type[MatrixOptimizer]) -> None:
    for rank, results in enumerate(processes.run(loads, cls, ranks=2, group_timeout=20)):
        for why, (text, kept) in zip(BROKEN.values(), results, strict=True):
            assert why in text
            assert kept
            assert rank == 1 or why.startswith("ranks") or "rank 1 cannot go on with load_state_dict(): " in text


# ---- ranks that share no shard ---------------------------------------------------------------------------------------

REPLICAS = {"sizes": (2, 2), "placements": (Replicate(), Shard(0))}


def replicas_of_other_options() -> tuple[str, bool]:
    p = parameter(0, 6, 4, **REPLICAS)  # type: ignore[arg-type]
    return said(lambda: made([p], lr=0.1 if dist.get_rank() < 2 else 0.2), p)


def a_replica_cannot() -> tuple[str, bool]:
    [p] = with_gradients([parameter(0, 6, 4, **REPLICAS)])  # type: ignore[arg-type]
    optimizer = made([p])
    if dist.get_rank() == 3:
        optimizer.param_groups[0]["lr"] = float("nan")
    return said(optimizer.step, p)


def a_replica_lacks_gradients() -> tuple[str, bool]:
    params = with_gradients([parameter(i, 6, 4, **REPLICAS) for i in range(2)])  # type: ignore[arg-type]
    optimizer = made(params)
    if dist.get_rank() >= 2:
        params[1].grad = None
    return said(optimizer.step, *params)


def replicated_alone() -> tuple[str, bool]:
    params = with_gradients([parameter(i, 6, 4, sizes=(4,), placements=[Replicate()]) for i in range(2)])
    optimizer = made(params)
    if dist.get_rank() == 3:
        params[1].grad = None
    return said(optimizer.step, *params)


def along_rows_and_columns() -> tuple[str, bool]:
    """Rank 3 shares a parameter with 1 and one with 2, and none with 0."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=NAMES)
    params = [nn.Parameter(distribute_tensor(noise((6, 4), i), mesh[name], [Shard(0)])) for i, name in enumerate(NAMES)]
    optimizer = made(with_gradients(params))
    if dist.get_rank() == 3:
        optimizer.param_groups[0]["lr"] = float("nan")
    return said(optimizer.step, *params)


SETS: dict[Callable[[], tuple[str, bool]], str] = {
    replicas_of_other_options: "rank 0 has group 0 with lr=0.1 and rank 2 has group 0 with lr=0.2",
    a_replica_cannot: "rank 3 cannot go on with the step: ValueError: group 0: Learning rate",
    a_replica_lacks_gradients: "rank 2 has parameter 'layer.1' (group 0)",
    replicated_alone: "rank 3 has parameter 'layer.1' (group 0)",
    along_rows_and_columns: "rank 3 cannot go on with the step: ValueError: group 0: Learning rate",
}


def sets() -> list[tuple[str, bool]]:
    return [case() for case in SETS]


def test_ranks_without_a_common_shard(processes: Processes) -> None:
    for results in processes.run(sets, ranks=4, timeout=60):
        for why, (text, kept) in zip(SETS.values(), results, strict=True):
            assert why in text
            assert kept


# ---- sums that were never reduced ------------------------------------------------------------------------------------


def partial_gradients(lacking: bool) -> tuple[str, Tensor | None]:
    """(the error of prepare() where rank 1 lacks the gradient, the gradient of this rank after it)."""
    placement: Placement = Replicate()
    p = parameter(0, 6, 4, placements=[placement])
    optimizer = made([p])
    if not (lacking and dist.get_rank() == 1):
        ones = torch.ones(6, 4)
        p.grad = torch.distributed.tensor.DTensor.from_local(ones, p.device_mesh, [Partial()])  # type: ignore[attr-defined]
    text = said(optimizer.prepare, p)[0] if lacking else str(optimizer.prepare())
    return text, None if p.grad is None else p.grad.to_local()  # type: ignore[attr-defined]


def test_prepare_sums_partial_gradients(processes: Processes) -> None:
    for _, g in processes.run(partial_gradients, False, ranks=2):
        assert torch.equal(g, torch.full((6, 4), 2.0))


def test_a_partial_gradient_that_one_rank_lacks(processes: Processes) -> None:
    for text, _ in processes.run(partial_gradients, True, ranks=2, group_timeout=20):
        assert "parameter 'layer.0' (group 0)" in text
        assert "with no gradient" in text
