"""A list of products, each a stack of matrices of its own shape.   out[i] = alpha[i] A[i] B[i] + beta[i] C[i].

The list is what a node of a chain (`steepest.ops.polar_chain`) asks for: on a Hopper GPU one launch of the same kernel.
It is here by itself, so that a chain that fails can be cut in two, and the kernel be tested, checked and timed alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from . import backend as _backend
from .fakes import register_fake
from .polar_chain import hopper_reason
from .symm_gemm import gemm
from .weight_update import factors_reason, stack_reason

#: Of the compiled kernel: "auto" is what a model of time likes best (csrc/symm_gemm/plan.cpp).
TILES = ("auto", "wide", "small")
STREAMS = ("auto", "never", "always")


def grouped_gemm(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    c: Sequence[Tensor] = (),
    *,
    out: Sequence[Tensor],
    alpha: float | Sequence[Tensor] = 1.0,
    beta: float | Sequence[Tensor] = 1.0,
    symmetric: bool = False,
    tile: Literal["auto", "wide", "small"] = "auto",
    streams: Literal["auto", "never", "always"] = "auto",
) -> None:
    """Products go into ``out``: ``out[i] = alpha[i] a[i] @ b[i] + beta[i] c[i]``, by `gemm` one by one where the
    compiled kernel does not take them.

    a[i]: (batch, m, k), b[i]: (batch, k, n), c[i] and out[i]: (batch, m, n), with sizes of their own for every i, of
    one floating dtype, on one device. alpha, beta: numbers, or a (batch,) fp32 tensor for each i. ``c`` may be empty;
    c[i] may be out[i], and no other two overlap. symmetric: as `gemm`.

    tile, streams: of the compiled kernel, and without effect elsewhere. The tile that a block of threads makes, of 128
    x 256 or 128 x 128 entries; and whether a sum along k may be cut where there are fewer tiles than multiprocessors.

    Equals ``torch.baddbmm`` in fp32, rounded once, where the compiled kernel runs. Deterministic, not differentiable.
    ValueError for lists that do not go by one another, shapes that make no products, and names that are not known.
    """
    for name, choice, known in (("tile", tile, TILES), ("streams", streams, STREAMS)):
        if choice not in known:
            raise ValueError(f"{name}={choice!r} is not known; use one of {', '.join(known)}")
    _check(a, b, c, out, {"alpha": alpha, "beta": beta}, symmetric)
    if not a:
        return
    if _route(a, b, c, out, (*_tensors(alpha), *_tensors(beta))) == "cuda":
        numbers = (_tensors(alpha), _tensors(beta), _number(alpha), _number(beta))
        choices = (symmetric, TILES.index(tile), STREAMS.index(streams))
        torch.ops.steepest.grouped_gemm(a, b, c, out, *numbers, *choices)
        return
    for i in range(len(a)):
        gemm(
            a[i],
            b[i],
            c[i] if c else None,
            alpha=_of(alpha, i),
            beta=_of(beta, i),
            out=out[i],
            symmetric=symmetric,
        )


def _tensors(numbers: float | Sequence[Tensor]) -> Sequence[Tensor]:
    return () if isinstance(numbers, float | int) else numbers


def _number(numbers: float | Sequence[Tensor]) -> float:
    return numbers if isinstance(numbers, float | int) else 0.0


def _of(numbers: float | Sequence[Tensor], i: int) -> float | Tensor:
    return numbers if isinstance(numbers, float | int) else numbers[i]


Lists = Sequence[Tensor]


def _route(a: Lists, b: Lists, c: Lists, out: Lists, numbers: Lists) -> str:
    device = a[0].device
    if device.type != "cuda" or torch.compiler.is_compiling():
        return "torch"
    reasons = {"cuda": _reason(a, b, c, out, numbers)}
    return _backend.choose("grouped_gemm", "auto", reasons, device, "polar chain")


def _reason(a: Lists, b: Lists, c: Lists, out: Lists, numbers: Lists = ()) -> str | None:
    """Why the compiled kernel does not take these; None where it does."""
    if (why := hopper_reason(a[0])) is not None:
        return why
    for x, y in zip(a, b, strict=True):
        if (why := factors_reason(x, y, by_columns=True)) is not None:
            return why
    for written, some in ((False, c), (True, out)):
        for x in some:
            if x.dtype != a[0].dtype:
                return f"a matrix is {x.dtype}, and a[0] {a[0].dtype}"
            if (why := stack_reason(x, written=written)) is not None:
                return why
    if any(x.data_ptr() % 16 for some in (a, b, c, out) for x in some):
        return "a stack does not begin at a multiple of 16 bytes"
    if any(x.dtype != torch.float32 for x in numbers):
        return "alpha and beta are taken as float32"
    return None


def _check(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    c: Sequence[Tensor],
    out: Sequence[Tensor],
    coefficients: Mapping[str, float | Sequence[Tensor]],
    symmetric: bool,
) -> None:
    lists = {"b": b, "out": out, "c": c, **{name: _tensors(numbers) for name, numbers in coefficients.items()}}
    for name, some in lists.items():
        if len(some) != len(a) and (some or name in ("b", "out")):
            raise ValueError(f"{name} has {len(some)} tensors for {len(a)} products")
    for i, (x, y, z) in enumerate(zip(a, b, out, strict=True)):
        fits = x.ndim == y.ndim == 3 and len(x) == len(y) and x.shape[2] == y.shape[1]
        wanted = (len(x), x.shape[1], y.shape[2]) if fits else ()
        if not fits or z.shape != wanted or (c and c[i].shape != wanted) or (symmetric and wanted[1] != wanted[2]):
            shapes = ", ".join(str(tuple(t.shape)) for t in (x, y, z, *c[i : i + 1]))
            square = ", square ones where symmetric" if symmetric else ""
            raise ValueError(
                f"a[{i}], b[{i}] and out[{i}] do not fit as (batch, m, k), (batch, k, n){square}: {shapes}"
            )
        for name, numbers in coefficients.items():
            if not isinstance(numbers, float | int) and numbers[i].shape != (len(x),):
                raise ValueError(
                    f"{name}[{i}] has shape {tuple(numbers[i].shape)}; it holds a number for each of {len(x)}"
                )


if _backend.extension is not None:

    @register_fake("grouped_gemm")
    def _(*arguments: object) -> None:
        """Mutates out; no metadata changes."""
