"""The code blocks of the README and of docs/ run, page by page, each page from top to bottom in one namespace.

So do the notebooks. Links lead to pages and headings that are there, and the site has every page and every public name.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import steepest
from steepest import diagnostics, parts
from steepest.tools.compare import methods
from support.processes import Processes
from support.slow import slow

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ON_RANKS = ROOT / "docs" / "distributed.md"  # its code is for several processes
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
SITE = sorted(path for path in (ROOT / "docs").rglob("*.md"))
LINKING = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CODE_OF_CONDUCT.md")), *SITE]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def run_blocks(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": f"docs.{page.stem}"}
    for block in BLOCK.finditer(text):
        # Blank lines in front keep the page's line numbers in a traceback.
        source = "\n" * (text[: block.start(1)].count("\n")) + block[1]
        exec(compile(source, str(page), "exec"), namespace)


#: step.md compiles.
@pytest.mark.parametrize(
    "page",
    [slow(page) if page.name == "step.md" else page for page in PAGES if page != ON_RANKS],
    ids=lambda page: page.name,
)
def test_code_blocks_run(page: Path) -> None:
    run_blocks(page)


def test_code_blocks_run_on_two_ranks(processes: Processes) -> None:
    processes.run(run_blocks, ON_RANKS, ranks=2)


def anchors(page: Path) -> set[str]:
    """What links to the headings of a page end in."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path, text: str) -> list[str]:
    """The links in the text of a page that lead to no file or no heading."""
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http://", "https://"))]
    targets = [(link, *link.partition("#")[::2]) for link in links]
    missing = [link for link, path, _ in targets if not (page.parent / path).exists()]
    headed = [(link, page.parent / path if path else page, anchor) for link, path, anchor in targets if anchor]
    return missing + [link for link, path, anchor in headed if path.suffix == ".md" and anchor not in anchors(path)]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    assert not broken(page, text)
    assert "@@" not in text


def test_a_link_that_leads_nowhere_is_noticed() -> None:
    page = ROOT / "docs" / "index.md"
    text = "[a](nowhere.md) [b](routing.md#of-nothing) [c](routing.md#lora) [d](#start-here) [e](https://x.example/y)"
    assert broken(page, text) == ["nowhere.md", "routing.md#of-nothing"]


def test_the_site_leads_to_every_page() -> None:
    listed: set[Path] = set()
    for index in (ROOT / "docs" / "index.md", ROOT / "docs" / "api" / "index.md"):
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```$", index.read_text(), re.MULTILINE | re.DOTALL):
            listed |= {index.parent / f"{line}.md" for line in tree.split() if re.fullmatch(r"[\w/-]+", line)}
    notebooks = {ROOT / "docs" / "notebooks" / f"{path.stem}.md" for path in NOTEBOOKS}
    assert {*SITE, *notebooks} - listed == {ROOT / "docs" / "index.md"}


def test_the_site_describes_every_public_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes of the zoo each once, by themselves (docs/conf.py)."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    filled = importlib.import_module("conf").with_optimizers
    text = "\n".join(filled(page.read_text(encoding="utf-8")) for page in (ROOT / "docs" / "api").glob("*.md"))
    assert all(text.count(f":: steepest.{name}\n") == 1 for name in steepest.zoo.__all__)
    described = set(re.findall(r"^\.\. auto\w+:: (\S+)$", text, re.MULTILINE))
    assert {f"steepest.{name}" for name in steepest.__all__} - described == {"steepest.__version__"}
    constants = {"Number", "ADJUST_LR", "NORMS"}  # no class and no function
    for room in (parts, diagnostics):
        assert {f"{room.__name__}.{name}" for name in {*room.__all__} - constants} - described <= {
            "steepest.diagnostics.watch"
        }


def test_the_table_has_a_row_for_every_optimizer() -> None:
    text = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
    kinds = {name: getattr(steepest, name) for name in steepest.zoo.__all__}
    optimizers = {name for name, kind in kinds.items() if isinstance(kind, type)}
    assert optimizers - set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE)) == {"Momo", "ProductNormDescent"}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    """Its cells as one program: what it asserts holds."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    program = tmp_path / f"{path.stem}.py"
    sources = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    program.write_text("\n\n".join(sources), encoding="utf-8")
    if "matplotlib" in program.read_text():
        pytest.importorskip("matplotlib")
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_stored_as_it_ran(path: Path) -> None:
    """With what it printed, without errors, counts and places of the machine it ran on; small."""
    text = path.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert any(cell["outputs"] for cell in cells)
    assert not [cell for cell in cells if cell["execution_count"] is not None or cell["metadata"]]
    assert not [out for cell in cells for out in cell["outputs"] if out["output_type"] == "error"]
    assert not re.search(r"/(home|root|work|tmp)/", text)
    assert len(text) < 100_000


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


def test_the_guide_quotes_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench/choose.py` has nothing to change on the page, and would change a figure that is not the file's."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    choose = importlib.import_module("choose")
    text, rows = (ROOT / "docs" / "choose.md").read_text(encoding="utf-8"), choose.read()
    assert choose.filled(text, rows) == text
    start = f"| `MuAdam` | {float(rows['gpt', 'MuAdam']['loss']):.3f} ± "
    (row,) = (line for line in text.splitlines() if line.startswith(start))
    assert choose.filled(text.replace(row, "| `MuAdam` | 0.000 |"), rows) == text
    assert choose.filled(text.replace(f"{row}\n", ""), rows) == text
    with pytest.raises(ValueError, match="choose.md has no lines <!-- situations --> and <!-- end -->"):
        choose.filled("nothing", rows)


