"""`import steepest` costs little beside `import torch`, and brings nothing that training does not use."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from typing import Any

import pytest
import torch

import steepest
from steepest.ops.tracing import assume_constant_result

HEAVY = ("torch._dynamo", "torch._inductor", "triton", "matplotlib", "numpy", "steepest.tools")

MEASURED = """
import json, sys, time
started = time.process_time()
import torch
between, known = time.process_time(), set(sys.modules)
import steepest
ended, alone = time.process_time(), sorted(set(sys.modules) - known)
steepest.Muon
used, new = time.process_time(), sorted(set(sys.modules) - known)
seconds = {"torch": between - started, "steepest": ended - between, "Muon": used - ended}
from steepest.tools import cli
cli.main(["plan", "--shape", "64x64"])
tools = [name for name in sys.modules if name.startswith("steepest.tools.")]
print(json.dumps({**seconds, "alone": alone, "new": new, "tools": tools}))
"""

#: That rooms and optimizers are there without an import of their own.
ROOMS = """
import steepest as s
print(s.parts.Momentum, s.recipe.Recipe, s.zoo.Muon is s.Muon, s.graph, s.step.plan)
"""

OLD_PATHS = """
import importlib, sys, warnings
from steepest._moved import MOVED
for name in (*MOVED, "bench.case", "compare.text"):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        exec(f"import steepest.{name}")
    old, new = f"steepest.{name}", f"steepest.tools.{name}"
    said = [(str(each.message), each.filename) for each in told if each.category is DeprecationWarning]
    assert (f"{old} has moved: import {new}", "<string>") in said, said
    module = importlib.import_module(new)
    assert sys.modules[old] is module
    assert module.__spec__.name == module.__name__ == new
"""


@functools.cache
def measure(run: int) -> dict[str, Any]:
    """Seconds of CPU that each import takes in a new process, the modules that come with ours, and the tools that the
    command `plan` imports then. The second process looks at the old paths too: each spends most on importing torch.
    """
    program = MEASURED + OLD_PATHS if run == 1 else MEASURED
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_importing_costs_less_than_a_tenth_of_importing_torch() -> None:
    """A twentieth where no bytecode may be written, a seventieth elsewhere; with torch._dynamo it was as much as torch.

    The first optimizer takes a quarter and a seventh, where half of the time is a pass of Python's garbage collector
    over what torch has made.
    """
    runs = [measure(run) for run in range(2)]
    new = runs[0]["new"]
    assert "steepest.zoo" in new
    assert not [name for name in new if name in HEAVY or name.startswith(tuple(f"{heavy}." for heavy in HEAVY))]
    assert not {"steepest.optimizer", "steepest.parts", "steepest.zoo"} & set(runs[0]["alone"])
    torch_ = min(run["torch"] for run in runs)
    assert min(run["steepest"] for run in runs) < 0.1 * torch_
    assert min(run["Muon"] for run in runs) < 0.35 * torch_


@pytest.mark.slow
def test_the_rooms_are_there_without_an_import_of_their_own() -> None:
    done = subprocess.run([sys.executable, "-c", ROOMS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(steepest.zoo.__all__) < set(steepest.__all__)
    with pytest.raises(AttributeError, match="module 'steepest' has no attribute 'Moun'"):
        _ = steepest.Moun


def test_a_command_imports_its_tool_alone() -> None:
    assert set(measure(0)["tools"]) == {"steepest.tools.cli", "steepest.tools.planner"}


def test_an_old_path_of_a_tool_is_the_tool_itself() -> None:
    """The warning names the line of the import, and no module is there twice, as OLD_PATHS asserts."""
    assert measure(1)


def test_a_constant_is_marked_as_torch_marks_it() -> None:
    ours, theirs = (lambda: 1), (lambda: 1)
    assert assume_constant_result(ours) is ours
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}


def test_a_constant_is_one_in_a_graph() -> None:
    """Its body, which torch.compile cannot trace, runs once, while the graph is made."""
    calls = []

    @assume_constant_result
    def one() -> int:
        calls.append(sys._getframe().f_code.co_name)
        return 1

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + one(), fullgraph=True, backend="eager")
    for _ in range(2):
        assert float(compiled(torch.zeros(()))) == 1
    assert calls == ["one"]
