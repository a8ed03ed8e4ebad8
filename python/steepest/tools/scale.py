"""`steepest plan --world`: what a step of a model sends, computes and keeps on every rank, found without any.

The routes by which a matrix' direction may be had, for P ranks of a mesh; c_r: the elements of a matrix on rank r.

    local    every rank has all matrices (DDP), computes all directions, and sends nothing
    owner    parameters are cut by Shard(0) along the mesh's last dimension (FSDP2: chunks of ceil(rows / P), the last
             ones shorter or empty; along the others they are replicated, HSDP). Rank r sends its c_r of each matrix
             that it does not own and gets as much of the direction; of what it owns it gets mn - c_r, and sends that:
                 sent = received = (sum over not owned c_r + sum over owned (mn - c_r)) times 2 bytes
             A matrix that lies on one rank stays there. Recipes with factors also send gradients; those with
             transforms what these keep, and both take fp32 for 16 bits.
    hybrid   parameters lie as on the route owner, and a matrix has one owner among all ranks of the mesh (HSDP with
             share_work=True), one that no shard cuts among those that have it. An owner gets the parts of its copy of
             the parameters, and sends to all R copies:
                 sent = (sum over owned elsewhere in this copy c_r + sum over owned (R mn - c_r)) times 2 bytes
    gram     parameters are cut along the mesh's last dimension by tensor parallelism. Where that is the long side: a
             ring's all_reduce, 2 (P - 1) / P of 8 bytes and then 1 + restarts times 4 bytes of each `gram_elements`, a
             matrix; where it is the short side the parts first go to a cut of the long one, and back, as (P - 1) / P of
             what lies here in 16 bits. What tensor parallelism leaves whole every rank computes
    share    all matrices on every rank (DDP, share_work=True): each computes its own, and a ring's all_gather of 16
             bits brings sum over not owned mn to each; factors are at the owner alone

    blocks   as owner in one step of --block-period, and in the others each rank takes the directions of its parts by
             themselves, and sends nothing: MuonBP (arXiv:2510.16981), which is planned here and no more. Numbers are
             the mean of a period

Of a recipe that steps by a submatrix (Dion2) as much less of a matrix goes there and back as it is smaller, of each
rank that share of what lies there, after a ring's all_reduce of an fp64 norm for each row (or column) of all matrices.

Stacked experts, (E, m, n), lie in e = gcd(P, E) groups of P / e ranks, whole groups of experts on each, cut by rows
within it (an expert mesh), on the routes owner and gram.

Messages are those of the matrices of one shape in one exchange (rounds of limited memory have more): of owner the ranks
that are sent to, there and back; of a ring 2 (P - 1) an all_reduce, P - 1 an all_gather. Owners are those of
`steepest.sharding`. Not counted: what the step of the model itself sends (gradients, FSDP's weights).

Time, which is a model and not measured: work over --tflops (fp32 products count six times, solvers a hundred times; see
`steepest.linalg.work`), bytes sent over --bandwidth, --latency for every collective of an exchange and for every of the
2 log2 P stages of a reduction, elementwise passes over --memory; of the slowest rank each. What travels while others
compute is "overlapped". A model's own step takes 6 FLOP a parameter that a token meets, and token, over --tflops.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import nn

import steepest
from steepest.chunking import WORKSPACE, chunk_by_bytes
from steepest.linalg.polar import choose_sharded, gram_elements
from steepest.linalg.work import Work, flop_text
from steepest.parts import Spectral
from steepest.recipe import ADAMW, CLOCK, Recipe
from steepest.sharding.owners import assign, imbalance
from steepest.step.costs import matrix_work
from steepest.step.shared_batches import round_bytes
from steepest.step.shared_matrices import share_bytes

from . import shapes

HEAD = (
    "route   ranks       sent   received  messages         work  balance       state    compute     travel  elementwise"
    "     in all  overlapped"
)
SIMULATED = ("llama-7b", "llama-70b", "kimi-k2-1t")
WORLDS = (1, 4, 16, 64, 256, 1024, 4096)
WIDE = 4  # bytes of fp32
SIZE = 8  # of the fp64 size of a matrix that a Gram route sums


@dataclass(frozen=True)
class Machine:
    """The numbers of a rank: TFLOP/s that 16-bit products reach, GB/s of its network, one way, and of its memory, and
    the microseconds until a collective begins. By default half the peak of an H200, an adapter of 400 Gbit/s, an order
    of magnitude, and four fifths of an H200's memory.
    """

    tflops: float = 500.0
    bandwidth: float = 50.0
    latency: float = 20.0
    memory: float = 4000.0

    def __str__(self) -> str:
        return f"{self.tflops:g} TFLOP/s, {self.bandwidth:g} GB/s, {self.latency:g} us, memory {self.memory:g} GB/s"

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value < math.inf or (name != "latency" and value == 0):
                raise ValueError(f"--{name} is a positive number, got {value:g}")


@dataclass
class Ranks:
    """What each of the ranks of a route does in a step; lists have one number a rank."""

    route: str
    size: int
    sent: list[int] = field(default_factory=list)  # bytes
    received: list[int] = field(default_factory=list)
    messages: list[int] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    state: list[int] = field(default_factory=list)  # bytes of the optimizer's state
    passes: list[int] = field(default_factory=list)  # bytes that elementwise work reads and writes
    stages: int = 0  # collectives of an exchange, or stages of reductions

    def __post_init__(self) -> None:
        for name in ("sent", "received", "messages", "state", "passes"):
            setattr(self, name, [0] * self.size)
        self.work = [Work()] * self.size

    @property
    def balance(self) -> float:
        """The largest work over the mean."""
        return imbalance([work.cost for work in self.work])

    def times(self, machine: Machine) -> dict[str, float]:
        """Milliseconds: of products, messages, elementwise passes, in all, and in all where messages overlap."""
        compute = max(work.cost for work in self.work) / machine.tflops / 1e9
        travel = max(self.sent) / machine.bandwidth / 1e6 + self.stages * machine.latency / 1e3
        passes = max(self.passes) / machine.memory / 1e6
        return {
            "compute_ms": compute,
            "travel_ms": travel,
            "elementwise_ms": passes,
            "total_ms": compute + travel + passes,
            "overlapped_ms": max(compute, travel) + passes,
        }

    def summary(self, machine: Machine) -> dict[str, Any]:
        """What the rank does that has most of each, as plain data."""
        return {
            "route": self.route,
            "sent_bytes": max(self.sent),
            "received_bytes": max(self.received),
            "messages": max(self.messages),
            "flop": max(work.flop for work in self.work),
            "balance": self.balance,
            "state_bytes": max(self.state),
            **self.times(machine),
        }


@dataclass(frozen=True)
class Method:
    """A recipe, where it runs, the dtype of gradients, and what of it the model asks for.

    refused: the routes that its class does not take.
    """

    recipe: Recipe
    device: str = "cuda"
    gradient: torch.dtype = torch.bfloat16
    refused: frozenset[str] = frozenset()

    def work(self, rows: int, cols: int) -> Work:
        return matrix_work(self.recipe, rows, cols, device=self.device)

    @functools.cached_property
    def bytes_there(self) -> int:
        """The bytes of an element on its way to the owner."""
        back = self.input_bytes if self.recipe.submatrix is not None else self.bytes_back
        return back + (self.gradient.itemsize if self.recipe.measures_gradients else 0)

    @functools.cached_property
    def bytes_back(self) -> int:
        narrow = not self.recipe.transforms if self.recipe.submatrix is not None else not self.recipe.by_matrix
        return self.input_bytes if narrow else WIDE * (1 + self._travels)

    def travelling(self, rows: int, cols: int) -> Fraction | int:
        """The part of a rows x cols matrix that goes to its owner."""
        _, m, n = self.recipe.input_shape((1, rows, cols))
        return 1 if self.recipe.submatrix is None else Fraction(m * n, rows * cols)

    def norms(self, rows: int, cols: int) -> int:
        """Numbers of a matrix that ranks sum before they choose what travels."""
        part = self.recipe.submatrix
        return 0 if part is None else rows if part.dim(rows, cols) == -2 else cols

    @functools.cached_property
    def input_dtype(self) -> torch.dtype:
        return self.recipe.direction_dtype(torch.float32, torch.device(self.device))

    @property
    def input_bytes(self) -> int:
        """Bytes of an element of a direction's input: 2 on a GPU, where no torch operations make it."""
        return self.input_dtype.itemsize

    @property
    def collectives(self) -> int:
        """Exchanges of one bucket."""
        return 2 * (1 + self._travels) + self.recipe.measures_gradients

    @property
    def _travels(self) -> int:
        """State of transforms that has the parameter's shape."""
        return sum(spec.layout == "elementwise" for transform in self.recipe.transforms for spec in transform.specs)

    def state(self, rows: int, cols: int) -> tuple[int, int]:
        """(bytes an element, bytes at the owner) of the state of a rows x cols matrix."""
        return _state(self.recipe, rows, cols)

    def passes(self, rows: int, cols: int) -> int:
        """Bytes an element that elementwise work moves: gradient, state and fp32 weight, direction and its input; the
        momentum once more where its rows are measured.
        """
        measured = 0 if self.recipe.submatrix is None else self.state(rows, cols)[0]
        return self.gradient.itemsize + 2 * self.state(rows, cols)[0] + 2 * WIDE + 2 * self.input_bytes + measured


