"""Every optimizer on parameters of `fully_shard`: the bits of one process, whatever the placements and the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

import steepest
from steepest.optimizer import MatrixOptimizer
from support.processes import Processes
from support.sharded import GPT, backward, different, digest, full, optimizer, shard, train
from support.slow import slow
from support.training import EVERY, KINDS

#: One of each way in which state may lie: elementwise and with factors at owners, elementwise alone, by rows.
SOME = (slow(steepest.Muon), slow(steepest.MuAdam), steepest.SOAP, slow(steepest.Schattor), slow(steepest.Dion2))
OPTIONS: dict[str, dict[str, Any]] = {
    "SOAP": {"precondition_frequency": 2},
    "KLSOAP": {"precondition_frequency": 2},
    "Shampoo": {"precondition_frequency": 2},
}
Weights = dict[str, Tensor]


def name_of(cls: type[Any]) -> str:
    return cls.__name__


def options_of(cls: type[Any]) -> dict[str, Any]:
    return OPTIONS.get(cls.__name__, {})


# ---- every class ----------------------------------------------------------------------------------------------------


def of_every_class(sharded: bool, classes: list[type[MatrixOptimizer]]) -> dict[str, Weights | str]:
    """Weights after six steps by class, or why one does not take these parameters, which it says on construction."""
    found: dict[str, Weights | str] = {}
    for cls in classes:
        model = shard(GPT()) if sharded else GPT()
        try:
            made = optimizer(cls, model, **options_of(cls))
        except ValueError as error:
            found[cls.__name__] = str(error)
            continue
        try:
            train(model, made)
        except Exception as error:
            raise RuntimeError(f"in {cls.__name__}: {error}") from error
        found[cls.__name__] = full(model)
    return found


#: Those that measure whole weights.
REFUSED = {steepest.Fromage}
#: Prodigy's step size is of sums over ranks.
SOME_OF_ALL = (*KINDS, steepest.ProdigyMuon)


@pytest.mark.parametrize("classes, ranks", [slow(EVERY, 1), (SOME_OF_ALL, 2), slow(EVERY, 4)], ids=["1", "2", "4"])
def test_six_steps_give_the_bits_of_one_process(
    processes: Processes, classes: Sequence[type[MatrixOptimizer]], ranks: int
) -> None:
    alone = processes.alone(of_every_class, False, list(classes))
    wrong = []
    for rank, found in enumerate(processes.run(of_every_class, True, list(classes), ranks=ranks, timeout=300)):
        for cls in classes:
            weights, wanted = found[cls.__name__], alone[cls.__name__]
            assert not isinstance(wanted, str)
            if cls in REFUSED:
                assert isinstance(weights, str)
                assert f"{cls.__name__} measures whole weights and updates" in weights
                assert "use DistributedDataParallel" in weights
            elif isinstance(weights, str) or digest(weights) != digest(wanted):
                text = weights if isinstance(weights, str) else different(weights, wanted)
                wrong.append(f"{cls.__name__} on rank {rank}: {text}")
    assert not wrong, "\n".join(wrong)


# ---- other placements -----------------------------------------------------------------------------------------------


def alone_of(cls: type[MatrixOptimizer], tied: bool = False, **values: Any) -> Weights:
    model = GPT(tied=tied)
    train(model, optimizer(cls, model, **options_of(cls), **values))
    return full(model)


def by_columns(p: nn.Parameter) -> Shard:
    """Of experts too; of a convolution's channels, as its kernel cannot be cut."""
    return Shard(p.ndim - 1 if p.shape[-1] > 3 else 1)


def by_largest_dimension(p: nn.Parameter) -> Shard:
    return Shard(max(range(p.ndim), key=lambda d: p.shape[d]))


def placed(cls: type[MatrixOptimizer], placement: Any) -> Weights:
    model = shard(GPT(), shard_placement_fn=placement)
    assert any(p.placements == (Shard(1),) for p in model.parameters() if isinstance(p, DTensor))
    train(model, optimizer(cls, model, **options_of(cls)))
    return full(model)


