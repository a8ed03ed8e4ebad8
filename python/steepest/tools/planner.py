"""`steepest plan`: what one call of `polar` does on a Hopper GPU, found on any machine.

A plan lists forms, products, launches, work and memory.  All stacks go in together: those that take the same chain of
products share its launches, node by node; matrices with a short side of at most 256 go into the small matrices' kernel,
a launch for those up to 128 and one for the others.  Work is counted in floating-point operations, 2 for a multiply and
add:

    asked      m (m + 1) k of a symmetric product (entries at and below the diagonal), 2 m n k of another
    executed   what the tiles of the launches compute, those above the diagonal left out; asked where no launch is known
    reference  torch.optim.Muon's five quintic steps with full products, 5 (4 m^2 n + 2 m^3) for m <= n

The launches are those of `make_plan` in csrc/symm_gemm/plan.cpp, with its model of time, which orders choices and is
not measured: *efficiency* is the work asked for over what the busiest cluster's time would hold.  Matrices whose
buffers are more than the L2 cache holds may be cut into chunks that take the chain one after another, as `make_chunks`
in csrc/polar/chunks.cpp models it: *traffic* is what goes between the cache and memory.

With --world or --simulate a step of a whole model on many ranks is planned instead: `steepest.tools.scale`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steepest.linalg.chain import Apply, Chain, Column, Gram, Node, Number, Operand, Product, Sum, chain, product_flop
from steepest.linalg.chain import multiplication as product_of
from steepest.linalg.coefficients import Schedule, check_preset
from steepest.linalg.polar import GRAM_ASPECT, GRAM_SHORT_SIDE, Choice, choose, nodes_of
from steepest.linalg.work import flop_text
from steepest.ops import backend
from steepest.ops.polar_chain import shape_reason
from steepest.ops.small_polar import too_long

CAPABILITY = (9, 0)
MULTIPROCESSORS = 132  # of an H100 SXM or H200
L2_MB = 50  # of either
MOST = 2**31 - 1  # of any size
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
CLOCK_FLOP = 4096  # of a multiprocessor's tensor cores in a clock, 16-bit operands
MUON_STEPS = 5


#: Of `steepest.tools.scale`, which a plan of one call does not import.
SCALE_OPTIONS: dict[str, dict[str, Any]] = {
    "--world": {"type": int, "metavar": "RANKS", "help": "plan a step of --model on so many ranks"},
    "--mesh": {
        "metavar": "AxB",
        "help": "of the ranks; parameters are cut along the last dimension (default: --world)",
    },
    "--model": {"default": "llama-7b", "metavar": "NAME", "help": "a model of steepest bench (default: llama-7b)"},
    "--optimizer": {"default": "Muon", "metavar": "CLASS", "help": "a class of steepest (default: Muon)"},
    "--block-period": {
        "type": int,
        "metavar": "STEPS",
        "help": "also plan MuonBP: parts by themselves but for every STEPS-th step",
    },
    "--tflops": {"type": float, "default": 500.0, "help": "that 16-bit products reach (default: 500)"},
    "--bandwidth": {"type": float, "default": 50.0, "metavar": "GB/S", "help": "of a rank's network (default: 50)"},
    "--latency": {"type": float, "default": 20.0, "metavar": "US", "help": "of a collective (default: 20)"},
    "--memory": {"type": float, "default": 4000.0, "metavar": "GB/S", "help": "of a rank's memory (default: 4000)"},
    "--simulate": {"action": "store_true", "help": "a table of models on 1 to 4096 ranks"},
    "--batch": {"type": int, "default": 2**22, "metavar": "TOKENS", "help": "a step of --simulate (default: 4194304)"},
}


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of the command."""
    p.add_argument(
        "--shape", action="append", default=[], metavar="[COUNTx]ROWSxCOLUMNS", help="a stack; all go in one call"
    )
    p.add_argument("--preset", help="of polar (default: auto, of --world and --simulate the class's own)")
    p.add_argument("--dtype", help="compute dtype, float16 or bfloat16 (default: what polar chooses)")
    p.add_argument("--multiprocessors", type=int, default=MULTIPROCESSORS)
    p.add_argument("--l2", type=float, default=L2_MB, metavar="MB", help="size of the L2 cache")
    p.add_argument("--json", action="store_true", help="the same as JSON")
    scale = p.add_argument_group("a step of a whole model on many ranks, instead of --shape")
    for flag, keywords in SCALE_OPTIONS.items():
        scale.add_argument(flag, **keywords)


