"""`steepest plan --world` against the exchange itself, region by region, against gloo and against optimizers' state."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import steepest
from steepest.linalg.polar import sharded_polars
from steepest.matrices import pieces
from steepest.sharding.exchange import Exchange
from steepest.sharding.layout import Sharding
from steepest.sharding.ranks import Ranks as RealRanks
from steepest.sharding.regions import regions
from steepest.step import shared_batches
from steepest.tools import cli, scale
from steepest.tools.scale import Machine, Method, Ranks, Stack
from steepest.tools.shapes import MODELS, Model, Parameters, elements
from support.processes import Processes
from support.ranks import Ranks as Threads
from support.slow import slow

DOCS = Path(__file__).parents[2] / "docs"
#: Even, uneven and empty shards, a single row, matrices of one shape twice, experts that go up and that do not.
UNEVEN: Model = (
    Parameters(3, (12, 8), "matrix", cut=0),
    Parameters(2, (10, 6), "matrix", cut=1),
    Parameters(1, (1, 30), "matrix", cut=1),
    Parameters(2, (3, 7), "matrix", cut=0),
    Parameters(2, (4, 12, 8), "matrix"),
    Parameters(1, (6, 5, 9), "matrix"),
    Parameters(1, (11, 4), "other"),
    Parameters(3, (5,), "other"),
)
METHODS = {name: scale.method_of(name) for name in ("Muon", "MuAdam", "SOAP", "Shampoo", "Dion2")}
#: Those of which whole matrices travel.
WHOLE = [name for name in METHODS if name != "Dion2"]


def of(route: str, model: Model, method: str, size: int) -> Ranks:
    ranks = scale.of_route(route, model, METHODS[method], size)
    assert ranks is not None
    return ranks


def exchanges(model: Model, method: Method, size: int, place: int) -> list[Exchange]:
    """One a shape, of the layouts that the model stands for."""
    stacks = scale.stacks_of(model, size)
    owners = iter(scale.owners_of(stacks, method, size))
    units: dict[tuple[int, int], list[Any]] = {}
    where: Any = types.SimpleNamespace(size=size, place=place, replica_of=(0,) * size)
    for stack in stacks:
        for _ in range(stack.parameters):
            mesh, placements = [stack.groups, size // stack.groups], [Shard(0), Shard(1)]
            shape: tuple[int, ...] = (stack.experts, stack.rows, stack.cols)
            if stack.experts == 1:
                mesh, placements, shape = [size], [Shard(0)], shape[1:]
            sharding = Sharding(shape, where, regions(shape, mesh, placements))
            (piece,) = pieces(shape, batch_dims=len(shape) - 2)
            unit = sharding.unit(piece, [next(owners) for _ in range(stack.experts)])
            units.setdefault((stack.rows, stack.cols), []).append(unit)
    return [Exchange(where, bucket) for bucket in units.values()]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("method", WHOLE)
def test_what_owners_are_sent_is_what_the_exchange_sends(method: str, size: int) -> None:
    asked, found = METHODS[method], of("owner", UNEVEN, method, size)
    for place in range(size):
        sent = received = messages = 0
        for exchange in exchanges(UNEVEN, asked, size, place):
            away, come = (sum(sizes) - sizes[place] for sizes in (exchange.sends, exchange.receives))
            sent += away * asked.bytes_there + come * asked.bytes_back
            received += come * asked.bytes_there + away * asked.bytes_back
            to = sum(count > 0 for rank, count in enumerate(exchange.sends) if rank != place)
            back = sum(count > 0 for rank, count in enumerate(exchange.receives) if rank != place)
            half = asked.collectives // 2
            messages += (asked.collectives - half) * to + half * back
        assert (found.sent[place], found.received[place], found.messages[place]) == (sent, received, messages)
    assert sum(found.sent) == sum(found.received)


def test_the_formula() -> None:
    """A large matrix a rank, cut evenly: 4 m n (P - 1) / P^2 bytes of each, there and back."""
    model = (Parameters(8, (64, 32), "matrix"),)
    found = of("owner", model, "Muon", 8)
    assert found.sent == [8 * 4 * 64 * 32 * 7 // 64] * 8 == found.received
    assert found.messages == [14] * 8
    assert found.stages == 2
    assert found.balance == 1.0


SHAPES = ((12, 8), (12, 8), (10, 12), (7, 10), (3, 7), (16, 3))
#: Of these columns are chosen, so that every rank has something of each.
TALL = ((12, 8), (12, 8), (10, 7), (16, 3))


class Network(nn.Module):
    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(cols, rows, bias=False) for rows, cols in shapes])


def sent_by_gloo(name: str, room: int, shapes: Sequence[tuple[int, int]], copies: int = 1) -> tuple[int, int]:
    """(bytes that this rank sends to others in a step, messages), as gloo is asked for them; a sum goes as a ring.
    copies: of the shards, which share the work.
    """
    shared_batches._LEAST_BYTES = min(room, shared_batches._LEAST_BYTES)
    model = Network(shapes)
    mesh = (dist.get_world_size(),) if copies == 1 else (copies, dist.get_world_size() // copies)
    fully_shard(model, mesh=init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard")[-len(mesh) :]))
    options = {"max_workspace_bytes": room, "share_work": copies > 1}
    optimizer = getattr(steepest, name)(list(model.named_parameters()), **options)
    sent = messages = 0
    plain, plain_sum = RealRanks.all_to_all, RealRanks.sum_parts

    def counted(self: RealRanks, t: torch.Tensor, sizes: Any, wanted: Any, what: str) -> Any:
        nonlocal sent, messages
        others = [n for rank, n in enumerate(sizes) if rank != self.place]
        sent += sum(others) * t.itemsize
        messages += sum(n > 0 for n in others)
        return plain(self, t, sizes, wanted, what)

    def counted_sum(self: RealRanks, t: torch.Tensor) -> None:
        nonlocal sent, messages
        size = self.shards.size
        sent += 2 * (size - 1) * t.numel() * t.itemsize // size
        messages += 2 * (size - 1)
        plain_sum(self, t)

    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()  # which makes state and plans
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RealRanks, "all_to_all", counted)
        patch.setattr(RealRanks, "sum_parts", counted_sum)
        optimizer.step()
    return sent, messages


@pytest.mark.parametrize(
    "ranks, copies, room",
    [(2, 1, 1 << 30), slow(3, 1, 1 << 30), (3, 1, 1 << 12), (4, 2, 1 << 30), slow(4, 2, 1 << 12), slow(4, 4, 1 << 30)],
)
@pytest.mark.parametrize("name", METHODS)
def test_what_gloo_is_asked_to_send(
    processes: Processes, name: str, ranks: int, copies: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "WORKSPACE", room)
    monkeypatch.setattr(shared_batches, "_LEAST_BYTES", min(room, shared_batches._LEAST_BYTES))
    method = dataclasses.replace(METHODS[name], device="cpu", gradient=torch.float32)
    shapes = SHAPES if name in WHOLE else TALL
    model: Model = tuple(Parameters(1, shape, "matrix") for shape in shapes)
    found = scale.of_route("owner" if copies == 1 else "hybrid", model, method, ranks, copies)
    assert found is not None
    sent = processes.run(sent_by_gloo, name, room, shapes, copies, ranks=ranks)
    assert sent == list(zip(found.sent, found.messages))
    assert sum(found.sent) == sum(found.received)


def test_owners_of_all_copies_share_the_work_of_one() -> None:
    """On two copies of four ranks, half of the work each, and shards and state of factors as they are."""
    model = (Parameters(16, (64, 32), "matrix"), Parameters(1, (8, 4), "other"))
    one = of("owner", model, "SOAP", 4)
    both = scale.of_route("hybrid", model, METHODS["SOAP"], 8, 2)
    assert both is not None
    assert [2 * work.flop for work in both.work] == [work.flop for work in one.work] * 2
    assert both.passes == one.passes * 2
    owned = METHODS["SOAP"].state(64, 32)[1]
    assert both.state == [state - 2 * owned for state in one.state] * 2


@pytest.mark.parametrize("places, copies", [(1, 1), (5, 1), (7, 3), (16, 4)])
def test_messages_are_those_of_pairs(places: int, copies: int) -> None:
    """Who sends to whom, pair by pair, where matrices lie on overlapping runs of places."""
    draw = random.Random(places)
    bucket, there, back = scale._Bucket(places, copies), set[tuple[int, int]](), set[tuple[int, int]]()
    for _ in range(12):
        first, owner = draw.randrange(places), draw.randrange(places * copies)
        holders = range(first, draw.randint(first + 1, places))
        bucket.add(owner, holders)
        copy = owner // places * places
        there |= {(copy + place, owner) for place in holders}
        back |= {(owner, place + at) for place in holders for at in range(0, places * copies, places)}
    for found, pairs in ((bucket.there(), there), (bucket.back(), back)):
        assert found == [sum(a == rank != b for a, b in pairs) for rank in range(places * copies)]


def test_plans_of_a_hundred_thousand_ranks() -> None:
    """In seconds: what takes a rank's time for each of the others takes hours."""
    model, world = (Parameters(3, (4096, 64), "matrix", cut=0), Parameters(1, (8, 96, 64), "matrix")), 100_000
    begun = time.process_time()
    for route in ("local", "owner", "gram", "share"):
        found = of(route, model, "Muon", world)
        assert sum(found.sent) == sum(found.received)
    hybrid = scale.of_route("hybrid", model, METHODS["Muon"], world, 1000)
    assert hybrid is not None
    assert sum(hybrid.sent) == sum(hybrid.received)
    assert time.process_time() - begun < 60