def of_a_cut_kernel() -> str:
    model = nn.Sequential(nn.Conv1d(12, 6, 4, bias=False))
    fully_shard(model, shard_placement_fn=lambda p: Shard(2))
    with pytest.raises(ValueError, match="is sharded, which cuts every row") as error:
        steepest.Muon(model)
    return str(error.value)


def test_shards_that_cut_a_kernel_are_refused_by_name(processes: Processes) -> None:
    for text in processes.run(of_a_cut_kernel, ranks=2):
        assert text.startswith("parameter '0.weight' of shape (6, 12, 4) with placements (Shard(dim=2),): ")
        assert text.endswith("shard dimension 0 or 1")


def on_a_mesh(cls: type[MatrixOptimizer], replicas: int, shards: int) -> Weights:
    """Replicas of sharded models, HSDP."""
    mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))
    model = shard(GPT(), mesh=mesh)
    train(model, optimizer(cls, model, **options_of(cls)))
    return full(model)


def tied(cls: type[MatrixOptimizer]) -> Weights:
    model = shard(GPT(tied=True))
    train(model, optimizer(cls, model, **options_of(cls)))
    return full(model)


def sharded_of(cls: type[MatrixOptimizer], **values: Any) -> Weights:
    model = shard(GPT())
    train(model, optimizer(cls, model, **options_of(cls), **values))
    return full(model)


def check(ranks: list[Weights], wanted: Weights) -> None:
    for rank, weights in enumerate(ranks):
        assert digest(weights) == digest(wanted), f"rank {rank}: {different(weights, wanted)}"


@pytest.mark.parametrize("placement", [by_columns, slow(by_largest_dimension)], ids=name_of)
@pytest.mark.parametrize("cls", SOME, ids=name_of)
def test_shards_of_columns(processes: Processes, cls: type[MatrixOptimizer], placement: Any) -> None:
    wanted = processes.alone(alone_of, cls)
    check(processes.run(placed, cls, placement, ranks=2), wanted)


@pytest.mark.parametrize("replicas, shards", [(2, 2), slow(4, 1), slow(1, 4)])
@pytest.mark.parametrize("cls", SOME, ids=name_of)
def test_replicas_of_shards(processes: Processes, cls: type[MatrixOptimizer], replicas: int, shards: int) -> None:
    wanted = processes.alone(alone_of, cls)
    check(processes.run(on_a_mesh, cls, replicas, shards, ranks=4), wanted)


@pytest.mark.parametrize("cls", SOME, ids=name_of)
def test_a_head_that_is_the_embedding(processes: Processes, cls: type[MatrixOptimizer]) -> None:
    wanted = processes.alone(alone_of, cls, True)
    check(processes.run(tied, cls, ranks=2), wanted)


