"""The pages of docs/integrations: their code runs from top to bottom, their links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

PAGES = sorted((Path(__file__).parents[2] / "docs" / "integrations").glob("*.md"))
TRAINERS = ("axolotl", "llamafactory", "torchtune", "ultralytics")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(page.stem) is None:
        target = "trainers" if page.stem in TRAINERS else "integrations"
        pytest.skip(f"{page.stem} is not installed (make test-{target})")
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": f"docs.{page.stem}"}
    for block in BLOCK.finditer(text):
        exec(compile("\n" * text[: block.start(1)].count("\n") + block[1], str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", BLOCK.sub("", page.read_text(encoding="utf-8")))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]