def run(options: argparse.Namespace) -> int:
    """Prints the plan; -> exit status."""
    if options.world is not None or options.simulate:
        from . import scale

        return scale.run(options)
    if not options.shape:
        raise ValueError("what to plan is missing: --shape for a call of polar, --world for a step of a whole model")
    stacks = [parse(text) for text in options.shape]
    printed = plan(
        stacks, options.preset or "auto", dtype=options.dtype, multiprocessors=options.multiprocessors, l2_mb=options.l2
    )
    print(json.dumps(printed.json(), indent=2) if options.json else describe(printed))
    return 0


@dataclass(frozen=True)
class Stack:
    """``matrices`` of ``rows`` x ``columns``."""

    matrices: int
    rows: int
    columns: int

    @property
    def short(self) -> int:
        return min(self.rows, self.columns)

    @property
    def long(self) -> int:
        return max(self.rows, self.columns)

    @property
    def reference_flop(self) -> int:
        return MUON_STEPS * self.matrices * self.short**2 * (4 * self.long + 2 * self.short)

    def __str__(self) -> str:
        return f"{self.matrices}x{self.rows}x{self.columns}"


@dataclass(frozen=True)
class Multiplication:
    """``batch`` products of m x k and k x n; majors as in csrc/symm_gemm/params.h."""

    batch: int
    m: int
    n: int
    k: int
    majors: str
    symmetric: bool

    @property
    def flop(self) -> int:
        return self.batch * product_flop(self.m, self.n, self.k, symmetric=self.symmetric)


@dataclass(frozen=True)
class Launch:
    """A launch of the grouped product: tiles of clusters, dealt out whole or streamed step by step of their sums."""

    majors: str
    tile: tuple[int, int, int]  # rows, columns and k of a block
    cluster: int  # blocks, one below the other
    clusters: int
    tiles: int  # of clusters
    whole: int  # tiles dealt out; the rest is streamed
    steps: int  # k tiles of the rest
    waves: float
    efficiency: float
    asked: int
    executed: int

    def clocks(self, multiprocessors: int) -> float:
        return self.asked / (CLOCK_FLOP * multiprocessors * self.efficiency)


@dataclass(frozen=True)
class Stage:
    """A node of a chain for all stacks of a call."""

    kind: str
    formula: str
    products: tuple[Multiplication, ...]
    launches: tuple[Launch, ...]
    workspace_bytes: int

    @property
    def asked(self) -> int:
        return sum(product.flop for product in self.products)

    @property
    def executed(self) -> int:
        return sum(launch.executed for launch in self.launches) or self.asked


@dataclass(frozen=True)
class Chunking:
    """Matrices that take the chain one chunk after another."""

    chunks: tuple[tuple[int, ...], ...]  # matrices of each stack in each chunk
    traffic_bytes: int
    whole_traffic_bytes: int  # of all matrices at once
    gain: float  # part of the modelled time


@dataclass(frozen=True)
class Call:
    """Stacks that go through the same stages together."""

    form: str  # gram, standard, small or plain
    restarts: tuple[int, ...]
    dtype: str  # of the products
    stacks: tuple[Stack, ...]
    why: tuple[str, ...]  # this form, for each stack
    stages: tuple[Stage, ...]
    no_launches: str | None  # why none are shown
    working_set_bytes: int  # X, its second buffer, squares and workspace
    matrix_bytes: tuple[int, ...]  # of it, for one matrix of each stack
    chunking: Chunking | None  # None where all fit into the cache, or launches are not known


