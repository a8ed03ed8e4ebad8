"""What the compilers made of the sm_90a kernels of csrc/symm_gemm: tensor cores, multicast, widths, spills."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ptx.build import UnavailableError, cutlass, nvcc
from steepest.ops import backend
from support.cuobjdump import binary, by_architecture, dump
from support.requirements import unavailable

pytestmark = pytest.mark.kernels

ROOT = Path(__file__).parents[2]
SOURCE = "csrc/symm_gemm/sm90_f16_kmn.cu"  # the others differ in the element type and in how the factors lie
FLAGS = ["-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr", "-Xptxas", "-v"]
KERNEL = "9symm_gemm8multiply"
# By the enumerators of csrc/common/dtype.h, symm_gemm/params.h and plan.h in a mangled name.
DTYPES = {"DtypeE2": "f16", "DtypeE1": "bf16"}
MAJORS = {"MajorsE0": "kk", "MajorsE1": "mnmn", "MajorsE2": "kmn"}
TILES = {"TileE0": "wide", "TileE1": "small"}
ENDS = {"EndE0": "store", "EndE1": "update"}
NAMES = [
    f"{dtype} {majors} {tile} {end}"
    for dtype in DTYPES.values()
    for majors in MAJORS.values()
    for tile in TILES.values()
    for end in ENDS.values()
    if (majors, end) != ("mnmn", "update")
]


@pytest.fixture(scope="module")
def sass() -> dict[str, str]:
    """By element type, how A and B lie, tile, and what becomes of it."""
    path = binary()
    assert backend.extension is not None
    if not backend.extension.build_info()["hopper"]:
        unavailable("the compiled part was built without the kernels for Hopper")
    found = {}
    for _, mangled, body in by_architecture(dump("--dump-sass", path), r"\bFunction : "):
        if KERNEL in mangled:
            kinds = (DTYPES, MAJORS, TILES, ENDS)
            name = [next(name for mark, name in marks.items() if mark in mangled) for marks in kinds]
            found[" ".join(name)] = body
    assert sorted(found) == sorted(NAMES)
    return found


kernels = pytest.mark.parametrize("name", NAMES)


def count(pattern: str, sass: str) -> int:
    return len(re.findall(pattern, sass))


@kernels
def test_tensor_cores(name: str, sass: dict[str, str]) -> None:
    shape, dtype = "64x256x16" if "wide" in name else "64x128x16", ".BF16" if "bf16" in name else ""
    # Four for a k tile of 64, once in the first turn and once in the loop.
    assert count(rf"\bHGMMA\.{shape}\.F32{dtype} ", sass[name]) == count(r"\bHGMMA\b", sass[name]) == 8
    assert count(r"\bHMMA\b", sass[name]) == 0


@kernels
def test_loads_are_multicast_in_a_cluster(name: str, sass: dict[str, str]) -> None:
    """Pieces of a k tile that a block loads: all of A, half of B for both blocks; 64 wide unless along k."""
    _, majors, tile, _ = name.split()
    a, b = {"kk": (1, 1), "mnmn": (2, 4), "kmn": (1, 4)}[majors]
    expected = (a, b) if tile == "wide" else (a + (b + 1) // 2, 0)
    alone, multicast = (count(rf"\bUTMALDG\.3D{kind} ", sass[name]) for kind in ("", r"\.MULTICAST"))
    assert (alone, multicast) == expected
    assert count(r"\bUTMALDG\b", sass[name]) == alone + multicast
    assert count(r"\bUCGABAR_WAIT\b", sass[name]) == (1 if tile == "wide" else 0)


@pytest.mark.parametrize("name", [name for name in NAMES if "store" in name])
def test_epilogue_moves_16_bytes(name: str, sass: dict[str, str]) -> None:
    code, chunks = sass[name], 4 if "wide" in name else 2
    # Directly and transposed, four matrices at a time, and C likewise; one code on the diagonal, one beside it.
    assert count(r"\bSTSM\.16\.M88\.4\b", code) == count(r"\bLDSM\.16\.M88\.4\b", code) == 2 * 4 * chunks
    assert count(r"\bSTSM\.16\.MT88\.4\b", code) == 2 * 4 * chunks
    # A thread has four vectors of a chunk: C; D directly, joined on the diagonal, or with its mirror image.
    assert count(r"\bLDG\.E\.128 ", code) >= 4 * chunks
    assert count(r"\bSTG\.E\.128 ", code) >= 8 * chunks
    # By fours the diagonal; a warp's sum of squares and a counter.
    assert count(r"\bSTG\.E ", code) == 2 * chunks + 2
    assert count(r"\bSTG\.E\.(U?16|U8)\b", code) == 0
    # Parts of cut tiles, fp32, past the L1 cache.
    assert count(r"\bSTG\.E\.128\.STRONG\.GPU\b", code) == count(r"\bLDG\.E\.128\.STRONG\.GPU\b", code) == 8 * chunks


@pytest.mark.parametrize("name", [name for name in NAMES if "update" in name])
def test_weights_move_16_bytes(name: str, sass: dict[str, str]) -> None:
    code, chunks = sass[name], 4 if "wide" in name else 2
    # Of a chunk, products go through shared memory in fp32; a thread has four times eight weights of 32 or 16 bits.
    assert count(r"\bSTS\.64\b", code) == 16 * chunks
    assert count(r"\bLDS\.128\b", code) == 8 * chunks
    assert count(r"\bSTG\.E\.128 ", code) == 4 * (2 + 1) * chunks
    assert count(r"\bLDG\.E\.128 ", code) >= 4 * 2 * chunks
    # By fours a counter alone, and nothing narrower.
    assert count(r"\bSTG\.E ", code) == 1
    assert count(r"\bSTG\.E\.(U?16|U8|64)\b", code) == 0
    assert count(r"\bSTG\.E\.128\.STRONG\.GPU\b", code) == count(r"\bLDG\.E\.128\.STRONG\.GPU\b", code) == 8 * chunks


@kernels
def test_no_local_memory(name: str, sass: dict[str, str]) -> None:
    assert count(r"\b(LDL|STL)\b", sass[name]) == 0
    assert count(r"\bUSETMAXREG\b", sass[name]) == 2


def test_no_spills(sass: dict[str, str]) -> None:
    usage = [
        re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", body)
        for _, name, body in by_architecture(dump("--dump-resource-usage", binary()), r"\bFunction ")
        if KERNEL in name
    ]
    # 384 threads start with a third of the file's registers each, and then share them as the roles need.
    assert [found and found.groups() for found in usage] == [("168", "0", "0")] * len(NAMES)


def test_compilers_have_nothing_to_say(tmp_path: Path) -> None:
    """Of one source. Among ptxas' remarks are that it serialised the tensor cores or ignored a register request."""
    try:
        compiler, headers = nvcc(), str(cutlass())
    except UnavailableError as error:
        unavailable(str(error))
    path, folders = tmp_path / "kernel.o", ["-I", "csrc", "-isystem", headers]
    command = [compiler, *FLAGS, "-Xcompiler=-Wall,-fPIC", "-DNDEBUG", *folders, "-c", SOURCE, "-o", str(path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    report = built.stderr + built.stdout
    assert built.returncode == 0, report
    assert "warning" not in report.lower(), report
    assert not re.search(r"\bC7\d{3}\b", report), report
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert usage == [("0", "0", "0")] * len(TILES)


def test_driver_is_not_linked() -> None:
    """The tensor maps' encoder is asked of the runtime, so that the library loads where there is no driver."""
    nm = shutil.which("nm")
    if nm is None:
        unavailable("nm is not on PATH")
    listed = subprocess.run([nm, "-D", "--undefined-only", binary()], capture_output=True, text=True, check=True)
    assert not re.findall(r"\bU (cu[A-Z]\w+)", listed.stdout)
