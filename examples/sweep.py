"""Find each method's learning rate: train at every value of a grid and write one row each to results/sweep.csv.

    python examples/sweep.py            # about thirteen minutes on two cores

The file is the sweep's memory: stop it and start it again and it goes on with the rows that are missing. AdamW comes
first, for its best learning rate is also that of the AdamW part of the matrix methods. Every run has the demo's full
length: in three quarters of the steps AdamW prefers a rate twice as large. `train_gpt.py` takes the best learning rates
from the file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from demo import rates
from demo.environment import environment
from demo.methods import METHODS
from demo.training import QUICK, Run, Settings, train

from steepest.tools.compare.command import positive
from steepest.tools.compare.progress import Progress
from steepest.tools.compare.text import Corpus, load

GRIDS = {
    "adamw": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "muon": (1e-2, 2e-2, 4e-2, 8e-2),
    "muadam": (2.5e-4, 5e-4, 1e-3, 2e-3),
    "muadam-sania": (5e-6, 1e-5, 2e-5, 4e-5),
    "soap": (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "kl-soap": (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing of the sweep and print the best of each grid; -> exit status."""
    p = parser()
    options = p.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    preset = QUICK if options.quick else Settings()
    settings = replace(preset, steps=options.steps or preset.steps)
    try:
        corpus = load(options.text, settings.shape.context)
        sweep(options.out, corpus, settings)
    except ValueError as error:
        p.error(str(error))
    rows = rates.read(options.out)
    for method in GRIDS:
        edge = "" if rates.enclosed(rows, method) else " (at the edge of its grid)"
        print(f"{method}: {rates.best(rows, method):g}{edge}")
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=rates.SWEEP, metavar="CSV", help=f"default: {rates.SWEEP}")
    p.add_argument(
        "--text", type=Path, metavar="FILE", help="text to train on (default: the standard library's source)"
    )
    p.add_argument("--steps", type=positive, help="of each run (default: the demo's)")
    p.add_argument("--threads", type=positive, help="CPU threads (default: what torch chooses)")
    p.add_argument("--quick", action="store_true", help="the demo's smaller model")
    return p


def sweep(path: Path, corpus: Corpus, settings: Settings) -> None:
    """Train at every learning rate that has no row in `path` yet, and append its row."""
    missing = list(rates.missing(path, GRIDS, _described(settings), "a sweep"))
    for number, (method, lr) in enumerate(missing, start=1):
        adamw_lr = lr if method == "adamw" else rates.best(rates.read(path), "adamw")
        run = Run(METHODS[method], lr, adamw_lr, settings)
        print(f"{method} at {lr:g} ({number} of {len(missing)})", flush=True)
        train([run], corpus, settings, Progress(settings.steps).update)
        row = {"optimizer": method, "lr": f"{lr:g}", "adamw_lr": f"{adamw_lr:g}"}
        outcome = {"validation_loss": f"{run.validation_loss:.4f}", "seconds": f"{run.points[-1].seconds:.1f}"}
        rates.append(path, {**row, **outcome, **_described(settings), **environment()})


def _described(settings: Settings) -> dict[str, str]:
    shape = settings.shape
    model = f"{shape.layers}x{shape.width}"
    return {
        "model": model,
        "context": str(shape.context),
        "batch": str(settings.batch),
        "steps": str(settings.steps),
        "seed": str(settings.seed),
    }


if __name__ == "__main__":
    sys.exit(main())
