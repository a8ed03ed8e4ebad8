"""`steepest tune`: times the configurations of the Triton products of some shapes, and keeps the fastest.

    polar       X X^T, products of squares and Q X of a polar call (`steepest.linalg.chain`), where Triton multiplies
    kronecker   averages L + w (G G^T - L) of both sides, and products of their sizes in "tf32x3" and "tf32"

Where a compiled kernel takes a call (`steepest doctor`, docs/polar.md), Triton is not asked, and what is measured here
counts under STEEPEST_BACKEND=triton only. A product is known by its sizes, batch, symmetry and precision: another batch
is another product, which the model of the table chooses for until it is measured as well.

Configurations are timed interleaved on a cold L2 cache, without what the host needs. That is more where descriptors are
made (TMA); in a CUDA graph, or in a step that keeps the GPU busy, it does not count.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from steepest.linalg.chain import Gram, Sum, chain, multiplication
from steepest.linalg.coefficients import presets
from steepest.linalg.polar import PLAIN, choose, compute_dtype
from steepest.ops import backend, tuning
from steepest.ops.tuning import Measured, Problem, Timer

from . import files, shapes
from .bench.timing import Call, interleaved

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
PARTS = ("polar", "kronecker")
ROUNDS = 15


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of the command."""
    p.add_argument(
        "--shape", action="append", default=[], metavar="[COUNTx]ROWSxCOLUMNS", help="a stack; may be given again"
    )
    p.add_argument("--model", action="append", default=[], choices=list(shapes.MODELS), help="all matrices of a model")
    p.add_argument("--of", nargs="+", choices=PARTS, default=list(PARTS), help="whose products (default: both)")
    p.add_argument("--preset", default="auto", help="of polar (default: auto)")
    p.add_argument(
        "--dtype",
        nargs="+",
        choices=list(DTYPES),
        help="of polar's products, 16 bits, and of gradients (default: what polar chooses, and float32)",
    )
    p.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    p.add_argument("--json", action="store_true", help="the same as JSON")
    p.add_argument("--show", action="store_true", help="print what the file holds and measure nothing")
    p.add_argument("--clear", action="store_true", help="remove the file and measure nothing")


def run(options: argparse.Namespace) -> int:
    """Measures and writes, or shows, or removes; ValueError without shapes, a GPU, or a file that it can use."""
    if options.show or options.clear:
        return (_clear if options.clear else _show)(_file(), options.json)
    names = [*options.model, *options.shape]
    stacks = [stack for name in names for stack in shapes.matrices(shapes.parse(name))]
    if not stacks:
        raise ValueError("nothing to tune for: pass --shape 24x1024x4096 or --model gpt2-124m")
    if options.rounds < 1:
        raise ValueError(f"rounds are at least 1, got {options.rounds}")
    if (reason := backend.triton_reason()) is not None:
        raise ValueError(f"tune measures on a GPU, with Triton, and cannot here: {reason}")
    dtypes = [DTYPES[name] for name in options.dtype] if options.dtype else None
    problems = products(stacks, options.preset, dtypes, options.of)
    device = torch.device("cuda", torch.cuda.current_device())
    timer = functools.partial(_seconds, rounds=options.rounds, device=str(device))
    file = _file()
    files.make_folder(file.parent, "STEEPEST_CACHE")
    measurements = tune(problems, device, timer, file, quiet=options.json)
    if options.json:
        print(json.dumps({"file": str(file), "products": [each.json() for each in measurements]}, indent=2))
    return 0


def _file() -> Path:
    try:
        return tuning.cache()
    except OSError as error:
        raise ValueError(str(error)) from None


def _show(file: Path, as_json: bool) -> int:
    try:
        machines = tuning.kept(file)
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{file} cannot be read: {said}; set STEEPEST_CACHE to another file, or remove it") from None
    print(json.dumps(machines, indent=2) if as_json else describe_kept(file, machines))
    return 0


def _clear(file: Path, as_json: bool) -> int:
    there = file.exists()
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{file} cannot be removed: {error.strerror}; set STEEPEST_CACHE to another file") from None
    text = f"{file} {'is removed' if there else 'was not there'}"
    print(json.dumps({"file": str(file), "removed": there}) if as_json else text)
    return 0


def tune(
    problems: Sequence[Problem], device: torch.device, timer: Timer, file: Path, quiet: bool = False
) -> list[Measured]:
    """Measures one product after another; what is done is in the file even if the rest never is."""
    measurements = []
    for each in problems:
        text = f"{each}\n    nothing to choose"
        try:
            if (measured := tuning.measure(each, device, timer, file)) is not None:
                measurements.append(measured)
                text = describe(measured)
        except torch.OutOfMemoryError:
            text = f"{each}\n    not measured: no memory for its operands"
        if not quiet:
            print(text, flush=True)
    if not quiet:
        print(f"{len(measurements)} of {len(problems)} products are in {file}")
    return measurements


