"""``A @ B`` of stacks of matrices, of which each has the bits that it has alone.   A: (batch, m, k), B: (batch, k, n).

On a CPU torch's batched products round by what else is in the batch, as one matrix goes another way through BLAS than
two, and by how factors lie in memory: where sums over k are cut, and whether they go by vectors of k. Here factors are
contiguous, and then

    fp32, of middling size              `cpu_gemm`, where it is faster than BLAS
    k <= IN_ORDER, m, n >= 2, fp32      all at once, where BLAS adds up from the first to the last of k
    else                                one after another, each factor at a boundary of memory

`cpu_gemm` (csrc/cpu_polar) adds up from the first to the last, and BLAS is checked by it once. Where BLAS does
otherwise, or nothing is compiled, matrices go one after another.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import backend as _backend
from .fakes import register_fake
from .tracing import assume_constant_result

IN_ORDER = 256
# Of a product for `cpu_gemm`: a shorter m or n does not repay packing, fewer multiplications not the call (torch needs
# 1.6 us for 32 x 32 x 32, this 2.7), and what a larger factor is packed into is fresh memory in every call.
SHORTEST, FEWEST, LARGEST = 32, 1 << 18, 1 << 22
# A product of BLAS may depend on where its factors begin, to this many bytes; all of torch's allocations begin there.
ALIGNMENT = 64
BY_TILES = 1 << 16  # elements of a transposed matrix: a third of the time at 1024 x 1024, three quarters at 256 x 256
#: (batch, m, k) of what BLAS is checked by
CHECKED = ((1, 2, 256), (1, 40, 7), (2, 3, 64), (2, 65, 256), (3, 16, 16), (5, 33, 130), (9, 70, 31))


def by_itself(x: Tensor) -> bool:
    """Whether products of x depend on the batch unless care is taken; what is traced or fake is torch's own."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not _is_fake()


def _is_fake() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of one dtype; on a CPU a matrix has its bits in any batch and of any strides. Not differentiable."""
    if not by_itself(a):
        return torch.matmul(a, b)
    if has_gemm(a, b):
        return cpu_gemm(a, b, out=a.new_empty(len(a), a.shape[1], b.shape[2]))
    if at_once(a.shape[1], a.shape[2], b.shape[2], a.dtype):
        return torch.bmm(contiguous(a), contiguous(b))
    out = a.new_empty(len(a), a.shape[1], b.shape[2])
    for one, left, right in zip(out.unbind(), a.unbind(), b.unbind(), strict=True):
        whole = placed(one)
        torch.mm(placed(left.contiguous()), placed(right.contiguous()), out=whole)
        if whole is not one:
            one.copy_(whole)
    return out


def has_gemm(a: Tensor, b: Tensor, symmetric: bool = False) -> bool:
    """Whether a product is for `cpu_gemm`; a is `by_itself`. A symmetric one is half the work of BLAS' product."""
    (_, m, k), n = a.shape, b.shape[2]
    if a.dtype != torch.float32 or not _fits(m, k, n):
        return False
    return _backend.takes_cpu_products() and (symmetric or gemm_is_faster())


def _fits(m: int, k: int, n: int) -> bool:
    """Whether an m x k x n product is of a size for `cpu_gemm`."""
    return min(m, n) >= SHORTEST and m * k * n >= FEWEST and max(m, n) * k <= LARGEST


def cpu_gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    out: Tensor,
    symmetric: bool = False,
) -> Tensor:
    """``alpha a @ b + beta c``, into ``out``, which is returned. Arguments as of `symm_gemm.gemm`, fp32."""
    whole = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    added = None if c is None or not beta else whole.copy_(c) if c is out else c.contiguous()
    torch.ops.steepest.cpu_gemm(_by_rows_or_columns(a), _by_rows_or_columns(b), added, whole, alpha, beta, symmetric)
    return out if whole is out else out.copy_(whole)


def _by_rows_or_columns(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def turns_in_order(m: int, n: int) -> bool:
    """Whether products of an m x n matrix with its bases, m x m and n x n, are `cpu_gemm`'s, or have its bits."""
    return max(m, n) <= IN_ORDER or (_fits(m, m, n) and _fits(m, n, n) and gemm_is_faster())


@assume_constant_result
def gemm_is_faster() -> bool:
    """Whether `cpu_gemm` is there and faster than torch's fp32 products on this processor."""
    return _gemm_is_faster()


@functools.cache
def _gemm_is_faster() -> bool:
    return _backend.extension is not None and _backend.extension.cpu_gemm_is_faster()


def at_once(m: int, k: int, n: int, dtype: torch.dtype) -> bool:
    """Whether products of one shape, of contiguous factors, may be taken as a batch."""
    return dtype == torch.float32 and k <= IN_ORDER and m > 1 and n > 1 and _adds_up_in_order()


def contiguous(x: Tensor) -> Tensor:
    """x in rows.   x: (batch, m, n). Large transposed matrices are copied one by one, which torch does by tiles."""
    if x.is_contiguous() or x.shape[-2] * x.shape[-1] < BY_TILES:
        return x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for one, given in zip(out.unbind(), x.unbind(), strict=True):
        one.copy_(given)
    return out


def placed(x: Tensor) -> Tensor:
    """x, or a copy with its strides that begins at a boundary of memory."""
    return x.clone() if by_itself(x) and x.data_ptr() % ALIGNMENT else x


@assume_constant_result
def _adds_up_in_order() -> bool:
    """Whether torch's batched fp32 products are those of our own, to the bit."""
    return _checked(torch.get_num_threads())


@functools.cache
def _checked(threads: int) -> bool:
    if not _backend.has_cpu_products():
        return False
    generator = torch.Generator().manual_seed(0)
    for batch, m, k in CHECKED:
        x = torch.randn(batch, m, k, generator=generator, dtype=torch.float32, device="cpu")
        wanted, one = x.new_zeros(batch, m, m), x.new_ones(batch)
        torch.ops.steepest.cpu_syrk(x, wanted, wanted, one, x.new_zeros(batch))
        with torch.autocast("cpu", enabled=False):
            if not torch.equal(torch.bmm(x, x.mT.contiguous()), wanted):
                return False
    return True


if _backend.extension is not None:

    @register_fake("cpu_gemm")
    def _(*arguments: object) -> None:
        """Mutates out; no metadata changes."""
