"""`steepest compare`: its options, and the comparison from the first run to the pictures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch

from .. import files
from . import evidence, full, methods, pictures, records, report, tasks
from .jobs import Job, Runs
from .methods import ADAMW_RATE, Method
from .progress import Progress
from .provenance import write
from .tasks import FULL, QUICK, Size, Task
from .training import Record

RECORDS, TABLE, PROVENANCE = "runs.jsonl", "summary.csv", "provenance.json"


def positive(text: str) -> int:
    """A whole number of 1 or more, for argparse's `type`."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: pass a whole number of 1 or more")
    return int(text)


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of the command."""
    p.add_argument(
        "--tasks",
        metavar="A,B",
        help=f"of {', '.join(tasks.NAMES)} (default: {', '.join(Size().tasks)}; with --full {', '.join(FULL.tasks)})",
    )
    p.add_argument("--optimizers", metavar="A,B", help="default: all of steepest.zoo, torch's AdamW, SGD and Muon")
    p.add_argument("--steps", type=positive, help="of each run (default: by the task)")
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
        "--full",
        action="store_true",
        help="grids that grow until they enclose the best rate, then three seeds of it, on four tasks: half an hour",
    )


def run(options: argparse.Namespace) -> int:
    """Runs what is missing, writes runs.jsonl, summary.csv and a picture a task; -> exit status.

    ValueError, before anything is run, for options that cannot be followed.
    """
    plan = _plan(options)
    path: Path = options.out / RECORDS
    files.make_folder(options.out, "--out")
    known = records.read(path)
    if known and not options.resume:
        raise ValueError(f"{path} holds {len(known)} runs: pass --resume to go on with them, or another --out")
    for task in plan.tasks.values():
        records.check_alike(path, known, task.name, {"steps": plan.steps(task), "described": task.described})
    runs = Runs(path, plan.size.evaluations, {records.key(record): record for record in known})
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        write(options.out / PROVENANCE, [(task, plan.steps(task)) for task in plan.tasks.values()])
        made = _full(plan, runs) if options.full else _grids(plan, runs)
    finally:
        torch.set_num_threads(threads)
    _tell(options.out, made, options.full)
    return 0


@dataclass(frozen=True)
class Plan:
    """What was asked for."""

    size: Size
    tasks: Mapping[str, Task]
    methods: Mapping[str, Method]
    rates: Mapping[str | None, Sequence[float]]
    seed: int
    steps_of_all: int | None

    def steps(self, task: Task) -> int:
        return self.steps_of_all or task.steps


def _plan(options: argparse.Namespace) -> Plan:
    size = QUICK if options.quick else FULL if options.full else Size()
    names = size.tasks if options.tasks is None else [name.strip() for name in options.tasks.split(",")]
    chosen, rates = methods.chosen(options.optimizers), methods.rates(options.rates)
    if options.full and rates:
        raise ValueError(f"--rates {options.rates[0]}: --full looks for the learning rates; leave one of the two out")
    made = tasks.make(names, size, options.text, options.mushrooms)
    return Plan(size, made, chosen, rates, options.seed, options.steps)


def _grids(plan: Plan, runs: Runs) -> list[Record]:
    jobs = [
        Job(task, method, lr, plan.steps(task), plan.seed)
        for task in plan.tasks.values()
        for name, method in plan.methods.items()
        for lr in plan.rates.get(name, plan.rates.get(None)) or method.grid(task.name, plan.size.rates)
    ]
    missing = [job for job in jobs if job.key not in runs.known]
    progress = Progress(len(missing), unit="run")
    for number, job in enumerate(missing, start=1):
        record = runs(job)
        progress.update(number, f"{job.task.name}: {job.method.name} at {job.lr:g} {_result(record)}")
    return [runs(job) for job in jobs]


def _full(plan: Plan, runs: Runs) -> list[Record]:
    """All records of the file: what other tasks and methods have had before is compared too.

    torch.AdamW is among the methods, and first, whether it was asked for or not.
    """
    chosen = {full.REFERENCE: methods.known()[full.REFERENCE], **plan.methods}
    progress = Progress(len(plan.tasks) * len(chosen), unit="method")
    adamw_lr = ADAMW_RATE
    for number, (task, method) in enumerate(product(plan.tasks.values(), chosen.values()), start=1):
        compared = full.compare(task, method, plan.steps(task), plan.seed, adamw_lr, runs)
        best = full.best_of(compared)
        at = "" if best is None else f" at {best['lr']:g}"
        progress.update(number, f"{task.name}: {method.name}{at} {_result(best or compared[0])}, {len(compared)} runs")
        if method.name == full.REFERENCE:
            adamw_lr = full.rate_of(compared)
    return list(runs.known.values())


def _result(record: Record) -> str:
    return str(record["status"]) if record["loss"] is None else f"{record['loss']:.4g}"


def _tell(out: Path, made: Sequence[Record], whole: bool) -> None:
    """Prints and writes the table, and draws the pictures."""
    names = dict.fromkeys(record["task"] for record in made)
    paths = {name: out / f"{name}.png" for name in names}
    if whole:
        summary = evidence.rows(made)
        print(evidence.table(summary))
        evidence.write_csv(out / TABLE, summary)
        draw = {path: partial(pictures.draw_evidence, path, evidence.of(summary, name)) for name, path in paths.items()}
    else:
        of_tasks = report.summaries(made)
        print(report.table(of_tasks))
        report.write_csv(out / TABLE, of_tasks)
        draw = {path: partial(pictures.draw, path, of_tasks[name]) for name, path in paths.items()}
    print(f"\n{out / RECORDS} and {out / TABLE} written{_drawn(draw)}")


def _drawn(draw: Mapping[Path, Callable[[], None]]) -> str:
    """What is to be said of the pictures."""
    try:
        for each in draw.values():
            each()
    except ImportError as error:
        return f"; no pictures, {error}"
    return ", and " + ", ".join(map(str, draw))