@functools.lru_cache(maxsize=1024)
def _state(recipe: Recipe, rows: int, cols: int) -> tuple[int, int]:
    whole = recipe.init(torch.empty(rows, cols, device="meta"))
    layouts = {name: layout for name, layout in recipe.layouts.items() if name != CLOCK}
    sizes = {name: whole[name].numel() * whole[name].itemsize for name in layouts}
    elementwise = sum(sizes[name] for name, layout in layouts.items() if layout == "elementwise")
    return elementwise // (rows * cols), sum(sizes.values()) - elementwise


@dataclass(frozen=True)
class Stack:
    """The matrices of one kind of parameter, and how each lies on the ranks of an exchange.

    Matrix k of a parameter lies on the ranks of one of `groups` groups, chunk by chunk of its rows.
    """

    parameters: int
    experts: int
    rows: int
    cols: int
    ranks: int

    @property
    def groups(self) -> int:
        return math.gcd(self.ranks, self.experts)

    @property
    def chunks(self) -> list[int]:
        """The rows of a matrix on each rank of its group."""
        return shard_rows(self.rows, self.ranks // self.groups)

    def group(self, k: int) -> int:
        return k // (self.experts // self.groups)

    def holders(self, group: int) -> list[tuple[int, int]]:
        """(rank, elements) of each rank that has something of a matrix of the group."""
        return [(rank, rows * self.cols) for rank, rows in self.rows_here(group)]

    def rows_here(self, group: int) -> list[tuple[int, int]]:
        """(rank, rows) of each rank that has something of a matrix of the group; such ranks follow one another."""
        first = group * (self.ranks // self.groups)
        return [(first + i, rows) for i, rows in enumerate(self.chunks) if rows]

    def span(self, group: int) -> range:
        """The ranks that have something of a matrix of the group."""
        first = group * (self.ranks // self.groups)
        return range(first, first + sum(rows > 0 for rows in self.chunks))

    def matrices(self) -> Iterator[int]:
        """The group of each matrix, parameter by parameter."""
        return (self.group(k) for _ in range(self.parameters) for k in range(self.experts))


def shard_rows(rows: int, ranks: int) -> list[int]:
    """The rows of every rank under Shard(0): chunks of ceil(rows / ranks), the last ones shorter or empty."""
    size = -(-rows // ranks)
    return [max(0, min(size, rows - rank * size)) for rank in range(ranks)]


def stacks_of(model: shapes.Model, ranks: int) -> list[Stack]:
    return [
        Stack(p.count, math.prod(p.shape[:-2]), p.shape[-2], p.shape[-1], ranks) for p in model if p.kind == "matrix"
    ]


def of_route(route: str, model: shapes.Model, method: Method, size: int, copies: int = 1) -> Ranks | None:
    """Every rank's part of a step on this route; None where the recipe has none of it. copies: of the parameters, on
    the route hybrid.
    """
    if route in method.refused:
        return None
    ranks = Ranks(route, size)
    if route == "local":
        _add_local(ranks, model, method)
    elif route == "owner":
        _add_owner(ranks, stacks_of(model, size), method)
    elif route == "hybrid":
        _add_hybrid(ranks, stacks_of(model, size // copies), method, copies)
    elif route == "blocks":
        _add_blocks(ranks, stacks_of(model, size), method)
    elif route == "gram":
        if method.recipe.by_matrix or not method.recipe.direction.shards:
            return None
        _add_gram(ranks, model, method)
    else:
        _add_share(ranks, model, method)
    shards = {"local": 1, "share": 1, "hybrid": size // copies}.get(route, size)
    _add_others(ranks, model, method, shards)
    return ranks


def _add_local(ranks: Ranks, model: shapes.Model, method: Method) -> None:
    for count, rows, cols in shapes.matrices(model):
        element, owned = method.state(rows, cols)
        work, passes = method.work(rows, cols).times(count), method.passes(rows, cols)
        for r in range(ranks.size):
            ranks.work[r] += work
            ranks.state[r] += count * (rows * cols * element + owned)
            ranks.passes[r] += count * rows * cols * passes


def _add_owner(ranks: Ranks, stacks: Sequence[Stack], method: Method) -> None:
    owners = iter(owners_of(stacks, method, ranks.size))
    rounds = iter(_rounds(stacks, method, ranks.size))
    buckets: dict[tuple[int, int, int], _Bucket] = {}
    for stack in stacks:
        holders = [stack.holders(group) for group in range(stack.groups)]
        parts = [dict(group) for group in holders]
        counts, owned, kept = [0] * stack.groups, [0] * ranks.size, [0] * ranks.size
        spans = [stack.span(group) for group in range(stack.groups)]
        for k, group in enumerate(stack.matrices()):
            if k % stack.experts == 0:
                bucket = buckets.setdefault((stack.rows, stack.cols, next(rounds)), _Bucket(ranks.size))
            owner = next(owners)
            counts[group] += 1
            owned[owner] += 1
            kept[owner] += parts[group].get(owner, 0)
            bucket.add(owner, spans[group])
        here = [0] * ranks.size
        for group, count in enumerate(counts):
            for r, part in holders[group]:
                here[r] += count * part
        work = method.work(stack.rows, stack.cols)
        element, of_owner = method.state(stack.rows, stack.cols)
        share, passes = method.travelling(stack.rows, stack.cols), method.passes(stack.rows, stack.cols)
        for r in range(ranks.size):
            away, others = here[r] - kept[r], owned[r] * stack.rows * stack.cols - kept[r]
            ranks.sent[r] += int(share * (away * method.bytes_there + others * method.bytes_back))
            ranks.received[r] += int(share * (others * method.bytes_there + away * method.bytes_back))
            ranks.work[r] += work.times(owned[r])
            ranks.state[r] += here[r] * element + owned[r] * of_owner
            ranks.passes[r] += here[r] * passes
    _add_messages(ranks, list(buckets.values()), method)
    _add_norms(ranks, stacks, method, ranks.size)


def _add_hybrid(ranks: Ranks, stacks: Sequence[Stack], method: Method, copies: int) -> None:
    """Owners among all ranks, of which those of one copy of the parameters follow one another."""
    costs = [method.work(s.rows, s.cols).cost for s in stacks for _ in range(s.parameters * s.experts)]
    places = ranks.size // copies
    among = [_holders(s, group, copies, places) for s in stacks for group in s.matrices()]
    owners, rounds = iter(assign(costs, ranks.size, among)), iter(_rounds(stacks, method, ranks.size))
    there, back = method.bytes_there, method.bytes_back
    buckets: dict[tuple[int, int, int], _Bucket] = {}
    for stack in stacks:
        work, share = method.work(stack.rows, stack.cols), method.travelling(stack.rows, stack.cols)
        (element, of_owner), passes = method.state(stack.rows, stack.cols), method.passes(stack.rows, stack.cols)
        holders = [stack.holders(group) for group in range(stack.groups)]
        parts, spans = [dict(group) for group in holders], [stack.span(group) for group in range(stack.groups)]
        counts: dict[tuple[int, int], int] = {}
        for k, group in enumerate(stack.matrices()):
            if k % stack.experts == 0:
                bucket = buckets.setdefault((stack.rows, stack.cols, next(rounds)), _Bucket(places, copies))
            owner = next(owners)
            counts[owner, group] = counts.get((owner, group), 0) + 1
            bucket.add(owner, spans[group])
            ranks.work[owner] += work
            ranks.state[owner] += of_owner
        sent, received, here = [0] * ranks.size, [0] * ranks.size, [0] * places
        for (owner, group), count in counts.items():
            first = owner // places * places
            kept, whole = parts[group].get(owner - first, 0), stack.rows * stack.cols
            for place, part in holders[group]:
                here[place] += count * part
                sent[first + place] += count * part * there
            sent[owner] += count * ((copies * whole - kept) * back - kept * there)
            received[owner] += count * ((whole - kept) * there - kept * back)
        for r in range(ranks.size):
            ranks.sent[r] += int(share * sent[r])
            ranks.received[r] += int(share * (received[r] + here[r % places] * back))
            ranks.state[r] += here[r % places] * element
            ranks.passes[r] += here[r % places] * passes
    _add_messages(ranks, list(buckets.values()), method)
    _add_norms(ranks, stacks, method, places)


def _holders(stack: Stack, group: int, copies: int, places: int) -> list[int] | None:
    """The ranks of all copies that have a matrix of the group whole; None where it is cut."""
    holders = stack.holders(group)
    return [holders[0][0] + places * copy for copy in range(copies)] if len(holders) == 1 else None


def _add_norms(ranks: Ranks, stacks: Sequence[Stack], method: Method, shards: int) -> None:
    """The sum of norms among the ranks of one copy, before what travels is chosen."""
    norms = sum(s.parameters * s.experts * method.norms(s.rows, s.cols) for s in stacks)
    if norms and shards > 1:
        ranks.sent = [sent + 2 * (shards - 1) * SIZE * norms // shards for sent in ranks.sent]
        ranks.received = [got + 2 * (shards - 1) * SIZE * norms // shards for got in ranks.received]
        ranks.messages = [number + 2 * (shards - 1) for number in ranks.messages]
        ranks.stages += 2 * math.ceil(math.log2(shards))


def _add_blocks(ranks: Ranks, stacks: Sequence[Stack], method: Method) -> None:
    """A step in which every part is a matrix of its own."""
    for stack in stacks:
        element, of_owner = method.state(stack.rows, stack.cols)
        each = stack.parameters * stack.experts // stack.groups
        for r, rows in ((r, rows) for g in range(stack.groups) for r, rows in stack.rows_here(g)):
            ranks.work[r] += method.work(rows, stack.cols).times(each)
            ranks.state[r] += each * (rows * stack.cols * element + of_owner)
            ranks.passes[r] += each * rows * stack.cols * method.passes(stack.rows, stack.cols)


def owners_of(stacks: Sequence[Stack], method: Method, ranks: int) -> list[int]:
    """The owner of every matrix, stack by stack: its holder where it has one, else by its cost."""
    owners: list[int] = []
    jobs: list[tuple[int, int]] = []
    for stack in stacks:
        cost = method.work(stack.rows, stack.cols).cost
        holders = [stack.holders(group) for group in range(stack.groups)]
        for group in stack.matrices():
            if len(holders[group]) > 1:
                jobs.append((len(owners), cost))
            owners.append(holders[group][0][0])
    for (place, _), owner in zip(jobs, assign([cost for _, cost in jobs], ranks), strict=True):
        owners[place] = owner
    return owners


def _rounds(stacks: Sequence[Stack], method: Method, ranks: int) -> list[int]:
    """The number of the exchange of its shape that each parameter is in."""
    shapes = [(stack.experts, stack.rows, stack.cols) for stack in stacks for _ in range(stack.parameters)]
    shares = [share_bytes(method.recipe, shape, method.input_dtype, ranks) for shape in shapes]
    most = round_bytes(shares, WORKSPACE)
    numbers = [0] * len(shapes)
    for alike in {shape[1:] for shape in shapes}:
        some = [i for i, shape in enumerate(shapes) if shape[1:] == alike]
        for number, chunk in enumerate(chunk_by_bytes(some, shares.__getitem__, most)):
            for i in chunk:
                numbers[i] = number
    return numbers


def _rounds_of_shape(stacks: Sequence[Stack], method: Method, ranks: int) -> dict[tuple[int, int], int]:
    """The exchanges of each shape."""
    shapes = [(stack.rows, stack.cols) for stack in stacks for _ in range(stack.parameters)]
    numbers = zip(shapes, _rounds(stacks, method, ranks), strict=True)
    most: dict[tuple[int, int], int] = {}
    for shape, number in numbers:
        most[shape] = max(most.get(shape, 0), number + 1)
    return most


class _Bucket:
    """Who sends to whom in the exchange of the matrices of one shape.

    places: ranks of one copy of the parameters, which follow one another; copies: of the parameters.
    """

    def __init__(self, places: int, copies: int = 1) -> None:
        self.places, self.copies = places, copies
        #: the places that have some of the matrices, and the owners of these
        self.owners: dict[range, set[int]] = {}

    def add(self, owner: int, holders: range) -> None:
        self.owners.setdefault(holders, set()).add(owner)

    def there(self) -> list[int]:
        """The number of others that every rank sends to: the owners in its copy of what it holds."""
        sizes = []
        for first in range(0, self.places * self.copies, self.places):
            begins, ends = (dict[int, list[set[int]]]() for _ in range(2))
            for holders, owners in self.owners.items():
                here = {owner for owner in owners if first <= owner < first + self.places}
                begins.setdefault(first + holders.start, []).append(here)
                ends.setdefault(first + holders.stop, []).append(here)
            now: Counter[int] = Counter()
            for rank in range(first, first + self.places):
                for here in ends.get(rank, ()):
                    now.subtract(here)
                    for owner in here:
                        if not now[owner]:
                            del now[owner]
                for here in begins.get(rank, ()):
                    now.update(here)
                sizes.append(len(now) - (rank in now))
        return sizes

    def back(self) -> list[int]:
        """The number of others that every rank sends to: those of all copies that hold what it owns."""
        spans: dict[int, list[range]] = {}
        for holders, owners in self.owners.items():
            for owner in owners:
                spans.setdefault(owner, []).append(holders)
        sizes = [0] * (self.places * self.copies)
        for owner, of_owner in spans.items():
            end = count = 0
            for holders in sorted(of_owner, key=lambda span: span.start):
                count += max(holders.stop - max(holders.start, end), 0)
                end = max(holders.stop, end)
            itself = any(owner % self.places in holders for holders in of_owner)
            sizes[owner] = self.copies * count - itself
        return sizes


def _add_messages(ranks: Ranks, buckets: Sequence[_Bucket], method: Method) -> None:
    half = method.collectives // 2
    for bucket in buckets:
        for count, messages in ((method.collectives - half, bucket.there()), (half, bucket.back())):
            ranks.messages = [n + count * more for n, more in zip(ranks.messages, messages, strict=True)]
            ranks.stages += count if any(messages) else 0


def _add_gram(ranks: Ranks, model: shapes.Model, method: Method) -> None:
    direction = method.recipe.direction
    assert isinstance(direction, Spectral)
    stages: dict[tuple[int, int], int] = {}
    rounds = _rounds_of_shape(stacks_of(model, ranks.size), method, ranks.size)
    for p in (p for p in model if p.kind == "matrix"):
        rows, cols = p.shape[-2:]
        experts = math.prod(p.shape[:-2])
        groups = math.gcd(ranks.size, experts)
        count, each = p.count * experts // groups, ranks.size // groups
        cut = 0 if experts > 1 else p.cut
        element, passes = method.state(rows, cols)[0], method.passes(rows, cols)
        if each == 1 or cut is None:
            work = method.work(rows, cols).times(count)
            for r in range(ranks.size):
                ranks.work[r] += work
                ranks.state[r] += count * rows * cols * element
                ranks.passes[r] += count * rows * cols * passes
            continue
        long, short, tall = max(rows, cols), min(rows, cols), rows >= cols
        choice = choose_sharded(
            short, direction.preset, device=method.device, coefficients=direction.coefficients, steps=direction.steps
        )
        grams = 1 + len(choice.restarts)
        reduced = count * (SIZE + WIDE * gram_elements(short) * grams)
        length, other = (rows, cols) if cut == 0 else (cols, rows)
        moves = length < other
        parts, longs = shard_rows(length, each), shard_rows(long, each)
        works = {
            n: direction.sharded_work(*((n, short) if tall else (short, n)), tall, torch.float32, method.device)
            for n in set(longs)
        }
        for r in range(ranks.size):
            part, of_long = parts[r % each], longs[r % each]
            ranks.work[r] += works[of_long].times(count)
            sent = 2 * (each - 1) * reduced // each
            messages = 2 * (each - 1) * (1 + grams) * rounds[rows, cols]
            if moves:  # there and back, so that what is sent is what comes
                kept = part * of_long
                sent += method.input_bytes * count * (part * other + of_long * short - 2 * kept)
                messages += 2 * (each - 1) * rounds[rows, cols]
            ranks.sent[r] += sent
            ranks.received[r] += sent
            ranks.messages[r] += messages
            ranks.state[r] += count * part * other * element
            ranks.passes[r] += count * part * other * passes
        stages[rows, cols] = (2 * math.ceil(math.log2(each)) * (1 + grams) + 2 * moves) * rounds[rows, cols]
    ranks.stages += sum(stages.values())


def _add_share(ranks: Ranks, model: shapes.Model, method: Method) -> None:
    matrices = [(rows, cols) for count, rows, cols in shapes.matrices(model) for _ in range(count)]
    works = {shape: method.work(*shape) for shape in set(matrices)}
    exchanges = sum(_rounds_of_shape(stacks_of(model, ranks.size), method, ranks.size).values())
    owned: list[Fraction | int] = [0] * ranks.size
    for shape, owner in zip(matrices, assign([works[shape].cost for shape in matrices], ranks.size), strict=True):
        ranks.work[owner] += works[shape]
        ranks.state[owner] += method.state(*shape)[1]
        owned[owner] += math.prod(shape) * method.travelling(*shape)
    kept = sum(math.prod(shape) * method.state(*shape)[0] for shape in matrices)
    passes = sum(math.prod(shape) * method.passes(*shape) for shape in matrices)
    everything = sum(owned)
    for r in range(ranks.size):
        ranks.received[r] += int(everything - owned[r]) * method.bytes_back
        others = everything - owned[(r + 1) % ranks.size]  # all but what the next one has
        ranks.sent[r] += int(others) * method.bytes_back
        ranks.messages[r] += (ranks.size - 1) * exchanges
        ranks.state[r] += kept
        ranks.passes[r] += passes
    ranks.stages += math.ceil(math.log2(ranks.size)) * exchanges


def _add_others(ranks: Ranks, model: shapes.Model, method: Method, shards: int) -> None:
    """What goes to AdamW: elementwise, where it lies; shards: of a parameter."""
    element = sum(1 for layout in ADAMW.layouts.values() if layout == "elementwise") * WIDE
    passes = method.gradient.itemsize + 2 * element + 2 * WIDE
    for p in (p for p in model if p.kind == "other"):
        rest = p.count * math.prod(p.shape[1:])
        here = shard_rows(p.shape[0], shards) * (ranks.size // shards)
        for r, rows in enumerate(here):
            ranks.state[r] += rows * rest * element
            ranks.passes[r] += rows * rest * passes


# ---- the command ----------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Prints the plan; -> exit status."""
    machine = Machine(options.tflops, options.bandwidth, options.latency, options.memory)
    method = method_of(options.optimizer, options.preset)
    if "owner" in method.refused and (options.simulate or options.block_period is not None):
        flag = "--simulate" if options.simulate else "--block-period"
        raise ValueError(f"{flag} is of sharded parameters, which {options.optimizer} does not take: leave it out")
    if options.simulate:
        rows = simulate(method, machine, options.batch)
        print(json.dumps(rows, indent=2) if options.json else describe_simulation(rows))
        return 0
    if options.shape:
        raise ValueError("--shape plans one call of polar, --world a step of a whole model: give one of them")
    mesh = mesh_of(options.mesh, options.world)
    routes = plan(options.model, method, mesh, machine, options.block_period)
    if options.json:
        print(json.dumps({"model": options.model, "mesh": mesh, "routes": routes}, indent=2))
    else:
        print(describe(options.model, options.optimizer, mesh, machine, routes))
    return 0


def method_of(name: str, preset: str | None = None) -> Method:
    """The recipe of a class of steepest, with its defaults but for the preset of its polar factors."""
    made: Any = getattr(steepest, name, None)
    if not (isinstance(made, type) and issubclass(made, torch.optim.Optimizer)):
        raise ValueError(f"optimizer {name!r} is no class of steepest; say one as it is imported, such as Muon or SOAP")
    cls: Callable[..., Any] = made
    options = {} if preset is None else {"polar": preset}
    try:
        optimizer = cls(nn.Linear(8, 8, bias=False), **options)
    except TypeError as error:
        raise ValueError(f"optimizer {name!r} cannot be made with {options}: {error}") from None
    recipe, refused = optimizer.recipe(optimizer.param_groups[0]), set()
    if cls is steepest.KFAC or not recipe.decay.elementwise:
        refused = {"owner", "hybrid", "gram", "blocks"}
    return Method(recipe, refused=frozenset(refused | {"share"} if cls is steepest.KFAC else refused))


def mesh_of(text: str | None, world: int) -> list[int]:
    """The lengths of a mesh such as "8x8"; ValueError where it does not hold the ranks of the world."""
    if world < 1:
        raise ValueError(f"--world is 1 rank or more, got {world}")
    try:
        mesh = [world] if text is None else [int(part) for part in text.split("x")]
    except ValueError:
        raise ValueError(f"mesh {text!r} is not lengths such as 8x8") from None
    if min(mesh) < 1 or math.prod(mesh) != world:
        raise ValueError(f"a mesh of {'x'.join(map(str, mesh))} does not have the {world} ranks of --world")
    return mesh


def plan(
    name: str, method: Method, mesh: Sequence[int], machine: Machine, block_period: int | None = None
) -> list[dict[str, Any]]:
    """The routes of a model on a mesh; the sizes and times are those of the rank that has most.

    block_period: the steps between two whole ones of "blocks"; None: without that route.
    """
    if name not in shapes.MODELS:
        raise ValueError(f"model {name!r} is not known; choose one of {', '.join(shapes.MODELS)}")
    world, model = math.prod(mesh), shapes.MODELS[name]
    sizes = {"local": world, "owner": mesh[-1], "hybrid": world, "gram": mesh[-1], "share": world}
    if world == mesh[-1]:
        del sizes["hybrid"]
    every = (of_route(route, model, method, size, world // mesh[-1]) for route, size in sizes.items())
    routes = [{**ranks.summary(machine), "ranks": ranks.size} for ranks in every if ranks is not None]
    if block_period is not None:
        blocks = of_route("blocks", model, method, mesh[-1])
        assert blocks is not None
        others = {**blocks.summary(machine), "ranks": blocks.size}
        routes.insert(2, _mean_step(others, next(row for row in routes if row["route"] == "owner"), block_period))
    return routes


def _mean_step(blocks: dict[str, Any], owner: dict[str, Any], period: int) -> dict[str, Any]:
    """The mean of one whole step and period - 1 of blocks."""
    if period < 1:
        raise ValueError(f"--block-period is 1 step or more, got {period}")
    mean = {key: ((period - 1) * value + owner[key]) / period for key, value in blocks.items() if key != "route"}
    counts = {key: round(value) for key, value in mean.items() if isinstance(blocks[key], int)}
    return {"route": "blocks", **mean, **counts}


def describe(name: str, optimizer: str, mesh: Sequence[int], machine: Machine, routes: Sequence[dict[str, Any]]) -> str:
    """A plan as text for a person."""
    lines = [
        f"{name}, {optimizer}, mesh {'x'.join(map(str, mesh))}: of the rank that has most of each, a step",
        f"modelled, not measured: {machine}",
        "",
        HEAD,
    ]
    for row in routes:
        lines.append(
            f"{row['route']:<7}{row['ranks']:>6}{_bytes(row['sent_bytes']):>11}{_bytes(row['received_bytes']):>11}"
            f"{row['messages']:>10}{flop_text(row['flop']):>13}{row['balance']:>9.2f}{_bytes(row['state_bytes']):>12}"
            f"{_ms(row['compute_ms']):>11}{_ms(row['travel_ms']):>11}{_ms(row['elementwise_ms']):>13}"
            f"{_ms(row['total_ms']):>11}{_ms(row['overlapped_ms']):>12}"
        )
    present = {row["route"] for row in routes}
    if "owner" not in present:
        lines.append(f"{optimizer} takes no sharded parameters: use DistributedDataParallel")
    elif "gram" not in present:
        lines.append("gram is for directions that are polar factors, without factors or transforms of the update")
    return "\n".join(lines)


def simulate(method: Method, machine: Machine, batch: int) -> list[dict[str, Any]]:
    """The owner route of every simulated model on 1 to 4096 ranks, beside the model's own step of ``batch`` tokens."""
    if batch < 1:
        raise ValueError(f"--batch is 1 token or more, got {batch}")
    rows = []
    for name in SIMULATED:
        model = shapes.MODELS[name]
        met = sum(p.count * math.prod(p.shape) * p.used for p in model)
        for world in WORLDS:
            ranks = of_route("owner", model, method, world)
            assert ranks is not None
            summary = ranks.summary(machine)
            step = 6 * met * batch / world / machine.tflops / 1e9
            parts = {"step_ms": step, "share": summary["total_ms"] / (step + summary["total_ms"])}
            rows.append({"model": name, "ranks": world, **summary, **parts})
    return rows


def describe_simulation(rows: Sequence[dict[str, Any]]) -> str:
    """The table of `simulate` in Markdown."""
    lines = [
        "| model | ranks | balance | work | sent | messages | state | in all | overlapped | share of a step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            *(row["model"], row["ranks"], f"{row['balance']:.2f}", flop_text(row["flop"]), _bytes(row["sent_bytes"])),
            *(row["messages"], _bytes(row["state_bytes"]), _ms(row["total_ms"]), _ms(row["overlapped_ms"])),
            f"{100 * row['share']:.1f}%",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _ms(value: float) -> str:
    if 0 < value < 1e-3:
        return f"{value * 1e6:.3g} ns"
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def _bytes(value: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g} B"