@dataclass(frozen=True)
class Plan:
    preset: str
    multiprocessors: int
    l2_bytes: int
    calls: tuple[Call, ...]

    def json(self) -> dict[str, Any]:
        """The plan as plain data, with the sums."""
        return {**dataclasses.asdict(self), "totals": self.totals()}

    def totals(self) -> dict[str, Any]:
        """FLOP asked, executed and of the reference, launches, clocks and efficiency where every launch is known."""
        stages = [stage for call in self.calls for stage in call.stages]
        reference = sum(stack.reference_flop for call in self.calls for stack in call.stacks)
        known = all(call.no_launches is None for call in self.calls)
        launches = [launch for stage in stages for launch in stage.launches]
        clocks = sum(launch.clocks(self.multiprocessors) for launch in launches)
        asked = sum(launch.asked for launch in launches)
        return {
            "asked_flop": sum(stage.asked for stage in stages),
            "executed_flop": sum(stage.executed for stage in stages),
            "reference_flop": reference,
            "product_launches": len(launches) if known else None,
            "product_clocks": clocks if known else None,
            "efficiency": asked / (CLOCK_FLOP * self.multiprocessors * clocks) if known and clocks else None,
        }


def parse(text: str) -> Stack:
    """A stack from "24x1024x4096", or one matrix from "1024x4096"."""
    try:
        *count, rows, columns = (int(part) for part in text.split("x"))
        (matrices,) = count or [1]
    except ValueError:
        raise ValueError(f"shape {text!r} is not [COUNTx]ROWSxCOLUMNS, such as 24x1024x4096") from None
    if min(matrices, rows, columns) < 1:
        raise ValueError(f"shape {text!r} has a size below 1; count, rows and columns are at least 1")
    if max(matrices, rows, columns) > MOST:
        raise ValueError(f"shape {text!r} has a size above {MOST}")
    return Stack(matrices, rows, columns)


def plan(
    stacks: Sequence[Stack],
    preset: str = "auto",
    *,
    dtype: str | None = None,
    multiprocessors: int = MULTIPROCESSORS,
    l2_mb: float = L2_MB,
) -> Plan:
    """What `polar` does with these stacks on a device of compute capability 9.0.

    dtype: the compute dtype, "float16" or "bfloat16", as `polar` takes it; by default what `polar` chooses.  ValueError
    for an unknown preset or dtype, "svd" (which has no products), and sizes below 1.
    """
    check_preset(preset)
    if preset == "svd":
        raise ValueError("preset 'svd' is a singular value decomposition; there is no list of products to plan")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not planned for; choose one of {', '.join(DTYPES)}")
    if not 0 < multiprocessors <= MOST or not 0 < l2_mb <= MOST:
        raise ValueError(
            f"multiprocessors and the L2 cache are positive and at most {MOST}, got {multiprocessors} and {l2_mb} MB"
        )
    alike: dict[tuple[Choice, str | None], list[tuple[Stack, str]]] = {}
    for stack in stacks:
        choice = _choose(stack, preset, dtype)
        alike.setdefault((choice, _no_launches(choice, stack)), []).append((stack, _why(choice, stack)))
    calls = [
        _call(choice, some, no_launches, multiprocessors, int(l2_mb * 2**20))
        for (choice, no_launches), some in alike.items()
    ]
    return Plan(preset, multiprocessors, int(l2_mb * 2**20), tuple(calls))


def _choose(stack: Stack, preset: str, dtype: str | None) -> Choice:
    """What `polar` would choose on a device of compute capability 9.0."""
    return choose(
        stack.rows,
        stack.columns,
        preset,
        device="cuda",
        dtype=DTYPES[dtype] if dtype else None,
        small=lambda schedule: _small_refusal(stack, schedule) is None,
    )


