"""Watch a training run: cosine, steepness and condition of every layer's step, in a CSV, in TensorBoard or in W&B.

    python examples/watch.py --out run                     # run/steps.csv and, with matplotlib, run/steps.png
    python examples/watch.py --out run --to tensorboard    # needs `pip install tensorboard`
    python examples/watch.py --out run --to wandb          # needs `pip install wandb`; offline, into run/

`steepest.watch` hands a flat dict of numbers to any callable; each logger here is a few lines.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

import steepest
from steepest.diagnostics import draw, watch

Numbers = dict[str, float]


class CSV:
    """One row a call. The first call names the columns, as every watched step has the same."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.history: list[Numbers] = []

    def __call__(self, numbers: Numbers) -> None:
        with self.path.open("a" if self.history else "w", newline="") as file:
            writer = csv.DictWriter(file, list(self.history[0] if self.history else numbers), lineterminator="\n")
            if not self.history:
                writer.writeheader()
            writer.writerow(numbers)
        self.history.append(numbers)


def tensorboard(folder: Path) -> Callable[[Numbers], None]:
    """A tag for each number; a step is TensorBoard's step."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def log(numbers: Numbers) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, int(numbers["step"]))
        writer.flush()

    return log


def wandb(folder: Path) -> Callable[[Numbers], object]:
    """`wandb.log` takes the dict as it is."""
    import wandb as client

    client.init(project="steepest", dir=str(folder), mode="offline")
    return client.log


def train(log: Callable[[Numbers], object], steps: int, every: int) -> None:
    """A network of three layers learns a random smooth function."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
    mixing = torch.randn(32, 8, generator=generator)
    optimizer = steepest.MuAdam(model, lr=2e-3)
    watched = watch(optimizer, log, every, model=model)
    for _ in range(steps):
        x = torch.randn(64, 32, generator=generator)
        optimizer.zero_grad()
        (model(x) - torch.sin(x @ mixing)).square().mean().backward()
        optimizer.step()
    watched.remove()


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and log; -> exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("watch-output"), metavar="FOLDER", help="default: ./watch-output")
    p.add_argument("--to", choices=["csv", "tensorboard", "wandb"], default="csv")
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--every", type=int, default=10, help="watch one step in so many (default: 10)")
    options = p.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.to != "csv":
        try:
            log = {"tensorboard": tensorboard, "wandb": wandb}[options.to](options.out)
        except ImportError:
            p.error(f"--to {options.to}: it is not installed; pip install {options.to}")
        train(log, options.steps, options.every)
        return 0
    table = CSV(options.out / "steps.csv")
    train(table, options.steps, options.every)
    print(f"{table.path} written")
    try:
        draw(table.history, options.out / "steps.png")
    except ImportError as error:
        print(error)
    else:
        print(f"{options.out / 'steps.png'} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
