"""QK-clip among ranks: maxima of all data, and of shards the rows that lie there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import steepest
from steepest.attention import AttentionLayer, max_logits
from support.processes import Processes
from support.sharded import GPT, HEADS, different, digest, full, optimizer, shard, train, whole
from support.slow import slow

#: Of every rank, block and step; -inf says nothing. Their maximum is what one process sees.
MAXIMA = [
    [[3.0, 0.5, 9.0], [-torch.inf, 1.5, 0.1]],
    [[0.2, 0.4, 16.0], [2.0, 1.0, -torch.inf]],
]


def layers_of(model: GPT) -> dict[str, AttentionLayer]:
    return {f"blocks.{i}": AttentionLayer.fused(block.qkv, HEADS) for i, block in enumerate(model.blocks)}  # type: ignore[arg-type]


def by_columns(p: nn.Parameter) -> Shard:
    return Shard(p.ndim - 1 if p.shape[-1] > 3 else 0)


def weights(sharded: bool, options: dict[str, Any], rows: bool = True, alone: bool = False) -> dict[str, Tensor]:
    """After three steps, each of which is clipped by other maxima."""
    model = shard(GPT(), shard_placement_fn=None if rows else by_columns) if sharded else GPT()
    made = optimizer(steepest.MuAdam, model, **options)
    clip = steepest.QKClip(made, layers_of(model), threshold=1.0)

    def hand_over(model: nn.Module, step: int) -> None:
        for i in range(2):
            said = torch.tensor(MAXIMA).amax(0)[i] if alone else torch.tensor(MAXIMA[dist.get_rank() % 2][i])
            clip.observe(f"blocks.{i}", said.roll(step))

    train(model, made, range(3), before=hand_over)
    assert clip.metrics()["max_logit"] == 16
    assert clip.metrics()["clipped_heads"] == 4
    return full(model)


@pytest.mark.parametrize(
    "sharded, ranks, rows", [(True, 2, True), (True, 2, False), (False, 2, True), slow(True, 4, True)]
)
def test_the_bits_of_one_process(processes: Processes, sharded: bool, ranks: int, rows: bool) -> None:
    """Shards that end inside of a head, shards of columns, and whole weights, as under DistributedDataParallel."""
    wanted = processes.alone(weights, False, {}, alone=True)
    for rank, found in enumerate(processes.run(weights, sharded, {}, rows, ranks=ranks)):
        assert digest(found) == digest(wanted), f"rank {rank}: {different(found, wanted)}"


def test_kept_mantissas_of_shards(processes: Processes) -> None:
    wanted = processes.alone(of_bf16, False)
    for found in processes.run(of_bf16, True, ranks=2):
        assert digest(found) == digest(wanted), different(found, wanted)


def of_bf16(sharded: bool) -> dict[str, Tensor]:
    model = GPT().bfloat16()
    model = shard(model) if sharded else model
    made = optimizer(steepest.Muon, model, keep_mantissa=True)
    clip = steepest.QKClip(made, layers_of(model), threshold=1.0)
    train(model, made, range(2), before=lambda *_: clip.observe("blocks.0", torch.tensor([3.0, 0.5, 7.0])))
    name = "blocks.0.qkv.weight"
    state = made.state[dict(model.named_parameters())[name]]
    return {**full(model), "mantissa": whole(state["mantissa"].int())}


def of_watched(sharded: bool) -> tuple[dict[str, Tensor], int]:
    model = shard(GPT()) if sharded else GPT()
    made = optimizer(steepest.Muon, model)
    clip = steepest.QKClip(made, layers_of(model), threshold=0.2)
    clip.watch(model)
    train(model, made, range(2))
    return full(model), int(clip.metrics()["clipped_heads"])


def test_a_sharded_model_is_watched(processes: Processes) -> None:
    wanted, clipped = processes.alone(of_watched, False)
    assert clipped
    for found, count in processes.run(of_watched, True, ranks=2):
        assert digest(found) == digest(wanted), different(found, wanted)
        assert count == clipped


def of_tensor_parallel(alone: bool) -> list[Tensor]:
    """Every rank has two of four heads, of queries and of keys, and sees those alone."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    generator = torch.Generator().manual_seed(0)
    whole_weights = [torch.randn(8, 6, generator=generator) for _ in range(2)]
    params = [nn.Parameter(w if alone else distribute_tensor(w, mesh, [Shard(0)])) for w in whole_weights]
    for p in params:
        g = torch.randn(8, 6, generator=generator)
        p.grad = g if alone else distribute_tensor(g, mesh, [Shard(0)])
    made = steepest.Muon(params, lr=0.02)
    clip = steepest.QKClip(made, {"a": AttentionLayer.separate(*params, num_heads=4)}, threshold=1.0)
    maxima = torch.tensor([4.0, 0.5, 2.0, 8.0])
    if alone:
        clip.observe("a", maxima)
    else:
        first = 2 * dist.get_rank()
        clip.observe("a", maxima[first : first + 2], first_head=first)
    made.step()
    return [whole(p).detach().clone() for p in params]


def test_heads_of_tensor_parallel_ranks(processes: Processes) -> None:
    wanted = processes.alone(of_tensor_parallel, True)
    for found in processes.run(of_tensor_parallel, False, ranks=2):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def of_dtensors(dim: int) -> tuple[Tensor, Tensor]:
    """Largest logits of queries and keys that are cut along a dimension, as the clip takes them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 3, generator=generator) for heads in (4, 2))
    params = [nn.Parameter(torch.randn(8, 6, generator=generator)) for _ in range(2)]
    clip = steepest.QKClip(steepest.Muon(params), {"a": AttentionLayer.separate(*params, num_heads=4)})
    clip.observe("a", max_logits(*(distribute_tensor(t, mesh, [Shard(dim)]) for t in (q, k)), is_causal=True))
    return clip._clipped["a"].maxima, max_logits(q, k, is_causal=True)


@pytest.mark.parametrize("dim", [0, 1], ids=["batch", "heads"])
def test_maxima_of_dtensors_are_those_of_all_ranks(processes: Processes, dim: int) -> None:
    for found, wanted in processes.run(of_dtensors, dim, ranks=2):
        torch.testing.assert_close(found, wanted)


def of_other_layers() -> tuple[str, bool]:
    model = GPT()
    made, layers = optimizer(steepest.Muon, model), layers_of(model)
    mine = f"blocks.{dist.get_rank()}"
    with pytest.raises(RuntimeError, match="are about to clip different layers") as error:
        steepest.QKClip(made, {mine: layers[mine]})
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    clip = steepest.QKClip(made, {mine: layers[mine]}, threshold=1.0, group=groups[dist.get_rank()])
    clip.observe(mine, torch.tensor([4.0, 0.5, 0.5]))
    train(model, made, range(1), before=lambda *_: None)
    return str(error.value), bool(clip.metrics()["clipped_heads"] == 1)


def test_ranks_with_other_layers_are_named_and_may_have_a_group(processes: Processes) -> None:
    for rank, (text, clipped) in enumerate(processes.run(of_other_layers, ranks=2)):
        assert f"this one has ([('blocks.{rank}', 3)], 100.0, 0.5); pass group=" in text
        assert clipped