def _why(choice: Choice, stack: Stack) -> str:
    """The rule that decided the form, with its numbers, for a person."""
    if choice.rule == "preset":
        return "the preset is torch.optim.Muon's function, product for product"
    if choice.rule == "small":
        assert backend.extension is not None
        blocks = backend.extension.small_polar_blocks(stack.short, 10 * CAPABILITY[0] + CAPABILITY[1])
        who = "a block takes" if blocks == 1 else f"a cluster of {blocks} blocks takes"
        return f"short side {stack.short}: {who} a matrix and keeps it in shared memory"
    aspect = stack.long / stack.short
    if choice.rule == "short side":
        small = _small_refusal(stack, choice.schedule) or "the kernel for small matrices chooses its own dtype"
        return f"short side {stack.short} is below {GRAM_SHORT_SIDE}, and 16 bits do not bear the Gram form; {small}"
    if choice.rule == "aspect":
        return f"aspect {aspect:.2f} is below {GRAM_ASPECT}, where the Gram form saves nothing"
    if choice.rule == "dtype":
        return f"{choice.dtype} does not bear the Gram form of this preset".replace("torch.", "")
    return f"aspect {aspect:.2f} is at least {GRAM_ASPECT}"


def _small_refusal(stack: Stack, schedule: Schedule) -> str | None:
    """Why the small matrices' kernel does not take the stack; None where it does."""
    if backend.extension is None:
        return f"no kernel for small matrices: {backend.extension_reason}"
    if (reason := too_long(stack.short, CAPABILITY)) is not None:
        return reason
    return backend.extension.small_polar_refusal(schedule.tables, schedule.slacks)


def _no_launches(choice: Choice, stack: Stack) -> str | None:
    """Why the launches of a call are not known; None where they are, or are one."""
    if choice.form == "plain":
        return "the products are torch's own"
    if choice.form == "small":
        return None
    reason = shape_reason(stack.rows, stack.columns, chain(choice.schedule, choice.restarts).constants)
    return backend.extension_reason if reason is None else f"{reason}: products one by one, in Triton"


def _call(
    choice: Choice,
    some: list[tuple[Stack, str]],
    no_launches: str | None,
    multiprocessors: int,
    l2_bytes: int,
) -> Call:
    form, products = choice.form, chain(choice.schedule, choice.restarts)
    stacks = tuple(stack for stack, _ in some)
    nodes = nodes_of(choice)
    launched = no_launches is None and form != "small"
    chunking = _chunking(products, stacks, multiprocessors, l2_bytes) if launched else None
    parts = [stacks] if chunking is None else [_part(stacks, counts) for counts in chunking.chunks]
    full, machine = form == "plain", multiprocessors if launched else None
    stages = [_stage(node, stacks, parts, full, machine) for node in nodes]
    if form != "plain":
        stages.insert(1, Stage("numbers", "the norm bound, and with it the numbers n of every matrix", (), (), 0))
    # The small kernel keeps squares to itself, and needs no second buffer but the result.
    squares = 0 if form == "small" else len({node.out for node in nodes} - {"x", "y"})
    reasons = tuple(why for _, why in some)
    matrix_bytes = tuple(choice.dtype.itemsize * (2 * s.rows * s.columns + squares * s.short**2) for s in stacks)
    buffers = sum(stack.matrices * size for stack, size in zip(stacks, matrix_bytes))
    working_set = buffers + max(stage.workspace_bytes for stage in stages)
    name = "16 bits, high and low" if form == "small" else str(choice.dtype).removeprefix("torch.")
    return Call(
        form=form,
        restarts=choice.restarts,
        dtype=name,
        stacks=stacks,
        why=reasons,
        stages=tuple(stages),
        no_launches=no_launches,
        working_set_bytes=working_set,
        matrix_bytes=matrix_bytes,
        chunking=chunking,
    )


def _chunking(products: Chain, stacks: Sequence[Stack], multiprocessors: int, l2_bytes: int) -> Chunking | None:
    assert backend.extension is not None
    shapes = [dataclasses.astuple(stack) for stack in stacks]
    chunking = backend.extension.polar_chunks(*products.packed, shapes, multiprocessors, l2_bytes)
    if not chunking["clocks_whole"]:
        return None
    chunks = tuple(tuple(count for _, count in chunk) for chunk in chunking["chunks"])
    gain = 1 - chunking["clocks"] / chunking["clocks_whole"]
    return Chunking(chunks, chunking["bytes"], chunking["bytes_whole"], gain)


def _part(stacks: Sequence[Stack], counts: Sequence[int]) -> tuple[Stack, ...]:
    return tuple(dataclasses.replace(stack, matrices=n) for stack, n in zip(stacks, counts, strict=True) if n)


