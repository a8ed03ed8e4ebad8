"""The site: `make docs` builds it with Sphinx, from these pages, the notebooks and the docstrings."""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT / "python"))

import torch  # noqa: E402

import steepest  # noqa: E402
from steepest.optimizer import MatrixOptimizer  # noqa: E402
from steepest.parts import Diagonal  # noqa: E402

project = "steepest"
author = "the authors of steepest"
project_copyright = "the authors of steepest, Apache-2.0"
version = release = steepest.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = []
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks hold what their last run printed; tests run them
highlight_language = "text"
smartquotes = False  # a quotation mark is a string's
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_class_signature = "mixed"

html_theme = "furo"
html_title = f"steepest {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
copybutton_exclude = ".linenos, .gp, .go"

# ---- docstrings --------------------------------------------------------------------------------------------------
# They are plain text: paragraphs, equations that are indented, and lines "name: what it is". What follows makes
# reStructuredText of them, which is what Sphinx reads.

ENTRY = re.compile(r"^\*{0,2}(\w+(?:, \w+)*): (.*)$")
SEVERAL = re.compile(r"(?<=\S) {3,}(?=\w+(?:, \w+)*: )")
ARGUMENT = re.compile(r"^ {4}(\S.*?) {2,}(\S.*)$")
SPECIAL = re.compile(r"([\\*|_])")


def escaped(text: str) -> str:
    """With what reStructuredText would read as markup made plain, but for what stands in backticks."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if i % 2 else SPECIAL.sub(r"\\\1", part) for i, part in enumerate(parts))


def blocks(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines between blank ones."""
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield block
            block = []


def converted(lines: list[str]) -> Iterator[str]:
    """The docstring as reStructuredText."""
    listing = False
    for number, block in enumerate(blocks(lines)):
        indented = all(line.startswith("    ") for line in block)
        if listing and indented:
            yield from arguments(block)
        elif indented:
            yield from ["::", "", *block, ""]
        elif number == 0 or not ENTRY.match(block[0]):
            yield from [*(escaped(line.strip()) for line in block), ""]
        else:
            yield from entries(block)
        listing = block == ["All arguments:"]


def arguments(block: list[str]) -> Iterator[str]:
    """The list of all arguments that `steepest.zoo.arguments` makes."""
    for line in block:
        match = ARGUMENT.match(line)
        assert match, line
        yield f"* ``{match[1]}``: {escaped(match[2])}"
    yield ""


def entries(block: list[str]) -> Iterator[str]:
    """A list of "name: what it is"."""
    for line in chain.from_iterable(map(SEVERAL.split, block)):
        match = ENTRY.match(line)
        if match and not line.startswith(" "):
            yield f"* **{match[1]}**: {escaped(match[2])}"
        else:
            yield f"  {escaped(line.strip())}"
    yield ""


def process_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = list(converted(lines))


def process_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returned: str
) -> tuple[str, str] | None:
    """Of an optimizer its own arguments; all of them are listed below its description."""
    if not (inspect.isclass(obj) and issubclass(obj, MatrixOptimizer) and obj is not MatrixOptimizer):
        return None
    code = inspect.unwrap(obj.__init__).__code__
    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    parameters = inspect.signature(obj).parameters
    shown = [str(parameters[each].replace(annotation=inspect.Parameter.empty)) for each in names]
    return f"({', '.join([*shown, '**more'])})", ""


# ---- pages that lie elsewhere ------------------------------------------------------------------------------------


def copy_notebooks(app: Any, config: Any) -> None:
    """examples/notebooks beside the pages: Sphinx reads one folder."""
    folder = HERE / "notebooks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for notebook in sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")):
        shutil.copy(notebook, folder)


def link_notebooks(app: Any, page: str, source: list[str]) -> None:
    """Links to examples/notebooks lead to the copies."""
    up = "../" * page.count("/")
    source[0] = source[0].replace(f"]({up}../examples/notebooks/", f"]({up}notebooks/")


# ---- the classes of a page ---------------------------------------------------------------------------------------

LISTED = re.compile(r"^<!-- optimizers: (\w+) -->$", re.MULTILINE)


def kind(cls: type[MatrixOptimizer]) -> str:
    """What its default recipe is made of."""
    if issubclass(cls, steepest.Momo):
        return "coupled"
    optimizer = cls(torch.nn.Linear(2, 2))
    recipe = optimizer.recipe(optimizer.param_groups[0])
    if recipe.kronecker is not None:
        return "kronecker"
    return "diagonal" if isinstance(recipe.precondition, Diagonal) else "plain"


def with_optimizers(text: str) -> str:
    """The page with the classes of the package where it asks for those of a kind, in the order of the table of all."""
    rows = re.findall(r"^\| `(\w+)`", (HERE / "optimizers.md").read_text(encoding="utf-8"), re.MULTILINE)
    classes = [value for value in map(vars(steepest.zoo).get, steepest.zoo.__all__) if isinstance(value, type)]
    kinds = {cls.__name__: kind(cls) for cls in classes if issubclass(cls, MatrixOptimizer)}
    names = sorted(kinds, key=[*rows, *kinds].index)

    def listed(match: re.Match[str]) -> str:
        some = [name for name in names if kinds[name] == match[1]]
        return "\n\n".join(f"```{{eval-rst}}\n.. autoclass:: steepest.{name}\n```" for name in some)

    return LISTED.sub(listed, text)


def list_optimizers(app: Any, page: str, source: list[str]) -> None:
    source[0] = with_optimizers(source[0])


def setup(app: Any) -> None:
    app.connect("config-inited", copy_notebooks)
    app.connect("source-read", link_notebooks)
    app.connect("source-read", list_optimizers)
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-process-signature", process_signature)