@pytest.mark.parametrize(
    "values",
    [
        {"backend": "torch", "cautious_wd": True},
        slow({"polar": "auto"}),
        slow({"maximize": True, "weight_decay": 0.0}),
        slow({"adjust_lr_fn": "match_rms_adamw"}),
        slow({"foreach": False}),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [slow(steepest.Muon), steepest.MuAdam], ids=name_of)
def test_options_of_every_optimizer(processes: Processes, cls: type[MatrixOptimizer], values: dict[str, Any]) -> None:
    if cls is steepest.MuAdam and "polar" not in values:
        values = {**values, "momentum_dtype": torch.bfloat16}
    wanted = processes.alone(alone_of, cls, **values)
    check(processes.run(sharded_of, cls, ranks=2, **values), wanted)


@pytest.mark.parametrize("cls", [steepest.Muon, slow(steepest.MuonMax)], ids=name_of)
def test_directions_that_would_go_straight_into_weights(processes: Processes, cls: type[MatrixOptimizer]) -> None:
    """fuse_update is for matrices that one process has: of shared ones the directions travel back first."""
    wanted = processes.alone(alone_of, cls)
    check(processes.run(sharded_of, cls, ranks=2, fuse_update=True), wanted)


# ---- gradients ------------------------------------------------------------------------------------------------------


def local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def with_nan(cls: type[MatrixOptimizer], sharded: bool, names: tuple[str, ...]) -> tuple[Weights, int]:
    """A NaN in the gradients of these parameters in steps 1 and 3, in the shard of the last rank alone."""
    model = shard(GPT()) if sharded else GPT()
    last = dist.get_rank() == dist.get_world_size() - 1

    def spoil(model: nn.Module, step: int) -> None:
        if step in (1, 3) and last:
            for name in names:
                grad = local(dict(model.named_parameters())[name].grad)  # type: ignore[arg-type]
                grad.view(-1)[-1] = torch.nan

    made = optimizer(cls, model, **options_of(cls))
    train(model, made, before=spoil)
    return full(model), int(sum(count.item() for count in made.skipped_updates().values()))


@pytest.mark.parametrize("cls", SOME, ids=name_of)
def test_a_nan_on_one_rank_skips_its_parameter_on_all(processes: Processes, cls: type[MatrixOptimizer]) -> None:
    names = ("blocks.0.up.weight", "blocks.1.qkv.weight", "embedding.weight", "blocks.0.qkv.bias")
    wanted, skipped = processes.alone(with_nan, cls, False, names)
    assert skipped == 2 * len(names)
    ranks = processes.run(with_nan, cls, True, names, ranks=2)
    check([weights for weights, _ in ranks], wanted)
    assert [count for _, count in ranks] == [skipped] * 2


def without_gradient(cls: type[MatrixOptimizer], sharded: bool) -> Weights:
    """Two parameters without a gradient in the first steps, on all ranks."""
    model = shard(GPT()) if sharded else GPT()

    def drop(model: nn.Module, step: int) -> None:
        if step < 2:
            model.blocks[1].up.weight.grad = model.norm.bias.grad = None  # type: ignore[index, union-attr]

    train(model, optimizer(cls, model, **options_of(cls)), before=drop)
    return full(model)


@pytest.mark.parametrize("cls", SOME, ids=name_of)
def test_gradients_that_come_late(processes: Processes, cls: type[MatrixOptimizer]) -> None:
    wanted = processes.alone(without_gradient, cls, False)
    check(processes.run(without_gradient, cls, True, ranks=2), wanted)


def one_rank_lacks_a_gradient(cls: type[MatrixOptimizer], first: int) -> tuple[str, bool]:
    """The error of a step where rank 1 has lost a gradient, and whether weights and state stayed as they were."""
    model = shard(GPT())
    made = optimizer(cls, model, **options_of(cls))
    train(model, made, range(first))
    made.zero_grad()
    backward(model, first)
    if dist.get_rank() == 1:
        model.blocks[0].proj.weight.grad = None  # type: ignore[union-attr]
    before = [local(p).clone() for p in model.parameters()]
    try:
        made.step()
    except RuntimeError as error:
        return str(error), all(torch.equal(local(p), b) for p, b in zip(model.parameters(), before, strict=True))
    return "", False


@pytest.mark.parametrize(
    "cls, first", [(steepest.MuAdam, 2), (steepest.SOAP, 0), slow(steepest.MuAdam, 0), slow(steepest.SOAP, 2)]
)
def test_a_gradient_that_one_rank_lacks_is_an_error_on_all(
    processes: Processes, cls: type[MatrixOptimizer], first: int
) -> None:
    for text, unchanged in processes.run(one_rank_lacks_a_gradient, cls, first, ranks=2):
        assert "blocks.0.proj.weight" in text
        assert unchanged


def accumulated(cls: type[MatrixOptimizer], sharded: bool) -> Weights:
    """Gradients of three batches a step, which are reduced after the last."""
    model: Any = shard(GPT()) if sharded else GPT()
    made = optimizer(cls, model, **options_of(cls))
    for step in range(4):
        made.zero_grad()
        for micro in range(3):
            if sharded:
                model.set_requires_gradient_sync(micro == 2)
            backward(model, 3 * step + micro)
        made.step()
    return full(model)


@pytest.mark.parametrize("cls", [slow(steepest.MuAdam), steepest.SOAP], ids=name_of)
def test_accumulated_gradients(processes: Processes, cls: type[MatrixOptimizer]) -> None:
    wanted = processes.alone(accumulated, cls, False)
    check(processes.run(accumulated, cls, True, ranks=2), wanted)


def clipped(cls: type[MatrixOptimizer], sharded: bool) -> Weights:
    model: Any = GPT().double()
    model = shard(model) if sharded else model
    made = optimizer(cls, model, **options_of(cls))
    norms = []

    def clip(model: nn.Module, step: int) -> None:
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))

    train(model, made, before=clip)
    assert all(float(local(norm)) > 0.1 for norm in norms)
    return full(model)


