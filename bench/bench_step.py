"""A whole optimizer step on a named model beside torch's, with the error of each step's direction.

    python bench/bench_step.py [--shapes gpt2-124m ...] [--whole] [--rounds N] [--device cuda] [--csv FILE]

All optimizers share parameters and gradients, so that they differ in their state and their work alone, and are called
in turn in one interleaved run. With --whole, embeddings, norms and biases are there too: by AdamW inside ours, by
torch.optim.AdamW(fused=True) beside torch.optim.Muon. The error is taken before anything is timed, on one Gaussian
gradient of each shape: the first step of a fresh optimizer from zero weights, against the fp64 polar factor.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

import torch
from shapes import Model, parse
from timing import header, interleaved, write_csv
from torch import nn
from truth import Error, Truth

import steepest

Step = Callable[[], object]
Build = Callable[[list[nn.Parameter], list[nn.Parameter]], list[torch.optim.Optimizer]]

BETAS = (0.9, 0.999)  # of MuAdam; at the first step its direction is that of sign(g) sqrt|g|


def torch_muon(matrices: list[nn.Parameter], others: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    muon = torch.optim.Muon(matrices, lr=1e-3)
    return [muon, torch.optim.AdamW(others, lr=1e-3, fused=True)] if others else [muon]


def ours(method: type[steepest.Muon | steepest.MuAdam], **options: object) -> Build:
    def build(matrices: list[nn.Parameter], others: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
        groups = [{"params": matrices}, {"params": others, "use_muon": False}] if others else [{"params": matrices}]
        return [method(groups, lr=1e-3, **options)]  # type: ignore[arg-type]

    return build


VARIANTS: dict[str, Build] = {
    "torch.optim.Muon": torch_muon,
    "Muon": ours(steepest.Muon),
    "Muon exact": ours(steepest.Muon, polar="exact"),
    "Muon auto": ours(steepest.Muon, polar="auto"),
    "Muon turbo": ours(steepest.Muon, polar="turbo"),
    "MuAdam auto": ours(steepest.MuAdam, betas=BETAS),
    "MuAdam turbo": ours(steepest.MuAdam, betas=BETAS, polar="turbo"),
}
BASES = {"torch": "torch.optim.Muon", "muon": "Muon"}


def build_parameters(model: Model, kind: str, device: str, dtype: torch.dtype) -> list[nn.Parameter]:
    """Gaussian parameters of one kind, with Gaussian gradients of the size a language model has."""
    generator = torch.Generator(device).manual_seed(0)
    found = []
    for parameters in model:
        for _ in range(parameters.count if parameters.kind == kind else 0):
            p = nn.Parameter(0.02 * torch.randn(parameters.shape, generator=generator, device=device).to(dtype))
            p.grad = (1e-3 * torch.randn(parameters.shape, generator=generator, device=device)).to(dtype)
            found.append(p)
    return found


def direction_errors(shapes: Sequence[tuple[int, int]], device: str) -> dict[str, Error]:
    """Of every variant, the worst over the shapes."""
    worst = dict.fromkeys(VARIANTS, Error(0.0, 0.0))
    for m, n in dict.fromkeys(shapes):
        g = 1e-3 * torch.randn(m, n, generator=torch.Generator().manual_seed(m + n)).to(device)
        # D of the first step; a Gaussian sample may be 0.
        metrics = {"Muon": torch.ones_like(g), "MuAdam": g.abs().sqrt()}
        truths = {name: Truth(torch.where(into > 0, g / into, 0)) for name, into in metrics.items()}
        for name, build in VARIANTS.items():
            w = nn.Parameter(torch.zeros_like(g))
            w.grad = g
            (optimizer,) = build([w], [])
            optimizer.step()
            metric = "MuAdam" if name.startswith("MuAdam") else "Muon"
            d = w.detach() * metrics[metric] / -(1e-3 * math.sqrt(max(1, m / n)))
            worst[name] = worst[name].worse(truths[metric].error(d))
    return worst


def measure(model_name: str, options: argparse.Namespace) -> list[dict[str, object]]:
    model = parse(model_name)
    shapes = [(p.shape[0], p.shape[1]) for p in model if p.kind == "matrix"]
    errors = direction_errors(shapes, options.device)
    matrices = build_parameters(model, "matrix", options.device, options.dtype)
    others = build_parameters(model, "other", options.device, options.dtype) if options.whole else []
    steps: dict[str, Step] = {}
    for name, build in VARIANTS.items():
        optimizers = build(matrices, others)
        steps[name] = lambda optimizers=optimizers: [optimizer.step() for optimizer in optimizers]
    timings = interleaved(steps, rounds=options.rounds, device=options.device)
    base = timings[BASES[options.against]]
    return [
        {
            "model": model_name + (" whole" if options.whole else ""),
            "dtype": str(options.dtype).removeprefix("torch."),
            "optimizer": name,
            "ms": round(timing.median * 1e3, 2),
            "spread_ms": round(timing.spread * 1e3, 2),
            "fastest_ms": round(timing.fastest * 1e3, 2),
            "ratio": round(base.median / timing.median, 3),
            "ratio_fastest": round(base.fastest / timing.fastest, 3),
            "relative_error": round(errors[name].relative, 4),
            "off_diagonal": round(errors[name].off_diagonal, 4),
        }
        for name, timing in timings.items()
    ]


def show(rows: Sequence[dict[str, object]]) -> None:
    print(f"{'optimizer':18}{'ms':>9}{'+-':>8}{'fastest':>9}{'ratio':>7}{'of fastest':>11}{'error':>8}{'off-diag':>9}")
    for row in rows:
        print(
            f"{row['optimizer']:18}{row['ms']:9.1f}{row['spread_ms']:8.1f}{row['fastest_ms']:9.1f}{row['ratio']:7.2f}"
            f"{row['ratio_fastest']:11.2f}{row['relative_error']:8.3f}{row['off_diagonal']:9.3f}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["gpt2-124m"], help="named models or [COUNTx]ROWSxCOLUMNS")
    parser.add_argument("--whole", action="store_true", help="with the parameters that are not matrices")
    parser.add_argument("--against", choices=list(BASES), default="torch", help="whose time the ratios start from")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", help="write the rows to this file")
    options = parser.parse_args(arguments)
    print(header(options.device))
    everything = []
    for name in options.shapes:
        rows = measure(name, options)
        print(f"\n{rows[0]['model']}, {rows[0]['dtype']}: ratio = {BASES[options.against]} / this, higher is faster")
        show(rows)
        everything += rows
    if options.csv:
        write_csv(options.csv, everything, options.device)


if __name__ == "__main__":
    main()
