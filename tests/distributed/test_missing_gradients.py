"""A gradient that one rank lacks, or has alone, where the host reads nothing: no rank steps its parameter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import steepest
from steepest.optimizer.shards import Shards
from steepest.sharding.agreement import Agreement
from steepest.sharding.local import is_sharded, local_tensor
from support.host_reads import no_host_reads
from support.processes import Processes
from support.slow import slow
from support.training import noise

STEPS = 5
#: Even, uneven and empty shards, one of which AdamW takes.
SHAPES = ((8, 6), (7, 5), (1, 9), (5,))
#: At which step which ranks lack the gradient of which parameter.
Lacking = Mapping[int, Collection[tuple[int, int]]]


class Ran(NamedTuple):
    weights: list[Tensor]
    warned: list[str]
    skipped: int
    reads: list[bool]


def as_on_a_device() -> None:
    """Has ranks agree as they do where the host would have to wait for what they say. Of this process."""
    Shards._agrees_on_host = False  # type: ignore[assignment,method-assign]


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if is_sharded(t) else t).detach().clone()  # type: ignore[attr-defined]


def parameters(sizes: tuple[int, ...], shapes: Collection[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    """On a mesh of these sizes, cut along its last dimension and copied along others; no sizes: plain ones."""
    params = [nn.Parameter(noise(shape, i)) for i, shape in enumerate(shapes)]
    if not sizes:
        return params
    mesh = init_device_mesh("cpu", sizes)
    placements = [*[Replicate()] * (len(sizes) - 1), Shard(0)]
    return [nn.Parameter(distribute_tensor(p.detach(), mesh, placements)) for p in params]


def optimizer_of(cls: Callable[..., Any], params: list[nn.Parameter], **options: Any) -> Any:
    groups = [
        {"params": [(f"layer.{i}", p) for i, p in enumerate(params) if (p.ndim > 1) == use_muon], "use_muon": use_muon}
        for use_muon in (True, False)
    ]
    return cls([group for group in groups if group["params"]], **options)


def give_gradients(params: list[nn.Parameter], step: int, lacking: Lacking) -> None:
    for i, p in enumerate(params):
        g = noise(tuple(p.shape), 100 * step + i)
        like: Any = p
        g = distribute_tensor(g, like.device_mesh, like.placements) if is_sharded(p) else g  # all ranks together
        p.grad = None if (dist.get_rank(), i) in lacking.get(step, ()) else g


def trained(
    cls: Callable[..., Any],
    lacking: Lacking,
    *,
    device: bool,
    sizes: tuple[int, ...] = (2,),
    told: bool = False,
    **options: Any,
) -> Ran:
    """Some steps, on this rank. device: as on one.   told: the loss."""
    if device:
        as_on_a_device()
    reads: list[bool] = []
    any_of = Agreement.any

    def noted(self: Agreement, said: bool, flags: Any) -> Any:
        reads.append(not said)
        return any_of(self, said, flags)

    Agreement.any = noted  # type: ignore[method-assign]
    params = parameters(sizes)
    optimizer = optimizer_of(cls, params, lr=0.1, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            give_gradients(params, step, lacking)
            there = [p.grad for p in params]
            optimizer.step(**({"loss": 3.0 - step} if told else {}))
            assert all(p.grad is g for p, g in zip(params, there, strict=True))
    return Ran(
        [whole(p) for p in params],
        [str(w.message) for w in caught],
        sum(map(int, optimizer.skipped_updates().values())),
        reads,
    )


METHODS = ["Muon", slow("SOAP"), "MuAdam", slow("Shampoo"), "NorMuon", slow("Dion2"), slow("Schattor"), slow("Lion")]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("i", [0, slow(1), 3])
def test_a_gradient_that_one_rank_lacks(processes: Processes, name: str, i: int) -> None:
    """The weights are those of all ranks without the gradient, which find that out by themselves."""
    cls = getattr(steepest, name)
    found = processes.run(trained, cls, {2: [(1, i)]}, device=True, ranks=2, group_timeout=20)
    wanted = processes.run(trained, cls, {2: [(0, i), (1, i)]}, device=False, ranks=2)
    for rank, (ran, reference) in enumerate(zip(found, wanted, strict=True)):
        assert all(map(torch.equal, ran.weights, reference.weights))
        assert ran.skipped == 1
        # The first step is agreed on; later ones are read by the rank alone whose gradients have changed.
        assert ran.reads == [True, False, rank == 1, False, False]
        assert len(ran.warned) == rank
    assert f"'layer.{i}'" in found[1].warned[0]
    assert "no gradient on rank 1" in found[1].warned[0]


OPTIONS: list[dict[str, Any]] = [
    *({"average": 0.8}, {"state_bits": 8}, {"constraint": "frobenius", "weight_decay": 0.0}),
    *({"variance_reduction": 0.05}, {"backend": "torch"}, {"max_workspace_bytes": 500}, {"cautious_update": True}),
]


@pytest.mark.parametrize("options", [OPTIONS[0], *map(slow, OPTIONS[1:])], ids=str)
def test_what_else_a_step_writes(processes: Processes, options: dict[str, Any]) -> None:
    found = processes.run(trained, steepest.MuAdam, {2: [(1, 0)]}, device=True, ranks=2, group_timeout=20, **options)
    everyone = {2: [(0, 0), (1, 0)]}
    wanted = processes.run(trained, steepest.MuAdam, everyone, device=False, ranks=2, **options)
    for ran, reference in zip(found, wanted, strict=True):
        assert all(map(torch.equal, ran.weights, reference.weights))


def test_a_gradient_that_one_rank_has_alone(processes: Processes) -> None:
    late = {step: [(0, 0), (1, 0)] for step in range(STEPS)}
    found = processes.run(trained, steepest.SOAP, {**late, 2: [(0, 0)]}, device=True, ranks=2, group_timeout=20)
    wanted = processes.run(trained, steepest.SOAP, late, device=False, ranks=2)
    for ran, reference in zip(found, wanted, strict=True):
        assert all(map(torch.equal, ran.weights, reference.weights))
        assert ran.skipped == 0
    assert "a gradient on rank 1 and none on another rank" in found[1].warned[0]


def test_late_and_lost_gradients_of_all_ranks(processes: Processes) -> None:
    """Where all change alike, all agree anew, and nothing is skipped."""
    lacking = {0: [(0, 0), (1, 0)], 3: [(0, 1), (1, 1), (0, 3), (1, 3)]}
    found = processes.run(trained, steepest.SOAP, lacking, device=True, ranks=2, group_timeout=20)
    wanted = processes.run(trained, steepest.SOAP, lacking, device=False, ranks=2)
    for ran, reference in zip(found, wanted, strict=True):
        assert all(map(torch.equal, ran.weights, reference.weights))
        assert (ran.skipped, ran.warned) == (0, [])
        assert ran.reads == [True, True, False, True, True]


def test_several_ranks_lack_several(processes: Processes) -> None:
    """As long as one goes on with the agreed step, here of 3, and twice in a row."""
    lacking = {2: [(0, 0), (1, 1)], 3: [(0, 0), (2, 2), (2, 3)]}
    everyone = {step: [(rank, i) for _, i in some for rank in range(3)] for step, some in lacking.items()}
    found = processes.run(trained, steepest.MuAdam, lacking, device=True, sizes=(3,), ranks=3, group_timeout=20)
    wanted = processes.run(trained, steepest.MuAdam, everyone, device=False, sizes=(3,), ranks=3)
    for ran, reference in zip(found, wanted, strict=True):
        assert all(map(torch.equal, ran.weights, reference.weights))
        assert ran.skipped == 5


def test_a_copy_of_the_shards_lacks_a_gradient(processes: Processes) -> None:
    """Under HSDP the ranks of other copies, which have every gradient, do not step the parameter either."""
    found = processes.run(trained, steepest.Muon, {2: [(2, 0), (3, 0)]}, device=True, sizes=(2, 2), ranks=4)
    everyone = {2: [(rank, 0) for rank in range(4)]}
    wanted = processes.run(trained, steepest.Muon, everyone, device=False, sizes=(2, 2), ranks=4)
    for ran, reference in zip(found, wanted, strict=True):
        assert all(map(torch.equal, ran.weights, reference.weights))
        assert ran.skipped == 1


def test_shared_work(processes: Processes) -> None:
    found = processes.run(trained, steepest.SOAP, {2: [(1, 0)]}, device=True, sizes=(), share_work=True, ranks=2)
    everyone = {2: [(0, 0), (1, 0)]}
    wanted = processes.run(trained, steepest.SOAP, everyone, device=False, sizes=(), share_work=True, ranks=2)
    for ran, reference in zip(found, wanted, strict=True):
        assert all(map(torch.equal, ran.weights[:3], reference.weights[:3]))


def test_truncated_steps(processes: Processes) -> None:
    """Layers that wait for one another wait for the same ones on all ranks."""
    options: dict[str, Any] = {"told": True, "lower_bound": 0.0, "ranks": 2, "group_timeout": 20}
    found = processes.run(trained, steepest.MuonMax, {2: [(1, 0)]}, device=True, **options)
    wanted = processes.run(trained, steepest.MuonMax, {2: [(0, 0), (1, 0)]}, device=False, **options)
    for ran, reference in zip(found, wanted, strict=True):
        assert all(map(torch.equal, ran.weights, reference.weights))


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(lacking: Lacking) -> tuple[str, bool]:
    """The error of the first step that has one, and whether weights are as they were before it."""
    as_on_a_device()
    params = parameters((2,))
    optimizer = optimizer_of(steepest.Muon, params)
    for step in range(STEPS):
        give_gradients(params, step, lacking)
        before = [local_tensor(p).clone() for p in params]
        try:
            optimizer.step()
        except RuntimeError as error:
            return str(error), all(map(torch.equal, before, map(local_tensor, params)))
    return "", False


@pytest.mark.parametrize("lacking", [{0: [(1, 1)]}, {2: [(0, 0), (1, 1)]}], ids=["at first", "no rank goes on"])
def test_all_refuse_together(processes: Processes, lacking: Lacking) -> None:
    for text, kept in processes.run(refused, lacking, ranks=2, group_timeout=20):
        assert "ranks are about to take different steps" in text
        assert "layer." in text
        assert "no gradient" in text
        assert kept


def changed_alone() -> str:
    as_on_a_device()
    params = parameters((2,))
    optimizer = optimizer_of(steepest.Muon, params)
    give_gradients(params, 0, {})
    optimizer.step()
    if dist.get_rank() == 0:
        return ""  # which would go on, and wait
    optimizer.param_groups[0]["nesterov"] = False
    Agreement.any = lambda self, said, flags: (torch.tensor(True), {r: torch.zeros(4) > 0 for r in flags})  # type: ignore[method-assign]
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    return str(error.value)


def test_an_option_that_one_rank_has_changed(processes: Processes) -> None:
    """It raises; the others wait for it until a time is over."""
    _, text = processes.run(changed_alone, ranks=2)
    assert "what this rank steps has changed, and what another rank steps has not" in text


# ---- sums that were never reduced, and reads -------------------------------------------------------------------------


def partial(lacking: bool) -> list[Tensor]:
    as_on_a_device()
    mesh = init_device_mesh("cpu", (2,))
    params = [nn.Parameter(distribute_tensor(noise((6, 4), i), mesh, [Replicate()])) for i in range(2)]
    optimizer = optimizer_of(steepest.Muon, params)
    for step in range(4):
        for i, p in enumerate(params):
            absent = i == 1 and step == 2 and (dist.get_rank() == 1 or not lacking)
            g = noise((6, 4), 10 * step + i + 100 * dist.get_rank())
            p.grad = None if absent else DTensor.from_local(g, mesh, [Partial()])  # type: ignore[assignment]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    return [whole(p) for p in params]


def test_a_partial_gradient_that_one_rank_lacks(processes: Processes) -> None:
    wanted = processes.run(partial, False, ranks=2, group_timeout=20)
    for found, reference in zip(processes.run(partial, True, ranks=2, group_timeout=20), wanted, strict=True):
        assert all(map(torch.equal, found, reference))


def steady() -> int:
    """Steps that go on with their plan, in which the host reads no tensor."""
    as_on_a_device()
    params = parameters((2,))
    optimizer = optimizer_of(steepest.Muon, params)
    give_gradients(params, 0, {})
    optimizer.step()
    with pytest.MonkeyPatch.context() as patch, no_host_reads(patch):
        for _ in range(2):
            optimizer.step()
    return 2


def test_steady_steps_read_nothing(processes: Processes) -> None:
    assert processes.run(steady, ranks=2, group_timeout=20) == [2, 2]
