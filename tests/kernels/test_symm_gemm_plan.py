"""The grouped product of sm_90 on the host: its plan, the scheduler's arithmetic, slots of shared memory.

tests/kernels/ptx runs the kernels themselves.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import subprocess
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pytest

from ptx.products import KK, KMN, MNMN, Shape

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "g++")

WIDE, SMALL = range(2)  # Tile
BY_MODEL, NEVER, ALWAYS = range(3)  # Streams


def pack(shapes: list[Shape]) -> Any:
    numbers = [number for shape in shapes for number in shape.numbers()]
    return (ctypes.c_int64 * len(numbers))(*numbers)


@dataclass(frozen=True)
class Options:
    capacity: int = 36
    tiles: int = 3
    streams: int = 0


FREE = Options()


class Host:
    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        for name in ("plan_text", "plan_fault"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.library.triangle_fault.restype = ctypes.c_int64
        self.library.entry_of.restype = ctypes.c_float
        self.library.entry_of.argtypes = [ctypes.c_float] * 5

    def plan(self, shapes: list[Shape], multiprocessors: int = 132, options: Options = FREE) -> dict[str, Any]:
        numbers = astuple(options)
        text = self.library.plan_text(pack(shapes), len(shapes), multiprocessors, *numbers).decode()
        assert not text.startswith("error"), text
        found: dict[str, Any] = json.loads(text)
        return found

    def fault(self, shapes: list[Shape], multiprocessors: int = 132, options: Options = FREE) -> str:
        numbers = astuple(options)
        return str(self.library.plan_fault(pack(shapes), len(shapes), multiprocessors, *numbers).decode())


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler: {COMPILER} is not on PATH")
    library = tmp_path_factory.mktemp("symm_gemm") / "host.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-ffp-contract=off"]
    flags += ["-I", "csrc"]
    sources = ["tests/kernels/symm_gemm_plan.cpp", "csrc/symm_gemm/plan.cpp"]
    built = subprocess.run([COMPILER, *flags, *sources, "-o", str(library)], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return Host(library)


# ---- plan ----------------------------------------------------------------------------------------------------------


def random_shape(rng: random.Random) -> Shape:
    symmetric = rng.random() < 0.6
    m = rng.choice([rng.randrange(1, 40), rng.randrange(1, 300)]) * 8
    n = m if symmetric else rng.randrange(1, 300) * 8
    k = rng.choice([rng.randrange(1, 80), rng.randrange(1, 3200), rng.randrange(1, 40) * 512])
    return Shape(rng.choice([1, 1, 2, rng.randrange(1, 20)]), m, n, k, rng.randrange(3), symmetric)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_every_k_tile_of_every_tile_once(seed: int, host: Host) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        shapes = [random_shape(rng) for _ in range(rng.choice([1, 2, rng.randrange(1, 40)]))]
        options = Options(rng.choice([1, 5, 36]), rng.choice([1, 2, 3]), rng.randrange(3))
        multiprocessors = rng.choice([1, 2, 3, 78, 114, 132])
        assert host.fault(shapes, multiprocessors, options) == "", (shapes, multiprocessors, options)


@pytest.mark.slow
def test_long_triangles(host: Host) -> None:
    """The root that finds a tile's row is exact where fp32 is not."""
    assert host.library.triangle_fault() == -1
    assert host.fault([Shape(1, 65536, 65536, 64)]) == ""


def test_large_lists_become_several_launches(host: Host) -> None:
    shapes = [Shape(2, 512, 512, 64 * (1 + i % 7), i % 3) for i in range(250)]
    plan = host.plan(shapes)
    assert [launch["majors"] for launch in plan["launches"]] == [KK] * 3 + [MNMN] * 3 + [KMN] * 3
    taken = sorted(problem["index"] for launch in plan["launches"] for problem in launch["problems"])
    assert taken == list(range(250))
    for launch in plan["launches"]:
        steps = [problem["k_tiles"] for problem in launch["problems"]]
        assert steps == sorted(steps, reverse=True)
        assert len(steps) <= 36


