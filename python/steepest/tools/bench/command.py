"""`steepest bench`: its options, and a run from the ceilings to the pictures."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import torch

from .. import files
from ..compare.command import positive
from ..machine import machine
from . import ceilings, peers, pictures, records, regression, table
from .case import LEAST_ROUNDS, Job, Row, Settings, bad, failure
from .records import Record
from .suites import SUITES, USUAL

#: What a suite asks of peers.
ROLES = {
    "polar": ("polar",),
    "symm_gemm": ("gram",),
    "step": ("muon", "soap"),
    "memory": ("muon", "soap"),
    "launch": ("muon",),
}
DTYPES = ("float32", "float16", "bfloat16")
OWN_OPTIONS = ("whole", "elements", "budget", "text", "steps", "methods")  # of one suite


def _count(text: str) -> int:
    """A whole number of 1 or more, as in 100000 or 1e5, for argparse's `type`."""
    try:
        number = int(float(text))
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: pass a number of elements, as in 1e8")
    return number


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of the command."""
    p.add_argument("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)} (default: all but train)")
    p.add_argument("--quick", action="store_true", help="fewer and smaller shapes, three rounds, no torch.compile")
    p.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    p.add_argument("--shapes", nargs="+", metavar="SHAPE", help="named models or [COUNTx]ROWSxCOLUMNS")
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: the suite's own")
    p.add_argument(
        "--presets", nargs="+", default=list(Settings.presets), help="of polar (default: auto exact turbo jordan)"
    )
    p.add_argument("--whole", action="store_true", help="step: with the parameters that are not matrices")
    p.add_argument("--elements", nargs="+", type=_count, help="fused: how many, as in 1e8")
    p.add_argument("--rounds", type=positive, help="at most, and at least three (default: 15; 3 with --quick)")
    p.add_argument("--seconds", type=float, default=3.0, help="of the rounds of one case (default: %(default)s)")
    p.add_argument(
        "--guard", type=float, default=1.0, help="refresh: seconds a baseline may take (default: %(default)s)"
    )
    p.add_argument("--compiled", action=argparse.BooleanOptionalAction, help="torch.compile of the baselines")
    p.add_argument("--no-peers", dest="peers", action="store_false", help="without other people's packages")
    p.add_argument("--budget", type=float, metavar="SECONDS", help="leave out cases that would begin after them")
    p.add_argument("--text", type=Path, metavar="FILE", help="train: default: the standard library's source")
    p.add_argument("--steps", type=positive, help="train: of each method")
    p.add_argument("--methods", nargs="+", help="train: some of its methods")
    p.add_argument("--out", type=Path, default=Path("bench-output"), metavar="FOLDER", help="default: %(default)s")
    p.add_argument("--name", help="of the files in it (default: the suite's, or bench)")
    p.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        metavar="JSON",
        help="an older run, a file or a folder of them: says what got worse; with two, the second is the newer run and "
        "nothing is measured",
    )


def run(options: argparse.Namespace) -> int:
    """Measures, writes FOLDER/NAME.json, .csv and pictures; -> exit status, 1 where ours is wrong or worse.

    ValueError, before anything is measured, for options that cannot be followed.
    """
    old = [records.read(path) for path in options.compare or ()]
    if len(old) > 2:
        raise ValueError("--compare takes an older run, and a newer one if nothing is to be measured")
    if len(old) == 2:
        return _judge(old[0], old[1])
    names = options.suites or list(USUAL)
    for name in names:
        if name not in SUITES:
            raise ValueError(f"suite {name!r} is not known; choose from {', '.join(SUITES)}")
    settings = _settings(options)
    jobs = _in_turn([list(SUITES[name](settings)) for name in names], options.budget is not None)
    facts = machine(settings.device)
    if old:
        old[0] = list(regression.of_class(old[0], facts))
        regression.check_machine([*(each.machine for each in old[0]), facts])
    files.make_folder(options.out, "--out")
    record = _begin(facts, names, settings, options)
    path = options.out / f"{options.name or (names[0] if len(names) == 1 else 'bench')}.json"
    began = time.monotonic()
    for number, job in enumerate(jobs, start=1):
        late = options.budget is not None and time.monotonic() - began > options.budget
        print(f"\n[{number}/{len(jobs)}] {time.monotonic() - began:.0f} s  {job.label}", flush=True)
        rows = (
            [_row(job, f"skipped: out of time, --budget {options.budget:g}")] if late else _run(job, record, settings)
        )
        gone = _device_gone(job, settings)
        rows += gone
        print(table.text(rows), flush=True)
        record.rows += rows
        record.write(path)  # what was measured survives a stop
        if gone:
            break
    print(f"\n{path} and {path.with_suffix('.csv')} written{_draw(options.out, record)}")
    wrong = bad(record.rows)
    if wrong:
        print("wrong or failed:\n  " + "\n  ".join(wrong))
    worse = _judge(old[0], [record]) if old else 0
    return 1 if wrong or worse else 0


def _in_turn(suites: Sequence[Sequence[Job]], in_turn: bool) -> list[Job]:
    """The jobs, suite after suite; or the first of each, then the second, so that time runs out for the last ones."""
    if not in_turn:
        return [job for jobs in suites for job in jobs]
    return [job for row in zip_longest(*suites) for job in row if job is not None]


def _settings(options: argparse.Namespace) -> Settings:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no GPU here; `steepest doctor` says more")
    return Settings(
        device=device,
        quick=options.quick,
        shapes=options.shapes,
        dtypes=[getattr(torch, name) for name in options.dtypes] if options.dtypes else None,
        presets=options.presets,
        rounds=options.rounds or (LEAST_ROUNDS if options.quick else Settings.rounds),
        seconds=options.seconds,
        guard=options.guard,
        compiled=False if options.quick and options.compiled is None else options.compiled,
        peers=options.peers,
        options={name: getattr(options, name) for name in OWN_OPTIONS},
    )


def _begin(facts: Mapping[str, str], names: Sequence[str], settings: Settings, options: argparse.Namespace) -> Record:
    """A record with the ceilings and the peers, both of which are printed."""
    print("  ".join(f"{key}: {value}" for key, value in facts.items()))
    measured = ceilings.measure(settings.device, settings.quick)
    print(measured)
    said = {name: str(value) for name, value in vars(options).items() if value not in (None, False)}
    record = Record(facts, measured, settings=said)
    for name in names if settings.peers else ():
        for role in ROLES.get(name, ()):
            for peer in peers.known(role):
                row = {"suite": name, "case": f"peers, {role}", "variant": peer.name, "ours": False}
                record.rows.append(row | {"version": peer.version, "status": peer.status})
    if record.rows:
        print("\n" + table.text(record.rows))
    return record


def _run(job: Job, record: Record, settings: Settings) -> list[Row]:
    try:
        return job.run(record.ceilings)
    except Exception as error:  # out of memory at one shape is a row, not the end of the table
        return [_row(job, failure(error)) | {"ours": True}]


def _device_gone(job: Job, settings: Settings) -> list[Row]:
    """A row that ends the run where the GPU no longer answers: after an illegal access every later call fails."""
    if not settings.cuda:
        return []
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        why = f"{failure(error)}; not measured after this, run the rest in a new process"
        return [{"suite": job.suite, "case": "the GPU", "ours": True, "status": why}]
    return []


def _row(job: Job, status: str) -> Row:
    return {"suite": job.suite, "case": job.case, "dtype": job.dtype, "ours": False, "status": status}


def _draw(out: Path, record: Record) -> str:
    """What is to be said of the pictures."""
    try:
        files = pictures.draw(out, record)
    except ImportError as error:
        return f"; no pictures, {error}"
    return "".join(f", {file}" for file in files)


def _judge(old: Sequence[Record], new: Sequence[Record]) -> int:
    comparison = regression.compare(old, new)
    print(comparison)
    return 1 if comparison.failed else 0
