"""Batched products in Triton, all of the output or the lower triangle of a symmetric one and its mirror image.

    out[i] = alpha[i] a[i] b[i] + beta[i] c[i] + gamma[i] I    a: (batch, m, k), b: (batch, k, n), c, out: (batch, m, n)
    out[i] = c[i] + alpha[i] (a[i] b[i] - c[i])                the same without beta: a moving average

A program computes a tile of one matrix. Symmetric products have programs for the tiles at and below the diagonal only;
each stores its tile and the transpose of it. Coefficients are read at run time, from an argument or from memory, so
that new ones compile nothing and numbers computed on the device need not come back to the host.

Products of fp16 and bf16 are exact and added up in fp32. Those of fp32 have a `Precision`:

    tf32x3  x = h + l, h the nearest TF32: l h' + h l' + h h', on tensor cores, each turn of the loop added up apart and
            then to the rest in fp32. Errs by 2^-20 of a term at most and by 2^-24 as a rule, as fp32 does.
    tf32    on tensor cores, which cut off what TF32 has no room for: 2^-9 of a term at most, 2^-10 as a rule.
    ieee    fp32, without tensor cores.

Nothing is tuned or allocated by a call: what has run once, with operands of the same kind, can be captured in a CUDA
graph. A model chooses the configuration, unless `steepest tune` has measured this very product before (tuned.py). All
that may be chosen for a product add an element up over k in one order, with equal BLOCK_K, so that none changes a bit.

Operands are loaded by address as a rule: strides that are no multiple of 16 bytes take addresses in any case, and the
loop has room for the arithmetic. That of the largest tile on sm_90 is 103 instructions a warp (Triton 3.7.1), 206
cycles of a scheduler in 1024 cycles of the tensor cores. sm_90 and sm_100 have the same configurations with TMA, for
operands of 16 bits, sm_90 for "tf32x3" as well: the same tiles in the same turns, zeros where a mask would be. The
descriptors are made on the host for every launch, so that the model leaves them alone and only a measurement asks.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import asdict, dataclass, replace
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuned

Precision = Literal["tf32x3", "tf32", "ieee"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Elements of 16 bits in 16 bytes: the widest load, and the only one that goes to shared memory in bulk before sm_90.
VECTOR = tl.constexpr(8)
# Tile rows that are taken together: their programs run at about the same time and find each other's operands in L2.
GROUP = 8
MAX_PROGRAMS = 2**31 - 1  # of a launch, along the only dimension of the grid that takes so many


# ---- configurations ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    """Tile of the output, k elements of a turn of the loop, turns in flight, warps of a program, operands by TMA."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    tma: bool = False