@pytest.mark.parametrize(
    "shape,streams",
    [
        (Shape(1, 1024, 1024, 4096), True),  # 10 cluster tiles for 66 clusters
        (Shape(1, 2048, 2048, 8192), True),  # 36
        (Shape(1, 4096, 4096, 4096), True),  # 136
        (Shape(1, 1024, 1024, 128), False),  # nothing to cut
        (Shape(1, 16384, 16384, 4096), False),  # the last of 32 waves
        (Shape(216, 2048, 7168, 2048, KMN, symmetric=False), False),
    ],
)
def test_streams_where_multiprocessors_would_idle(shape: Shape, streams: bool, host: Host) -> None:
    plan = host.plan([shape])
    (launch,) = plan["launches"]
    assert (launch["steps"] > 0) == (launch["whole"] < launch["tiles"]) == streams
    assert (plan["floats"] > 0) == (plan["counters"] > 0) == streams
    assert 0 < launch["efficiency"] <= 1
    assert launch["clusters"] <= (66 if launch["tile"] == WIDE else 132)


def test_small_matrices_take_the_small_tile(host: Host) -> None:
    assert host.plan([Shape(500, 128, 128, 512)])["launches"][0]["tile"] == SMALL
    assert host.plan([Shape(24, 1024, 1024, 4096)])["launches"][0]["tile"] == WIDE


def test_empty_list(host: Host) -> None:
    assert host.plan([]) == {"floats": 0, "counters": 0, "reasons": [], "launches": []}


@pytest.mark.parametrize(
    "shape,reason",
    [
        (Shape(1, 64, 72, 64), "a symmetric product has m = n"),
        (Shape(1, 64, 64, 0), "k 0; every one is from 1 to 1073741823"),
        (Shape(0, 64, 64, 8), "batch 0, m 64"),
        (Shape(1, 68, 68, 64), "n is 68; a multiple of 8 is accepted"),
        (Shape(1, 64, 64, 60, a=(60, 3840)), "A has strides 3840 and 60 elements; multiples of 8 (16 bytes)"),
        (Shape(2, 64, 64, 64, b=(64, 4100)), "B has strides 4100 and 64 elements; multiples of 8 (16 bytes)"),
        (Shape(1, 64, 64, 64, MNMN, a=(56, 4096)), "A has strides 4096 and 56 elements for 64 rows of 64"),
        (Shape(2, 64, 64, 64, d=(64, 64)), "D has strides 64 and 64 elements; its matrices overlap"),
        (Shape(2, 64, 64, 64, a=(64, 0)), "A has strides 0 and 64 elements; a batch of one matrix"),
        (Shape(1, 64, 64, 64, has_c=True, c=(12, 64)), "C has strides"),
    ],
)
def test_refusals_say_why(shape: Shape, reason: str, host: Host) -> None:
    plan = host.plan([Shape(1, 64, 64, 64), shape])
    assert plan["reasons"][0] == ""
    assert reason in plan["reasons"][1]
    assert [problem["index"] for problem in plan["launches"][0]["problems"]] == [0]


def test_odd_k_and_single_matrices_need_no_more_than_rows(host: Host) -> None:
    shapes = [
        Shape(3, 64, 64, 61, has_c=True),
        Shape(1, 64, 64, 64, a=(64, 1), b=(64, 0), d=(64, 3)),
        Shape(1, 61, 64, 24, KMN, symmetric=False),
        Shape(4, 64, 64, 64, a=(256, 64), c=(64, 0), has_c=True),
    ]
    assert host.plan(shapes)["reasons"] == [""] * 4


# ---- epilogue ------------------------------------------------------------------------------------------------------


def test_entry(host: Host) -> None:
    entry = host.library.entry_of
    assert entry(2, 3, 0.5, 8, 1) == 11
    assert entry(1, 1 + 2**-23, 1, -1, 0) == 2**-23


def test_shared_memory_without_conflicts(host: Host) -> None:
    assert host.library.conflict_free() == 1
