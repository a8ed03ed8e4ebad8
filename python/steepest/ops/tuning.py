"""Measures which configuration of a Triton product is fastest on this GPU, and keeps what it found.

`steepest tune` asks for it and nothing else does: no product is tuned by being called, so none is while a CUDA graph is
captured. Candidates are those of the kernel's table (kernels/symm_gemm.py), which add up in one order: a matrix keeps
its bits whichever of them wins, alone and in a batch. One that does not run, or whose result is not that of the model's
choice to the bit, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import products as _products
from .products import Precision

Call = Callable[[], object]
Timer = Callable[[Mapping[str, Call]], Mapping[str, float]]  # seconds of each call, by name


@dataclass(frozen=True)
class Problem:
    """``batch`` products of m x k and k x n.  dtype: of the operands; precision: of fp32 ones.

    a_rows, b_rows: whether rows of the operands are contiguous, columns if not. c: whether a matrix is added. wide: c
    and the result are fp32.
    """

    batch: int
    m: int
    n: int
    k: int
    dtype: torch.dtype
    symmetric: bool = False
    precision: Precision = "ieee"
    wide: bool = False
    a_rows: bool = True
    b_rows: bool = True
    c: bool = True

    @property
    def fp32_precision(self) -> Precision | None:
        return self.precision if self.dtype == torch.float32 else None

    def __str__(self) -> str:
        """The name of the product in the file; products of one name share a configuration."""
        from ..kernels.symm_gemm import question

        return question(self.m, self.n, self.k, self.batch, self.symmetric, self.fp32_precision, self.wide)

    def aligned(self) -> bool:
        from ..kernels.symm_gemm import VECTOR

        contiguous = (self.k if self.a_rows else self.m, self.n if self.b_rows else self.k, self.n)
        return all(length % VECTOR.value == 0 for length in contiguous)

    def candidates(self, device: torch.device) -> list[Any]:
        """Configurations; one where nothing is left to choose, none where torch multiplies instead."""
        from ..kernels.symm_gemm import candidates

        if self.dtype == torch.float32:
            like = torch.empty(0, dtype=self.dtype, device=device)
            if _products._unsupported_by_triton(like, self.precision, narrow=False) is not None:
                return []
        capability = torch.cuda.get_device_capability(device)
        return candidates(capability, self.symmetric, self.aligned(), self.fp32_precision, self.wide)

    def operands(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """a, b, c or None, and room for the result."""
        a = _matrices(self.batch, self.m, self.k, self.a_rows, self.dtype, device)
        b = a.mT if self.symmetric else _matrices(self.batch, self.k, self.n, self.b_rows, self.dtype, device)
        if self.symmetric and self.a_rows == self.b_rows:  # squares, symmetric themselves
            a = b = ((a + a.mT) / 2).contiguous()
        out = _matrices(self.batch, self.m, self.n, True, torch.float32 if self.wide else self.dtype, device)
        return a, b, out.clone() if self.c else None, out


@dataclass(frozen=True)
class Measured:
    """Seconds by configuration; ``model`` and ``won`` are two of them, or one and the same."""

    problem: Problem
    seconds: dict[str, float]
    model: str
    won: str
    left_out: dict[str, str] = field(default_factory=dict)  # why

    def json(self) -> dict[str, Any]:
        """The measurement as plain data."""
        results = {name: getattr(self, name) for name in ("seconds", "model", "won", "left_out")}
        return {"product": str(self.problem), **results}


def measure(problem: Problem, device: torch.device, timer: Timer, file: Path) -> Measured | None:
    """Times the candidates for a product and writes the fastest to the file; None where there is nothing to choose.

    Of equals, and of candidates that are no faster than the model's choice, the model's choice.
    """
    from ..kernels import symm_gemm as kernels
    from ..kernels import tuned

    listed = problem.candidates(device)
    if len(listed) < 2:
        return None
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    sizes = (
        problem.m,
        problem.n,
        problem.k,
        capability,
        properties.multi_processor_count,
        problem.batch,
        problem.symmetric,
    )
    model = kernels.configuration(*sizes, True, problem.fp32_precision, problem.wide)
    by_name = {describe(c): c for c in (model, *(c for c in listed if c != model))}
    a, b, c, out = problem.operands(device)

    def call(chosen: Any) -> Call:
        numbers = (1.0, 1.0 if problem.c else 0.0, 0.0)
        options = {"symmetric": problem.symmetric, "precision": problem.precision, "chosen": chosen}
        return lambda: kernels.product(a, b, c, *numbers, out, **options)

    calls = {name: call(chosen) for name, chosen in by_name.items()}
    calls[describe(model)]()
    wanted, left_out = out.clone(), {}
    for name in list(calls)[1:]:
        if (reason := _refused(calls[name], out, wanted)) is not None:
            left_out[name] = reason
            del calls[name]
    seconds = dict(timer(calls))
    won = min(seconds, key=lambda name: seconds[name])  # the first of equals
    gpu = kernels.machine(torch.cuda.get_device_name(device), capability)
    tuned.write(file, gpu, {str(problem): asdict(by_name[won])})
    kernels.configuration.cache_clear()
    return Measured(problem, seconds, describe(model), won, left_out)


def describe(configuration: Any) -> str:
    """128 x 256 x 64, 4 turns, 8 warps, TMA"""
    c = configuration
    return f"{c.block_m} x {c.block_n} x {c.block_k}, {c.stages} turns, {c.warps} warps{', TMA' if c.tma else ''}"


def cache() -> Path:
    """The file that products look into."""
    from ..kernels import tuned

    return tuned.path()


def kept(file: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """What the file holds: machine, product, configuration. ValueError where it is none of ours."""
    from ..kernels import tuned

    return tuned.read(file)


def _refused(call: Call, out: Tensor, wanted: Tensor) -> str | None:
    out.fill_(float("nan"))
    try:
        call()
    except Exception as error:  # Triton has errors of many kinds for what a device does not bear
        return f"{type(error).__name__}: {error}"
    return None if torch.equal(out, wanted) else "the result is not the same to the bit"


def _matrices(batch: int, rows: int, columns: int, by_rows: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normal numbers, which cost a GPU the power that those of a step do."""
    if not by_rows:
        return _matrices(batch, columns, rows, True, dtype, device).mT
    return torch.randn(batch, rows, columns, dtype=dtype, device=device)
