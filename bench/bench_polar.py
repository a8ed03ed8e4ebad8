"""The polar factor of stacks of matrices, and the products it is made of, beside torch's own and the fastest peers.

    python bench/bench_polar.py [--device cuda] [--parts small products polar] [--shapes 24x1024x4096 ...]
                                [--dtypes float16 bfloat16] [--quick] [--csv FILE]

    polar      presets, torch.optim.Muon's function (eager and compiled, matrix by matrix), peers that can be imported,
               and one product of the stack by torch.bmm, cuBLAS on a GPU, whose rate is the ceiling
    products   a symmetric product X X^T by `steepest.ops.symm_gemm`, and by the products in one call where there are
               kernels for them, beside the full one of torch.bmm; half the work counts as the symmetric one's
    small      126 small matrices of three shapes: torch one by one, ours stack by stack and in one call

Some of them on a GPU a second time as a CUDA graph ("captured"), which leaves the host out.

All variants of a row's shape are one interleaved run, with nothing in the L2 cache at first. Before anything is timed
its error is taken, and a variant beyond the bounds is WRONG and not timed; the exit status is then 1 if it is ours.
FLOP are those of `steepest plan`: what tiles execute, for launches on Hopper. torch's function and the peers convert to
a dtype of their own, so what takes long to compile is there for the first dtype alone.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import peers
import torch
from shapes import matrices, parse
from timing import header, interleaved, seconds, write_csv
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz
from truth import Error, Truth

from steepest import planner
from steepest.linalg.chain import Apply, Chain, Node, Product
from steepest.linalg.coefficients import JORDAN_STEP
from steepest.linalg.polar import polar, polars
from steepest.ops import polar_chain
from steepest.ops.symm_gemm import gemm

SHAPES = ["24x1024x4096", "28x2048x6144", "4096x4096", "4096x14336", "216x2048x7168", "8192x28672"]
QUICK_SHAPES = ["24x1024x4096", "4x2048x6144", "4096x4096"]
SMALL = ["42x64x64", "42x128x576", "42x256x256"]
PRODUCTS = ["32x1024x1024", "1024x1024", "8x2048x2048", "2048x2048", "4096x4096", "8192x8192"]
PRESETS = ("auto", "exact", "turbo", "jordan")
BASE, BMM = "torch.optim.Muon", "torch.bmm"
# Of Gaussian matrices: every peer's polynomial leaves .02 to .25, bf16 .006 to .03 of rounding.
MOST = Error(relative=0.4, off_diagonal=0.05)
# A product rounds once (half a unit), and the second of two in a row multiplies what the first has rounded.
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-11}
MOST_CAPTURED = 1 << 29  # elements; a graph keeps its memory while it lives
LONG, SHORT = 10, 2  # products of the two chains whose difference is timed

Result = Sequence[Sequence[Tensor] | Tensor]  # for each stack, its matrices


@dataclass(frozen=True)
class Variant:
    """``run`` gives, for every stack, a tensor or list of its matrices; flop: None where it is not known."""

    run: Callable[[], Result]
    flop: float | None = None
    ours: bool = False
    version: str = ""


class Captured:
    """A call as one CUDA graph, captured when it is first made: its time without the host's part of it."""

    def __init__(self, call: Callable[[], Result]) -> None:
        self.call = call
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Result = ()

    def __call__(self) -> Result:
        if self.graph is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # what is made on a first call must not be captured
                self.call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.result = self.call()
            self.graph = graph
        self.graph.replay()
        return self.result


def with_captured(found: dict[str, Variant], names: Sequence[str], xs: Sequence[Tensor]) -> dict[str, Variant]:
    """Some of the variants once more, each as a CUDA graph, where there is a GPU and room for what graphs keep."""
    if not xs[0].is_cuda or sum(x.numel() for x in xs) > MOST_CAPTURED:
        return found
    return found | {f"{n}, captured": replace(found[n], run=Captured(found[n].run)) for n in names if n in found}


def muon(x: Tensor) -> Tensor:
    return _zeropower_via_newtonschulz(x, JORDAN_STEP, 5, 1e-7)


def one_by_one(function: Callable[[Tensor], Tensor], xs: Sequence[Tensor]) -> Result:
    # torch's function divides a bf16 matrix in place.
    return [[function(each.clone() if x.dtype == torch.bfloat16 else each) for each in x] for x in xs]


