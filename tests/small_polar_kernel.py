"""The kernel for small matrices, run on a CPU by tests/emulation, and the fp64 polynomial that it is to compute."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from emulations import shared_library
from steepest.linalg import coefficients as tables
from steepest.linalg.coefficients import Schedule

SOURCES = ("csrc/small_polar/small_polar.cu", "csrc/small_polar/plan.cpp", "tests/emulation/small_polar.cpp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HOPPER = 90


class Matrices(ctypes.Structure):
    """`Matrices` in csrc/small_polar/params.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("slack", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("x_row", ctypes.c_int64),
        ("x_matrix", ctypes.c_int64),
        ("out_row", ctypes.c_int64),
        ("out_matrix", ctypes.c_int64),
        ("x_dtype", ctypes.c_uint8),
        ("out_dtype", ctypes.c_uint8),
    )


@dataclass
class Kernel:
    library: ctypes.CDLL

    def __call__(
        self,
        xs: Sequence[Tensor],
        plan: Schedule | str,
        *,
        outs: Sequence[Tensor] | None = None,
        eps: float = 1e-7,
        capability: int = HOPPER,
        most_blocks: int = 2**31 - 1,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Polar factors and slacks of batches (count, m, n) whose rows are contiguous, all in one call."""
        plan = tables.SCHEDULES[plan] if isinstance(plan, str) else plan
        given = outs
        outs = [torch.full(x.shape, torch.nan, dtype=x.dtype) for x in xs] if given is None else list(given)
        slacks = [torch.full((len(x),), -1.0) for x in xs]
        matrices = (Matrices * len(xs))()
        for to, x, out, slack in zip(matrices, xs, outs, slacks):
            assert x.stride(2) == out.stride(2) == 1 or x.shape[2] <= 1
            pointers = (x.data_ptr(), out.data_ptr(), slack.data_ptr())
            strides = (x.stride(1), x.stride(0), out.stride(1), out.stride(0))
            dtypes = (DTYPES.index(x.dtype), DTYPES.index(out.dtype))
            to.__init__(*pointers, *x.shape, *strides, *dtypes)
        numbers = [v for t in plan.tables for step in t for v in (*step, *[math.nan] * (5 - len(step)))]
        failed = self.library.small_polar_run(
            matrices,
            len(xs),
            (ctypes.c_double * len(numbers))(*numbers),
            len(plan.tables),
            plan.steps,
            (ctypes.c_double * 3)(*plan.slacks),
            int(plan.norm == "tight"),
            ctypes.c_double(eps),
            capability,
            most_blocks,
        )
        if failed:
            raise ValueError(self.library.small_polar_message().decode())
        return list(outs), slacks

    def one(self, x: Tensor, plan: Schedule | str, **options: float) -> Tensor:
        return self([x[None]], plan, **options)[0][0][0]  # type: ignore[arg-type]


def build(folder: Path) -> ctypes.CDLL:
    path = shared_library(folder / "emulated.so", SOURCES)
    loaded = ctypes.CDLL(str(path))
    loaded.small_polar_message.restype = ctypes.c_char_p
    for name in ("launches", "products"):
        getattr(loaded, f"small_polar_{name}").restype = ctypes.c_int64
    for name in ("bytes", "room"):
        getattr(loaded, f"small_polar_{name}").restype = ctypes.c_size_t
    loaded.small_polar_most_rows.restype = ctypes.c_int64
    return loaded


def in_half_precision(x: Tensor) -> Tensor:
    """What the kernel works on: x times a power of two, in fp16; the rest is measured against that."""
    root = x.norm() / math.sqrt(min(x.shape))
    return (x * 2.0 ** -math.frexp(root)[1]).half().double()


def exact(x: Tensor, plan: Schedule) -> tuple[Tensor, float]:
    """The schedule's polynomial applied to the fp64 singular values, and the slack."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    trace, m = (s * s).sum(), len(s)
    bound = trace / m + (s * s - trace / m).norm() / math.sqrt(m) * math.sqrt(m - 1)
    norm = (bound if plan.norm == "tight" else trace).sqrt()
    slack = (trace.sqrt() / norm).item()
    table = next((t for t, least in zip(plan.tables, plan.slacks) if slack >= least), plan.tables[-1])
    values = [tables.evaluate(table, v) for v in (s / norm).tolist()]
    return (u * torch.tensor(values, dtype=torch.float64)) @ vh, slack


# The exact polynomial's largest singular value and what rounding may add to it.
LARGEST = {"auto": 1.26, "turbo": 1.22, "exact": 1.22, "you": 1.18}