def products(
    stacks: Sequence[shapes.Stack],
    preset: str = "auto",
    dtypes: Sequence[torch.dtype] | None = None,
    of: Sequence[str] = PARTS,
) -> list[Problem]:
    """What is asked of Triton for (count, rows, columns), each once.

    dtypes: of polar's products, those of 16 bits, and of gradients; None for what polar chooses on a GPU, and fp32.
    """
    if preset not in presets() or preset == "svd":
        raise ValueError(f"preset {preset!r} has no products to tune; choose one of {', '.join(presets())} but svd")
    problems: list[Problem] = []
    for dtype in dtypes or (compute_dtype(preset, torch.float32, "cuda"), torch.float32):
        if "polar" in of and dtype.itemsize == 2 and preset != PLAIN:
            for stack in stacks:
                problems += _of_polar(*stack, preset, dtype)
        if "kronecker" in of:
            for stack in stacks:
                problems += _averages(*stack, dtype)
    if "kronecker" in of:
        problems += _of_refreshes(stacks)
    return list({str(each): each for each in reversed(problems)}.values())[::-1]


def _of_polar(count: int, rows: int, columns: int, preset: str, dtype: torch.dtype) -> list[Problem]:
    choice = choose(rows, columns, preset, device="cuda", dtype=dtype)
    products = []
    for node in (Gram("gram", "x"), *chain(choice.schedule, choice.restarts).nodes):
        if isinstance(node, Sum):
            continue
        product = multiplication(node, rows, columns)
        products.append(
            Problem(
                batch=count,
                m=product.m,
                n=product.n,
                k=product.k,
                dtype=dtype,
                symmetric=product.symmetric,
                a_rows=not product.a.transposed,
                b_rows=not product.b.transposed,
                c=not isinstance(node, Gram) and node.beta != 0,
            )
        )
    return products


def _averages(count: int, rows: int, columns: int, dtype: torch.dtype) -> list[Problem]:
    """Gradients are G and G^T, of contiguous rows and of contiguous columns."""
    wide = dtype.itemsize == 2
    return [
        Problem(
            *(count, m, m, k, dtype),
            symmetric=True,
            precision="tf32x3",
            wide=wide,
            a_rows=by_rows,
            b_rows=not by_rows,
        )
        for m, k, by_rows in ((rows, columns, True), (columns, rows, False))
    ]


def _of_refreshes(stacks: Sequence[shapes.Stack]) -> list[Problem]:
    """P Q, Q^T P Q and Y + Y X of all factors of a size together, as bases and roots are refreshed."""
    sizes: Counter[int] = Counter()
    for count, rows, columns in stacks:
        sizes.update({rows: count})
        sizes.update({columns: count})
    problems = []
    for n, count in sizes.items():
        problems += [
            Problem(count, n, n, n, torch.float32, symmetric, precision="tf32x3") for symmetric in (False, True)
        ]
        problems.append(Problem(count, n, n, n, torch.float32, precision="tf32"))
    return problems


def _seconds(calls: Mapping[str, tuning.Call], rounds: int, device: str) -> dict[str, float]:
    timed = interleaved({name: Call(call) for name, call in calls.items()}, rounds=rounds, device=device, hide=True)
    return {name: timing.median for name, timing in timed.items()}


def describe(measured: Measured) -> str:
    """The times of a product's configurations, fastest first, as text for a person."""
    marks = {measured.model: "the model's choice"}
    lines = [str(measured.problem)]
    for name, seconds in sorted(measured.seconds.items(), key=lambda item: item[1]):
        mark = "->" if name == measured.won else "  "
        lines.append(f" {mark} {seconds * 1e6:10.1f} us  {name:<42}{marks.get(name, '')}".rstrip())
    lines += [f"    left out       {name}: {reason}" for name, reason in measured.left_out.items()]
    return "\n".join(lines)


def describe_kept(file: Path, machines: Mapping[str, Mapping[str, Mapping[str, object]]]) -> str:
    """What the file holds as text for a person."""
    lines = [str(file) if machines else f"{file} holds nothing"]
    for machine, won in machines.items():
        lines.append(machine)
        lines += [f"    {product:<60} {json.dumps(fields)}" for product, fields in won.items()]
    return "\n".join(lines)