def flop(xs: Sequence[Tensor], preset: str) -> float | None:
    """What the preset executes; None off the GPU, where forms and products are others."""
    if not xs[0].is_cuda:
        return None
    dtype = "bfloat16" if xs[0].dtype == torch.bfloat16 else None
    stacks = [planner.Stack(*x.shape) for x in xs]
    count = torch.cuda.get_device_properties(xs[0].device).multi_processor_count
    return float(planner.plan(stacks, preset, dtype=dtype, multiprocessors=count).totals()["executed_flop"])


def torch_variants(xs: list[Tensor], options: argparse.Namespace) -> dict[str, Variant]:
    reference = sum(planner.Stack(*x.shape).reference_flop for x in xs)
    found = {BASE: Variant(lambda: one_by_one(muon, xs), reference, version=torch.__version__)}
    if options.compiled and xs[0].dtype == options.dtypes[0]:
        run = torch.compile(muon, dynamic=False)
        found[f"{BASE} compiled"] = Variant(lambda: one_by_one(run, xs), reference, version=torch.__version__)
    return found


def polar_variants(x: Tensor, options: argparse.Namespace) -> dict[str, Variant]:
    found = torch_variants([x], options)
    count, m, n = x.shape
    square = torch.randn(count, min(m, n), min(m, n), device=x.device).to(x.dtype)
    pair = (x, square) if m > n else (square, x)
    found[BMM] = Variant(lambda: [torch.bmm(*pair)], 2.0 * count * m * n * min(m, n))
    for preset in options.presets:
        # bf16 matrices of a user go through fp16 as well; here they show what bf16 products do.
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else None
        run = functools.partial(polar, x, preset, dtype=dtype)
        found[f"polar {preset}"] = Variant(lambda run=run: [run()], flop([x], preset), ours=True)  # type: ignore[misc]
    for peer in options.peers if x.dtype == options.dtypes[0] else ():
        run = peer.build()
        found[peer.name] = Variant(lambda run=run: [run(x)], version=peer.version)  # type: ignore[misc]
    return with_captured(found, ("polar auto", "polar turbo"), [x])


def small_variants(xs: list[Tensor], options: argparse.Namespace) -> dict[str, Variant]:
    found = torch_variants(xs, options)
    work = flop(xs, "auto")
    found["polar auto, stack by stack"] = Variant(lambda: [polar(x) for x in xs], work, ours=True)
    found["polar auto, one call"] = Variant(lambda: polars(xs), work, ours=True)
    return with_captured(found, (BASE, "polar auto, one call"), xs)


def gate(xs: Sequence[Tensor], variants: Mapping[str, Variant]) -> dict[str, tuple[str, Error | None]]:
    """For each variant its status ("ok", or what is wrong) and its error, the worst over the first and last matrix.

    All other matrices must be finite and have the norm of a semi-orthogonal matrix to the same bound.
    """
    truths = [{i: Truth(x[i]) for i in {0, len(x) - 1}} for x in xs]
    answers: dict[str, tuple[str, Error | None]] = {}
    for name, variant in variants.items():
        if name == BMM:
            answers[name] = ("ok", None)
            continue
        try:
            found = variant.run()
        except Exception as error:  # one variant that fails leaves the others their row
            answers[name] = (f"failed: {type(error).__name__}: {str(error)[:200]}", None)
            continue
        worst, norms_are_right = Error(0.0, 0.0), True
        for own, ys in zip(truths, found, strict=True):
            for i, truth in own.items():
                worst = worst.worse(truth.error(ys[i]))
            norms = torch.stack([torch.linalg.vector_norm(y, dtype=torch.float32) for y in ys])
            off = (norms / min(ys[0].shape) ** 0.5 - 1).abs()
            norms_are_right = norms_are_right and bool((off <= MOST.relative).all())
        right = worst.relative <= MOST.relative and worst.off_diagonal <= MOST.off_diagonal and norms_are_right
        answers[name] = ("ok" if right else "WRONG", worst)
        del found
    return answers


def products(x: Tensor) -> tuple[dict[str, Variant], dict[str, tuple[str, Error | None]]]:
    """Variants of X X^T and what is wrong with them: against fp64 on the first matrix, and not symmetric to the bit."""
    count, m, _ = x.shape
    out = torch.empty(count, m, m, dtype=x.dtype, device=x.device)
    full = 2.0 * count * m**3
    variants = {
        BMM: Variant(lambda: [torch.bmm(x, x.mT)], full),
        "symm_gemm": Variant(lambda: [gemm(x, x.mT, out=out, symmetric=True)], full / 2, ours=True),
    }
    exact = x[0].double() @ x[0].double().mT
    wanted = dict.fromkeys(variants, exact)
    if polar_chain.takes(x, ((1.0,),)):
        ys = torch.empty_like(x)
        for length in (LONG, SHORT):
            run = functools.partial(run_chain, x, ys, length)
            variants[f"chain of {length}"] = Variant(run, ours=True)
            wanted[f"chain of {length}"] = exact @ exact @ x[0].double()
    answers: dict[str, tuple[str, Error | None]] = {}
    for name, variant in variants.items():
        (found,) = variant.run()
        y = found[0].double()
        relative = ((y - wanted[name]).norm() / wanted[name].norm()).item()
        symmetric = name != "symm_gemm" or torch.equal(y, y.mT)
        answers[name] = ("ok" if relative <= 2 * UNIT[x.dtype] and symmetric else "WRONG", Error(relative, 0.0))
    return variants, answers


