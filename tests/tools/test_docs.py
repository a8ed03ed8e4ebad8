"""The code blocks of the README and of docs/ run, page by page, each page from top to bottom in one namespace."""

from __future__ import annotations

import csv
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from support.processes import Processes

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ON_RANKS = ROOT / "docs" / "distributed.md"  # its code is for several processes
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_blocks(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": f"docs.{page.stem}"}
    for block in BLOCK.finditer(text):
        # Blank lines in front keep the page's line numbers in a traceback.
        source = "\n" * (text[: block.start(1)].count("\n")) + block[1]
        exec(compile(source, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if page != ON_RANKS], ids=lambda page: page.name)
def test_code_blocks_run(page: Path) -> None:
    run_blocks(page)


def test_code_blocks_run_on_two_ranks(processes: Processes) -> None:
    processes.run(run_blocks, ON_RANKS, ranks=2)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)#]+)", text)
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert "@@" not in text


def test_the_tables_are_the_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench/readme.py` has nothing to change, and would change a figure that is not the file's."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    readme = importlib.import_module("readme")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.filled(text) == text
    for row in ("| Muon auto | 3894 ± 25 | 2.00 | 0.08 |", "| AdamW | 2.034 | 182 ms | 1 ms |"):
        assert row in text
        assert readme.filled(text.replace(row, "| mine | 99.00 |")) == text
        assert readme.filled(text.replace(f"{row}\n", "")) == text
    with pytest.raises(ValueError, match="has no table"):
        readme.filled("nothing")


def test_the_sentence_on_adamw_is_the_measurement() -> None:
    with (ROOT / "bench" / "results" / "fused-cpu.csv").open(newline="") as file:
        found = {row["variant"]: float(row["ms"]) for row in csv.DictReader(file) if row["case"] == "gpt2-124m AdamW"}
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    ours, theirs = found["AdamW"], found["torch fused AdamW"]
    assert f"takes {ours:.0f} ms on one core, torch's fused AdamW {theirs:.0f} ms" in text


def test_there_are_pages_with_code() -> None:
    assert any(BLOCK.search(page.read_text(encoding="utf-8")) for page in PAGES)
