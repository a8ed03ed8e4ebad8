"""Batched products of fp32 matrices in a chosen precision, and moving averages of Gram matrices.

    product     alpha A B + beta C
    syrk_ema    L + w (X X^T - L)

A `Precision` says which error a product may have; on a GPU it is the way it goes through the tensor cores, elsewhere
every product is one of fp32 (fp64 for fp64).

    tf32x3      that of fp32, three times the work of TF32: products whose rounding decides a result
    tf32        2^-9 of each term: products that correct something by a little
    ieee        that of fp32, without tensor cores
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from . import backend as _backend
from .fakes import register_fake
from .matmul import by_itself, cpu_gemm, has_gemm, matmul
from .symm_gemm import Number, linear

Precision = Literal["tf32x3", "tf32", "ieee"]
PRECISIONS = ("tf32x3", "tf32", "ieee")
# Where tensor cores multiply TF32 several times as fast as the rest multiplies fp32, by compute capability: elsewhere
# both go at the same rate or nearly so (CUDA C++ Programming Guide, throughput of arithmetic instructions).
FAST_TF32 = {(8, 0), (9, 0), (10, 0), (10, 3)}


def product(
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    *,
    precision: Precision,
    alpha: Number = 1.0,
    beta: Number = 1.0,
    symmetric: bool = False,
) -> Tensor:
    """``alpha A @ B + beta C``.   A: (..., m, k), B: (..., k, n), C and the result: (..., m, n).

    fp32 or fp64, all the same, with equal leading dimensions. alpha, beta: a number, or fp32 of shape (batch,), one
    for each matrix in order, read on the device. Not differentiable. Same input, same output, bit for bit, and a matrix
    has the same result in any batch.

    symmetric: the exact A @ B and C are, of which the caller is sure (Gram matrices, Q^T P Q), and the result is to the
    bit. A GPU computes half of it and copies the other half; torch takes the mean of both. Z Y of two symmetric factors
    that nearly commute is not such a product.

    Raises:
        TypeError: dtypes other than fp32 or fp64, or different ones.
        ValueError: shapes that do not fit, an unknown precision.
    """
    _check(A, B, C, precision)
    a, b, c = _stack(A), _stack(B), None if C is None else _stack(C)
    if _route(A, precision) == "triton":
        from ..kernels.symm_gemm import product as launch

        a, b, c = _placed(a), _placed(b), None if c is None else _placed(c)
        out = a.new_empty(len(a), a.shape[1], b.shape[2])
        launch(a, b, c, alpha, beta, 0.0, out, symmetric=symmetric, precision=precision)
    else:
        out = _by_torch(a, b, symmetric)
        if c is not None or isinstance(alpha, Tensor) or alpha != 1:
            out = linear(out, c, alpha=alpha, beta=beta, out=out)
    return out.view(*A.shape[:-1], B.shape[-1])


def syrk_ema(factor: Tensor, x: Tensor, weight: Number | None) -> Tensor:
    """``factor + weight (x @ x^T - factor)``, as torch.lerp.   factor and the result: (..., m, m), x: (..., m, k).

    factor: symmetric, fp32 or fp64. x: of its dtype, or of a narrower one, whose products are exact; of contiguous rows
    or columns, so that ``g.mT`` serves the other side. weight: a number, or a tensor of one or of one for each matrix,
    read on the device; None for the sum ``factor + x @ x^T``. No argument is written. The result is symmetric to
    the bit. Not differentiable; deterministic.

    Raises:
        TypeError: a factor that is not fp32 or fp64, x of a wider dtype.
        ValueError: shapes that do not fit.
    """
    _check_average(factor, x, weight)
    lead, m = factor.shape[:-2], factor.shape[-1]
    batch = math.prod(lead)
    result = torch.empty(factor.shape, dtype=factor.dtype, device=factor.device)
    average, rows, into = _stack(factor), _stack(x), result.view(batch, m, m)
    if isinstance(weight, Tensor):
        weight = weight.to(factor.dtype).reshape(-1).expand(batch)
    if _route(factor, "tf32x3", narrow=x.dtype.itemsize == 2) == "triton":
        from ..kernels.symm_gemm import product as launch

        rows, average = _placed(rows), _placed(average)
        alpha, beta = (1.0, 1.0) if weight is None else (weight, None)
        launch(rows, rows.mT, average, alpha, beta, 0.0, into, symmetric=True, precision="tf32x3")
        return result
    rows = rows.to(factor.dtype)
    if _on_host(factor):
        _by_host(rows, average.contiguous(), into, weight)
        return result
    gram = _by_torch(rows, rows.mT, symmetric=True)
    if weight is None:
        torch.add(average, gram, out=into)
    elif isinstance(weight, Tensor):
        torch.lerp(average, gram, weight[:, None, None], out=into)
    else:
        torch.lerp(average, gram, weight, out=into)
    return result


def _on_host(factor: Tensor) -> bool:
    """Whether an average is taken by products of our own (csrc/cpu_polar/syrk.cpp), half of them and in one pass."""
    if factor.device.type != "cpu" or factor.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    return _backend.takes_cpu_products()


def _by_host(rows: Tensor, average: Tensor, out: Tensor, weight: Number | None) -> None:
    if isinstance(weight, Tensor):
        alpha = weight.contiguous()
    else:
        alpha = average.new_full((len(average),), 1.0 if weight is None else weight)
    beta = torch.ones_like(alpha) if weight is None else 1 - alpha
    rows = rows if rows.is_contiguous() or rows.mT.is_contiguous() else rows.contiguous()
    torch.ops.steepest.cpu_syrk(rows, average, out, alpha, beta)


def _by_torch(a: Tensor, b: Tensor, symmetric: bool) -> Tensor:
    if symmetric and by_itself(a) and has_gemm(a, b, symmetric):
        return cpu_gemm(a, b, out=a.new_empty(len(a), a.shape[1], b.shape[2]), symmetric=True)
    ab = matmul(a, b)
    return (ab + ab.mT).mul_(0.5) if symmetric else ab


def _route(A: Tensor, precision: Precision, narrow: bool = False) -> str:
    """narrow: what is multiplied has 16 bits."""
    if not A.is_cuda or torch.compiler.is_compiling():  # what is traced is torch's own products
        return "torch"
    if precision == "ieee" and _torch_is_exact():
        return "torch"
    reason = _backend.triton_reason() or _unsupported_by_triton(A, precision, narrow)
    return _backend.choose(f"product in {precision}", "auto", {"triton": reason}, A.device, "fp32 products")


def _unsupported_by_triton(A: Tensor, precision: Precision, narrow: bool) -> str | None:
    if A.dtype != torch.float32:
        return f"products of {A.dtype} are torch's"
    capability = torch.cuda.get_device_capability(A.device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]}; needed is 8.0 or higher"
    if capability not in FAST_TF32 and not narrow and (precision == "tf32" or _torch_is_exact()):
        return f"TF32 is no faster than fp32 on compute capability {capability[0]}.{capability[1]}"
    return None


def _torch_is_exact() -> bool:
    """Whether torch multiplies fp32 in fp32: a setting of the user's, which is read and never changed."""
    return torch.backends.cuda.matmul.fp32_precision != "tf32"