def _stage(
    node: Node,
    stacks: Sequence[Stack],
    parts: Sequence[Sequence[Stack]],
    full: bool,
    multiprocessors: int | None,
) -> Stage:
    """parts: the stacks chunk by chunk; multiprocessors: None where launches are not known."""

    kind = type(node).__name__.lower()
    if isinstance(node, Sum):
        return Stage(kind, _formula(node), (), (), 0)
    products = tuple(multiplication(node, stack, full=full) for stack in stacks)
    if multiprocessors is None:
        return Stage(kind, _formula(node), products, (), 0)
    assert backend.extension is not None
    launches, workspace = [], 0
    for part in parts:
        of_part = [multiplication(node, stack, full=full) for stack in part]
        launch_plan = backend.extension.symm_gemm_plan(list(map(dataclasses.astuple, of_part)), multiprocessors)
        launches += [_launch(launch, of_part) for launch in launch_plan["launches"]]
        workspace = max(workspace, launch_plan["workspace_bytes"])
    return Stage(kind, _formula(node), products, tuple(launches), workspace)


def multiplication(node: Gram | Product | Apply, stack: Stack, *, full: bool = False) -> Multiplication:
    """What a node multiplies for a stack; ``full`` takes symmetric products as any others."""
    product = product_of(node, stack.rows, stack.columns)
    majors = _major(product.a, "k", "mn") + _major(product.b, "mn", "k")
    return Multiplication(stack.matrices, product.m, product.n, product.k, majors, product.symmetric and not full)


def _major(operand: Operand, by_rows: str, by_columns: str) -> str:
    """The index of a product along which an operand is contiguous: its sum's, k, wherever a square lies either way."""
    if operand.buffer not in ("x", "y"):
        return "k"
    return by_columns if operand.transposed else by_rows


def _launch(launch: dict[str, Any], products: Sequence[Multiplication]) -> Launch:
    _, side, depth = launch["tile"]
    problems = [(products[problem["index"]], problem) for problem in launch["problems"]]
    executed = sum(p.batch * each["tiles"] * 2 * side * side * each["k_tiles"] * depth for p, each in problems)
    names = ("majors", "tile", "cluster", "clusters", "tiles", "whole", "steps", "waves", "efficiency")
    return Launch(**{name: launch[name] for name in names}, asked=sum(p.flop for p, _ in problems), executed=executed)


def _formula(node: Node) -> str:
    def times(number: Number) -> str:
        if isinstance(number, Column):
            return f"n{number.index} "
        return "" if number == 1 else f"{number:.4g} "

    if isinstance(node, Gram):
        return f"{node.out} = {node.x} {node.x}^T"
    if isinstance(node, Product):
        right = f" + {times(node.beta)}{node.c}" if node.beta != 0 else ""
        return f"{node.out} = {times(node.alpha)}{node.a} {node.b}{right}"
    if isinstance(node, Apply):
        right = f" + {times(node.beta)}{node.x}" if node.beta != 0 else ""
        return f"{node.out} = {times(node.alpha)}{node.q} {node.x}{right}"
    right = f" + {times(node.beta)}{node.c}" if node.beta != 0 else ""
    return f"{node.out} = {times(node.alpha)}{node.a}{right}" + (f" + {node.gamma:.4g} I" if node.gamma else "")


def describe(plan: Plan) -> str:
    """A plan as text for a person."""
    lines = [f"polar preset {plan.preset!r} on {plan.multiprocessors} multiprocessors of compute capability 9.0"]
    if backend.extension is not None and not backend.extension.build_info()["hopper"]:
        lines.append("This build has no kernels for Hopper; the launches are those of a build that has them.")
    for call in plan.calls:
        lines += ["", *_describe_call(call, plan)]
    totals = plan.totals()
    asked, reference = totals["asked_flop"], totals["reference_flop"]
    times = f"{reference / asked:.2f} times as much"
    lines += [
        "",
        f"in all       {flop_text(asked)} asked, {flop_text(totals['executed_flop'])} executed",
        f"reference    {flop_text(reference)} by torch.optim.Muon's full products, {times}",
    ]
    if totals["efficiency"] is not None:
        lines.append(
            f"model        {totals['product_launches']} launches of products, {totals['product_clocks'] / 1e3:.0f} "
            f"thousand clocks, efficiency {totals['efficiency']:.2f} (not measured)"
        )
    return "\n".join(lines)


