"""Batched products with numbers of their own for each matrix.   out = alpha A B + beta C + gamma I.

`gemm` with ``symmetric=True`` is for products whose exact result is symmetric (A B with B = A^T, or commuting symmetric
factors): the caller promises it, and the result is symmetric to the bit: entries below the diagonal are computed and
entries above it are copies of them.  `linear` is the same without the product.

On a CPU a matrix has the bits that it has alone (`steepest.ops.matmul`), and a symmetric product of a large one takes
only the block rows at and below the diagonal, (p + 1) / 2p of the work for p block rows.  Elsewhere torch takes the
full batched product and mirrors it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backend as _backend
from .matmul import at_once, by_itself, contiguous, cpu_gemm, has_gemm, placed

# Two cores with AVX512-BF16, torch 2.13, bf16, ratio to the time of the full product, mirroring included:
#   768x768x768    p=2 0.84   p=3 0.74   p=4 0.73   p=6 0.75
#   768x2304x768   p=2 0.79   p=3 0.69   p=4 0.68   p=6 0.66
#   768x3072x768   p=2 0.79   p=3 0.69   p=4 0.67   p=6 0.65
# polar("auto") over the matrices of GPT-2 124M, times faster than torch: p=2 1.41, p=3 1.49, p=4 1.51, p=6 1.52, p=8
# 1.47.
MAX_BLOCK_ROWS = 4
MIN_BLOCK = 128


Number = float | Tensor  # the same for all matrices, or (batch,) of any stride, one for each


class Workspace:
    """Buffers by name, kept for the next product, step or chunk of the same shape and dtype.

    On a CPU a fresh megabyte costs its page faults: 0.2 of the 1.8 ms of a symmetric 768 x 768 x 768 product in bf16.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """A contiguous buffer of this shape, of ``like``'s dtype and device, with undefined contents."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != torch.Size(shape) or buffer.dtype != like.dtype:
            buffer = self._buffers[name] = torch.empty(shape, dtype=like.dtype, device=like.device)
        return buffer


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: Number = 1.0,
    beta: Number = 1.0,
    out: Tensor,
    symmetric: bool = False,
    workspace: Workspace | None = None,
) -> Tensor:
    """``alpha a @ b + beta c``, into ``out``, which is returned.

    a: (batch, m, k), b: (batch, k, n), c and out: (batch, m, n), all of one floating dtype.  Products accumulate in
    fp32 (fp64 for fp64) and round once.  ``out`` may be ``c``, not ``a`` or ``b``; no other argument is written, and
    without ``c`` what ``out`` held does not matter.  Of ``c`` only entries at and below the diagonal matter where
    ``symmetric``.  Torch's products take plain numbers alone: where one is a tensor the product is rounded by itself,
    and the sum of the two once more.  In fp16 a symmetric product is brought into range before that, alpha on its
    factors; of another, ``a @ b`` is what fp16 must hold: scaled, small rows of X would lose digits that count.
    """
    if _route(a, b) == "triton":
        from ..kernels.symm_gemm import product

        product(a, b, c, alpha, beta, 0.0, out, symmetric=symmetric)
        return out
    if isinstance(alpha, Tensor) or isinstance(beta, Tensor):
        product = out if c is None else (workspace or Workspace()).get("product", out.shape, out)
        if symmetric and isinstance(alpha, Tensor) and a.dtype == torch.float16:
            alpha = _scaled_product(a, b, alpha, product)
        else:
            gemm(a, b, out=product, symmetric=symmetric)
        return linear(product, c, alpha=alpha, beta=beta, out=out)
    if by_itself(a) and has_gemm(a, b, symmetric):
        return cpu_gemm(a, b, c, alpha=alpha, beta=beta, out=out, symmetric=symmetric)
    if by_itself(a) or (a.device.type == "cpu" and len(out) == 1):
        return _each_by_itself(a, b, c, alpha, beta, out, symmetric)
    if c is None:
        c, beta = out, 0.0
    if not symmetric:
        return torch.baddbmm(c, a, b, beta=beta, alpha=alpha, out=out)
    if c is not out:
        out.copy_(c)
    return mirror_(out.baddbmm_(a, b, alpha=alpha, beta=beta), (0, out.shape[-1]))


def _each_by_itself(
    a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, out: Tensor, symmetric: bool
) -> Tensor:
    _, m, k = a.shape
    if at_once(m, k, b.shape[-1], a.dtype):
        linear(torch.bmm(contiguous(a), contiguous(b)), c, alpha=alpha, beta=beta, out=out)
        return mirror_(out, (0, m)) if symmetric else out
    for i, target in enumerate(out.unbind()):
        whole, added = placed(target), target if c is None else c[i]
        factors, weight = (placed(a[i]), placed(b[i])), 0.0 if c is None else beta
        if not symmetric:
            torch.addmm(added, *factors, beta=weight, alpha=alpha, out=whole)
        else:
            edges = block_edges(m)
            _lower_block_rows_(whole.copy_(added), *factors, alpha, weight, edges)
            mirror_(whole, edges)
        if whole is not target:
            target.copy_(whole)
    return out


def _scaled_product(a: Tensor, b: Tensor, alpha: Tensor, out: Tensor) -> Tensor:
    """alpha a b as what is returned times ``out``, of which nothing leaves fp16's range.

    a and b are polynomials in one R, and alpha brings their product to the order of 1: for alpha = c / ||R||^2 and R of
    norm 512 the product itself would not be finite. All of alpha on one factor would take c / 512 of its bits below
    2^-24, where the product multiplies what is lost by 512. So either factor takes the root of alpha, as a power of
    two, and both are of the order of 1: at m rows what is lost is 2^-25 sqrt(m) of the product's norm at most.
    """
    _, exponent = torch.frexp(alpha)  # |alpha| in [2^(exponent - 1), 2^exponent)
    half = torch.where(alpha == 0, -32, (exponent // 2).clamp(max=0))  # a product that does not count is not infinite
    root = torch.ldexp(torch.ones_like(alpha), half).to(alpha.dtype)  # until torch 2.11 of the default dtype
    left = times(a, root, out=torch.empty_like(a))
    right = left if b is a else times(b, root, out=torch.empty_like(b))
    gemm(left, right, out=out, symmetric=True)
    return alpha / root.square()


def _route(a: Tensor, b: Tensor) -> str:
    if not a.is_cuda or torch.compiler.is_compiling():  # what is traced is torch's own products
        return "torch"
    reasons = {"triton": _backend.triton_reason() or _unsupported_by_triton(a, b)}
    return _backend.choose("gemm", "auto", reasons, a.device, "products")


def _unsupported_by_triton(a: Tensor, b: Tensor) -> str | None:
    if a.dtype.itemsize != 2:
        return f"products of {a.dtype} are faster in torch"
    from ..kernels.symm_gemm import can_use

    return can_use(a) or can_use(b)


def linear(
    a: Tensor, c: Tensor | None = None, *, alpha: Number = 1.0, beta: Number = 1.0, gamma: float = 0.0, out: Tensor
) -> Tensor:
    """``alpha a + beta c + gamma I``, into ``out``, which is returned.   a, c, out: (batch, m, n); out may be a.

    Summed in fp32 (fp64 for fp64) and rounded once.
    """
    if c is None and not gamma:
        return times(a, alpha, out=out)
    wide = torch.promote_types(a.dtype, torch.float32)
    total = out if out.dtype == wide and out is not c else torch.empty(out.shape, dtype=wide, device=out.device)
    times(total.copy_(a), alpha, out=total)
    if c is not None:
        total.addcmul_(c, _wide(beta, c)) if isinstance(beta, Tensor) else total.add_(c, alpha=beta)
    if gamma:
        total.diagonal(dim1=-2, dim2=-1).add_(gamma)
    return out if total is out else out.copy_(total)


def times(matrix: Tensor, factor: Number, *, out: Tensor) -> Tensor:
    """``factor matrix`` into ``out``, with the factor in full precision."""
    if isinstance(factor, Tensor):
        return torch.mul(matrix, _wide(factor, matrix), out=out)
    return out.copy_(matrix) if factor == 1 else torch.mul(matrix, factor, out=out)


def _wide(factor: Tensor, matrix: Tensor) -> Tensor:
    """(batch,) beside (batch, m, n).

    On a CPU a 0-dim factor keeps its precision and takes half the time of a broadcast one (bf16, 768 x 768: 0.26
    against 0.52 ms); elsewhere it would first be rounded to the matrix' dtype.
    """
    return factor.reshape(()) if len(factor) == 1 and matrix.device.type == "cpu" else factor[:, None, None]


def block_edges(m: int) -> tuple[int, ...]:
    """The edges of the block rows of an m x m product: equal blocks, a multiple of 32, and what remains."""
    rows = min(MAX_BLOCK_ROWS, max(1, m // MIN_BLOCK))
    block = m if rows == 1 else 32 * -(-m // (32 * rows))
    return (*range(0, m, block), m)


def mirror_(out: Tensor, edges: tuple[int, ...]) -> Tensor:
    """Copy what lies below the diagonal onto what lies above it, in place.   out: (..., m, m).

    Block by block: mirroring the whole square at once costs as much as a block row saves.
    """
    block, whole = edges[1], edges[-1] - edges[-1] % edges[1]
    _mirror_corners_(
        out[..., :whole, :whole].unfold(-2, block, block).unfold(-2, block, block).diagonal(dim1=-4, dim2=-3)
    )
    if whole < edges[-1]:
        _mirror_corners_(out[..., whole:, whole:].unsqueeze(-1))
    for low, high in zip(edges[:-2], edges[1:-1], strict=True):
        out[..., low:high, high:].copy_(out[..., high:, low:high].mT)
    return out


def _mirror_corners_(corners: Tensor) -> None:
    """corners: (..., k, k, count).   tril_ on a strided view would copy it there and back."""
    index = torch.arange(corners.shape[-2], device=corners.device)
    below = (index[:, None] >= index)[..., None]
    corners.copy_(torch.where(below, corners, corners.transpose(-3, -2)))


def _lower_block_rows_(out: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float, edges: tuple[int, ...]) -> None:
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        out[low:high, :high].addmm_(a[low:high], b[:, :high], alpha=alpha, beta=beta)
