"""What got worse from one run to another: the regression gate of `steepest bench --compare`.

Slower is a variant of ours whose time less its spread is above the old one with its spread, and at least MARGIN above
it: the middle halves of the two samples do not meet. Less exact is an error beyond MORE of what it was. Rows that other
people's code stands for are not judged, and runs on other hardware are not compared.

On a CPU, which other processes share, a time means little by itself: there a variant's time over that of torch or of a
peer in the same interleaved run is judged, on any CPU of one class (`machine.machine_class`). Slower is one that is
RATIO_MARGIN above the old one, and more than both spreads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..machine import machine_class
from .case import OK, Row
from .records import Record
from .table import aligned

MARGIN = 1.03
RATIO_MARGIN = 1.15
MORE = 1.25
#: What is judged, and the spread it comes with; without one, only beyond MARGIN.
MEASURES = {"ms": "spread_ms", "host_us": "spread_us", "extra_mib": None, "state_mib": None, "launches": None}
ERRORS = ("relative_error", "off_diagonal", "whitening", "residual")

Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Change:
    key: Key
    what: str
    old: float
    new: float

    def __str__(self) -> str:
        label, what, old, new, times = self.cells
        return f"{label}: {what} {old} -> {new} ({times} x)"

    @property
    def cells(self) -> list[str]:
        return [" ".join(self.key), self.what, f"{self.old:.4g}", f"{self.new:.4g}", f"{self.new / self.old:.2f}"]


@dataclass(frozen=True)
class Comparison:
    """worse: what exits with an error; better and lost are said too. lost: rows that were timed and are no longer."""

    worse: Sequence[Change]
    better: Sequence[Change]
    lost: Sequence[str]
    compared: int

    @property
    def failed(self) -> bool:
        return bool(self.worse or self.lost)

    def __str__(self) -> str:
        lines = [f"{self.compared} rows compared"]
        for title, changes in (("worse", self.worse), ("better", self.better)):
            if changes:
                lines.append(
                    aligned([[title, "what", "before", "now", "times"], *(change.cells for change in changes)])
                )
        lines += [f"lost: {each}" for each in self.lost]
        return "\n".join(lines if len(lines) > 1 else [*lines, "nothing changed beyond the spread"])


def compare(old: Sequence[Record], new: Sequence[Record]) -> Comparison:
    """What changed between two runs; ValueError where the hardware is another, or no row is in both."""
    check_machine([record.machine for record in (*old, *new)])
    before, after = _ours(old), _ours(new)
    changes_of = _changes if machine_class(str(new[0].machine["machine"])) is None else _changes_of_ratio
    suites = {key[0] for key in after}
    common = [key for key in before if key in after]
    if not common:
        raise ValueError("the two runs have no row in common: pass the suites and shapes of the old one")
    changes = [change for key in common for change in changes_of(key, before[key], after[key])]
    timed = [key for key in common if before[key]["status"] == OK != after[key]["status"]]
    cases = {key[:3] for key in after}
    missing = [key for key in before if key[0] in suites and key not in after and key[:3] in cases]
    lost = [f"{' '.join(key)}: {after[key]['status']}" for key in timed] + [
        f"{' '.join(key)}: not there" for key in missing if before[key]["status"] == OK
    ]
    return Comparison(
        [change for change in changes if change.new > change.old],
        [change for change in changes if change.new < change.old],
        lost,
        len(common),
    )


def check_machine(facts: Iterable[Mapping[str, str]]) -> None:
    """The check that all runs are of one GPU, or of CPUs of one class; ValueError for more than one."""
    names = sorted({machine_class(str(each["machine"])) or str(each["machine"]) for each in facts})
    if len(names) > 1:
        raise ValueError(f"runs on different machines are not compared: {', '.join(names)}")


def of_class(records: Sequence[Record], facts: Mapping[str, str]) -> Sequence[Record]:
    """The runs on the same class of CPU; all of them where there is none, or on a GPU."""
    kind = machine_class(facts["machine"])
    return [each for each in records if machine_class(str(each.machine["machine"])) == kind is not None] or records


def _ours(records: Iterable[Record]) -> Mapping[Key, Row]:
    rows = (row for record in records for row in record.rows if row.get("ours") and "variant" in row)
    return {(row["suite"], row.get("case", ""), row.get("dtype", ""), row["variant"]): row for row in rows}


def _changes(key: Key, old: Row, new: Row) -> list[Change]:
    changes = []
    for name, spread in MEASURES.items():
        if name in old and name in new and old[name] > 0:
            slack = 0.0 if spread is None else old.get(spread, 0.0) + new.get(spread, 0.0)
            low, high = sorted((old[name], new[name]))
            if high - low > slack and high > MARGIN * low:
                changes.append(Change(key, name, old[name], new[name]))
    return changes + _changes_of_error(key, old, new)


def _changes_of_ratio(key: Key, old: Row, new: Row) -> list[Change]:
    """Changes of the time over the base's, if that is somebody else's and the same in both, of bytes and of errors."""
    changes = []
    if old.get("base") == new.get("base") not in (None, key[-1]) and old["ratio"] > 0 < new["ratio"]:
        times = sorted((1 / old["ratio"], 1 / new["ratio"]))
        spread = sum(row.get("spread_ms", 0.0) / row["ms"] for row in (old, new))
        if times[1] > max(RATIO_MARGIN, 1 + spread) * times[0]:
            changes.append(Change(key, f"time over {old['base']}", 1 / old["ratio"], 1 / new["ratio"]))
    for name in (name for name, spread in MEASURES.items() if spread is None and old.get(name, 0) > 0 and name in new):
        if max(old[name], new[name]) > MARGIN * min(old[name], new[name]):
            changes.append(Change(key, name, old[name], new[name]))
    return changes + _changes_of_error(key, old, new)


def _changes_of_error(key: Key, old: Row, new: Row) -> list[Change]:
    changes = []
    for name in ERRORS:
        if name in old and name in new and old[name] > 0 and new[name] > MORE * old[name]:
            changes.append(Change(key, name, old[name], new[name]))
    return changes