def test_the_guide_takes_in_methods_that_have_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their places, and without another look at those that have; of a task that is another one nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    choose = importlib.import_module("choose")
    whole, described = choose.RESULT.read_text(), json.loads(choose.PROVENANCE.read_text())
    head, *lines = whole.splitlines(keepends=True)
    monkeypatch.setattr(choose, "RESULT", tmp_path / "compare.csv")
    monkeypatch.setattr(choose, "PROVENANCE", tmp_path / "compare.json")
    choose.RESULT.write_text(head + "".join(line for line in lines if ",Dion2," not in line))
    choose.PROVENANCE.write_text(json.dumps(described))
    muon = "".join(line.replace(",2.4714,", ",0.1,") for line in lines if ",Muon," in line)
    (tmp_path / "summary.csv").write_text(head + "".join(line for line in lines if ",Dion2," in line) + muon)
    there = {"tasks": described["tasks"], "machines": [{"machine": "another"}]}
    (tmp_path / "provenance.json").write_text(json.dumps(there))
    choose.add(tmp_path)
    assert choose.RESULT.read_text() == whole
    assert json.loads(choose.PROVENANCE.read_text())["machines"] == [*described["machines"], {"machine": "another"}]
    there["tasks"] = {"gpt": {"steps": 7, "described": "a task"}}
    (tmp_path / "provenance.json").write_text(json.dumps(there))
    with pytest.raises(ValueError, match="has run 'gpt' as .*'steps': 7"):
        choose.add(tmp_path)


def test_the_guide_has_no_method_that_is_gone() -> None:
    with (ROOT / "bench" / "results" / "compare.csv").open(newline="") as file:
        assert {row["optimizer"] for row in csv.DictReader(file)} <= methods.known().keys()


def test_the_sentence_on_adamw_is_the_measurement() -> None:
    with (ROOT / "bench" / "results" / "fused-cpu-amx.csv").open(newline="") as file:
        ms = {(row["case"], row["variant"]): float(row["ms"]) for row in csv.DictReader(file) if row["ms"]}
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    large, small = (
        [ms[f"{model} AdamW", who] for who in ("AdamW", "torch fused AdamW")] for model in ("gpt2-124m", "small")
    )
    assert f"takes {large[0]:.0f} ms on one core, torch's fused AdamW {large[1]:.0f} ms" in text
    assert f"on a small model {small[0]:.1f} and {small[1]:.1f} ms" in text


def test_there_are_pages_with_code() -> None:
    assert any(BLOCK.search(page.read_text(encoding="utf-8")) for page in PAGES)