NAMES = {
    "gram": "Gram form",
    "standard": "standard form",
    "small": "small matrices' kernel, a launch for all in blocks and one for all in clusters",
    "plain": "full products as torch.optim.Muon has them",
}


def _describe_call(call: Call, plan: Plan) -> list[str]:
    fresh = f", a new Gram product before step {', '.join(map(str, _from_one(call)))}" if call.form == "gram" else ""
    if call.form == "gram" and not call.restarts:
        fresh = ", one Gram product"
    lines = [f"{NAMES[call.form]}, {call.dtype}{fresh}"]
    lines += [f"  {stack!s:<18} {why}" for stack, why in zip(call.stacks, call.why)]
    seen: dict[tuple[Multiplication, ...], int] = {}
    for number, stage in enumerate(call.stages, start=1):
        known = f"   as {seen[stage.products]}" if stage.products in seen else ""
        lines.append(f"{number:3} {stage.kind:<8} {stage.formula}{known}")
        if not stage.products or known:
            continue
        seen[stage.products] = number
        for stack, product in zip(call.stacks, stage.products):
            half = ", lower triangle" if product.symmetric else ""
            sizes = f"m {product.m} n {product.n} k {product.k}"
            lines.append(f"      {stack!s:<18} {sizes:<26} {flop_text(product.flop)}{half}")
        for launch, times in Counter(stage.launches).items():
            again = f"{times} times " if times > 1 else ""
            lines.append(f"      -> {again}{_describe_launch(launch, plan.multiprocessors)}")
        if stage.workspace_bytes:
            lines.append(f"         workspace {stage.workspace_bytes / 2**20:.1f} MB")
    if call.no_launches:
        lines.append(f"    launches are not shown: {call.no_launches}")
    working_set = call.working_set_bytes
    fits = "fits" if working_set <= plan.l2_bytes else "does not fit"
    lines.append(f"    working set {working_set / 2**20:.1f} MB, {fits} an L2 cache of {plan.l2_bytes / 2**20:.0f} MB")
    for stack, size in zip(call.stacks, call.matrix_bytes):
        if working_set > plan.l2_bytes:
            lines.append(f"      {stack!s:<18} {size / 2**20:.1f} MB a matrix, {plan.l2_bytes // size} at once fit")
    return lines if call.chunking is None else [*lines, f"    {_describe_chunks(call.chunking)}"]


def _describe_chunks(chunking: Chunking) -> str:
    whole = f"{chunking.whole_traffic_bytes / 2**30:.2f} GB between cache and memory"
    if len(chunking.chunks) == 1:
        return f"one chunk, {whole}; smaller ones would gain too little (modelled)"
    sizes = [sum(counts) for counts in chunking.chunks]
    each = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    return (
        f"{len(sizes)} chunks of {each} matrices, {chunking.traffic_bytes / 2**30:.2f} instead of {whole}, "
        f"{100 * chunking.gain:.0f}% less time (modelled)"
    )


def _from_one(call: Call) -> list[int]:
    return [position + 1 for position in call.restarts]


def _describe_launch(launch: Launch, multiprocessors: int) -> str:
    rows, columns, depth = launch.tile
    streamed = f", {launch.tiles - launch.whole} streamed in {launch.steps} steps" if launch.steps else ""
    return (
        f"{launch.majors} tile {rows}x{columns}x{depth}, {launch.clusters} clusters of {launch.cluster}, "
        f"{launch.tiles} tiles in {launch.waves:.2f} waves: {launch.whole} whole{streamed}; "
        f"{flop_text(launch.executed)} executed, efficiency {launch.efficiency:.2f}, "
        f"{launch.clocks(multiprocessors) / 1e3:.0f} thousand clocks"
    )
