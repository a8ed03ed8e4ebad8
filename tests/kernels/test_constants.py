"""Numbers and names that Python and C++ both state: where one of them changes alone, one name has two algorithms."""

from __future__ import annotations

import ast
import functools
import operator
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from steepest.linalg import basis
from steepest.ops import (
    chain_numbers,
    eigh,
    extension,
    grouped_gemm,
    multi_tensor,
    normalize,
    polar_chain,
    small_polar,
    weight_update,
)
from steepest.ops.checks import eigh_refresh

ROOT = Path(__file__).parents[2]
REFRESH = "eigh/formulas.cuh"
#: (the file of csrc, its constant, the number that Python has for it)
NUMBERS: list[tuple[str, str, float]] = [
    ("eigh/params.h", "kMostRows", eigh.MOST_ROWS),
    (REFRESH, "kTracked", basis.TRACKED),
    (REFRESH, "kProgress", basis.PROGRESS),
    (REFRESH, "kSettled", basis.SETTLED),
    (REFRESH, "kSmallestEta", basis.SMALLEST_ETA),
    (REFRESH, "kLargestEta", basis.LARGEST_ETA),
    (REFRESH, "kLongestRow", basis.LONGEST_ROW),
    (REFRESH, "kEtas", basis.ETAS),
    (REFRESH, "kOrthonormalOnEntry", basis.ORTHONORMAL_ON_ENTRY),
    (REFRESH, "kOrthonormal", basis.ORTHONORMAL[torch.float32]),
    (REFRESH, "kSteps", basis.STEPS[torch.float32]),
    (REFRESH, "kPowerSteps", basis.POWER_STEPS),
    (REFRESH, "kSymmetric", basis.SYMMETRIC),
    ("eigh/iterate.cpp", "kOrthonormalOnEntry", basis.ORTHONORMAL_ON_ENTRY),
    ("multi_tensor/layout.h", "kMaxDims", multi_tensor.STRIDED_DIMS),
    ("multi_tensor/normalize.h", "kMostOfRow", normalize.MOST),
    ("polar/params.h", "kMostTables", chain_numbers.MOST_TABLES),
    ("polar/params.h", "kMostNumbers", chain_numbers.MOST_NUMBERS),
    ("polar/params.h", "kSpreadSums", (chain_numbers.SCRATCH - 1) / 64),
    ("small_polar/params.h", "kMostAlone", small_polar.MOST_ALONE),
    ("small_polar/params.h", "kMostRows", small_polar.MOST_ROWS),
    ("small_polar/params.h", "kMostTerms", small_polar.MOST_TERMS),
    ("symm_gemm/params.h", "kMostWeights", weight_update.MOST),
    ("symm_gemm/plan.cpp", "kAligned", polar_chain.MULTIPLE),
    ("symm_gemm/plan.cpp", "kMaxSize", weight_update.MOST_SIZE),
    ("symm_gemm/plan.cpp", "kMaxStride", weight_update.MOST_STRIDE),
]
#: (the file of csrc, its enumeration, the names that Python has for 0, 1, ...)
NAMES: list[tuple[str, str, Sequence[str]]] = [
    ("eigh/params.h", "Method", ["automatic" if name == "auto" else name for name in eigh.METHODS]),
    ("polar/chain.h", "Kind", polar_chain.KINDS),
    ("polar/chain.h", "Buffer", [*polar_chain.BUFFERS, "buffers"]),
    ("symm_gemm/params.h", "Majors", extension.MAJORS),
    ("ops/grouped_gemm.cpp", "TileChoice", ["by_model", *(f"{tile}_tile" for tile in grouped_gemm.TILES[1:])]),
]
OPERATIONS = {ast.LShift: operator.lshift, ast.Div: operator.floordiv, ast.Mult: operator.mul}


@functools.cache
def source(file: str) -> str:
    return re.sub(r"//[^\n]*", "", (ROOT / "csrc" / file).read_text())


def value(node: ast.expr) -> float:
    """What a constant expression comes to, whose division is that of whole numbers."""
    if isinstance(node, ast.BinOp):
        number: float = OPERATIONS[type(node.op)](value(node.left), value(node.right))
        return number
    assert isinstance(node, ast.Constant)
    assert isinstance(node.value, int | float)
    return node.value


def constants(file: str) -> dict[str, float]:
    """The constants of a file whose values are numbers or expressions of such."""
    numbers = {}
    for declaration in re.findall(r"\bconstexpr [\w:]+ (k\w+ = [^;]*);", source(file)):
        for name, text in re.findall(r"(k\w+) = ([^,;]+)", declaration):
            text = re.sub(r"std::numeric_limits<int32_t>::max\(\)|\bINT32_MAX\b", str(2**31 - 1), text)
            text = re.sub(r"\bint64_t\{(\d+)\}", r"\1", re.sub(r"(?<=[\d.])f\b", "", text))
            if re.fullmatch(r"[-+\d.e*/<> ()]+", text):
                numbers[name] = value(ast.parse(text.strip(), mode="eval").body)
    return numbers


def enumerators(file: str, name: str) -> dict[str, int | None]:
    """Names of an enumeration, kNotFinite as not_finite, and their values where they are said."""
    (body,) = re.findall(rf"enum (?:class )?{name} : \w+ \{{(.*?)\}}", source(file), re.DOTALL)
    found = {}
    for entry in filter(None, (each.strip() for each in body.split(","))):
        name, _, number = entry.partition(" = ")
        plain = re.sub(r"^k(?=[A-Z])", "", name)
        found[re.sub(r"(?<=[a-z\d])(?=[A-Z])", "_", plain).lower()] = int(number) if number else None
    return found


@pytest.mark.parametrize("file,name,wanted", NUMBERS, ids=lambda value: str(value))
def test_numbers_are_those_of_csrc(file: str, name: str, wanted: float) -> None:
    assert constants(file)[name] == wanted


@pytest.mark.parametrize("file,name,wanted", NAMES, ids=lambda value: str(value))
def test_names_are_those_of_csrc(file: str, name: str, wanted: Sequence[str]) -> None:
    """Python hands over the place of a name, so that their order counts too."""
    assert list(enumerators(file, name)) == list(wanted)
    assert set(enumerators(file, name).values()) == {None}


def test_the_bits_of_a_status_are_those_of_csrc() -> None:
    bits = enumerators("eigh/params.h", "Status")
    assert bits == {name: getattr(basis, name.upper()) for name in bits}
    assert sorted(bits.values()) == [2**i for i in range(7)]  # type: ignore[type-var]
    assert (eigh_refresh.ACCEPTED, eigh_refresh.NOT_FINITE) == (basis.ACCEPTED, basis.NOT_FINITE)


def test_what_python_says_to_have_from_csrc_is_compared() -> None:
    named = set()
    for path in (ROOT / "python" / "steepest").rglob("*.py"):
        named |= set(re.findall(r"\bk[A-Z][A-Za-z]+\b", path.read_text()))
    assert named <= {name for _, name, _ in NUMBERS}
