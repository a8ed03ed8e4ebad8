"""Train a small GPT with MuAdam, Muon and AdamW side by side: same weights at the start, same batches, same schedule.

    python examples/train_gpt.py                    # the standard library's source: 2.5 minutes on two cores
    python examples/train_gpt.py --text book.txt --steps 1000 --optimizers muadam,adamw --lr muadam=0.003

Prints a table and writes curves.csv and loss.png into --out. Each method runs at the learning rate that was best for it
in results/sweep.csv (see sweep.py); --lr overrides one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from demo import rates, report
from demo.methods import METHODS
from demo.training import QUICK, Run, Settings, train

from steepest.tools.compare.command import positive
from steepest.tools.compare.progress import Progress
from steepest.tools.compare.text import Corpus, load

DEFAULT = Settings()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo with command line `arguments`; -> exit status."""
    p = parser()
    options = p.parse_args(arguments)
    preset = QUICK if options.quick else DEFAULT
    settings = replace(preset, steps=options.steps or preset.steps, seed=options.seed)
    try:
        corpus = load(options.text, settings.shape.context)
        runs = make_runs(options, settings)
        make_folder(options.out)
    except ValueError as error:
        p.error(str(error))
    if options.threads:
        torch.set_num_threads(options.threads)
    compare(runs, corpus, settings, options.out)
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--text", type=Path, metavar="FILE", help="text to train on (default: the standard library's source)"
    )
    p.add_argument("--out", type=Path, default=Path("demo-output"), metavar="FOLDER", help="default: ./demo-output")
    p.add_argument("--optimizers", default="muadam,muon,adamw", metavar="A,B", help=f"of {', '.join(METHODS)}")
    p.add_argument("--lr", action="append", default=[], metavar="NAME=VALUE", help="one method's learning rate")
    p.add_argument("--steps", type=positive, help=f"default: {DEFAULT.steps}")
    p.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default: 0)")
    p.add_argument("--threads", type=positive, help="CPU threads (default: what torch chooses)")
    p.add_argument("--quick", action="store_true", help="a smaller model and fewer steps: seconds, to see it run")
    return p


def make_runs(options: argparse.Namespace, settings: Settings) -> list[Run]:
    """One run for each method named in --optimizers, at its learning rate."""
    names = method_names(options.optimizers)
    chosen = learning_rates([*names, "adamw"], options.lr)
    return [Run(METHODS[name], chosen[name], chosen["adamw"], settings) for name in names]


def method_names(listed: str) -> list[str]:
    """The names in a comma-separated list, each once; ValueError for one that is no method."""
    names = list(dict.fromkeys(name.strip() for name in listed.split(",")))
    for name in names:
        if name not in METHODS:
            raise ValueError(f"--optimizers: unknown optimizer {name!r}; pass some of {', '.join(METHODS)}")
    return names


def learning_rates(names: Sequence[str], overrides: Sequence[str]) -> dict[str, float]:
    """What --lr gives, else the best of the sweep; ValueError for a bad --lr or a method the sweep has not tried."""
    given = dict(parse_rate(override) for override in overrides)
    return given | {name: METHODS[name].best_rate(rates.read()) for name in names if name not in given}


def parse_rate(override: str) -> tuple[str, float]:
    """ "muon=0.02" -> ("muon", 0.02)."""
    name, _, value = override.partition("=")
    if name not in METHODS:
        raise ValueError(
            f"--lr {override}: unknown optimizer {name!r}; pass NAME=VALUE with one of {', '.join(METHODS)}"
        )
    try:
        rate = float(value)
    except ValueError:
        rate = -1.0
    if not 0 < rate < float("inf"):
        raise ValueError(f"--lr {override}: {value!r} is no learning rate; pass a positive number")
    return name, rate


def make_folder(folder: Path) -> None:
    """Make the output folder now: a run of minutes must not end in a file that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot write there ({error.strerror}); pass another folder") from error


def compare(runs: list[Run], corpus: Corpus, settings: Settings, out: Path) -> None:
    """Train, then print the table and write curves.csv and loss.png."""
    started = time.perf_counter()
    parameters = sum(p.numel() for p in runs[0].model.parameters())
    print(corpus)
    print(f"GPT with {parameters:,} parameters, seed {settings.seed}, {torch.get_num_threads()} threads")
    print(f"{settings.steps} steps of {settings.batch} x {settings.shape.context} bytes\n", flush=True)
    train(runs, corpus, settings, Progress(settings.steps).update)
    print("", report.table(runs), "", *report.catch_up(runs), "", sep="\n")
    report.write_csv(out / "curves.csv", runs)
    report.write_picture(out / "loss.png", runs, f"{parameters / 1e6:.1f}M-parameter GPT on {corpus.source}")
    print(f"{out / 'curves.csv'} and {out / 'loss.png'} written; {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    sys.exit(main())
