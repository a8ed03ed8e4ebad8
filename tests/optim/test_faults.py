"""Every optimizer meets every fault, does what is right about it, and docs/faults.md says what that is."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.configurations import CLASSES, CONFIGURATIONS
from support.faults import HEAD, SECTIONS, Section, legend_of, measured, rows_of
from support.slow import slow
from support.training import KINDS

pytestmark = pytest.mark.filterwarnings("ignore:Anomaly Detection")

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
#: A class of each kind as it is, every second one, and all others.
FEW = [row for row, (cls, options) in CONFIGURATIONS.items() if cls in KINDS[::2] and not options]
REST = [row for row in CONFIGURATIONS if row not in FEW]


@pytest.mark.parametrize("rows", [FEW, slow(REST)], ids=["few", "rest"])
@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.title)
def test_every_optimizer_does_what_is_right_and_the_page_says_it(section: Section, rows: list[str]) -> None:
    """`python bench/faults.py` writes the page."""
    table = measured(section, rows)
    wrong = [
        f"{row}, {column.name}: {cell.word} {cell.message}"
        for row, cells in table.items()
        for column, cell in zip(section.columns, cells, strict=True)
        if cell.word not in column.right
    ]
    assert not wrong
    shown = PAGE.read_text(encoding="utf-8").partition(f"\n## {section.title}\n")[2].partition("\n## ")[0]
    lines = rows_of(section, table)
    if rows is FEW:
        lines = [section.text, *legend_of(section, table), *lines]
    assert [line for line in lines if line not in shown.splitlines()] == []


def test_the_page_has_every_section_and_every_class() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.startswith(HEAD)
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == [each.title for each in SECTIONS]
    rows = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert rows == list(CONFIGURATIONS) * len(SECTIONS)
    assert len(CLASSES) == len({cls.__name__ for cls in CLASSES} & CONFIGURATIONS.keys()) >= 27
