"""How sure is the demo's comparison? Repeat it over seeds, one row per seed and method in results/seeds.csv.

    python examples/seeds.py            # about seven minutes on two cores

A seed changes the weights at the start and the order of the batches; the held-out windows stay the same, so that the
difference between two methods at one seed is theirs. A seed that has its rows already is not run again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from demo import rates
from demo.environment import environment
from demo.methods import METHODS
from demo.training import Run, Settings, train

from steepest.tools.compare.command import positive
from steepest.tools.compare.progress import Progress
from steepest.tools.compare.text import Corpus, load

METHOD_NAMES = ("muadam", "muon", "adamw")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the seeds that are missing and print each method's margin over AdamW; -> exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=rates.RESULTS / "seeds.csv", metavar="CSV")
    p.add_argument("--seeds", type=positive, default=3, help="how many, from 0 (default: 3)")
    p.add_argument("--threads", type=positive, help="CPU threads (default: what torch chooses)")
    options = p.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = Settings()
    corpus = load(None, settings.shape.context)
    done = {int(row["seed"]) for row in rates.read(options.out)}
    for seed in range(options.seeds):
        if seed not in done:
            compare(options.out, corpus, replace(settings, seed=seed))
    print(*margins(rates.read(options.out)), sep="\n")
    return 0


def compare(path: Path, corpus: Corpus, settings: Settings) -> None:
    """Train with all methods at one seed, each at its best learning rate, and append their rows."""
    sweep = rates.read()
    best = {name: METHODS[name].best_rate(sweep) for name in METHOD_NAMES}
    runs = [Run(METHODS[name], best[name], best["adamw"], settings) for name in METHOD_NAMES]
    train(runs, corpus, settings, Progress(settings.steps).update)
    for run in runs:
        rates.append(path, {**_row(run), "steps": str(settings.steps), "seed": str(settings.seed), **environment()})


def margins(rows: Sequence[rates.Row]) -> list[str]:
    """One sentence per method: mean loss over the seeds, and how far it is below AdamW's at the same seed."""
    reference = _losses(rows, "adamw")
    lines = [f"adamw: {statistics.mean(reference.values()):.4f} over {len(reference)} seeds"]
    for losses, name in ((_losses(rows, name), name) for name in METHOD_NAMES if name != "adamw"):
        below = [reference[seed] - loss for seed, loss in losses.items()]
        mean = statistics.mean(losses.values())
        lines.append(f"{name}: {mean:.4f}, below adamw by {min(below):.4f} to {max(below):.4f}")
    return lines


def _losses(rows: Sequence[rates.Row], method: str) -> dict[str, float]:
    return {row["seed"]: float(row["validation_loss"]) for row in rows if row["optimizer"] == method}


def _row(run: Run) -> dict[str, str]:
    return {
        "optimizer": run.method.name,
        "lr": f"{run.lr:g}",
        "validation_loss": f"{run.validation_loss:.4f}",
        "step_ms": f"{run.step_ms:.1f}",
        "optimizer_ms": f"{run.optimizer_ms:.1f}",
        "seconds": f"{run.points[-1].seconds:.1f}",
    }


if __name__ == "__main__":
    sys.exit(main())