@functools.cache
def chain_of(length: int) -> Chain:
    """``length`` equal products of the Gram product with itself, and the last times X."""
    squared: Node = Product("t", "gram", "gram", "gram", 1.0, 0.0)
    return Chain(((squared,) * length) + (Apply("y", "t", "x", 1.0, 0.0),), ((1.0,),), (0,), "y")


def run_chain(x: Tensor, y: Tensor, length: int) -> Result:
    plan = chain_of(length)
    slack = torch.empty(len(x), device=x.device)
    polar_chain.polar_chain([x], [y], [slack], plan.packed, plan.constants, plan.powers, (), tight=False, eps=0.0)
    return [y]


def measure(
    part: str,
    name: str,
    xs: Sequence[Tensor],
    variants: Mapping[str, Variant],
    answers: Mapping[str, tuple[str, Error | None]],
    options: argparse.Namespace,
) -> list[dict[str, object]]:
    """A row for every variant; times of those that are right."""
    runs = {name: variant.run for name, variant in variants.items() if answers[name][0] == "ok"}
    once = sum(min(seconds(run, options.device) for _ in range(2)) for run in runs.values())
    rounds = max(3, min(options.rounds, int(options.seconds / max(once, 1e-9))))
    timings = interleaved(runs, rounds=rounds, warmup=1, device=options.device, flush=True) if runs else {}
    of = {name: (timing.median, timing.spread) for name, timing in timings.items()}
    work = {name: variant.flop for name, variant in variants.items()}
    long, short = f"chain of {LONG}", f"chain of {SHORT}"
    if long in of and short in of:
        steps = LONG - SHORT
        each, spread = (of[long][0] - of[short][0]) / steps, (of[long][1] + of[short][1]) / steps
        if each > 0:
            of["one of a chain"], work["one of a chain"] = (each, spread), work["symm_gemm"]
        status = "ok" if each > 0 else "failed: less than the noise"
        answers = {**answers, "one of a chain": (status, answers[long][1])}
    base = of.get(BASE) or of.get(BMM)
    ceiling = of.get(BMM)
    rate = None if ceiling is None else work[BMM] / ceiling[0]  # type: ignore[operator]
    rows: list[dict[str, object]] = []
    for variant in answers:
        status, error = answers[variant]
        row: dict[str, object] = {
            "part": part,
            "shape": name,
            "dtype": str(xs[0].dtype).removeprefix("torch."),
            "variant": variant,
            "version": variants[variant].version if variant in variants else "",
            "status": status,
        }
        if variant in of:
            row |= {"ms": round(of[variant][0] * 1e3, 4), "spread_ms": round(of[variant][1] * 1e3, 4)}
            row["rounds"] = rounds
            if base:
                row["ratio"] = round(base[0] / of[variant][0], 3)
            if (own := work[variant]) is not None:
                row["tflop_per_s"] = round(own / of[variant][0] / 1e12, 4)
                if rate is not None:
                    row["of_bmm"] = round(own / of[variant][0] / rate, 3)
        if error is not None:
            row |= {"relative_error": round(error.relative, 6), "off_diagonal": round(error.off_diagonal, 6)}
        rows.append(row)
    return rows


COLUMNS = (
    *("part", "shape", "dtype", "variant", "version", "status", "ms", "spread_ms", "rounds", "ratio", "tflop_per_s"),
    *("of_bmm", "relative_error", "off_diagonal"),
)


def cases(options: argparse.Namespace) -> list[tuple[str, str, torch.dtype]]:
    """(part, shapes joined by +, dtype) of every run."""
    named = {"polar": each_stack(options.shapes), "products": each_stack(options.products)}
    named["small"] = ["+".join(each_stack(options.small))]
    return [(part, name, dtype) for part in options.parts for name in named[part] for dtype in options.dtypes]


def each_stack(names: Sequence[str]) -> list[str]:
    return ["x".join(map(str, stack)) for name in names for stack in matrices(parse(name))]


