"""A batched product that goes straight into weights.   W[i] <- beta[i] W[i] + alpha[i] A[i] B[i].

The weights of a stack lie anywhere, as the parameters of a model do; each is read once, written once and rounded once,
and the product, an update's direction, is never in memory. The compiled version is the product for Hopper with another
epilogue (csrc/symm_gemm/update.cuh); elsewhere the product is formed and then taken into the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backend as _backend
from .fakes import register_fake
from .polar_chain import DTYPES, MULTIPLE, hopper_reason, weights_reason
from .symm_gemm import Workspace, gemm

MOST = 1024  # weights whose addresses a launch carries: kMostWeights in csrc/symm_gemm/params.h
MOST_SIZE, MOST_STRIDE = (2**31 - 1) // 2, 2**38  # kMaxSize and kMaxStride in csrc/symm_gemm/plan.cpp


def weight_update(
    a: Tensor,
    b: Tensor,
    weights: Sequence[Tensor],
    *,
    alpha: Tensor,
    beta: Tensor,
    workspace: Workspace | None = None,
) -> None:
    """``weights[i] = beta[i] weights[i] + alpha[i] a[i] @ b[i]``, in place.

    a: (batch, m, k), b: (batch, k, n), of one floating dtype; weights: batch matrices (m, n) of any floating dtype, not
    overlapping each other, a or b. alpha, beta: (batch,) fp32 (fp64 too on a CPU), of any stride, read on the device.
    Where alpha is 0 the product does not count, NaN or not, so that alpha = 0 and beta = 1 leave a weight as it is, bit
    for bit. Nothing else is written. The sum is one of fp32 (fp64 with fp64); the compiled version rounds once, the
    other one rounds the product to a's dtype as well, which must hold it.

    Equals ``w.mul_(beta).add_(alpha * (a @ b))`` up to those roundings. Deterministic, not differentiable. ValueError
    for shapes that do not fit.
    """
    _check(a, b, weights, alpha, beta)
    if _route(a, b, weights, alpha, beta) == "cuda":
        for first in range(0, len(weights), MOST):
            some = slice(first, first + MOST)
            torch.ops.steepest.weight_update(a[some], b[some], weights[some], alpha[some], beta[some])
        return
    product = (workspace or Workspace()).get("product", (len(a), a.shape[1], b.shape[2]), a)
    add_into(gemm(a, b, out=product), weights, alpha, beta)


def add_into(product: Tensor, weights: Sequence[Tensor], alpha: Tensor, beta: Tensor) -> None:
    """``weights[i] = beta[i] weights[i] + alpha[i] product[i]``, in place; arguments as those of `weight_update`."""
    for arguments in zip(weights, product, alpha, beta, strict=True):
        _add_one(*arguments)  # whose memory is free for the next


def _add_one(w: Tensor, product: Tensor, alpha: Tensor, beta: Tensor) -> None:
    wide = torch.promote_types(torch.promote_types(w.dtype, product.dtype), torch.float32)
    step = product.to(wide, copy=True).mul_(alpha).masked_fill_(alpha == 0, 0)
    moved = w.to(wide).mul_(beta).add_(step)  # w itself where it is as wide
    if moved is not w:
        w.copy_(moved)


def _route(a: Tensor, b: Tensor, weights: Sequence[Tensor], alpha: Tensor, beta: Tensor) -> str:
    if not a.is_cuda or torch.compiler.is_compiling():
        return "torch"
    reasons = {"cuda": _reason(a, b, weights, alpha, beta)}
    return _backend.choose("weight_update", "auto", reasons, a.device, "weight update")


def _reason(a: Tensor, b: Tensor, weights: Sequence[Tensor], alpha: Tensor, beta: Tensor) -> str | None:
    """Why the compiled version does not take these; None where it does."""
    if (why := hopper_reason(a)) is not None:
        return why
    if alpha.dtype != torch.float32 or beta.dtype != torch.float32:
        return f"alpha and beta are {alpha.dtype} and {beta.dtype}; float32 is taken"
    if (why := factors_reason(a, b)) is not None:
        return why
    if a.data_ptr() % 16 or b.data_ptr() % 16:
        return "a factor does not begin at a multiple of 16 bytes"
    return weights_reason(weights)


def factors_reason(a: Tensor, b: Tensor, *, by_columns: bool = False) -> str | None:
    """Why a compiled product does not take these factors, by dtype, shape and strides; None where it does.

    As `refusal` in csrc/symm_gemm/plan.cpp: a tensor map steps by 16 bytes, from rows that do not overlap to rows, and
    a single matrix stands for a stack only where it is a copy. by_columns: whether A may lie by columns where B lies
    by rows.
    """
    if a.dtype not in DTYPES or b.dtype != a.dtype or not (a.numel() and b.numel()):
        return f"the factors are {a.dtype} and {b.dtype} of shapes {tuple(a.shape)} and {tuple(b.shape)}"
    strides = f"the factors have shapes {tuple(a.shape)} and {tuple(b.shape)} and strides {a.stride()} and {b.stride()}"
    a_by_rows, b_by_rows = a.stride(2) == 1, b.stride(2) == 1
    lie = b_by_rows or b.stride(1) == 1 if a_by_rows else by_columns and b_by_rows and a.stride(1) == 1
    if not lie or b.shape[2] % MULTIPLE or max(*a.shape, *b.shape) > MOST_SIZE:
        return strides
    alone = len(a) == 1
    if not all(_steps(x) and (alone or x.stride(0)) for x in (a if a_by_rows else a.mT, b if b_by_rows else b.mT)):
        return strides
    return None


def stack_reason(x: Tensor, *, written: bool) -> str | None:
    """Why a compiled product does not read C from x, or write there; None where it does."""
    rows = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    if x.stride(2) == 1 and _steps(x) and (not written or len(x) == 1 or x.stride(0) >= rows):
        return None
    return f"a stack of shape {tuple(x.shape)} has strides {x.stride()}"


def _steps(x: Tensor) -> bool:
    """Whether a tensor map steps through x, (batch, rows, columns) with contiguous rows."""
    matrix, row, _ = x.stride()
    aligned = row % MULTIPLE == 0 and (len(x) == 1 or matrix % MULTIPLE == 0)
    return aligned and row >= x.shape[2] and max(row, matrix) <= MOST_STRIDE


def _check(a: Tensor, b: Tensor, weights: Sequence[Tensor], alpha: Tensor, beta: Tensor) -> None:
    fits = a.ndim == b.ndim == 3 and len(a) == len(b) == len(weights) and a.shape[2] == b.shape[1]
    if not fits or any(w.shape != (a.shape[1], b.shape[2]) for w in weights):
        shapes = ", ".join(str(tuple(t.shape)) for t in (a, b, *weights[:3]))
        raise ValueError(f"a (batch, m, k), b (batch, k, n) and {len(weights)} weights (m, n) do not fit: {shapes}")
    for name, numbers in (("alpha", alpha), ("beta", beta)):
        if numbers.shape != (len(a),) or not numbers.is_floating_point():
            raise ValueError(
                f"{name} is {numbers.dtype} of shape {tuple(numbers.shape)}; it holds a number for each of {len(a)}"
            )


if _backend.extension is not None:

    @register_fake("weight_update")
    def _(*arguments: object) -> None:
        """Mutates weights; no metadata changes."""
