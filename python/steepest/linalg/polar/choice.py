"""How the polar factors of a matrix are computed: form, compute dtype, schedule and restarts, chosen in one place.

`polars` asks `choose` for what it runs, `steepest plan` for what it prints and `steepest tune` for what it measures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal

import torch

from ...ops.tracing import assume_constant_result
from ..coefficients import Coefficients, Schedule, presets, schedule

FORMS = ("auto", "standard", "gram")
COMPUTE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PLAIN = "jordan"
# Presets whose error budget is the reference's own in the standard form; the others run in fp16 on a GPU.
STANDARD_PRESETS = ("jordan", "you", "polar_express")
# Two steps in the Gram form cost 3a + 5 half products of m^3, in the standard form 6a + 2, a = long side / short side.
GRAM_ASPECT = 1.25
# Below this short side a 16-bit Gram form is not bounded: rounding errors of X X^T do not average out, its smallest
# eigenvalues turn negative, and the iteration carries them away. Largest singular value of the result over thousands of
# matrices with log-uniform singular values, bf16 and "auto": 2e12 at 4 x 5, 1e5 at 16 x 20, 1.4 at 32 x 40, 1.05 at 96.
GRAM_SHORT_SIDE = 128
# "0": this CPU counts as one without native bf16 products, "1": as one with, "": it is asked. Read once, at import.
cpu_bf16 = os.environ.get("STEEPEST_CPU_BF16", "")

Form = Literal["small", "plain", "gram", "standard"]
#: What decided the form: the preset, the kernel for small matrices, the caller, or what stands against the Gram form;
#: "gram" where nothing does.
Rule = Literal["preset", "small", "caller", "short side", "aspect", "dtype", "gram"]


@dataclass(frozen=True)
class Choice:
    """How the polar factors of a stack of matrices are computed.

    form: "small", one kernel for whole matrices in shared memory (`steepest.ops.small_polar`); "plain", the full
        products of torch.optim.Muon, whose polynomial has other forms in fp32, which err less than its bf16 in any;
        "gram" or "standard", a chain of products (`steepest.linalg.chain`).
    dtype: of the products; the small kernel has two fp16 halves of some numbers.
    restarts: the steps, from 1, before which a new Gram product is taken.
    rule: what decided the form.
    """

    form: Form
    dtype: torch.dtype
    schedule: Schedule
    restarts: tuple[int, ...]
    rule: Rule = field(compare=False)


def choose(
    rows: int,
    columns: int,
    preset: str = "auto",
    *,
    device: torch.device | str,
    coefficients: Coefficients | None = None,
    steps: int | None = None,
    x_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype | None = None,
    form: str = "auto",
    restarts: Collection[int] | None = None,
    small: Callable[[Schedule], bool] = lambda schedule: False,
) -> Choice:
    """The choice for matrices of rows x columns; arguments as those of `polar`, x_dtype the dtype of x.

    ``small`` says whether the kernel for small matrices takes them. It is asked last of all, because a self-check may
    run with it, and not where the caller chose dtype, form or restarts himself.

    ValueError for steps, coefficients or restarts out of range.
    """
    table = schedule(preset, coefficients, steps)
    name = preset if coefficients is None else None
    work = dtype or compute_dtype(name or PLAIN, x_dtype, device)
    every = tuple(range(1, table.steps))
    if restarts is not None:
        positions = _checked(restarts, table)
        return Choice("standard" if positions == every else "gram", work, table, positions, "caller")
    if form != "auto":
        positions = default_restarts(table, form, rows, columns, work)
        return Choice("gram" if form == "gram" else "standard", work, table, positions, "caller")
    if name == PLAIN and work != torch.float32:
        return Choice("plain", work, table, every, "preset")
    if dtype is None and small(table):
        return Choice("small", torch.float16, table, (), "small")
    positions = default_restarts(table, form, rows, columns, work)
    rule = _against_gram(table, rows, columns, work) or "gram"
    return Choice("gram" if rule == "gram" else "standard", work, table, positions, rule)


def choose_sharded(
    short: int,
    preset: str = "auto",
    *,
    device: torch.device | str,
    coefficients: Coefficients | None = None,
    steps: int | None = None,
    x_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype | None = None,
    restarts: Collection[int] | None = None,
) -> Choice:
    """The choice for matrices whose long side lies on several ranks, by their short side: always a Gram form.

    fp64 stays; fp16 on a GPU where the short side is at least 128, which every preset bears in this form; else fp32.

    ValueError for "svd", which has no Gram form, and for steps, coefficients or restarts out of range.
    """
    if preset == "svd" and coefficients is None:
        raise ValueError(
            "preset 'svd' has no Gram form, so a matrix whose long side is sharded does not take it; choose one of "
            f"{', '.join(name for name in presets() if name != 'svd')}, or send whole matrices to an owner"
        )
    table = schedule(preset, coefficients, steps)
    wide = torch.promote_types(x_dtype, torch.float32)
    narrow = torch.device(device).type != "cpu" and short >= GRAM_SHORT_SIDE and wide != torch.float64
    work = dtype or (torch.float16 if narrow else wide)
    if restarts is None:
        positions = default_restarts(table, "gram", short, short, work)
        return Choice("gram", work, table, positions, "gram")
    return Choice("gram", work, table, _checked(restarts, table), "caller")


def compute_dtype(preset: str, dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The dtype in which `polar` runs ``preset`` on a matrix of ``dtype`` on ``device``.

    fp64 stays.  On a CPU bf16 where its matrix products are native, else fp32, and never fp16 (1 GFLOP/s);
    STEEPEST_CPU_BF16=0 or 1 in the environment says whether they are.  On a GPU fp16 for the presets that may take the
    Gram form, in which bf16 has an off-diagonal error of .2, and bf16 for the rest. "svd" takes fp32, and
    decomposes it in fp64.
    """
    if dtype == torch.float64:
        return dtype
    if preset == "svd":
        return torch.float32
    if torch.device(device).type == "cpu":
        return torch.bfloat16 if native_bf16() else torch.float32
    return torch.bfloat16 if preset in STANDARD_PRESETS else torch.float16


