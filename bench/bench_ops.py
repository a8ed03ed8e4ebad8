"""Microbenchmarks of single operations beside torch's own.

    python bench/bench_ops.py polar [--shapes gpt2-124m | 24x1024x4096 ...] [--presets auto ...] [--quick] [--csv FILE]

One interleaved run.  Errors are taken before anything is timed, against the fp64 SVD; a preset whose result is not
finite or is further from the polar factor than 1 is an error, not a row.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from steepest.linalg.coefficients import JORDAN_STEP, Table, schedule
from steepest.linalg.polar import compute_dtype, default_restarts, polar
from steepest.ops.symm_gemm import block_edges

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from shapes import matrices, parse
from timing import header, interleaved, write_csv

from assertions import polar_error

DEFAULT_PRESETS = ["jordan", "exact", "tight_8e-3", "auto", "turbo"]
COLUMNS = (
    *("preset", "count", "rows", "columns", "ms", "spread_ms", "ratio"),
    *("gflop", "gflops", "relative_error", "off_diagonal", "largest"),
)


class Work(NamedTuple):
    """Products of one iteration in floating-point operations: with X, and of short-side squares."""

    with_x: float
    squares: float


def torch_muon(x: Tensor) -> Tensor:
    return _zeropower_via_newtonschulz(x, JORDAN_STEP, 5, 1e-7)


def flops(preset: str, m: int, n: int, device: str) -> float:
    """Floating-point operations (2 for a multiply and add) that the preset executes on one m x n matrix."""
    short, long = min(m, n), max(m, n)
    full = preset in ("torch", "jordan")
    plan = schedule("jordan" if full else preset, None, None)
    dtype = compute_dtype(preset, torch.float32, device)
    restarts = default_restarts(plan, "standard" if full else "auto", short, long, dtype)
    share = 1.0 if full or device != "cpu" else _block_row_share(short)
    work = products(plan.tables[0], restarts)
    grams = 1 + len(restarts)
    return 2 * short * short * (long * (grams * share + work.with_x) + short * work.squares * share)


def products(table: Table, restarts: tuple[int, ...]) -> Work:
    """How many products X <- Z X and how many short-side squares an iteration takes, Gram products of X apart."""
    with_x, squares, fresh = 0, 0, True
    for k, step in enumerate(table):
        squares += {2: 0, 3: 1, 4: 2, 5: 2}[len(step)]
        ends = k + 1 == len(table) or k + 1 in restarts
        with_x += ends
        squares += (0 if fresh else 1) + (0 if ends else 2)
        fresh = ends
    return Work(with_x, squares)


def _block_row_share(m: int) -> float:
    edges = block_edges(m)
    return sum((high - low) * high for low, high in zip(edges[:-1], edges[1:], strict=True)) / m**2


def measure(count: int, m: int, n: int, presets: list[str], *, rounds: int, device: str) -> list[dict[str, object]]:
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(0)).to(device)
    functions = {"torch": lambda: torch_muon(x)} | {name: lambda name=name: polar(x, name) for name in presets}
    errors = {name: polar_error(x.cpu(), function().cpu()) for name, function in functions.items()}
    for name, error in errors.items():
        if not error.relative < 1:
            raise SystemExit(f"{name} is wrong on {m}x{n}: {error}")
    timings = interleaved(functions, rounds=rounds, device=device)
    rows: list[dict[str, object]] = []
    for name, timing in timings.items():
        work = flops(name, m, n, device)
        values = (name, count, m, n, timing.median * 1e3, timing.spread * 1e3, timings["torch"].median / timing.median)
        error = errors[name]
        rates = (work / 1e9, work / timing.median / 1e9, error.relative, error.off_diagonal, error.largest)
        rows.append(dict(zip(COLUMNS, values + rates, strict=True)))
    return rows


def total(rows: list[dict[str, object]]) -> dict[str, float]:
    """Seconds of torch over seconds of each preset, for all matrices of the model."""
    seconds: dict[str, float] = {}
    for row in rows:
        name = str(row["preset"])
        seconds[name] = seconds.get(name, 0.0) + float(row["count"]) * float(row["ms"])  # type: ignore[arg-type]
    return {name: seconds["torch"] / value for name, value in seconds.items()}


def show(rows: list[dict[str, object]]) -> None:
    print("preset                matrices       ms     +-  ratio   GFLOP  GFLOP/s     rel    off   max")
    for row in rows:
        size = f"{row['count']}x{row['rows']}x{row['columns']}"
        print(
            f"{row['preset']:14}{size:>16}{row['ms']:9.2f}{row['spread_ms']:7.2f}{row['ratio']:7.2f}{row['gflop']:8.1f}"
            f"{row['gflops']:9.0f}{row['relative_error']:8.3f}{row['off_diagonal']:7.3f}{row['largest']:6.2f}"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operation", choices=["polar"])
    parser.add_argument("--shapes", nargs="+", default=["gpt2-124m"], help="named models or [COUNTx]ROWSxCOLUMNS")
    parser.add_argument("--presets", nargs="+", default=DEFAULT_PRESETS)
    parser.add_argument("--quick", action="store_true", help="3 rounds, not 15")
    parser.add_argument("--csv", help="write the rows to this file")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    print(header(options.device))
    everything = []
    for name in options.shapes:
        rows = []
        for count, m, n in matrices(parse(name)):
            rows += measure(count, m, n, options.presets, rounds=3 if options.quick else 15, device=options.device)
        show(rows)
        print(f"{name}: times faster than torch:  " + "  ".join(f"{k} {v:.2f}" for k, v in total(rows).items()))
        everything += rows
    if options.csv:
        write_csv(options.csv, everything, options.device)


if __name__ == "__main__":
    main()
