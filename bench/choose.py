"""Fills the tables of docs/choose.md from bench/results/compare.csv, and draws its pictures.

python bench/choose.py                    writes docs/choose.md and docs/images/choose-*.png
python bench/choose.py --check            exit status 1 if the page would change
python bench/choose.py --from FOLDER      takes over what `steepest compare --full --out FOLDER` has written, first
python bench/choose.py --add FOLDER       takes over only the methods that have no rows yet

A table stands between the lines `<!-- NAME -->` and `<!-- end -->`. What to take in which situation is written here;
every figure beside it is the file's.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "choose.md"
RESULT = ROOT / "bench" / "results" / "compare.csv"
PROVENANCE = RESULT.with_suffix(".json")
ADAMW, OTHER_BETAS = "torch.AdamW", "torch.AdamW-0.95"
LARGEST = 100.0  # loss that is written without a power of ten

Row = Mapping[str, str]
Rows = Mapping[tuple[str, str], Row]  # by task and method


def read(path: Path = RESULT) -> Rows:
    with path.open(newline="") as file:
        return {(row["task"], row["optimizer"]): row for row in csv.DictReader(file)}


# ---- what is taken over -------------------------------------------------------------------------------------------


def take_over(folder: Path) -> None:
    """All that was run into the folder becomes the result."""
    shutil.copyfile(folder / "summary.csv", RESULT)
    shutil.copyfile(folder / "provenance.json", PROVENANCE)


def add(folder: Path) -> None:
    """Adds the rows of methods that have none, each in its place by loss, and where they ran.

    ValueError where a task of theirs is not the result's: losses of the two would not be comparable.
    """
    from steepest.tools.compare.evidence import write_csv

    known, more = (json.loads(path.read_text()) for path in (PROVENANCE, folder / "provenance.json"))
    for task, described in more["tasks"].items():
        if known["tasks"].get(task) != described:
            raise ValueError(f"{folder} has run {task!r} as {described}, and {RESULT.name} {known['tasks'].get(task)}")
    had = read(RESULT)
    rows = {**read(folder / "summary.csv"), **had}
    both = {key: rows[key] for key in dict.fromkeys((*had, *rows))}
    write_csv(RESULT, [row for task in tasks(had) for row in sorted(of_task(both, task), key=_rank)])
    known["machines"] += [one for one in more["machines"] if one not in known["machines"]]
    PROVENANCE.write_text(json.dumps(known, indent=1) + "\n")


def _rank(row: Row) -> float:
    return float(row["loss"] or "inf")


# ---- what stands in a cell ----------------------------------------------------------------------------------------


def loss(row: Row) -> str:
    """Mean and half the distance of the ends; what became of it where there is none."""
    if not row["loss"]:
        return row["status"]
    mean, low, high = (float(row[key]) for key in ("loss", "lowest", "highest"))
    if mean >= LARGEST:
        return f"{mean:.0e}"
    lost = "" if row["status"] == "done" else f", {row['seeds']} seeds"
    return f"{mean:.3f} ± {(high - low) / 2:.3f}{lost}{'' if row['enclosed'] == 'yes' else ' *'}"


def band(row: Row) -> str:
    return f"{'' if row['closed'] == 'yes' else '≥ '}{row['band']}" if row["band"] else ""


def steps(row: Row) -> str:
    return row["steps_to_reference"] or "never"


def of_task(rows: Rows, task: str) -> list[Row]:
    return [row for (name, _), row in rows.items() if name == task]


def tasks(rows: Rows) -> list[str]:
    return list(dict.fromkeys(task for task, _ in rows))


# ---- what to take, and why ------------------------------------------------------------------------------------------


def losses(rows: Rows, task: str, *names: str) -> str:
    """`A` 1.234, `B` 1.345: the lowest first."""
    found = sorted((rows[task, name] for name in names), key=lambda row: float(row["loss"]))
    return ", ".join(f"`{row['optimizer']}` {float(row['loss']):.3f}" for row in found)


def cells(rows: Rows, task: str, cell: Callable[[Row], str], *names: str) -> str:
    """`A` 4, `B` 8."""
    return ", ".join(f"`{name}` {cell(rows[task, name])}" for name in names)


def _pretraining(rows: Rows) -> str:
    names = ("MuAdam", "Scion", "Muon", "SOAP")
    reached = f"AdamW's last loss after {cells(rows, 'gpt', steps, *names)} of {rows['gpt', ADAMW]['steps']} steps"
    return f"loss {losses(rows, 'gpt', *names, ADAMW, OTHER_BETAS)}; {reached}"


def _fine_tuning(rows: Rows) -> str:
    first = float(rows["gpt-fine-tune", ADAMW]["first_loss"])
    return f"loss {losses(rows, 'gpt-fine-tune', *FEW)}, from {first:.3f}"


def _unknown_rate(rows: Rows) -> str:
    names = ("SOAP", "Muon", "MuAdam", ADAMW)
    momo = rows["gpt", "MuonMax-Momo"]
    wide = f"`MuonMax-Momo` {band(momo)}, but its loss is {float(momo['loss']):.3f}"
    narrow = f"on `images` {cells(rows, 'images', band, *names, 'MuonMax-Momo')}"
    return f"good rates span a factor of: {cells(rows, 'gpt', band, *names)}; {wide}; {narrow}"


def _time(rows: Rows) -> str:
    names = ("Muon", "MuAdam", "torch.Muon", "SOAP", "KFAC")
    return f"a whole step, times that of `{ADAMW}`: {cells(rows, 'gpt', lambda row: row['step_ratio'], *names)}"


def _memory(rows: Rows) -> str:
    names = ("Muon", "Scion", "MuAdam", ADAMW, "SOAP")
    return f"bytes a weight: {cells(rows, 'gpt', _bytes, *names)}"


def _bytes(row: Row) -> str:
    return f"{float(row['state_bytes']):.0f}"


FEW = ("MuAdam", "Muon", "SOAP", ADAMW, OTHER_BETAS, "torch.SGD")
#: Who asks, what to take, and what the runs say to it.
SITUATIONS: Sequence[tuple[str, str, Callable[[Rows], str]]] = (
    ("pretrain a transformer", "`MuAdam` or `Muon`", _pretraining),
    ("train a convolutional net", "`MuAdam` or `Muon`", lambda rows: f"loss {losses(rows, 'images', *FEW)}"),
    ("fine-tune", "`MuAdam`; little is to be had", _fine_tuning),
    ("have small batches", "`MuAdam` or `Muon`", lambda rows: f"loss {losses(rows, 'gpt-small-batch', *FEW)}"),
    ("do not know the learning rate", "`Muon`, and try factors of two", _unknown_rate),
    ("are short of memory", "`Muon` or `Scion`", _memory),
    ("are short of time", "`Muon` or `MuAdam`", _time),
)
#: Whose places are told.
PLACED = (
    "MuAdam",
    "Muon",
    "Scion",
    "ProdigyMuon",
    "KFAC",
    "SOAP",
    "Shampoo",
    "AdaGrad",
    ADAMW,
    OTHER_BETAS,
    "torch.SGD",
)


def situations(rows: Rows) -> list[str]:
    return table(["you", "take", "in these runs"], [[you, take, because(rows)] for you, take, because in SITUATIONS])


def places(rows: Rows) -> list[str]:
    """A method each: its place by loss on every task, of all that finished there."""
    names = tasks(rows)
    order = {task: [row["optimizer"] for row in of_task(rows, task) if row["loss"]] for task in names}
    head = ["place by loss", *(f"{task}, of {len(order[task])}" for task in names)]
    found = [[str(1 + order[task].index(name)) if name in order[task] else "" for task in names] for name in PLACED]
    return table(head, [[f"`{name}`", *of_name] for name, of_name in zip(PLACED, found, strict=True)])


# ---- the tables ---------------------------------------------------------------------------------------------------


def everything(rows: Rows) -> list[str]:
    """A method each: the loss on every task, then what it takes on the first."""
    first, names = tasks(rows)[0], tasks(rows)
    head = ["", *names, "good rates", "steps to AdamW's loss", "time of a step", "state"]
    return table(head, [_method(rows, row["optimizer"], names) for row in of_task(rows, first)])


def _method(rows: Rows, name: str, names: Sequence[str]) -> list[str]:
    row = rows[names[0], name]
    losses = [loss(rows[task, name]) if (task, name) in rows else "" for task in names]
    reached = f"{steps(row)}" if row["loss"] else ""
    return [f"`{name}`", *losses, band(row), reached, row["step_ratio"], row["state_bytes"]]


def runs(rows: Rows) -> list[str]:
    """A task each: what was trained, for how many steps, and how much of the grids encloses its best rate."""
    described = json.loads(PROVENANCE.read_text(encoding="utf-8"))["tasks"]
    head = ["task", "what", "steps", "methods", "not enclosed"]
    return table(head, [[f"`{task}`", *_task(rows, task, described[task])] for task in tasks(rows)])


def _task(rows: Rows, task: str, described: Mapping[str, object]) -> list[str]:
    found = of_task(rows, task)
    edges = sum(row["enclosed"] == "no" for row in found)
    return [str(described["described"]), str(described["steps"]), str(len(found)), str(edges)]


def machines(rows: Rows) -> list[str]:
    """Where it ran, a line each."""
    known = json.loads(PROVENANCE.read_text(encoding="utf-8"))["machines"]
    return [
        f"* {one['machine']}, torch {one['torch']}, Python {one['python']}, commit {one['commit']}" for one in known
    ]


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [_line(head), "|" + "---|" * len(head), *map(_line, body)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


#: By the name that opens a table.
TABLES: Mapping[str, Callable[[Rows], list[str]]] = {
    "situations": situations,
    "places": places,
    "everything": everything,
    "runs": runs,
    "machines": machines,
}


def filled(text: str, rows: Rows) -> str:
    """The page with every table filled; ValueError where one is not there."""
    for name, lines in TABLES.items():
        between = re.compile(rf"(<!-- {name} -->\n)(.*?)(\n?<!-- end -->)", re.DOTALL)
        if not between.search(text):
            raise ValueError(f"{PAGE.name} has no lines <!-- {name} --> and <!-- end -->: change TABLES with it")
        new = "\n" + "\n".join(lines(rows)) + "\n"
        text = between.sub(lambda found, new=new: f"{found[1]}{new}\n<!-- end -->", text, count=1)
    return text


def draw(rows: Rows) -> None:
    """A picture a task, beside the others of docs."""
    from steepest.tools.compare.pictures import draw_evidence

    for task in tasks(rows):
        draw_evidence(PAGE.parent / "images" / f"choose-{task}.png", of_task(rows, task))


def main(arguments: Sequence[str]) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true")
    source = p.add_mutually_exclusive_group()
    source.add_argument("--from", dest="source", type=Path, metavar="FOLDER")
    source.add_argument("--add", type=Path, metavar="FOLDER")
    options = p.parse_args(arguments)
    if options.source is not None:
        take_over(options.source)
    if options.add is not None:
        add(options.add)
    rows, old = read(), PAGE.read_text(encoding="utf-8")
    new = filled(old, rows)
    if not options.check:
        PAGE.write_text(new, encoding="utf-8")
        draw(rows)
    return int(options.check and new != old)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