def test_of_a_submatrix_its_share_travels() -> None:
    """Of 8 of 32 columns a quarter, in fp32, and 32 norms; of shared work that alone."""
    model = (Parameters(8, (64, 32), "matrix"),)
    whole, part = of("owner", model, "Muon", 8), of("owner", model, "Dion2", 8)
    assert [2 * (sent - 2 * 7 * 8 * 8 * 32 // 8) for sent in part.sent] == whole.sent
    assert part.stages == whole.stages + 2 * 3
    assert part.work == [scale.method_of("Muon", "auto").work(64, 8)] * 8
    assert [2 * sent for sent in of("share", model, "Dion2", 8).sent] == of("share", model, "Muon", 8).sent


@pytest.mark.parametrize("size", [1, 3, 4])
def test_blocks_are_matrices_of_their_own(size: int) -> None:
    """Of 12, 10, 1 and 3 rows each rank has a chunk; of stacks experts, or rows of them."""
    found = of("blocks", UNEVEN, "Muon", size)
    work = METHODS["Muon"].work
    for r, found_work in enumerate(found.work):
        flop = 0
        for stack in scale.stacks_of(UNEVEN, size):
            for k in range(stack.experts):
                rows = dict(stack.holders(stack.group(k))).get(r, 0) // stack.cols
                flop += stack.parameters * work(rows, stack.cols).flop if rows else 0
        assert found_work.flop == flop
    assert not any(found.sent)
    assert found.state == of("owner", UNEVEN, "Muon", size).state
    assert found.passes == of("owner", UNEVEN, "Muon", size).passes


def test_a_period_has_one_whole_step() -> None:
    def blocks(period: int) -> dict[str, Any]:
        rows = scale.plan("tiny", METHODS["Muon"], [4], Machine(), period)
        owner, of_blocks = (next(row for row in rows if row["route"] == route) for route in ("owner", "blocks"))
        assert of_blocks["sent_bytes"] == pytest.approx(owner["sent_bytes"] / period, abs=1)
        return {key: value - owner[key] for key, value in of_blocks.items() if key.endswith("_ms")}

    assert not any(blocks(1).values())
    four, two = blocks(4), blocks(2)
    for key, gap in four.items():
        assert gap == pytest.approx(1.5 * two[key], abs=1e-9)


@pytest.mark.parametrize("size", [2, 4])
def test_a_gram_route_sends_what_is_summed(size: int) -> None:
    """A ring's share of what `sharded_polars` sums, on a matrix cut along its long side."""
    rows, cols, count = 160, 40, 3
    model = (Parameters(count, (rows, cols), "matrix", cut=0),)
    found, threads = of("gram", model, "Muon", size), Threads(size)
    parts = torch.randn(count, rows, cols).tensor_split(size, 1)
    threads.run(lambda rank, all_reduce: sharded_polars([parts[rank]], [-2], all_reduce))
    summed = sum(number * dtype.itemsize for number, dtype in threads.sums)
    assert found.sent == [2 * (size - 1) * summed // size] * size == found.received
    assert found.messages == [2 * (size - 1) * len(threads.sums)] * size
    assert found.stages == 2 * math.log2(size) * len(threads.sums)


@pytest.mark.slow
def test_a_gram_route_of_a_short_side_moves_to_the_long_one() -> None:
    """40 x 160 cut by rows: 10 rows of 160 here, 40 rows of 40 there, of which 10 x 40 lie here."""
    by_rows, by_columns = ((Parameters(1, (40, 160), "matrix", cut=cut),) for cut in (0, 1))
    moved, plain = of("gram", by_rows, "Muon", 4), of("gram", by_columns, "Muon", 4)
    assert [a - b for a, b in zip(moved.sent, plain.sent)] == [2 * 2 * (1600 - 400)] * 4
    assert moved.work == plain.work
    assert moved.stages == plain.stages + 2


def test_a_gram_route_leaves_whole_what_tensor_parallelism_does_not_cut() -> None:
    model = (Parameters(2, (40, 160), "matrix"),)
    found, alone = of("gram", model, "Muon", 4), of("local", model, "Muon", 1)
    assert not any(found.sent)
    assert found.work == alone.work * 4
    assert found.state == alone.state * 4


def test_no_gram_route() -> None:
    assert scale.of_route("gram", UNEVEN, scale.method_of("Muon", "svd"), 4) is None
    assert scale.of_route("gram", UNEVEN, METHODS["SOAP"], 4) is None
    assert scale.of_route("gram", UNEVEN, METHODS["Shampoo"], 4) is None


@pytest.mark.parametrize("size", [2, 3, 5])
def test_shared_work_reaches_everyone(size: int) -> None:
    found = of("share", UNEVEN, "Muon", size)
    whole = 2 * elements(UNEVEN, "matrix")
    assert sum(found.sent) == sum(found.received) == (size - 1) * whole
    assert all(received < whole for received in found.received)
    alone = of("local", UNEVEN, "Muon", 1)
    assert found.state == alone.state * size


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("route", ["owner", "share"])
def test_ranks_do_the_work_of_one(method: str, route: str) -> None:
    for size in (1, 2, 4, 8):
        found, alone = of(route, UNEVEN, method, size), of("local", UNEVEN, method, 1)
        assert sum(work.flop for work in found.work) == alone.work[0].flop
        assert found.balance >= 1.0
        if route == "owner":
            assert sum(found.state) == alone.state[0]
            assert sum(found.passes) == alone.passes[0]


@pytest.mark.parametrize("method", METHODS)
def test_state_is_what_an_optimizer_keeps(method: str) -> None:
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Linear(12, 10, bias=False))
    optimizer = getattr(steepest, method)(list(model.named_parameters()))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = sum(
        t.numel() * t.element_size()
        for state in optimizer.state.values()
        for name, t in state.items()
        if isinstance(t, torch.Tensor) and name != "clock"
    )
    shapes = tuple(Parameters(1, tuple(p.shape), "matrix") for p in model.parameters())
    assert of("local", shapes, method, 1).state == [kept]


def test_shards() -> None:
    assert scale.shard_rows(10, 4) == [3, 3, 3, 1]
    assert scale.shard_rows(5, 4) == [2, 2, 1, 0]
    assert scale.shard_rows(1, 3) == [1, 0, 0]
    stack = Stack(1, 6, 4, 5, 4)
    assert (stack.groups, stack.chunks, [stack.group(k) for k in range(6)]) == (2, [2, 2], [0, 0, 0, 1, 1, 1])
    assert stack.holders(1) == [(2, 10), (3, 10)]


@pytest.mark.parametrize(
    ("name", "billions", "met"),
    [
        ("gpt2-124m", 0.1244, 0.1244),
        ("llama-7b", 6.74, 6.74),
        ("llama-70b", 68.98, 68.98),
        ("kimi-k2-1t", 1026.4, 32.9),
    ],
)
def test_models_have_their_published_sizes(name: str, billions: float, met: float) -> None:
    model = MODELS[name]
    assert elements(model) / 1e9 == pytest.approx(billions, rel=2e-3)
    assert sum(p.count * math.prod(p.shape) * p.used for p in model) / 1e9 == pytest.approx(met, rel=2e-3)


def test_times() -> None:
    found = Ranks("owner", 2)
    found.work = [scale.Work(2_000_000_000_000), scale.Work(0, 500_000_000_000)]
    found.sent, found.passes, found.stages = [10**9, 10**8], [4 * 10**9, 0], 4
    times = found.times(Machine(tflops=100, bandwidth=10, latency=50, memory=1000))
    assert times == pytest.approx(
        {"compute_ms": 30, "travel_ms": 100.2, "elementwise_ms": 4, "total_ms": 134.2, "overlapped_ms": 104.2}
    )


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--world", "64", "--mesh", "8x8", "--model", "llama-7b"]) == 0
    text = capsys.readouterr().out
    assert [line.split()[:2] for line in text.splitlines()[4:]] == [
        ["local", "64"],
        ["owner", "8"],
        ["hybrid", "64"],
        ["gram", "8"],
        ["share", "64"],
    ]
    assert cli.main(["plan", "--world", "4", "--model", "gpt2-124m", "--optimizer", "SOAP", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["route"] for row in data["routes"]] == ["local", "owner", "share"]
    assert data["routes"][1]["sent_bytes"] == max(of("owner", MODELS["gpt2-124m"], "SOAP", 4).sent)


@pytest.mark.parametrize(("optimizer", "routes"), [("KFAC", ["local"]), ("Fromage", ["local", "share"])])
def test_ways_that_a_class_does_not_take(optimizer: str, routes: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--world", "8", "--mesh", "2x4", "--model", "tiny", "--optimizer", optimizer]) == 0
    *rows, last = capsys.readouterr().out.splitlines()[4:]
    assert [row.split()[0] for row in rows] == routes
    assert last == f"{optimizer} takes no sharded parameters: use DistributedDataParallel"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--world", "64", "--mesh", "8x4"], "a mesh of 8x4 does not have the 64 ranks of --world"),
        (["--world", "0"], "--world is 1 rank or more, got 0"),
        (["--world", "-4"], "--world is 1 rank or more, got -4"),
        (["--world", "8", "--optimizer", "KFAC", "--simulate"], "which KFAC does not take: leave it out"),
        (
            ["--world", "8", "--optimizer", "Fromage", "--block-period", "4"],
            "which Fromage does not take",
        ),
        (["--world", "8", "--mesh", "2by4"], "mesh '2by4' is not lengths such as 8x8"),
        (["--world", "8", "--model", "gpt9"], "model 'gpt9' is not known; choose one of tiny"),
        (["--world", "8", "--optimizer", "Sgd"], "optimizer 'Sgd' is no class of steepest; say one as it is imported"),
        (
            ["--world", "8", "--optimizer", "SignSGD", "--preset", "auto"],
            "optimizer 'SignSGD' cannot be made with {'polar'",
        ),
        (["--world", "8", "--tflops", "0"], "--tflops is a positive number, got 0"),
        (["--world", "8", "--latency", "-1"], "--latency is a positive number, got -1"),
        (["--world", "8", "--block-period", "0"], "--block-period is 1 step or more, got 0"),
        (["--simulate", "--batch", "0"], "--batch is 1 token or more, got 0"),
        (["--world", "8", "--shape", "64x64"], "--shape plans one call of polar, --world a step"),
        ([], "what to plan is missing: --shape for a call of polar, --world for a step of a whole model"),
    ],
)
def test_errors(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", *words])
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_the_page_shows_what_the_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    page = (DOCS / "scale.md").read_text(encoding="utf-8")
    commands = re.findall(r"^steepest (plan .*)$", page, re.MULTILINE)
    assert len(commands) == 8
    for command in commands:
        assert cli.main(command.split()) == 0
        assert capsys.readouterr().out in page, command


def test_the_page_compares_what_the_commands_print() -> None:
    page = (DOCS / "scale.md").read_text(encoding="utf-8")
    for name, route, method in (
        ("Muon", "owner", scale.method_of("Muon", "auto")),
        ("MuonBP, period 5", "blocks", scale.method_of("Muon", "auto")),
        ("Dion2, fraction 1/4", "owner", METHODS["Dion2"]),
    ):
        cells = [name]
        for world in (8, 64):
            rows = {row["route"]: row for row in scale.plan("llama-7b", method, [world], Machine(), 5)}
            cells.append(f"{rows[route]['total_ms']:.3g}, {rows[route]['overlapped_ms']:.3g} ms")
        cells.append(f"{rows['local']['total_ms']:.3g} ms")
        assert f"| {' | '.join(cells)} |" in page


@pytest.mark.parametrize("size", [2, 4, 8])
def test_where_a_gram_form_sends_less(size: int) -> None:
    """As the page says: 64 is a multiple of 32, so that 9/16 become 3/4 of its square, and 1.125 is 1.5."""
    restarts, short = 1, 64
    edge = 1.5 * size * (1 + restarts)
    for aspect, less in ((edge + 1, True), (edge - 1, False)):
        model = (Parameters(size, (int(aspect * short), short), "matrix", cut=0),)
        gram, owner = (
            scale.of_route(route, model, scale.method_of("Muon", "auto"), size) for route in ("gram", "owner")
        )
        assert gram is not None
        assert owner is not None
        assert (sum(gram.sent) < sum(owner.sent)) is less
