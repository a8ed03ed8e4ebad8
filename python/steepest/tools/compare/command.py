"""`steepest compare`: its options, and the comparison from the first run to the pictures."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import methods, pictures, records, report, tasks
from .methods import Method
from .progress import Progress
from .tasks import FULL, QUICK, Size, Task
from .training import train

RECORDS, TABLE = "runs.jsonl", "summary.csv"


def positive(text: str) -> int:
    """A whole number of 1 or more, for argparse's `type`."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: pass a whole number of 1 or more")
    return int(text)


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of the command."""
    p.add_argument("--tasks", default=",".join(tasks.NAMES), metavar="A,B", help="default: %(default)s")
    p.add_argument("--optimizers", metavar="A,B", help="default: all of steepest.zoo, torch.AdamW and torch.SGD")
    p.add_argument("--steps", type=positive, help="of each run (default: 200 for gpt, 300 for mushrooms)")
    p.add_argument(
        "--rates",
        action="append",
        default=[],
        metavar="[NAME=]A,B",
        help="learning rates of all optimizers, or of one; may be repeated (default: five around a middle for each)",
    )
    p.add_argument("--out", type=Path, default=Path("compare-output"), metavar="FOLDER", help="default: %(default)s")
    p.add_argument("--resume", action="store_true", help="go on with the runs that --out holds")
    p.add_argument("--text", type=Path, metavar="FILE", help="of gpt (default: the standard library's source)")
    p.add_argument(
        "--mushrooms", type=Path, metavar="FILE", help="LIBSVM's mushrooms (default: a made-up set of the same size)"
    )
    p.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    p.add_argument("--threads", type=positive, default=1, help="default: 1, for the models are small")
    size = p.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="smaller and shorter, three rates: under two minutes")
    size.add_argument(
        "--full", action="store_true", help="the GPT of the example with AdamW, Muon and MuAdam: a minute a run"
    )


def run(options: argparse.Namespace) -> int:
    """Runs what is missing, writes runs.jsonl, summary.csv and a picture a task; -> exit status.

    ValueError, before anything is run, for options that cannot be followed.
    """
    jobs, size = _jobs(options)
    path: Path = options.out / RECORDS
    known = records.read(path)
    if known and not options.resume:
        raise ValueError(f"{path} holds {len(known)} runs: pass --resume to go on with them, or another --out")
    for job in jobs:
        records.check_alike(path, known, job.task.name, job.settings(options.seed))
    done = records.done(known)
    missing = [job for job in jobs if job.key not in done]
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        _run(missing, path, options.seed, size)
    finally:
        torch.set_num_threads(threads)
    keys = {job.key for job in jobs}
    of_tasks = report.summaries([each for each in records.read(path) if _key(each) in keys])
    print(report.table(of_tasks))
    report.write_csv(options.out / TABLE, of_tasks)
    print(f"\n{path} and {options.out / TABLE} written{_draw(options.out, of_tasks)}")
    return 0


@dataclass(frozen=True)
class Job:
    """A run to be made."""

    task: Task
    method: Method
    lr: float
    steps: int

    @property
    def key(self) -> tuple[str, str, float]:
        return self.task.name, self.method.name, self.lr

    def settings(self, seed: int) -> dict[str, object]:
        """What a record of the same task must have too."""
        return {"steps": self.steps, "seed": seed, "described": self.task.described}


def _jobs(options: argparse.Namespace) -> tuple[list[Job], Size]:
    size = QUICK if options.quick else FULL if options.full else Size()
    names = [name.strip() for name in options.tasks.split(",")]
    chosen, rates = methods.chosen(options.optimizers), methods.rates(options.rates)
    made = tasks.make(names, size, options.text, options.mushrooms)
    return list(_grid(made, chosen, rates, size, options.steps)), size


def _grid(
    made: dict[str, Task],
    chosen: dict[str, Method],
    rates: dict[str | None, list[float]],
    size: Size,
    steps: int | None,
) -> Iterator[Job]:
    for task in made.values():
        for name, method in chosen.items():
            for lr in rates.get(name, rates.get(None)) or method.grid(task.name, size.rates):
                yield Job(task, method, lr, steps or task.steps)


def _run(missing: Sequence[Job], path: Path, seed: int, size: Size) -> None:
    progress = Progress(len(missing), unit="run")
    for number, job in enumerate(missing, start=1):
        record = train(job.task, job.method, job.lr, job.steps, seed, size.evaluations)
        records.append(path, record)
        result = record["status"] if record["loss"] is None else f"{record['loss']:.4g}"
        progress.update(number, f"{job.task.name}: {job.method.name} at {job.lr:g} {result}")


def _key(record: dict[str, object]) -> tuple[object, object, object]:
    return record["task"], record["optimizer"], record["lr"]


def _draw(out: Path, summaries: dict[str, list[report.Summary]]) -> str:
    """What is to be said of the pictures."""
    try:
        for task, of_task in summaries.items():
            pictures.draw(out / f"{task}.png", of_task)
    except ImportError as error:
        return f"; no pictures, {error}"
    return ", and " + ", ".join(str(out / f"{task}.png") for task in summaries)
