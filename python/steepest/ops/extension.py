"""The compiled library: loading it registers the ops, `torch.ops.steepest`; its facts and plans are functions here.

It has no Python symbols, so that one file serves every Python. Numbers and arrays go in by ctypes; numbers, or JSON
text, come out (csrc/library.cpp).
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
from array import array
from collections.abc import Iterable, Sequence
from ctypes import POINTER, c_char_p, c_double, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

LIBRARY = Path(__file__).parents[1] / "libsteepest.so"
MAJORS = ("kk", "mnmn", "kmn")  # symm_gemm::Majors

_INTS, _FLOATS = POINTER(c_int64), POINTER(c_double)
# The C functions: what they return, and take.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "small_polar_rows": (c_int64, c_int32),
    "small_polar_blocks": (c_int32, c_int64, c_int32),
    "eigh_rows": (c_int64, c_int32),
    "cpu_products": (c_int32, c_int32),
    "cpu_gemm_is_faster": (c_int32,),
    "load_cusolver": (c_char_p, c_char_p),
    "small_polar_refusal": (c_char_p, _FLOATS, _INTS, _INTS, c_int64, _FLOATS, c_int64),
    "symm_gemm_plan": (c_char_p, _INTS, c_int64, c_int32),
    "advise_huge_pages": (None, c_void_p, c_int64),
    "whole_steps": (c_char_p, c_void_p, c_int64, *[c_void_p] * 8),
    "steps_in_bases": (
        *(c_char_p, c_void_p, c_void_p, c_int64, *[c_void_p] * 8, c_int64),
        *(c_void_p, c_void_p, c_void_p, c_int32, c_int64),
    ),
    "polar_steps": (c_char_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, *[c_void_p] * 8, c_int64),
    "polar_chunks": (c_char_p, _INTS, _FLOATS, c_int64, _INTS, c_int64, c_int32, c_int64),
}


class OtherSourcesError(ImportError):
    """The library was built from other sources than those it lies among."""


class Extension:
    """The library at `path`, loaded, and its functions that take no tensor.

    Raises OSError where the loader refuses it and OtherSourcesError where its `interface` is another than the one asked
    for. Every function raises ValueError with the library's own words.
    """

    def __init__(self, path: Path = LIBRARY, interface: str | None = None) -> None:
        self.path = path
        if _is_cut_off(path):
            raise OSError(f"{path} is cut off, as by a copy that did not end")
        self._library = ctypes.CDLL(str(path))  # registers the ops; torch's libraries, which it needs, are loaded
        # First, and apart from the others: a library of other sources need not have them.
        try:
            self._library.steepest_build_info.restype = c_char_p
        except AttributeError:
            raise OtherSourcesError(f"{path} is not this library") from None
        self._info: dict[str, Any] = json.loads(self._library.steepest_build_info())
        if interface not in (None, self._info.get("interface")):
            raise OtherSourcesError(f"{path} was built from other sources")
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(self._library, f"steepest_{name}")
            function.restype, function.argtypes = result, arguments

    def build_info(self) -> dict[str, Any]:
        """version, commit, torch (of the headers), cuda, architectures, cutlass, hopper, compiler, interface."""
        return self._info

    def small_polar_rows(self, capability: int) -> int:
        """The longest short side of a matrix that `small_polar` takes on a device of 10 major + minor."""
        return int(self._library.steepest_small_polar_rows(capability))

    def small_polar_blocks(self, rows: int, capability: int) -> int:
        """The number of blocks that take a matrix of this short side; 0 where none do."""
        return int(self._library.steepest_small_polar_blocks(rows, capability))

    def eigh_rows(self, capability: int) -> int:
        """The largest matrices that `eigh_refresh` takes."""
        return int(self._library.steepest_eigh_rows(capability))

    def cpu_products(self, bf16: bool) -> bool:
        """Whether `cpu_chain` multiplies bf16, or fp32, on this processor."""
        return bool(self._library.steepest_cpu_products(bf16))

    def cpu_gemm_is_faster(self) -> bool:
        """Whether `cpu_gemm` is there for this processor and faster than torch's fp32 products are on it."""
        return bool(self._library.steepest_cpu_gemm_is_faster())

    def load_cusolver(self, names: Sequence[str]) -> str | None:
        """Why none of these libraries can be loaded; None where one is."""
        reason: str | None = self._text("load_cusolver", "\n".join(names).encode())
        return reason

    def small_polar_refusal(self, tables: Sequence[Sequence[Sequence[float]]], least: Sequence[float]) -> str | None:
        """Why `small_polar` does not bear this schedule; None where it does."""
        steps = [step for table in tables for step in table]
        coefficients, terms = _floats(value for step in steps for value in step), _ints(map(len, steps))
        sizes = _ints(map(len, tables))
        reason: str | None = self._text(
            "small_polar_refusal", coefficients, terms, sizes, len(tables), _floats(least), len(least)
        )
        return reason

    def symm_gemm_plan(
        self, products: Sequence[tuple[int, int, int, int, str, bool]], multiprocessors: int
    ) -> dict[str, Any]:
        """The launches of products (batch, m, n, k, majors, symmetric), why some are refused, and workspace_bytes."""
        numbers = [
            number
            for *sizes, majors, symmetric in products
            for number in (*sizes, _number(majors, MAJORS, "majors"), symmetric)
        ]
        plan: dict[str, Any] = self._text("symm_gemm_plan", _ints(numbers), len(products), multiprocessors)
        for launch in plan["launches"]:
            launch["majors"], launch["tile"] = MAJORS[launch["majors"]], tuple(launch["tile"])
        return plan

    def polar_chunks(
        self,
        ints: Sequence[int],
        floats: Sequence[float],
        shapes: Sequence[tuple[int, int, int]],
        multiprocessors: int,
        l2_bytes: int,
    ) -> dict[str, Any]:
        """How a chain, packed as `polar_chain` takes it, cuts stacks of (matrices, rows, columns).

        chunks: for each, (first, count) of every stack; bytes and clocks: the model's, of these chunks and of all at
        once (bytes_whole, clocks_whole).
        """
        sizes = _ints(size for shape in shapes for size in shape)
        count = len(ints) // 7
        if (len(ints), len(floats)) != (7 * count, 3 * count):
            raise ValueError(f"a node is 7 integers and 3 numbers, got {len(ints)} and {len(floats)}")
        nodes = (_ints(ints), _floats(floats), count)
        chunking: dict[str, Any] = self._text("polar_chunks", *nodes, sizes, len(shapes), multiprocessors, l2_bytes)
        chunking["chunks"] = [[tuple(part) for part in chunk] for chunk in chunking["chunks"]]
        return chunking

    def advise_huge_pages(self, address: int, size: int) -> None:
        """Asks the system to put memory into huge pages when it is first written, which is not always granted."""
        self._library.steepest_advise_huge_pages(address, size)

    def whole_steps(
        self,
        steps: array[int],
        grads: array[int],
        params: array[int],
        hypers: array[float],
        *memory: int,
    ) -> None:
        """Steps of len(grads) parameters by addresses (`steepest.ops.whole_steps`).

        memory: the addresses of what a scaler says, found_inf and grad_scale, 0 where it says nothing, of the table's
        rows and sums, and of the counter of steps not taken.
        """
        numbers, *rest = [values.buffer_info()[0] for values in (steps, grads, params, hypers)]
        error = self._library.steepest_whole_steps(numbers, len(grads), *rest, *memory)
        if error is not None:
            raise ValueError(error.decode())

    def steps_in_bases(
        self,
        steps: array[int],
        numbers: array[float],
        grads: array[int],
        params: array[int],
        hypers: array[float],
        betas: array[float],
        memory: Sequence[int],
        due: array[int],
        left: array[int],
        limits: array[float],
        accepted: int,
        tries: int,
    ) -> None:
        """Steps of len(grads) parameters by addresses, and refreshes of their bases (`steepest.ops.steps_in_bases`).

        memory: the addresses of found_inf, 0 where no scaler says anything, of the table's rows and sums, and of the
        counter of steps not taken, and then how many elements updates may take at once. due: empty where no basis is.
        """
        first = [values.buffer_info()[0] for values in (steps, numbers)]
        rest = [values.buffer_info()[0] for values in (grads, params, hypers, betas)]
        refreshes = [values.buffer_info()[0] if due else 0 for values in (due, left)]
        limiting = (limits.buffer_info()[0], accepted, tries)
        error = self._library.steepest_steps_in_bases(*first, len(grads), *rest, *memory, *refreshes, *limiting)
        if error is not None:
            raise ValueError(error.decode())

    def polar_steps(
        self,
        steps: array[int],
        ratios: array[float],
        chain_ints: array[int],
        chain_floats: array[float],
        chains: int,
        grads: array[int],
        params: array[int],
        hypers: array[float],
        memory: Sequence[int],
    ) -> None:
        """Steps of len(grads) parameters by addresses (`steepest.ops.polar_steps`).

        memory: the addresses of what a scaler says, found_inf and grad_scale, 0 where it says nothing, of the table's
        rows and sums, and of the counter of steps not taken, and then how many bytes inputs and directions may take.
        """
        first = [values.buffer_info()[0] for values in (steps, ratios)]
        of_chains = [values.buffer_info()[0] for values in (chain_ints, chain_floats)]
        rest = [values.buffer_info()[0] for values in (grads, params, hypers)]
        error = self._library.steepest_polar_steps(*first, len(grads), *of_chains, chains, *rest, *memory)
        if error is not None:
            raise ValueError(error.decode())

    def _text(self, name: str, *arguments: Any) -> Any:
        value = json.loads(getattr(self._library, f"steepest_{name}")(*arguments))
        if isinstance(value, dict) and "error" in value:
            raise ValueError(value["error"])
        return value


def _is_cut_off(path: Path) -> bool:
    """Whether a library ends before its table of sections does: to load it would end the process."""
    try:
        with path.open("rb") as file:
            head, length = file.read(64), os.fstat(file.fileno()).st_size
    except FileNotFoundError:  # a name that the loader finds elsewhere, or does not
        return False
    if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":  # the loader says why
        return False
    (sections,), (size, count) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
    return length < sections + size * count


def _number(name: str, names: Sequence[str], what: str) -> int:
    if name not in names:
        raise ValueError(f"{what} are {', '.join(names)}, got {name!r}")
    return names.index(name)


def _ints(values: Iterable[int]) -> ctypes.Array[c_int64]:
    """The integers as int64; ValueError for what it does not hold, of which ctypes would take the lowest bits."""
    listed = list(values)
    for value in listed:
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{value} does not fit into 64 bits")
    return (c_int64 * len(listed))(*listed)


def _floats(values: Iterable[float]) -> ctypes.Array[c_double]:
    listed = list(values)
    return (c_double * len(listed))(*listed)
