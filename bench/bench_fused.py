"""The elementwise part of a step: bandwidth of each op beside a copy, AdamW beside torch's, launches and host time.

    python bench/bench_fused.py [--device cuda] [--elements 100e6 1e9] [--model gpt2-124m] [--csv FILE]

Every table is one interleaved run. Bandwidth counts each tensor once for every time the op must read or write it; the
ceiling is `Tensor.copy_` of as many bytes, measured among the ops. Results are compared with the parts in torch ops
before anything is timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from shapes import Model, parse
from timing import header, interleaved, write_csv
from torch import Tensor, nn

import steepest
from steepest.ops import multi_tensor
from steepest.ops.multi_tensor import Groups, Item, Items, Table
from steepest.ops.program import Program

MUON = Program(nesterov=True)
MUADAM = Program(momentum_correction=True, power="quarter", second_correction=True, eps_inside=True)
ADAMW = Program(momentum_correction=True, power="quarter", second_correction=True, direction="identity")
PROGRAMS = {"Muon": MUON, "MuAdam": MUADAM, "AdamW": ADAMW}
PARTS = 8  # tensors that the elements are shared out among
HYPER = [1e-3, 0.01, 0.9, 0.999, 1e-8]


class Ops:
    """One program over `elements` elements in PARTS parameters of `dtype`, with fp32 averages."""

    def __init__(self, program: Program, elements: int, dtype: torch.dtype, device: str) -> None:
        size = elements // PARTS

        def some(dtype: torch.dtype, scale: float) -> list[Tensor]:
            return [(scale * torch.randn(size, device=device)).to(dtype) for _ in range(PARTS)]

        none: list[Tensor] = []
        self.program, self.elements = program, size * PARTS
        self.grads, self.params, self.momenta = some(dtype, 1e-3), some(dtype, 0.02), some(torch.float32, 1e-3)
        self.seconds = none if program.power == "none" else [m.square() for m in self.momenta]
        self.inputs = none if program.whole else some(torch.bfloat16 if device == "cpu" else torch.float16, 1.0)
        self.steps = [torch.ones((), device=device) for _ in range(PARTS)]
        skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.table = Table.empty(skipped, [size] * PARTS, [(1, size)] * PARTS)
        self.items = Items(tuple(Item(program, i, 1, i, (0, i, 0), 1.0) for i in range(PARTS)))
        self.groups = Groups(HYPER, [], [], [0] * PARTS)
        self.inspect()

    def inspect(self) -> None:
        packed = [self.program.packed()] * PARTS
        multi_tensor.inspect(self.grads, self.steps, self.table, packed, list(range(PARTS + 1)), self.groups)

    def before(self) -> None:
        params = self.params if self.program.whole else []
        multi_tensor.before(self.grads, self.momenta, self.seconds, self.inputs, params, [], self.table, self.items)

    def after(self) -> None:
        multi_tensor.after(self.inputs, self.seconds, self.params, [], [], self.table, self.items)

    def bytes_of(self, op: str) -> int:
        g, p, x = (each[0].itemsize if each else 0 for each in (self.grads, self.params, self.inputs))
        second = 4 if self.seconds else 0
        moved = {
            "inspect": g,
            "before": g + 8 + 2 * second + x + (2 * p if self.program.whole else 0),
            "after": x + second + 2 * p,
        }
        return moved[op] * self.elements


def bandwidth(elements: int, dtype: torch.dtype, device: str, rounds: int) -> list[dict[str, object]]:
    functions: dict[str, Callable[[], object]] = {}
    moved: dict[str, int] = {}
    source = torch.zeros(elements, device=device)
    target = torch.empty_like(source)
    functions["copy"], moved["copy"] = lambda: target.copy_(source), 8 * elements
    for name, program in PROGRAMS.items():
        ops = Ops(program, elements, dtype, device)
        for op in ("inspect",) * (name == "Muon") + ("before",) + ("after",) * (not program.whole):
            functions[f"{op} {name}"], moved[f"{op} {name}"] = getattr(ops, op), ops.bytes_of(op)
    timings = interleaved(functions, rounds=rounds, device=device)
    rates = {name: moved[name] / timing.median / 1e9 for name, timing in timings.items()}
    return [
        {
            "what": name,
            "elements": elements,
            "dtype": str(dtype).removeprefix("torch."),
            "ms": round(timing.median * 1e3, 4),
            "spread_ms": round(timing.spread * 1e3, 4),
            "gb_per_s": round(rates[name], 1),
            "of_copy": round(rates[name] / rates["copy"], 3),
        }
        for name, timing in timings.items()
    ]


def parameters(model: Model, kind: str, device: str) -> list[nn.Parameter]:
    found = []
    for each in model:
        for _ in range(each.count if each.kind == kind else 0):
            p = nn.Parameter(0.02 * torch.randn(each.shape, device=device))
            p.grad = 1e-3 * torch.randn(each.shape, device=device)
            found.append(p)
    return found


def check(device: str) -> None:
    """SystemExit unless three steps of the fused ops and of the parts agree to a few parts in a million."""
    model = parse("tiny")
    made = []
    for backend in ("auto", "torch"):
        torch.manual_seed(0)
        groups = [{"params": parameters(model, "matrix", device)}]
        groups.append({"params": parameters(model, "other", device), "use_muon": False})  # type: ignore[dict-item]
        optimizer = steepest.MuAdam(groups, polar="svd", backend=backend)
        for _ in range(3):
            optimizer.step()
        made.append([p.detach() for group in groups for p in group["params"]])
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*made, strict=True))
    if not worst < 1e-4:
        raise SystemExit(f"the fused step is {worst:.1e} off the parts on {device}")


def adamw(name: str, device: str, rounds: int) -> list[dict[str, object]]:
    """AdamW over all parameters of a model: torch's fused one, and ours."""
    model = parse(name)
    params = parameters(model, "matrix", device) + parameters(model, "other", device)
    values = {"lr": 1e-3, "weight_decay": 0.01}
    ours = steepest.MuAdam([{"params": params, "use_muon": False, **values}])
    theirs = torch.optim.AdamW(params, fused=True, **values)  # type: ignore[arg-type]
    timings = interleaved({"torch fused AdamW": theirs.step, "AdamW": ours.step}, rounds=rounds, device=device)
    base = timings["torch fused AdamW"].median
    return [
        {
            "what": what,
            "model": name,
            "ms": round(timing.median * 1e3, 4),
            "spread_ms": round(timing.spread * 1e3, 4),
            "ratio": round(base / timing.median, 3),
        }
        for what, timing in timings.items()
    ]


