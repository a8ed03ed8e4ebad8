"""Every optimizer meets every fault, does what is right about it, and docs/faults.md says what that is."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.configurations import CLASSES, CONFIGURATIONS
from support.faults import HEAD, SECTIONS, Section, measured, written

pytestmark = pytest.mark.filterwarnings("ignore:Anomaly Detection")

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.title)
def test_every_optimizer_does_what_is_right_and_the_page_says_it(section: Section) -> None:
    """`python bench/faults.py` writes the page."""
    table = measured(section)
    wrong = [
        f"{row}, {column.name}: {cell.word} {cell.message}"
        for row, cells in table.items()
        for column, cell in zip(section.columns, cells, strict=True)
        if cell.word not in column.right
    ]
    assert not wrong
    assert written(section, table) in PAGE.read_text(encoding="utf-8")


def test_the_page_has_every_section_and_every_class() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.startswith(HEAD)
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == [each.title for each in SECTIONS]
    rows = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert rows == list(CONFIGURATIONS) * len(SECTIONS)
    assert len(CLASSES) == len({cls.__name__ for cls in CLASSES} & CONFIGURATIONS.keys()) >= 27