# One number for all tiles: whichever of them is chosen (the size of the batch has a say), an element of the output is
# added up over k by instructions of one kind in one order, so that a matrix has the same result alone and in a batch.
# 64 elements are 128 bytes: a cache line, and the widest swizzle of the tensor cores' operands.
BLOCK_K = 64
# stages * (BM + BN) * 64 * 2 bytes and how many programs share a multiprocessor, from the largest tile to the smallest;
# square ones serve symmetric products. Triton 3.6 to 3.9 keeps a turn less in shared memory for HMMA (sm_80, sm_86).
# The numbers of warps are such that no register is spilled: eight for the squares of sm_100, where the whole tile comes
# out of tensor memory at once. On sm_90, four leave room for two programs, of which one multiplies while one stores.
# Found by this arithmetic and by reading machine code; none has been timed yet.
CONFIGURATIONS = {
    "sm_80": (
        Configuration(128, 256, BLOCK_K, 3, 8),  # 144 KB
        Configuration(128, 128, BLOCK_K, 4, 8),  # 128 KB
        Configuration(64, 128, BLOCK_K, 3, 4),  # 72 KB, two
        Configuration(64, 64, BLOCK_K, 3, 4),  # 48 KB, three
    ),
    "sm_86": (
        Configuration(128, 128, BLOCK_K, 3, 8),  # 96 KB
        Configuration(64, 128, BLOCK_K, 3, 4),  # 72 KB
        Configuration(64, 64, BLOCK_K, 3, 4),  # 48 KB, two
    ),
    "sm_90": (
        Configuration(128, 256, BLOCK_K, 4, 8),  # 192 KB
        Configuration(128, 128, BLOCK_K, 3, 4),  # 96 KB, two
        Configuration(64, 128, BLOCK_K, 4, 4),  # 96 KB, two
        Configuration(64, 64, BLOCK_K, 4, 4),  # 64 KB, three
    ),
    "sm_100": (
        Configuration(128, 256, BLOCK_K, 4, 8),  # 192 KB
        Configuration(128, 128, BLOCK_K, 3, 8),  # 96 KB
        Configuration(64, 128, BLOCK_K, 4, 4),  # 96 KB, two
        Configuration(64, 64, BLOCK_K, 4, 8),  # 64 KB, three
    ),
}
# fp32 without tensor cores ("ieee"): for correctness, not for speed. 2 * (64 + 64) * 32 * 4 bytes = 64 KB.
FP32 = Configuration(64, 64, 32, 2, 4)
# c and out of fp32 beside operands of 16 bits: the same bytes. Tiles of 128 x 256, and of 128 x 128 with four warps,
# are spilled.
WIDE = {
    "sm_80": (
        Configuration(128, 128, BLOCK_K, 4, 8),  # 128 KB
        Configuration(64, 128, BLOCK_K, 3, 4),  # 72 KB, two
        Configuration(64, 64, BLOCK_K, 3, 4),  # 48 KB, three
    ),
    "sm_86": (
        Configuration(64, 128, BLOCK_K, 3, 4),  # 72 KB
        Configuration(64, 64, BLOCK_K, 3, 4),  # 48 KB, two
    ),
    "sm_90": (
        Configuration(128, 128, BLOCK_K, 3, 8),  # 96 KB
        Configuration(64, 128, BLOCK_K, 4, 4),  # 96 KB, two
        Configuration(64, 64, BLOCK_K, 4, 4),  # 64 KB, three
    ),
}
WIDE["sm_100"] = WIDE["sm_90"]
# "tf32": half as many elements of twice the size.
TF32 = {name: tuple(replace(c, block_k=BLOCK_K // 2) for c in listed) for name, listed in WIDE.items()}
# "tf32x3": ((stages - 1) (BM + BN) + 2 BN) BK 4 bytes. The two terms of both operands of a turn are in registers at
# once on sm_80, where only 16 elements of k leave room for them. On sm_100 the sum of a turn goes through tensor memory
# five times: 64 elements halve its share. Programs that share a multiprocessor split while another multiplies.
TF32X3 = {
    "sm_80": (
        Configuration(64, 128, 16, 4, 4),  # 52 KB, two
        Configuration(64, 64, 16, 4, 4),  # 32 KB, three
    ),
    "sm_86": (
        Configuration(64, 128, 16, 3, 4),  # 40 KB, two
        Configuration(64, 64, 16, 4, 4),  # 32 KB, three
    ),
    "sm_90": (
        Configuration(128, 128, 32, 3, 8),  # 96 KB
        Configuration(64, 128, 32, 3, 4),  # 80 KB, two
        Configuration(64, 64, 32, 3, 4),  # 48 KB, three
    ),
    "sm_100": (
        Configuration(128, 128, 64, 2, 8),  # 128 KB
        Configuration(64, 128, 64, 2, 4),  # 112 KB, two
        Configuration(64, 64, 64, 2, 8),  # 64 KB, two
    ),
}
# Cost of a tile: BM BN multiply-adds and TRAFFIC (BM + BN) for moving its operands. At 64 a square of 128 has half of
# either, and a square of 64 runs at two thirds of its speed. A model, not a measurement.
TRAFFIC = 64
# Where TMA changes nothing but the loads: precisions, and the largest tile. On sm_100 the loop of "tf32x3" is cut
# differently and Triton 3.9 spills at 128 x 256, "tf32" turns what does not lie along k in shared memory that is not
# counted here, and on sm_120 Triton 3.6 spills.
WITH_TMA: dict[str, tuple[tuple[Precision | None, ...], int]] = {
    "sm_90": ((None, "tf32x3"), 128 * 256),
    "sm_100": ((None,), 128 * 128),
}
LONGEST_SIDE = 256  # of any tile
# The largest tile, in elements, of operands that are not aligned.
UNALIGNED_TILE = 64 * 64


def architecture(capability: tuple[int, int]) -> str:
    """The key of CONFIGURATIONS for a device of compute capability >= 8.0."""
    major, minor = capability
    if major == 8:
        return "sm_80" if minor in (0, 7) else "sm_86"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_86")


def candidates(
    capability: tuple[int, int],
    symmetric: bool,
    aligned: bool = True,
    precision: Precision | None = None,
    wide: bool = False,
) -> list[Configuration]:
    """All that `product` may take for operands of 16 bits, or of fp32 with a precision; the same bits by any of them.

    Operands that are not aligned are loaded element by element, and the addresses of a large tile's do not fit in the
    registers. ``wide``: c and out are fp32 beside operands of 16 bits. With TMA shared memory has barriers beside the
    turns, less than 128 bytes.
    """
    if precision == "ieee":
        return [FP32]
    kinds = {None: WIDE if wide else CONFIGURATIONS, "tf32": TF32, "tf32x3": TF32X3}
    name = architecture(capability)
    listed = [
        c
        for c in kinds[precision][name]
        if (c.block_m == c.block_n or not symmetric) and (c.block_m * c.block_n <= UNALIGNED_TILE or aligned)
    ]
    precisions, largest = WITH_TMA.get(name, ((), 0))
    by_tma = aligned and precision in precisions
    return listed + [replace(c, tma=True) for c in listed if by_tma and c.block_m * c.block_n <= largest]


@functools.lru_cache(maxsize=4096)
def configuration(
    m: int,
    n: int,
    k: int,
    capability: tuple[int, int],
    multiprocessors: int,
    batch: int,
    symmetric: bool,
    aligned: bool = True,
    precision: Precision | None = None,
    wide: bool = False,
    gpu: str | None = None,
) -> Configuration:
    """The fastest candidate where it was measured on ``gpu``, by name; else the tile of least modelled time.

    Modelled time is the number of waves (multiprocessors take a tile each) times the cost of a tile; of equals, the
    larger tile. k multiplies both and decides nothing.
    """
    listed = candidates(capability, symmetric, aligned, precision, wide)
    if gpu is not None and aligned:
        asked = question(m, n, k, batch, symmetric, precision, wide)
        fields = tuned.fields(machine(gpu, capability), asked)
        won = next((c for c in listed if asdict(c) == fields), None)
        if won is not None:
            return won
        if fields is not None:
            tuned.note(f"{tuned.path()}: {fields} for {asked} is not in the table; `steepest tune` measures it again")

    def time(c: Configuration) -> int:
        waves = -(-batch * tile_count(m, n, c, symmetric) // multiprocessors)
        return waves * (c.block_m * c.block_n + TRAFFIC * (c.block_m + c.block_n))

    return min((c for c in listed if not c.tma), key=time)


def machine(gpu: str, capability: tuple[int, int]) -> str:
    """What a measurement holds for."""
    return f"{gpu}, Triton {triton.__version__}, {architecture(capability)}"


def question(m: int, n: int, k: int, batch: int, symmetric: bool, precision: Precision | None, wide: bool) -> str:
    """What is measured: a product, however its aligned operands lie."""
    kind = precision or ("16 bits into fp32" if wide else "16 bits")
    return f"{batch} x {m} x {n} x {k}, {'symmetric, ' if symmetric else ''}{kind}"


def tile_count(m: int, n: int, c: Configuration, symmetric: bool) -> int:
    """Programs of one matrix."""
    rows, columns = -(-m // c.block_m), -(-n // c.block_n)
    return rows * (rows + 1) // 2 if symmetric else rows * columns


# ---- the tile of a program -----------------------------------------------------------------------------------------


@triton.jit
def triangle(t):
    # (i, j) with t = i (i + 1) / 2 + j, 0 <= j <= i, for t < 2^30, where i < 2^15.5. The root in fp32, relative error
    # below 2^-21 with the approximate instruction, is less than one off.
    return settle(t, ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32))


@triton.jit
def settle(t, i):
    # The same from an i that is one off at most, in whole numbers.
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    return i, t - i * (i + 1) // 2


@triton.jit
def tile_of(t, rows, columns, SYMMETRIC: tl.constexpr, GROUP: tl.constexpr):
    # Tile row and tile column of the t-th tile of a matrix; bands of GROUP tile rows, in each column after column.
    if SYMMETRIC:
        # The t-th tile in rows one after another lies in the same band as the t-th in bands.
        row, _ = triangle(t)
        first = row // GROUP * GROUP
        t -= first * (first + 1) // 2
        height = tl.minimum(rows - first, GROUP)
        whole = height * first  # `first` columns of full height; then the band's own triangle
        own_row, own_column = triangle(tl.maximum(t - whole, 0))
        i = first + tl.where(t < whole, t % height, own_row)
        j = tl.where(t < whole, t // height, first + own_column)
    else:
        first = t // (GROUP * columns) * GROUP
        t -= first * columns
        height = tl.minimum(rows - first, GROUP)
        i = first + t % height
        j = t // height
    return i, j


@triton.jit
def _number(x, stride, matrix):
    # x, or where it has a stride, what lies there for the matrix.
    return x if stride is None else tl.load(x + matrix.to(tl.int64) * stride)


@triton.jit
def _corner(x, matrix, matrix_stride, stride, row, column, ROWS: tl.constexpr, ALIGNED: tl.constexpr):
    # Address of element (row, column) of a matrix whose rows, or else whose columns, are contiguous. In 64 bits: a
    # matrix, or the distance to the next, may exceed 2^31 elements.
    x += matrix.to(tl.int64) * matrix_stride.to(tl.int64)
    if ROWS:
        x += row.to(tl.int64) * stride + column
    else:
        x += column.to(tl.int64) * stride + row
    return tl.multiple_of(x, 16) if ALIGNED else x


@triton.jit
def _offsets(i, j, stride, ROWS: tl.constexpr, ALIGNED: tl.constexpr, OFFSET: tl.constexpr):
    # Of elements (i, j) of a tile from its corner, in 32 bits where they fit: they stay in registers over the loop.
    stride = stride.to(OFFSET)
    if ALIGNED:
        stride = stride // VECTOR * VECTOR  # says that it is a multiple
    return i * stride + j if ROWS else i + j * stride


@triton.jit
def _load(x, offsets, inside, k, k_left, ALONG_K: tl.constexpr, EVEN_K: tl.constexpr):
    # Tile of an operand. Where k is contiguous no mask is needed for rows outside, which were moved inside.
    if EVEN_K:
        return tl.load(x + offsets) if ALONG_K else tl.load(x + offsets, mask=inside, other=0.0)
    else:
        return tl.load(x + offsets, mask=k < k_left if ALONG_K else inside & (k < k_left), other=0.0)


@triton.jit
def _box(x, matrix, row, column, ROWS: tl.constexpr):
    # The same by its descriptor, in which rows, or else columns, are contiguous; zeros outside of the matrix.
    if ROWS:
        return x.load([matrix, row, column]).reshape(x.block_shape[1], x.block_shape[2])
    else:
        return tl.trans(x.load([matrix, column, row]).reshape(x.block_shape[1], x.block_shape[2]))


ADDRESSES = ("a", "b", "c", "out", "alpha", "beta", "gamma")
INTEGERS = ("m", "n", "k", "alpha_stride", "beta_stride", "gamma_stride")
STRIDES = ("a_batch", "a_stride", "b_batch", "b_stride", "c_batch", "c_stride", "out_batch", "out_stride")


@triton.jit(do_not_specialize=(*ADDRESSES, *INTEGERS, *STRIDES))
def product_kernel(
    a,
    b,
    c,  # or None
    out,
    m,
    n,
    k,
    a_batch,  # elements from one matrix to the next
    a_stride,  # from one row to the next, or from one column where columns are contiguous
    b_batch,
    b_stride,
    c_batch,
    c_stride,
    out_batch,
    out_stride,
    alpha,  # a number, or the address of the first matrix's; fp32
    beta,  # or None: out moves from c towards the product by alpha
    gamma,  # or None
    alpha_stride,  # None for a number
    beta_stride,
    gamma_stride,
    A_ALONG_K: tl.constexpr,
    B_ALONG_K: tl.constexpr,
    C_ROWS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ALIGNED: tl.constexpr,  # addresses are multiples of 16 bytes; strides, and sizes of contiguous dims, of VECTOR
    EVEN_K: tl.constexpr,  # k is a multiple of BLOCK_K
    OFFSET: tl.constexpr,  # integers that count the elements from a tile's first to its last
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,  # a and b are descriptors
):
    rows, columns = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    tiles = rows * (rows + 1) // 2 if SYMMETRIC else rows * columns
    matrix = tl.program_id(0) // tiles
    i, j = tile_of(tl.program_id(0) % tiles, rows, columns, SYMMETRIC, GROUP)
    row, column = i * BLOCK_M, j * BLOCK_N
    at_row, at_column, at_k = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :], tl.arange(0, BLOCK_K)
    rows_left, columns_left = m - row, n - column
    if ALIGNED:
        columns_left = tl.multiple_of(columns_left, VECTOR)
        if SYMMETRIC or not A_ALONG_K or (c is not None and not C_ROWS):
            rows_left = tl.multiple_of(rows_left, VECTOR)

    if not TMA:
        a_at = _corner(a, matrix, a_batch, a_stride, row, 0 * row, A_ALONG_K, ALIGNED)
        b_at = _corner(b, matrix, b_batch, b_stride, 0 * column, column, not B_ALONG_K, ALIGNED)
        a_row = tl.minimum(at_row, rows_left - 1) if A_ALONG_K else at_row
        b_column = tl.minimum(at_column, columns_left - 1) if B_ALONG_K else at_column
        a_offsets = _offsets(a_row, at_k[None, :], a_stride, A_ALONG_K, ALIGNED, OFFSET)
        b_offsets = _offsets(at_k[:, None], b_column, b_stride, not B_ALONG_K, ALIGNED, OFFSET)
        a_step = BLOCK_K if A_ALONG_K else BLOCK_K * a_stride.to(tl.int64)
        b_step = BLOCK_K if B_ALONG_K else BLOCK_K * b_stride.to(tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, k, BLOCK_K):
        if TMA:
            x = _box(a, matrix, row, first, A_ALONG_K)
            y = _box(b, matrix, first, column, not B_ALONG_K)
        else:
            k_left = k - first
            if ALIGNED and (A_ALONG_K or B_ALONG_K):
                k_left = tl.multiple_of(k_left, VECTOR)
            x = _load(a_at, a_offsets, at_row < rows_left, at_k[None, :], k_left, A_ALONG_K, EVEN_K)
            y = _load(b_at, b_offsets, at_column < columns_left, at_k[:, None], k_left, B_ALONG_K, EVEN_K)
            a_at += a_step
            b_at += b_step
        total = tl.dot(x, y, total, input_precision=PRECISION)

    # Which product is fused into the sum is said outright: left to the compiler it could differ between configurations.
    scale = _number(alpha, alpha_stride, matrix)
    mask = (at_row < rows_left) & (at_column < columns_left)
    if c is not None:
        c_at = _corner(c, matrix, c_batch, c_stride, row, column, C_ROWS, ALIGNED)
        c_at += _offsets(at_row, at_column, c_stride, C_ROWS, ALIGNED, OFFSET)
        old = tl.load(c_at, mask=mask, other=0.0).to(tl.float32)
        if beta is None:  # as torch.lerp: exact at both ends
            near = tl.abs(scale) < 0.5
            total = tl.fma(total - old, tl.where(near, scale, scale - 1.0), tl.where(near, old, total))
        else:
            total = tl.fma(old, _number(beta, beta_stride, matrix), total * scale)
    else:
        total *= scale
    if gamma is not None:
        total = tl.where(row + at_row == column + at_column, total + _number(gamma, gamma_stride, matrix), total)
    tile = total.to(out.dtype.element_ty)
    if SYMMETRIC:
        if i == j:  # what c has above the diagonal ends here
            tile = tl.where(at_row >= at_column, tile, tl.trans(tile))
        else:
            mirror = _corner(out, matrix, out_batch, out_stride, column, row, True, ALIGNED)
            mirror += _offsets(at_column, at_row, out_stride, True, ALIGNED, OFFSET)
            tl.store(mirror, tile, mask=mask)
    at = _corner(out, matrix, out_batch, out_stride, row, column, True, ALIGNED)
    tl.store(at + _offsets(at_row, at_column, out_stride, True, ALIGNED, OFFSET), tile, mask=mask)


# ---- the op --------------------------------------------------------------------------------------------------------


def can_use(a: Tensor) -> str | None:
    """None when `product` takes such an operand, else the reason."""
    if a.dtype not in DTYPES:
        return f"a matrix is {a.dtype}; accepted are {', '.join(map(str, DTYPES))}"
    if _place(a) is None:
        return f"neither rows nor columns are contiguous: shape {tuple(a.shape)}, strides {a.stride()}"
    if a.device.type != "cuda":
        return f"a matrix is on {a.device}; Triton needs a CUDA device"
    capability, _ = _machine(a.device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]}; needed is 8.0 or higher"
    return None


def product(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    alpha: Tensor | float,
    beta: Tensor | float | None,
    gamma: Tensor | float,
    out: Tensor,
    *,
    symmetric: bool,
    precision: Precision = "ieee",
    chosen: Configuration | None = None,
) -> None:
    """``out[i] = alpha[i] a[i] @ b[i] + beta[i] c[i] + gamma[i] I``, accumulated in fp32, rounded once.

    a: (batch, m, k), b: (batch, k, n), c: (batch, m, n) or None, all fp16, all bf16 or all fp32, each of contiguous
    rows or of contiguous columns and at any distance from one another; out: (batch, m, n), contiguous rows. c and out
    may be fp32 beside a and b of 16 bits. alpha, beta, gamma: a number, or (batch,) fp32 of any stride. gamma other
    than the number 0 takes m = n. With the number 0 for beta, c is not read; with None, ``alpha[i]`` is the weight of
    the product in an average with c, ``c[i] + alpha[i] (a[i] @ b[i] - c[i])``.  Only out is written; it may be c, not a
    or b.  precision: of a and b in fp32, see the module.

    symmetric: the exact result is, of which the caller is sure. Its tiles at and below the diagonal are computed, the
    others are copies, so that out is symmetric to the bit; what c has above the diagonal does not count.

    chosen: one of `candidates`, in place of `configuration`'s. Operands whose elements share memory are loaded by
    address in any case.

    A matrix has the same result alone and in a batch. ValueError for what it does not take. "ieee" multiplies far
    slower than torch does.
    """
    batch, m, k = a.shape
    n = b.shape[-1]
    if c is None or (isinstance(beta, float | int) and beta == 0):
        c, beta = None, 0.0
    has_gamma = isinstance(gamma, Tensor) or gamma != 0
    _check(a, b, c, out, square=symmetric or has_gamma)
    if out.numel() == 0:
        return
    a_place, b_place, out_place = _checked_place(a), _checked_place(b), _checked_place(out)
    c_place = out_place if c is None else _checked_place(c)
    if not out_place.by_rows:
        raise ValueError(f"the rows of out are not contiguous: shape {tuple(out.shape)}, strides {out.stride()}")
    aligned = a_place.aligned and b_place.aligned and c_place.aligned and out_place.aligned
    precise = a.dtype == torch.float32
    chosen = chosen or _choose(a, n, symmetric, aligned, precision if precise else None, out.dtype != a.dtype)
    programs = batch * tile_count(m, n, chosen, symmetric)
    if programs > MAX_PROGRAMS:
        raise ValueError(f"{batch} matrices of {m} x {n} are {programs} tiles; a launch has {MAX_PROGRAMS} at most")
    tma = chosen.tma and aligned and _has_boxes(a, a_place) and _has_boxes(b, b_place)
    last = max(a_place.stride, b_place.stride, c_place.stride, out_place.stride) * (LONGEST_SIDE - 1)
    with _on(a.device):
        product_kernel[(programs,)](
            _boxes(a, a_place, chosen.block_m, chosen.block_k) if tma else a,
            _boxes(b, b_place, chosen.block_k, chosen.block_n) if tma else b,
            c,
            out,
            m,
            n,
            k,
            a_place.apart,
            a_place.stride,
            b_place.apart,
            b_place.stride,
            c_place.apart,
            c_place.stride,
            out_place.apart,
            out_place.stride,
            _number_of(alpha, batch),
            None if beta is None else _number_of(beta, batch),
            _number_of(gamma, batch) if has_gamma else None,
            *(x.stride(0) if isinstance(x, Tensor) else None for x in (alpha, beta, gamma)),
            A_ALONG_K=a_place.by_rows,
            B_ALONG_K=not b_place.by_rows,
            C_ROWS=c_place.by_rows,
            SYMMETRIC=symmetric,
            ALIGNED=aligned,
            EVEN_K=k % chosen.block_k == 0,
            OFFSET=tl.int32 if last + LONGEST_SIDE <= 2**31 else tl.int64,
            BLOCK_M=chosen.block_m,
            BLOCK_N=chosen.block_n,
            BLOCK_K=chosen.block_k,
            GROUP=GROUP,
            PRECISION=precision if precise else "ieee",
            TMA=tma,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
            enable_fp_fusion=False,
        )


def _check(a: Tensor, b: Tensor, c: Tensor | None, out: Tensor, square: bool) -> None:
    (batch, m, k), n = a.shape, b.shape[-1]
    if b.shape != (batch, k, n) or out.shape != (batch, m, n) or (c is not None and c.shape != out.shape):
        given = ", ".join(str(tuple(x.shape)) for x in (a, b, c, out) if x is not None)
        raise ValueError(f"shapes do not make a product: {given}")
    if square and m != n:
        raise ValueError(f"a symmetric result, or a multiple of the identity in it, is square, not {m} x {n}")
    dtype = a.dtype
    wide = out.dtype in (dtype, torch.float32) and (c is None or c.dtype == out.dtype)
    if dtype not in DTYPES or b.dtype != dtype or not wide:
        given = ", ".join(str(x.dtype) for x in (a, b, c, out) if x is not None)
        accepted = ", ".join(map(str, DTYPES))
        raise ValueError(f"matrices are {given}; accepted is one of {accepted} for all, or float32 for c and out")


class _Place(NamedTuple):
    """How matrices lie in memory; numbers of elements."""

    by_rows: bool  # rows are contiguous; if not, columns are
    stride: int  # from one of them to the next
    apart: int  # from one matrix to the next
    aligned: bool  # as the kernel's ALIGNED


def _place(x: Tensor) -> _Place | None:
    """None where neither rows nor columns are contiguous. Strides of dimensions of one element do not count."""
    batch, rows, columns = x.shape
    apart, row, column = x.stride()
    if column == 1 or columns <= 1:
        by_rows, length, stride = True, columns, row if rows > 1 else 0
    elif row == 1 or rows <= 1:
        by_rows, length, stride = False, rows, column
    else:
        return None
    apart = apart if batch > 1 else 0
    aligned = (length | stride | apart) % VECTOR.value == 0 and x.data_ptr() % 16 == 0
    return _Place(by_rows, stride, apart, aligned)


def _checked_place(x: Tensor) -> _Place:
    place = _place(x)
    if place is None:
        raise ValueError(f"neither rows nor columns are contiguous: shape {tuple(x.shape)}, strides {x.stride()}")
    return place


def _stored(x: Tensor, place: _Place) -> Tensor:
    return x if place.by_rows else x.mT


def _has_boxes(x: Tensor, place: _Place) -> bool:
    """Whether descriptors describe aligned matrices: nothing empty, no strides of 0, no rows that overlap."""
    batch, rows, length = _stored(x, place).shape
    return length > 0 and (rows == 1 or place.stride >= length) and (batch == 1 or place.apart > 0)


def _boxes(x: Tensor, place: _Place, rows: int, columns: int) -> TensorDescriptor:
    """The descriptor of matrices that are loaded by tiles of rows x columns."""
    stored = _stored(x, place)
    stride = place.stride or stored.shape[2]
    block = [1, rows, columns] if place.by_rows else [1, columns, rows]
    return TensorDescriptor(stored, [*stored.shape], [place.apart or stride * stored.shape[1], stride, 1], block)


def _number_of(x: Tensor | float, batch: int) -> Tensor | float:
    if not isinstance(x, Tensor):
        return float(x)
    if x.dtype != torch.float32 or x.shape != (batch,):
        raise ValueError(f"a coefficient is {x.dtype} of shape {tuple(x.shape)}; as a tensor it is fp32, ({batch},)")
    return x


def _choose(
    a: Tensor, n: int, symmetric: bool, aligned: bool, precision: Precision | None, wide: bool
) -> Configuration:
    batch, m, k = a.shape
    return configuration(m, n, k, *_machine(a.device), batch, symmetric, aligned, precision, wide, _name(a.device))


@functools.cache
def _name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


@functools.cache
def _machine(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors; of no GPU in Triton's interpreter."""
    if device.type != "cuda":
        return (8, 0), 1
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: makes it the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
