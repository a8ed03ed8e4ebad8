"""The code blocks of the README and of docs/ run, page by page, each page from top to bottom in one namespace."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": f"docs.{page.stem}"}
    for block in BLOCK.finditer(text):
        # Blank lines in front keep the page's line numbers in a traceback.
        source = "\n" * (text[: block.start(1)].count("\n")) + block[1]
        exec(compile(source, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)#]+)", text)
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert "@@" not in text


def test_the_table_is_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    table = importlib.import_module("table")
    rows = table.rows(ROOT / "bench" / "results" / "step-cpu.csv")
    assert "\n".join(rows) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_there_are_pages_with_code() -> None:
    assert any(BLOCK.search(page.read_text(encoding="utf-8")) for page in PAGES)