def stacks(name: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Gaussian matrices."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = [size for each in name.split("+") for size in matrices(parse(each))]
    return [torch.randn(size, generator=generator, device=device, dtype=dtype) for size in sizes]


@torch.no_grad()
def run(part: str, name: str, dtype: torch.dtype, options: argparse.Namespace) -> list[dict[str, object]]:
    if options.compiled or options.peers:
        torch.compiler.reset()  # what is compiled sees each shape as the first
    xs = stacks(name, dtype, options.device)
    if part == "products":
        x = xs[0].div_(xs[0].shape[-1] ** 0.5)
        variants, answers = products(x)
    else:
        variants = polar_variants(xs[0], options) if part == "polar" else small_variants(xs, options)
        answers = gate(xs, variants)
    try:
        return measure(part, name, xs, variants, answers, options)
    except torch.OutOfMemoryError:
        # A peer may keep what it allocated, a CUDA graph's memory for one: then ours are timed without it.
        for peer in options.peers:
            if variants.pop(peer.name, None):
                answers[peer.name] = ("failed: no memory beside the others", answers[peer.name][1])
        torch.compiler.reset()
        torch.cuda.empty_cache()
    return measure(part, name, xs, variants, answers, options)


def show(rows: Sequence[Mapping[str, object]]) -> None:
    for row in rows:
        if row["status"] != "ok":
            print(f"  {row['variant']:<28} {row['status']}")
            continue
        text = f"  {row['variant']:<28} {row['ms']:>10} ms +- {row['spread_ms']:<8}"
        for key, words in (("ratio", "times"), ("tflop_per_s", "TFLOP/s"), ("of_bmm", "of bmm")):
            text += f" {row[key]} {words}" if key in row else ""
        text += f"  error {row['relative_error']:.4f}" if "relative_error" in row else ""
        print(text + (f" off-diagonal {row['off_diagonal']:.4f}" if row.get("off_diagonal") else ""))


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", nargs="+", choices=["polar", "products", "small"])
    parser.add_argument("--shapes", nargs="+", help="of part polar: named models or [COUNTx]ROWSxCOLUMNS")
    parser.add_argument("--products", nargs="+", help="of part products: square")
    parser.add_argument("--small", nargs="+", default=SMALL)
    parser.add_argument("--dtypes", nargs="+", type=lambda name: getattr(torch, name))
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--rounds", type=int, default=15, help="at most, and at least 3")
    parser.add_argument("--seconds", type=float, default=3.0, help="of the rounds of one shape, all variants together")
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help="without torch.compile")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller shapes, 3 rounds, no torch.compile")
    parser.add_argument("--csv", help="write the rows to this file, after every shape")
    options = parser.parse_args(arguments)
    cuda = options.device.startswith("cuda")
    options.parts = options.parts or ["small", "products", "polar"]  # the longest at the end
    options.shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    options.products = options.products or (PRODUCTS[:-1] if options.quick else PRODUCTS)
    options.dtypes = options.dtypes or ([torch.float16, torch.bfloat16] if cuda else [torch.float32])
    if options.quick:
        options.rounds, options.compiled = 3, False
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(arguments)
    print(header(options.device))
    everything: list[dict[str, object]] = []
    known = peers.found()
    options.peers = [peer for peer in known if peer.build is not None]
    for peer in known:
        print(f"{peer.name} {peer.version}: " + ("found" if peer.build else f"absent ({peer.reason})"))
        status = "found" if peer.build else f"absent: {peer.reason}"
        everything.append({"part": "peer", "variant": peer.name, "version": peer.version, "status": status})
    for part, name, dtype in cases(options):
        print(f"\n{part} {name} {str(dtype).removeprefix('torch.')}", flush=True)
        try:
            rows = run(part, name, dtype, options)
        except Exception as error:  # out of memory at one shape is a row, not the end of the table
            status = f"failed: {type(error).__name__}: {str(error)[:200]}"
            print(f"  {status}")
            rows = [{"part": part, "shape": name, "dtype": str(dtype).removeprefix("torch."), "status": status}]
        else:
            show(rows)
        everything += rows
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()
        if options.csv:
            write_csv(options.csv, [{key: row.get(key, "") for key in COLUMNS} for row in everything], options.device)
    theirs = {peer.name for peer in known}
    bad = [
        row
        for row in everything
        if row["part"] != "peer" and row["status"] != "ok" and row.get("variant") not in theirs
    ]
    if bad:
        lines = (f"{row.get('shape')} {row.get('dtype')} {row.get('variant', '')}: {row['status']}" for row in bad)
        raise SystemExit("wrong or failed:\n  " + "\n  ".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
