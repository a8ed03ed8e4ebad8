"""What every test shares: skips that name what is missing, threads shared out among workers, no forced backend, which
tests are quick, and a GPU that no longer answers ends a run."""

from __future__ import annotations

import gc
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from steepest.linalg import polar
from steepest.ops import backend

if TYPE_CHECKING:
    from support.processes import Processes

TESTS = Path(__file__).parent
#: Where all tests are `kernels`, or `slow`.
EXECUTED = TESTS / "kernels" / "ptx"
#: Files and folders whose tests are `quick`: together some 25 seconds of one core, and something of every part.
QUICK = (
    *("optim/parts", "optim/test_adamw.py", "optim/test_backends_of_a_step.py", "optim/test_drop_in.py"),
    *("optim/test_errors.py", "optim/test_graph.py", "optim/test_identities.py", "optim/test_matrices.py"),
    *("optim/test_metrics.py", "optim/test_optimizer_recipes.py", "optim/test_plan.py", "optim/test_recipe.py"),
    *("optim/test_routing.py", "optim/test_scaling.py", "optim/test_scion.py", "optim/test_splus.py"),
    *("optim/test_state_storage.py", "optim/test_table.py", "optim/test_trust_region.py", "optim/test_upstream.py"),
    *("papers/test_scion.py", "papers/test_table_1.py"),
    *("linalg/test_blocks.py", "linalg/test_coefficients.py", "linalg/test_polar_robust.py"),
    "distributed/test_owners.py",
    *("kernels/test_chain_numbers.py", "kernels/test_eigh.py", "kernels/test_grouped_gemm.py"),
    *("kernels/test_small_polar.py", "kernels/test_symm_gemm.py", "kernels/test_weight_update.py"),
    *("tools/bench/test_harness.py", "tools/test_floors.py", "tools/test_tune.py"),
)


def pytest_configure(config: pytest.Config) -> None:
    """Each worker of pytest-xdist takes its share of torch's threads (as many as OMP_NUM_THREADS or the cores say)."""
    # Two workers with a thread pool as large as the machine each spend their time waiting for one another.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """The garbage collector leaves the tests alone, which stay to the end: a tenth of the time of all of them."""
    gc.disable()
    result = yield
    gc.freeze()
    gc.enable()
    return result


def pytest_report_header() -> str:
    """Which kind of CPU this was: `polar` computes in bf16 or fp32 by it, and sums go by vectors of its width."""
    native = polar.compute_dtype("auto", torch.float32, "cpu") is torch.bfloat16
    switch = f"STEEPEST_CPU_BF16={polar.cpu_bf16}" if polar.cpu_bf16 else "as detected"
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"cpu: native bf16 products {'on' if native else 'off'} ({switch}), torch's vectors {vectors}"


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A STEEPEST_BACKEND of the person who runs the tests changes neither this process nor those that tests start."""
    monkeypatch.setattr(backend, "forced", "auto")
    monkeypatch.delenv("STEEPEST_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """A test draws the same numbers whatever ran before it: of those that go on from others, one run in many is past a
    bound.
    """
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """For cases on several ranks. One for all tests of a worker, as what it imports takes seconds."""
    import torch.distributed as dist

    from support.processes import Processes

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo backend")
    with closing(Processes()) as started:
        yield started


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "a file with tests, a line each: they are left out, and those that begin are added to it"
    parser.addoption("--begun", type=Path, metavar="FILE", help=told)
    told = (
        "of the slow cases of a test one in N, at least one: of different tests different ones, in every run the same"
    )
    parser.addoption("--one-in", type=int, choices=range(1, 11), default=1, metavar="N", help=told)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """After an illegal access every later call fails: the tests that follow are for a new process (bench/gpu.py)."""
    if (file := item.config.getoption("--begun")) is not None:
        with file.open("a") as begun:
            begun.write(f"{item.nodeid}\n")
    result = yield
    if item.get_closest_marker("gpu") is not None and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            item.session.shouldstop = f"the GPU is in error after {item.nodeid}: {str(error).splitlines()[0]}"
    return result


def is_quick(path: Path) -> bool:
    return any(path == TESTS / name or path.parent == TESTS / name for name in QUICK)


def of_other_classes(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """What is asked of many classes `make test` asks of one of each kind: the rest are slow, and these are they."""
    asked: dict[str, list[tuple[pytest.Item, bool]]] = {}
    for item in items:
        callspec = getattr(item, "callspec", None)  # of a test with parameters
        cls = callspec and callspec.params.get("cls")
        if isinstance(cls, type):
            from steepest.optimizer import MatrixOptimizer  # which most processes of bench/gpu.py do without
            from support.training import KINDS

            if issubclass(cls, MatrixOptimizer):
                asked.setdefault(item.nodeid.partition("[")[0], []).append((item, cls in KINDS))
    tests = [test for test in asked.values() if any(kind for _, kind in test)]
    return [item for test in tests for item, kind in test if not kind]


def of_products(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Of a product of parameters `make test` takes as many cases as have each of their values ("each choice"): the rest
    are slow, and these are they. What papers say is asked of every case, for there a product is of many formulas.
    """
    tests: dict[str, list[tuple[pytest.Item, set[object]]]] = {}
    for item in items:
        if hasattr(item, "callspec") and TESTS / "papers" not in item.path.parents:
            tests.setdefault(item.nodeid.partition("[")[0], []).append((item, values_of(item)))
    rest = []
    for test in tests.values():
        missing = set().union(*(values for _, values in test))
        while missing:
            item, values = most = max(test, key=lambda case: len(case[1] & missing))
            missing -= values
            test.remove(most)
        rest += [item for item, _ in test]
    return rest


def values_of(item: pytest.Item) -> set[object]:
    """What an item has of each of the lists that the product of its test's parameters is of."""
    params = dict(item.callspec.params)  # type: ignore[attr-defined]
    values: set[object] = set()
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        values.add(tuple((name, id(params.pop(name))) for name in names))
    return values | {(name, id(value)) for name, value in params.items()}  # those of fixtures


def one_in(n: int, items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """What `--one-in` leaves out of slow tests. Each begins elsewhere, so that all classes are taken by some tests."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow") is not None:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left = []
    for name, of_test in cases.items():
        first = zlib.crc32(name.encode()) % min(n, len(of_test))
        left += [item for i, item in enumerate(of_test) if i % n != first]
    return left


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files that `make test` or `make test-quick` take nothing of are not even imported."""
    marks = config.option.markexpr.split(" and ")
    if {"not slow", "not kernels"} <= {*marks} and collection_path == EXECUTED:
        return True
    return True if "quick" in marks and collection_path.is_file() and not is_quick(collection_path) else None


@pytest.hookimpl(tryfirst=True)  # before -m decides
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    quick = {path for path in {item.path for item in items} if is_quick(path)}
    for item in items:
        if item.path in quick:
            item.add_marker(pytest.mark.quick)
    file = config.getoption("--begun")
    begun = set(file.read_text().splitlines()) if file is not None and file.exists() else set()
    for item in of_other_classes(items):
        item.add_marker(pytest.mark.slow)
    here = [item for item in items if not any(map(item.get_closest_marker, ("slow", "gpu", "kernels")))]
    for item in of_products(here):
        item.add_marker(pytest.mark.slow)
    left = {*one_in(config.getoption("--one-in"), items), *(item for item in items if item.nodeid in begun)}
    if left:
        config.hook.pytest_deselected(items=[*left])
        items[:] = [item for item in items if item not in left]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