@pytest.mark.parametrize("cls", [slow(steepest.Muon), steepest.MuAdam], ids=name_of)
def test_clipped_gradients(processes: Processes, cls: type[MatrixOptimizer]) -> None:
    """The norm is a sum over ranks, in another order: not the same bits."""
    wanted = processes.alone(clipped, cls, False)
    for weights in processes.run(clipped, cls, True, ranks=2):
        for name, t in weights.items():
            torch.testing.assert_close(t, wanted[name], rtol=1e-8, atol=1e-9)


# ---- policies of fully_shard ----------------------------------------------------------------------------------------


def in_bf16(cls: type[MatrixOptimizer], sharded: bool, reduce: torch.dtype) -> Weights:
    """Forward and backward in bf16 of fp32 parameters."""
    model: Any = GPT()
    if sharded:
        shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce))
    made = optimizer(cls, model, **options_of(cls))
    for step in range(6):
        made.zero_grad()
        if sharded:
            backward(model, step)
        else:
            narrow = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
            backward(model, step, lambda tokens, narrow=narrow: torch.func.functional_call(model, narrow, (tokens,)))
        made.step()
    return full(model)


@pytest.mark.parametrize(
    "cls, reduce",
    [
        (steepest.MuAdam, torch.bfloat16),
        slow(steepest.MuAdam, torch.float32),
        slow(steepest.SOAP, torch.float32),
        slow(steepest.SOAP, torch.bfloat16),
    ],
)
def test_mixed_precision(processes: Processes, cls: type[MatrixOptimizer], reduce: torch.dtype) -> None:
    wanted = processes.alone(in_bf16, cls, False, reduce)
    check(processes.run(in_bf16, cls, True, reduce, ranks=2), wanted)


def of_bf16(cls: type[MatrixOptimizer], sharded: bool, values: dict[str, Any], steps: int = 6) -> Weights:
    model: Any = GPT().bfloat16()
    model = shard(model) if sharded else model
    train(model, optimizer(cls, model, **options_of(cls), **values), range(steps))
    return full(model)


@pytest.mark.parametrize(
    "cls, values",
    [
        (steepest.MuAdam, {"keep_mantissa": True}),
        slow(steepest.MuAdam, {}),
        slow(steepest.SOAP, {}),
        slow(steepest.SOAP, {"keep_mantissa": True}),
    ],
)
def test_parameters_in_bf16(processes: Processes, cls: type[MatrixOptimizer], values: dict[str, Any]) -> None:
    wanted = processes.alone(of_bf16, cls, False, values)
    check(processes.run(of_bf16, cls, True, values, ranks=2), wanted)


@pytest.mark.parametrize("cls", [steepest.MuAdam, slow(steepest.SOAP)], ids=name_of)
def test_stochastic_rounding_is_to_one_of_two_neighbours(processes: Processes, cls: type[MatrixOptimizer]) -> None:
    """The dice of a shard are its own: not those of the whole tensor."""
    values = {"stochastic_rounding": True}
    wanted = processes.alone(of_bf16, cls, False, values, 1)
    first, second = processes.run(of_bf16, cls, True, values, 1, ranks=2)
    assert digest(first) == digest(second)
    for name, t in first.items():
        gap, spacing = (t.float() - wanted[name].float()).abs(), 2.0**-7 * torch.maximum(t.abs(), wanted[name].abs())
        assert bool((gap <= spacing.float()).all()), name


def offloaded(cls: type[MatrixOptimizer]) -> Weights:
    model = shard(GPT(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    train(model, optimizer(cls, model, **options_of(cls)))
    return full(model)


@pytest.mark.parametrize("cls", [steepest.MuAdam], ids=name_of)
def test_offloaded_parameters(processes: Processes, cls: type[MatrixOptimizer]) -> None:
    wanted = processes.alone(alone_of, cls)
    check(processes.run(offloaded, cls, ranks=2), wanted)
