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
from .polar_chain import DTYPES, MULTIPLE, hopper_reason, weights_reason
from .symm_gemm import Workspace, gemm

MOST = 1024  # weights whose addresses a launch carries: kMostWeights in csrc/symm_gemm/params.h


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
    other one rounds the product to a's dtype as well.

    Equals ``w.mul_(beta).add_(alpha * (a @ b))`` up to those roundings. Deterministic, not differentiable. ValueError
    for shapes that do not fit.
    """
    _check(a, b, weights, alpha, beta)
    if _route(a, b, weights) == "cuda":
        for first in range(0, len(weights), MOST):
            own = slice(first, first + MOST)
            torch.ops.steepest.weight_update(a[own], b[own], weights[own], alpha[own], beta[own])
        return
    product = (workspace or Workspace()).get("product", (len(a), a.shape[1], b.shape[2]), a)
    add_into(gemm(a, b, out=product), weights, alpha, beta)


def add_into(product: Tensor, weights: Sequence[Tensor], alpha: Tensor, beta: Tensor) -> None:
    """``weights[i] = beta[i] weights[i] + alpha[i] product[i]``, in place; arguments as those of `weight_update`."""
    for w, own, times, keep in zip(weights, product, alpha, beta, strict=True):
        wide = torch.promote_types(torch.promote_types(w.dtype, own.dtype), torch.float32)
        step = torch.where(times == 0, 0, own.to(wide) * times.to(wide))
        w.copy_(w.to(wide).mul(keep.to(wide)).add_(step))


def _route(a: Tensor, b: Tensor, weights: Sequence[Tensor]) -> str:
    if not a.is_cuda or torch.compiler.is_compiling():
        return "torch"
    return _backend.choose("weight_update", "auto", {"cuda": _reason(a, b, weights)}, a.device, "weight update")


def _reason(a: Tensor, b: Tensor, weights: Sequence[Tensor]) -> str | None:
    """Why the compiled version does not take these; None where it does."""
    if (why := hopper_reason(a)) is not None:
        return why
    if a.dtype not in DTYPES or not (a.numel() and b.numel()):
        return f"the factors are {a.dtype} of shapes {tuple(a.shape)} and {tuple(b.shape)}"
    sizes = (b.shape[2], *a.stride()[:2], *(s for s in b.stride() if s != 1))
    if a.stride(2) != 1 or 1 not in b.stride()[1:] or any(size % MULTIPLE for size in sizes):
        return f"the factors have strides {a.stride()} and {b.stride()} and {b.shape[2]} columns"
    if a.data_ptr() % 16 or b.data_ptr() % 16:
        return "a factor does not begin at a multiple of 16 bytes"
    return weights_reason(weights)


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

    @torch.library.register_fake("steepest::weight_update")
    def _(*arguments: object) -> None:
        """Mutates weights; no metadata changes."""
