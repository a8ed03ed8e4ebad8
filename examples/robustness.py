"""How much does the learning rate matter? Muon and MuonMax-Momo on the demo's GPT, over more than a hundredfold range.

    python examples/robustness.py       # about twenty minutes on two cores, if results/robustness.csv is not there

Every learning rate that has no row in the CSV yet is trained at, once. The number of a method is its spread: highest
less lowest held-out loss among the learning rates of a hundredfold range, of all such ranges in its grid the one where
it is least. Muon's learning rate is that of the hidden matrices; AdamW's, for all else, stays where it is best. The one
of MuonMax-Momo is everybody's. A run that diverged counts with the loss before training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from demo import rates
from demo.environment import environment

from steepest.tools.compare import methods, tasks
from steepest.tools.compare.command import positive
from steepest.tools.compare.progress import Progress
from steepest.tools.compare.training import train

RESULT = rates.RESULTS / "robustness.csv"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "robustness.png"
GRIDS = {
    "Muon": (6e-4, 2e-3, 6e-3, 2e-2, 6e-2, 2e-1),
    "MuonMax-Momo": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
}
RANGE = 100.0

Losses = Mapping[float, float]  # by learning rate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, print the spreads and draw the picture; -> exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=RESULT, metavar="CSV", help=f"default: {RESULT}")
    p.add_argument("--picture", type=Path, default=PICTURE, metavar="PNG", help=f"default: {PICTURE}")
    p.add_argument("--steps", type=positive, default=tasks.DEMO.gpt_steps, help="of each run (default: %(default)s)")
    p.add_argument("--threads", type=positive, help="CPU threads (default: what torch chooses)")
    p.add_argument("--quick", action="store_true", help="the smallest model of `steepest compare`")
    options = p.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        measure(options.out, tasks.QUICK if options.quick else tasks.DEMO, options.steps)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    found = {name: losses(rates.read(options.out), name) for name in GRIDS}
    for name, own in found.items():
        inside, least = spread(own)
        lowest = min(own.values())
        print(f"{name}: spread {least:.3f} from {min(inside):g} to {max(inside):g}, lowest loss {lowest:.3f}")
    draw(options.picture, found)
    return 0


def measure(path: Path, size: tasks.Size, steps: int) -> None:
    """Train at every learning rate that has no row in `path` yet, and append its row."""
    task, known = tasks.make(["gpt"], size, None, None)["gpt"], methods.known()
    described = {"steps": str(steps), "seed": "0", "model": task.described}
    missing = list(rates.missing(path, GRIDS, described, "runs"))
    progress = Progress(len(missing), unit="run")
    for number, (name, lr) in enumerate(missing, start=1):
        record = train(task, known[name], lr, steps, 0)
        loss = record["first_loss"] if record["loss"] is None else record["loss"]
        row = {"optimizer": name, "lr": f"{lr:g}", "status": record["status"], "held_out_loss": f"{loss:.4f}"}
        rates.append(path, {**row, **described, **environment()})
        progress.update(number, f"{name} at {lr:g}: {loss:.3f}")


def losses(rows: Sequence[rates.Row], name: str) -> Losses:
    """Of one method, from small to large learning rates."""
    own = {float(row["lr"]): float(row["held_out_loss"]) for row in rows if row["optimizer"] == name}
    return dict(sorted(own.items()))


def spread(own: Losses) -> tuple[Losses, float]:
    """The hundredfold range where the losses differ least, and by how much they do; ValueError for a shorter grid."""
    ranges = [
        {lr: loss for lr, loss in own.items() if 1 <= lr / low <= 1.001 * RANGE}
        for low in own
        if 1.001 * max(own) >= RANGE * low
    ]
    if not ranges:
        raise ValueError(f"learning rates {', '.join(f'{lr:g}' for lr in own)} span less than a factor of {RANGE:g}")
    least = min(ranges, key=difference)
    return least, difference(least)


def difference(own: Losses) -> float:
    """Highest less lowest."""
    return max(own.values()) - min(own.values())


def draw(path: Path, found: Mapping[str, Losses]) -> None:
    """Held-out loss against the learning rate, the hundredfold range of each method drawn thick."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    for name, own in found.items():
        inside, least = spread(own)
        (line,) = ax.plot(list(own), list(own.values()), marker="o", markersize=3, linewidth=1)
        label = f"{name}: spread {least:.2f} over a hundredfold range"
        ax.plot(list(inside), list(inside.values()), color=line.get_color(), linewidth=3.5, alpha=0.5, label=label)
    ax.set(xlabel="learning rate", ylabel="held-out loss (nats per byte)", xscale="log")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