def _stack(x: Tensor) -> Tensor:
    return x if x.ndim == 3 else x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def _placed(x: Tensor) -> Tensor:
    """x, or a copy of it with contiguous rows."""
    return x if x.stride(-1) == 1 or x.stride(-2) == 1 else x.contiguous()


def _check(A: Tensor, B: Tensor, C: Tensor | None, precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not known; use one of {', '.join(PRECISIONS)}")
    matrices = [x for x in (A, B, C) if x is not None]
    if A.dtype not in (torch.float32, torch.float64) or any(x.dtype != A.dtype for x in matrices):
        raise TypeError(f"product takes float32 or float64 for all, got {', '.join(str(x.dtype) for x in matrices)}")
    fits = A.ndim >= 2 and B.ndim >= 2 and A.shape[:-2] == B.shape[:-2] and A.shape[-1] == B.shape[-2]
    if not fits or (C is not None and C.shape != (*A.shape[:-1], B.shape[-1])):
        raise ValueError(f"shapes do not make a product: {', '.join(str(tuple(x.shape)) for x in matrices)}")


def _check_average(factor: Tensor, x: Tensor, weight: Number | None) -> None:
    if factor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"factor must be float32 or float64, got {factor.dtype}; convert it first")
    if not x.is_floating_point() or torch.promote_types(factor.dtype, x.dtype) != factor.dtype:
        raise TypeError(f"x is floating and no wider than the factor, {factor.dtype}, got {x.dtype}")
    square = factor.ndim >= 2 and factor.shape[-1] == factor.shape[-2] and x.shape[:-1] == factor.shape[:-1]
    if not square:
        raise ValueError(f"factor (..., m, m) and x (..., m, k) do not fit: {tuple(factor.shape)}, {tuple(x.shape)}")
    batch = math.prod(factor.shape[:-2])
    if isinstance(weight, Tensor) and weight.numel() not in (1, batch):
        raise ValueError(f"weight must hold 1 number or {batch}, one for each matrix, got shape {tuple(weight.shape)}")


if _backend.extension is not None:

    @register_fake("cpu_syrk")
    def _(*arguments: object) -> None:
        """Mutates out; no metadata changes."""
