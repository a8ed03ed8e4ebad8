"""A new optimizer is three files and a row: they are put into a copy of the tree, whose tests then know it.

CONTRIBUTING.md names them; the class and its test lie in examples/new_optimizer.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import steepest
from steepest.optimizer import MatrixOptimizer
from support.training import both_backends, both_kinds, check_resume_and_bad_gradients, give_gradients

ROOT = Path(__file__).parents[2]
FILES = ROOT / "examples" / "new_optimizer"
ROW = (
    "| `RowMuon` | spectral | none | unit, rows of one running size | 1 and a number a row | after arXiv:2510.05491 |\n"
)
#: What CONTRIBUTING.md says is to be written: new files, and lines of these.
NEW = {"row_muon.py": "python/steepest/zoo/row_muon.py", "test_row_muon.py": "tests/papers/test_row_muon.py"}
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
CHANGED = ("python/steepest/zoo/__init__.py", "docs/optimizers.md")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package as it is built, of its tests and its pages, with the newcomer."""
    root = tmp_path_factory.mktemp("tree")
    package = Path(steepest.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__", "_build", "build")
    shutil.copytree(package, root / "python" / "steepest", ignore=ignored)
    for name in ("tests", "docs", "bench", "kernels", "csrc"):
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    for name in ("CONTRIBUTING.md", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    for name, place in NEW.items():
        shutil.copy(FILES / name, root / place)
    exports, table = (root / place for place in CHANGED)
    text = exports.read_text()
    text = text.replace("from .schattor", "from .row_muon import RowMuon\nfrom .schattor")
    exports.write_text(text.replace('    "SPlus",\n', '    "RowMuon",\n    "SPlus",\n'))
    table.write_text(re.sub(r"(\| `NorMuon` .*\n)", rf"\1{ROW}", table.read_text()))
    return root


def run(tree: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(tree / "python"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def passed(output: str) -> int:
    return int(re.findall(r"(\d+) passed", output)[-1])


def test_contributing_names_these_files() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## Add an optimizer") : text.index("## Add a part")]
    said = {place.replace("row_muon", "NAME") for place in (*NEW.values(), *CHANGED)}
    assert said == set(re.findall(r"^\d\. `([\w/.]+)`", section, re.MULTILINE))


@pytest.mark.slow
def test_the_package_and_its_pages_know_the_newcomer(tree: Path) -> None:
    """Its equations hold, and it is exported, described, compared and in `help`."""
    one = {
        "tests/tools/test_docs.py": ("the_site_describes_every_public_name", "the_table_has_a_row_for_every_optimizer"),
        "tests/tools/test_compare.py": ("every_optimizer_of_the_zoo_is_compared",),
    }
    tests = [f"{file}::test_{name}" for file, names in one.items() for name in names]
    assert passed(run(tree, *PYTEST, "tests/papers/test_row_muon.py", *tests)) == 6
    assert passed(run(tree, *PYTEST, "tests/optim/test_help.py", "-k", "RowMuon")) == 2
    found = "steepest.__file__, 'row_beta=0.95' in steepest.RowMuon.__doc__, dir(steepest).count('RowMuon')"
    program = f"import steepest; print({found})"
    assert run(tree, "-c", program).split() == [str(tree / "python" / "steepest" / "__init__.py"), "True", "1"]


@pytest.mark.slow
def test_the_tests_of_all_optimizers_take_the_newcomer(tree: Path) -> None:
    """Resume, checkpoints, options, errors, precision, averages, graphs, contracts of torch.optim, as of all others."""
    assert passed(run(tree, *PYTEST, "tests/optim", "-k", "RowMuon")) > 50
    assert passed(run(tree, *PYTEST, "tests/optim/test_method.py", "tests/tools/test_floors.py")) > 20
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from support.faults import SECTIONS, measured\n"
        "for section in SECTIONS:\n"
        "    (cells,) = measured(section, ['RowMuon']).values()\n"
        "    for column, cell in zip(section.columns, cells, strict=True):\n"
        "        assert cell.word in column.right, (section.title, column.name, cell)\n"
        "    print(len(cells))"
    )
    assert sum(map(int, run(tree, "-W", "ignore", "-c", program).split())) > 10


# ---- outside of the package -----------------------------------------------------------------------------------------


@pytest.fixture
def newcomer(monkeypatch: pytest.MonkeyPatch) -> type[MatrixOptimizer]:
    monkeypatch.syspath_prepend(str(FILES))
    from row_muon import RowMuon  # type: ignore[import-not-found]

    return RowMuon  # type: ignore[no-any-return]


@both_backends
def test_a_newcomers_optimizer_has_what_all_have(newcomer: type[MatrixOptimizer], backend: str) -> None:
    """Checkpoints, bad gradients, AdamW beside it and the fused ops, without a line about any of them."""
    check_resume_and_bad_gradients(lambda: both_kinds(newcomer, backend=backend))
    optimizer, params = both_kinds(newcomer)
    give_gradients(params, 0)
    assert optimizer.prepare() == steepest.MuAdam(params).prepare()