def default_restarts(table: Schedule, form: str, rows: int, columns: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Steps before which a new Gram product of a matrix of rows x columns is taken.

    Every step in the standard form.  In the Gram form, bf16: where the schedule says, else every second step.
    Otherwise none in three steps, after the second of four, after every third of more.  "auto" takes the Gram form
    where the long side is at least 1.25 times the short one; in 16 bits where the short side is at least 128, and in
    bf16 only where the schedule bears it.
    """
    if form == "auto":
        form = "gram" if _against_gram(table, rows, columns, dtype) is None else "standard"
    if form == "standard":
        return tuple(range(1, table.steps))
    if dtype == torch.bfloat16:
        return table.bf16_restarts or tuple(range(2, table.steps, 2))
    segment = 2 if table.steps == 4 else 3
    return tuple(range(segment, table.steps, segment))


def _checked(restarts: Collection[int], table: Schedule) -> tuple[int, ...]:
    if any(not 0 < position < table.steps for position in restarts):
        raise ValueError(f"restarts must lie in 1 .. {table.steps - 1} for {table.steps} steps, got {tuple(restarts)}")
    return tuple(sorted(restarts))


def _against_gram(
    table: Schedule, rows: int, columns: int, dtype: torch.dtype
) -> Literal["short side", "aspect", "dtype"] | None:
    """What stands against the Gram form of a matrix of rows x columns; None where nothing does."""
    short = max(1, min(rows, columns))
    if dtype.itemsize <= 2 and short < GRAM_SHORT_SIDE:
        return "short side"
    if max(rows, columns) < GRAM_ASPECT * short:
        return "aspect"
    return "dtype" if dtype == torch.bfloat16 and table.bf16_restarts is None else None


@assume_constant_result
def native_bf16() -> bool:
    """Whether a CPU takes bf16 products: where they are native, or as STEEPEST_CPU_BF16 says."""
    if cpu_bf16 not in ("", "0", "1"):
        raise ValueError(
            f"STEEPEST_CPU_BF16={cpu_bf16!r} is neither '0' (this CPU has no native bf16 products) nor '1' (it has "
            "them); unset it to have the CPU asked"
        )
    if cpu_bf16:
        return cpu_bf16 == "1"
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