def host(name: str, device: str, rounds: int) -> list[dict[str, object]]:
    """On a GPU: microseconds the host spends in a MuAdam step, launches of the fused ops in it, peak extra memory."""
    model = parse(name)
    rows: list[dict[str, object]] = []
    for captured in (False, True):
        groups = [{"params": parameters(model, "matrix", device)}]
        groups.append({"params": parameters(model, "other", device), "use_muon": False})  # type: ignore[dict-item]
        optimizer = steepest.MuAdam(groups)
        step = steepest.graphed(optimizer).step if captured else optimizer.step
        for _ in range(4):
            step()
        rows.append(
            {
                "what": "captured step" if captured else "step",
                "model": name,
                "host_us": round(median(_host_seconds(step) for _ in range(rounds)) * 1e6, 1),
                "launches": _launches(step),
                "extra_mib": round(_extra_bytes(step) / 2**20, 1),
            }
        )
    return rows


def _host_seconds(step: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _launches(step: Callable[[], object]) -> int:
    """Kernels of ours in a step: their names are `inspect` and `run` of steepest::multi_tensor."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    return sum("multi_tensor" in event.name and event.device_type.name == "CUDA" for event in profile.events())


def _extra_bytes(step: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def show(rows: Sequence[dict[str, object]]) -> None:
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--elements", nargs="+", type=lambda text: int(float(text)), default=[10_000_000])
    parser.add_argument("--model", nargs="+", default=["gpt2-124m"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--csv", help="write the rows to this file")
    options = parser.parse_args(arguments)
    print(header(options.device))
    check(options.device)
    everything: list[dict[str, object]] = []
    for elements in options.elements:
        for dtype in (torch.float32, torch.bfloat16):
            everything += bandwidth(elements, dtype, options.device, options.rounds)
    for name in options.model:
        everything += adamw(name, options.device, options.rounds)
        if options.device.startswith("cuda"):
            everything += host(name, options.device, options.rounds)
    show(everything)
    if options.csv:
        columns = list(dict.fromkeys(key for row in everything for key in row))
        write_csv(options.csv, [{key: row.get(key, "") for key in columns} for row in everything], options.device)


if __name__ == "__main__":
    main()
