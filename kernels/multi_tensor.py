"""The fused elementwise ops in Triton: a launch for each tuple of element types and one that adds up the sums.

The matrices of an item are cut into chunks, none of which holds elements of two matrices. A program takes a chunk,
finds its item by bisection in a table of addresses, and leaves its sums in the scratch; a second launch, a program for
each matrix (or gradient), adds up the chunks of a matrix in an order that is always the same. What differs between
items of the same element types (the packed program of steepest.ops.program, numbers, sizes) is read at run time, so a
new recipe compiles nothing.

The tables are kept by their contents: a step whose tensors and numbers are those of an earlier one uploads nothing and
allocates nothing, and can be captured in a CUDA graph. The formulas are those of csrc/multi_tensor/formulas.cuh.
"""

from __future__ import annotations

import contextlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import program as layout
from ..ops.program import CHUNK, Program

# A thread holds 8 neighbours: 16 bytes of a 16-bit type, twice 16 of fp32. With 8 warps two programs share a
# multiprocessor, and the loads of one hide the other's arithmetic. Nothing to tune by shape: memory is the bound.
THREADS = 256
VECTOR = tl.constexpr(8)
# Lines of partial sums that a finishing program takes at once: the 64k chunks of a billion elements in 256 turns.
LINES = 256
# a x + b as one fused multiply-add, said outright because the default differs between Triton versions.
OPTIONS = {"num_warps": THREADS // 32, "enable_fp_fusion": True}
FINISH_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int16: tl.int16}
# Tables kept. A step takes one of each op, one of numbers, and as many of `update_moments` and `apply_update` as it is
# cut into parts; if they were fewer than a step takes, none would be found again.
KEPT = 256

# Fields of an item's line in the table: its element count and the addresses of its tensors (0: absent) come first.
SIZE = tl.constexpr(0)
GRAD, MOMENTUM, SECOND, DIRECTION, PARAM, MANTISSA = map(tl.constexpr, range(1, 7))
ITEM_ROW, ITEM_PROGRAM, ITEM_FIRST_SUM, PLACE, RATIO, LENGTHS = map(tl.constexpr, (7, 8, 9, 10, 13, 14))
ITEM_FIELDS = tl.constexpr(15)
# Fields of a gradient's line.
GRADIENT_ROW, GRADIENT_PROGRAM, STEP_AT, FIRST_SUM, END_SUM, GROUP = map(tl.constexpr, range(2, 8))
GRADIENT_FIELDS = tl.constexpr(8)


def _constants(names: str, place: Callable[[str], int]) -> Iterator[tl.constexpr]:
    return (tl.constexpr(place(name)) for name in names.split())


# Columns of a row of numbers and of a line of sums; numbers of a group.
FINITE, GRAD_SQ, GRAD_MAX, STEP, GRAD_SCALE = _constants(
    "finite grad_sq grad_max step grad_scale", layout.COLUMNS.index
)
BETA1, ONE_MINUS_BETA1, BETA2, ONE_MINUS_BETA2 = _constants(
    "beta1 one_minus_beta1 beta2 one_minus_beta2", layout.COLUMNS.index
)
READ_BETA1, ONE_MINUS_READ_BETA1, EPS = _constants("read_beta1 one_minus_read_beta1 eps", layout.COLUMNS.index)
INVERSE_CORRECTION1, INVERSE_CORRECTION2 = _constants("inverse_correction1 inverse_correction2", layout.COLUMNS.index)
DECAY, LR, INPUT_SCALE, LARGEST_TAKEN = _constants("decay lr input_scale largest_taken", layout.COLUMNS.index)
INPUT_SQ, INPUT_MAX, GRAD_DOT = _constants("input_sq input_max grad_dot", layout.SUMS.index)
MOMENTUM_SQ, MOMENTUM_MAX = _constants("momentum_sq momentum_max", layout.SUMS.index)
UPDATE_SQ, PARAM_SQ = _constants("update_sq param_sq", layout.SUMS.index)
HYPER_LR, HYPER_DECAY, HYPER_BETA1 = _constants("lr weight_decay beta1", layout.HYPERS.index)
HYPER_BETA2, HYPER_EPS = _constants("beta2 eps", layout.HYPERS.index)
COLUMNS, SUMS, HYPERS = (tl.constexpr(len(names)) for names in (layout.COLUMNS, layout.SUMS, layout.HYPERS))
# A chunk of a gradient leaves two sums.
MOST, SQUARE = map(tl.constexpr, range(2))

# The lowest bits of a program's fields, and what the wider ones say.
HEAVY_BALL, NESTEROV, MOMENTUM_CORRECTION = _constants(
    "heavy_ball nesterov momentum_correction", layout.LOWEST_BIT.__getitem__
)
POWER, SUM, SECOND_CORRECTION, EPS_INSIDE = _constants(
    "power sum second_correction eps_inside", layout.LOWEST_BIT.__getitem__
)
KIND, CAUTIOUS, ROUNDING, MAXIMIZE = _constants("direction cautious rounding maximize", layout.LOWEST_BIT.__getitem__)
START_FIRST, DECAY_AFTER = _constants("start_first decay_after", layout.LOWEST_BIT.__getitem__)
DECAY_SCALED, FROZEN_MOMENTS = _constants("decay_scaled frozen_moments", layout.LOWEST_BIT.__getitem__)
DECAY_INDEPENDENT, INTERPOLATED = _constants("decay_independent interpolated", layout.LOWEST_BIT.__getitem__)
QUARTER, HALF, SIXTH = _constants("quarter half sixth", layout.FIELDS["power"].index)
GIVEN, IDENTITY = _constants("given identity", layout.FIELDS["direction"].index)
(STOCHASTIC,) = _constants("stochastic", layout.FIELDS["rounding"].index)


# ---- the work of a program -----------------------------------------------------------------------------------------


@triton.jit
def _flag(program, at):
    return ((program >> at) & 1) != 0


@triton.jit
def _choice(program, at):
    return (program >> at) & 3


@triton.jit
def _owner(starts, count, at):
    # Position of the last of `count` items that does not start after `at`; starts rises.
    low = tl.full([], 0, tl.int32)
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(starts + middle) <= at
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _find(starts, lines, first_item, items, chunk, FIELDS: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr):
    # The item of a chunk (its line), the matrix, where in the item the chunk begins, and how many elements it has.
    item = first_item + _owner(starts + first_item, items, chunk)
    line = lines + item.to(tl.int64) * FIELDS
    size = tl.load(line + SIZE)
    index = chunk - tl.load(starts + item).to(tl.int32)
    chunks = ((size - 1) // CHUNK + 1).to(tl.int32)
    matrix = (index // chunks).to(tl.int64)
    begin = (index % chunks).to(tl.int64) * CHUNK
    start = matrix * size + begin
    length = tl.minimum(size - begin, CHUNK).to(tl.int32)
    if ALIGNED:
        start = tl.multiple_of(start, VECTOR)
        length = tl.multiple_of(length, VECTOR)
    return line, matrix, start, length


@triton.jit
def _pointer(line, slot, start, T: tl.constexpr, ALIGNED: tl.constexpr):
    # To element `start` of an item's tensor; 0 where the items of the launch have none.
    if T is None:
        return 0
    else:
        pointer = tl.load(line + slot).to(tl.pointer_type(T))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        return pointer + start


@triton.jit
def _tile(THREADS: tl.constexpr):
    # Elements of a turn, a thread's in a line, so that sums over a line stay within the thread.   (THREADS, VECTOR)
    return tl.arange(0, THREADS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _dot(x, y, ALIGNED: tl.constexpr):
    # Over a line. Where each of its elements is in another thread, all of them end with the same sum only if a product
    # is rounded before it is added: a thread would fuse its own with the sum of the others.
    if ALIGNED:
        return tl.sum(x * y, axis=1)
    else:
        return tl.sum(tl.fma(x, y, tl.zeros_like(x)), axis=1)


@triton.jit
def _number(row, column):
    return tl.load(row + column).to(tl.float32)


# ---- the formulas, element by element; fp32 ------------------------------------------------------------------------


@triton.jit
def _lerp(a, b, w, one_minus_w):
    # a + w (b - a), from the nearer end, as torch.lerp.
    return a + w * (b - a) if w < 0.5 else b - (b - a) * one_minus_w


@triton.jit
def _cube_root(x):
    # x >= 0. libdevice has it, the interpreter does not: a Newton step makes up for the last places of log and exp,
    # and 2^96 keeps them away from the numbers that Triton flushes to zero.
    tiny = x < 1e-28
    scaled = tl.where(tiny, x * 2.0**96, x)
    y = tl.exp2(tl.log2(scaled) * (1.0 / 3))
    y = y - (y - scaled / (y * y)) * (1.0 / 3)
    return tl.where((x > 0) & (x < float("inf")), tl.where(tiny, y * 2.0**-32, y), x)


@triton.jit
def _squared_d(program, v, eps, inverse_correction2):
    # D^2 = (v^(2p) + eps) / c  or  v^(2p) / c + eps
    power = _choice(program, POWER)
    if power == QUARTER:
        squared = tl.sqrt_rn(v)
    elif power == SIXTH:
        squared = _cube_root(v)
    else:
        squared = v
    return (squared + eps) * inverse_correction2 if _flag(program, EPS_INSIDE) else squared * inverse_correction2 + eps


@triton.jit
def _inverse(squared):
    # 1 / D, with 1 / 0 = 0. Triton's rsqrt takes subnormal numbers for 0.
    return tl.where(squared > 0, 1.0 / tl.sqrt_rn(squared), 0.0)


@triton.jit
def _moved(program, p, u, decay, keep, step):
    # (1 - decay) W - step u; cautious: decay only where it and the update agree; decay after: (1 - decay) (W - step u)
    if _flag(program, CAUTIOUS):
        p = p - tl.where(u * p >= 0, p, 0.0) * decay - u * step
    elif _flag(program, DECAY_AFTER):
        p = (p - u * step) * keep
    else:
        p = p * keep - u * step
    return p


@triton.jit
def _step_numbers(program, line, row, matrix):
    # decay, 1 - decay, step length
    at = tl.load(line + LENGTHS)
    length = tl.load(at.to(tl.pointer_type(tl.float64)) + matrix, mask=at != 0, other=1.0)
    ratio = tl.load(line + RATIO).to(tl.float64, bitcast=True)
    decay = tl.load(row + DECAY) * tl.where(_flag(program, DECAY_SCALED), ratio, 1.0)
    step = tl.load(row + LR) * (ratio * length)
    return decay.to(tl.float32), (1 - decay).to(tl.float32), step.to(tl.float32)


@triton.jit
def _scramble(x):
    # The 32-bit integer hash lowbias32 (github.com/skeeto/hash-prospector).
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _seed(line, row):
    # What tells the random bits of this step and this item from all others.
    s = _scramble(tl.load(row + STEP).to(tl.int64).to(tl.uint32))
    for k in tl.static_range(3):
        s = _scramble(s + (tl.load(line + PLACE + k).to(tl.uint32) + 1) * 0x9E3779B9)
    return s


@triton.jit
def _load_param(param, mantissa, at, mask, L: tl.constexpr):
    # The fp32 number that parameter and mantissa make together.
    p = tl.load(param + at, mask=mask, other=0.0).to(tl.float32)
    if L is not None:
        low = tl.load(mantissa + at, mask=mask, other=0).to(tl.int32)
        p = (p.to(tl.int32, bitcast=True) + low).to(tl.float32, bitcast=True)
    return p


@triton.jit
def _round_bf16(p, program, seed, element):
    # bf16 is the upper half of fp32: adding 16 random bits below it and cutting rounds up with the right odds.
    if _choice(program, ROUNDING) == STOCHASTIC:
        noise = _scramble(_scramble(element.to(tl.uint32)) ^ seed) >> 16
        rounded = ((p.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)
        p = tl.where(tl.abs(p) < float("inf"), rounded, p)
    return p


@triton.jit
def _store_param(param, mantissa, program, seed, start, at, mask, p, P: tl.constexpr, L: tl.constexpr):
    if L is not None:
        bits = p.to(tl.int32, bitcast=True)
        bits = tl.where(p == p, bits, 0x7FC00000)  # rounding up a NaN could carry into its sign
        high = (bits + 0x8000) & -0x10000
        tl.store(mantissa + at, (bits - high).to(tl.int16), mask=mask)
        p = high.to(tl.float32, bitcast=True)
    elif P.is_bf16():
        p = _round_bf16(p, program, seed, start + at)
    tl.store(param + at, p.to(P), mask=mask)


UNSPECIALIZED = ("count", "first_item", "items", "first_chunk", "partials")


@triton.jit(do_not_specialize=UNSPECIALIZED)
def update_moments_kernel(
    table,  # (count,) first chunks, (count,) first lines, (count, ITEM_FIELDS) items; int64
    count,
    first_item,  # of this launch, which has so many items, and its first chunk
    items,
    first_chunk,
    rows,  # (parameters, COLUMNS) fp64
    partials,  # (chunks, SUMS) fp64, written
    G: tl.constexpr,  # element types of gradient, momentum, second moment, direction's input, parameter, mantissa;
    M: tl.constexpr,  # None where the items have no such tensor
    V: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    ALIGNED: tl.constexpr,  # all addresses are multiples of 16 bytes, all sizes of VECTOR
    CHUNK: tl.constexpr,
    THREADS: tl.constexpr,
):
    # m <- beta m + (1 - beta) g,  v <- beta v + (1 - beta) g^2,  x = read(m) / D; whole programs: W <- keep W - step u
    chunk = first_chunk + tl.program_id(0)
    line, matrix, start, length = _find(table, table + 2 * count, first_item, items, chunk, ITEM_FIELDS, ALIGNED, CHUNK)
    row = rows + tl.load(line + ITEM_ROW) * COLUMNS
    direction = _pointer(line, DIRECTION, start, D, ALIGNED)
    tile = _tile(THREADS)
    if tl.load(row + FINITE) == 0:
        if D is not None:
            for turn in range(0, length, THREADS * VECTOR):
                at = turn + tile
                tl.store(direction + at, tl.zeros([THREADS, VECTOR], D), mask=at < length)
        return
    program = tl.load(line + ITEM_PROGRAM)
    grad = _pointer(line, GRAD, start, G, ALIGNED)
    momentum = _pointer(line, MOMENTUM, start, M, ALIGNED)
    second = _pointer(line, SECOND, start, V, ALIGNED)
    param = _pointer(line, PARAM, start, P, ALIGNED)
    mantissa = _pointer(line, MANTISSA, start, L, ALIGNED)
    grad_scale = _number(row, GRAD_SCALE)
    beta1 = _number(row, BETA1)
    one_minus_beta1 = _number(row, ONE_MINUS_BETA1)
    beta2 = _number(row, BETA2)
    one_minus_beta2 = _number(row, ONE_MINUS_BETA2)
    read_beta1 = _number(row, READ_BETA1)
    one_minus_read_beta1 = _number(row, ONE_MINUS_READ_BETA1)
    eps = _number(row, EPS)
    inverse_correction1 = _number(row, INVERSE_CORRECTION1)
    inverse_correction2 = _number(row, INVERSE_CORRECTION2)
    input_scale = _number(row, INPUT_SCALE)
    decay, keep, step = _step_numbers(program, line, row, matrix)
    seed = _seed(line, row)
    input_sq = tl.zeros([THREADS], tl.float32)
    input_max = tl.zeros([THREADS], tl.float32)
    grad_dot = tl.zeros([THREADS], tl.float32)
    momentum_sq = tl.zeros([THREADS], tl.float32)
    momentum_max = tl.zeros([THREADS], tl.float32)
    update_sq = tl.zeros([THREADS], tl.float32)
    param_sq = tl.zeros([THREADS], tl.float32)
    for turn in range(0, length, THREADS * VECTOR):
        at = turn + tile
        mask = at < length
        # All loads before the first store, which the compiler lets none of them pass.
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32) * grad_scale
        m = tl.load(momentum + at, mask=mask, other=0.0).to(tl.float32)
        if V is not None:
            v = tl.load(second + at, mask=mask, other=0.0).to(tl.float32)
        if P is not None:
            p = _load_param(param, mantissa, at, mask, L)
        if _flag(program, FROZEN_MOMENTS) == 0:
            m = m * beta1 + g if _flag(program, HEAVY_BALL) else _lerp(m, g, one_minus_beta1, beta1)
            stored = m.to(M)
            tl.store(momentum + at, stored, mask=mask)
            m = stored.to(tl.float32)  # what the next step will read
        if _flag(program, NESTEROV):
            d = g + m * read_beta1 if _flag(program, HEAVY_BALL) else _lerp(g, m, read_beta1, one_minus_read_beta1)
        else:
            d = m * inverse_correction1
        if V is not None:
            if _flag(program, FROZEN_MOMENTS) == 0:
                v = v + g * g if _flag(program, SUM) else v * beta2 + g * g * one_minus_beta2
                tl.store(second + at, v.to(V), mask=mask)
            squared = _squared_d(program, v, eps, inverse_correction2)
        grad_dot += _dot(g, m, ALIGNED)
        momentum_sq += _dot(m, m, ALIGNED)
        momentum_max = tl.maximum(momentum_max, tl.max(tl.abs(m), axis=1))
        if P is not None and _choice(program, KIND) == IDENTITY:
            if V is not None:
                d = tl.where(squared > 0, d / squared, 0.0)
        else:
            if V is not None:
                d = d * _inverse(squared)
            input_sq += _dot(d, d, ALIGNED)
            input_max = tl.maximum(input_max, tl.max(tl.abs(d), axis=1))
            if P is not None:
                d = (d > 0).to(tl.float32) - (d < 0).to(tl.float32)
                if V is not None:
                    d = d * _inverse(squared)
        if P is not None:
            p = _moved(program, p, d, decay, keep, step)
            update_sq += _dot(d, d, ALIGNED)
            param_sq += _dot(p, p, ALIGNED)
            _store_param(param, mantissa, program, seed, start, at, mask, p, P, L)
        if D is not None:
            if D.is_fp16():
                d = d * input_scale
                d = tl.where(tl.abs(d) > 65504.0, tl.where(d < 0, -65504.0, 65504.0), d)  # a NaN stays one
            tl.store(direction + at, d.to(D), mask=mask)
    partial = partials + chunk.to(tl.int64) * SUMS
    tl.store(partial + INPUT_SQ, tl.sum(input_sq).to(tl.float64))
    tl.store(partial + INPUT_MAX, tl.max(input_max).to(tl.float64))
    tl.store(partial + GRAD_DOT, tl.sum(grad_dot).to(tl.float64))
    tl.store(partial + MOMENTUM_SQ, tl.sum(momentum_sq).to(tl.float64))
    tl.store(partial + MOMENTUM_MAX, tl.max(momentum_max).to(tl.float64))
    if P is not None:
        tl.store(partial + UPDATE_SQ, (tl.sum(update_sq) * (step * step)).to(tl.float64))
        tl.store(partial + PARAM_SQ, tl.sum(param_sq).to(tl.float64))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def apply_update_kernel(
    table,  # as for update_moments_kernel
    count,
    first_item,
    items,
    first_chunk,
    rows,
    partials,
    V: tl.constexpr,  # element types of second moment, direction, parameter, mantissa; None where there is none
    D: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    THREADS: tl.constexpr,
):
    # W <- (1 - decay) W - step d / D
    chunk = first_chunk + tl.program_id(0)
    line, matrix, start, length = _find(table, table + 2 * count, first_item, items, chunk, ITEM_FIELDS, ALIGNED, CHUNK)
    row = rows + tl.load(line + ITEM_ROW) * COLUMNS
    if tl.load(row + FINITE) == 0:
        return
    program = tl.load(line + ITEM_PROGRAM)
    second = _pointer(line, SECOND, start, V, ALIGNED)
    direction = _pointer(line, DIRECTION, start, D, ALIGNED)
    param = _pointer(line, PARAM, start, P, ALIGNED)
    mantissa = _pointer(line, MANTISSA, start, L, ALIGNED)
    eps = _number(row, EPS)
    inverse_correction2 = _number(row, INVERSE_CORRECTION2)
    decay, keep, step = _step_numbers(program, line, row, matrix)
    seed = _seed(line, row)
    tile = _tile(THREADS)
    update_sq = tl.zeros([THREADS], tl.float32)
    param_sq = tl.zeros([THREADS], tl.float32)
    for turn in range(0, length, THREADS * VECTOR):
        at = turn + tile
        mask = at < length
        d = tl.load(direction + at, mask=mask, other=0.0).to(tl.float32)
        if V is not None:
            v = tl.load(second + at, mask=mask, other=0.0).to(tl.float32)
            d = d * _inverse(_squared_d(program, v, eps, inverse_correction2))
        p = _moved(program, _load_param(param, mantissa, at, mask, L), d, decay, keep, step)
        update_sq += _dot(d, d, ALIGNED)
        param_sq += _dot(p, p, ALIGNED)
        _store_param(param, mantissa, program, seed, start, at, mask, p, P, L)
    partial = partials + chunk.to(tl.int64) * SUMS
    tl.store(partial + UPDATE_SQ, (tl.sum(update_sq) * (step * step)).to(tl.float64))
    tl.store(partial + PARAM_SQ, tl.sum(param_sq).to(tl.float64))


@triton.jit(do_not_specialize=["count", "partials"])
def sums_kernel(
    table,  # as for update_moments_kernel
    count,
    rows,
    sums,  # (lines, SUMS) fp64, written
    partials,
    AFTER: tl.constexpr,
    CHUNK: tl.constexpr,
    LINES: tl.constexpr,
):
    # The partials of a matrix' chunks, added up (the largest of them in columns of the largest), into its line.
    program_id = tl.program_id(0)
    item = _owner(table + count, count, program_id)
    line = table + 2 * count + item.to(tl.int64) * ITEM_FIELDS
    if tl.load(rows + tl.load(line + ITEM_ROW) * COLUMNS + FINITE) == 0:
        return
    matrix = program_id - tl.load(table + count + item)
    chunks = (tl.load(line + SIZE) - 1) // CHUNK + 1
    partials += (tl.load(table + item) + matrix * chunks) * SUMS
    column = tl.arange(0, 8)
    if AFTER:
        known = (column >= UPDATE_SQ) & (column < SUMS)
    else:
        known = column < tl.where(_choice(tl.load(line + ITEM_PROGRAM), KIND) == GIVEN, UPDATE_SQ, SUMS)
    total = tl.zeros([LINES, 8], tl.float64)
    largest = tl.zeros([LINES, 8], tl.float64)
    for first in range(0, chunks, LINES):
        at = first + tl.arange(0, LINES)
        mask = (at < chunks)[:, None] & known[None, :]
        x = tl.load(partials + at[:, None] * SUMS + column[None, :], mask=mask, other=0.0)
        total += x
        largest = tl.maximum(largest, x)
    is_largest = (column == INPUT_MAX) | (column == MOMENTUM_MAX)
    result = tl.where(is_largest, tl.max(largest, axis=0), tl.sum(total, axis=0))
    tl.store(sums + (tl.load(line + ITEM_FIRST_SUM) + matrix) * SUMS + column, result, mask=known)


# ---- the numbers of a step: once for every parameter, in fp64 --------------------------------------------------------
#
# libdevice's expm1 and pow are not in the interpreter; exp and log are everywhere.


@triton.jit
def _expm1(x):
    # Kahan's: what exp rounds away, the log of its result has in common with it.
    y = tl.exp(x)
    near = tl.where(y == 1, x, (y - 1) * (x / tl.log(y)))
    return tl.where(tl.abs(x) < 0.5, near, y - 1)


@triton.jit
def _power_of(x, exponent):
    # x >= 0
    return tl.where(exponent == 0, 1.0, tl.exp(exponent * tl.log(x)))


@triton.jit
def _bias_correction(beta, t):
    # 1 - beta^t without cancellation; beta in [0, 1).
    return tl.where(beta == 0, 1.0, -_expm1(t * tl.log(beta)))


@triton.jit
def _geometric(ratio, t):
    # sum of ratio^j for j = 0 .. t - 1
    below = tl.where(ratio <= 0, 1.0, _bias_correction(ratio, t) / (1 - ratio))
    above = _expm1(t * tl.log(ratio)) / (ratio - 1)
    return tl.where(ratio < 1, below, tl.where(ratio == 1, t, above))


@triton.jit
def _twice_power(program):
    # 2 p for D = v^p
    power = _choice(program, POWER)
    third = tl.where(power == SIXTH, 1.0, 0.0).to(tl.float64) / 3
    return tl.where(power == QUARTER, 0.5, tl.where(power == HALF, 1.0, third))


@triton.jit
def _input_bound(program, beta1, one_minus_beta1, read, beta2, one_minus_beta2, eps, inverse1, inverse2, t, g, m):
    # A bound on |x| for x = y / D; g, m: the largest entries of gradient and old momentum. formulas.cuh has the proof.
    heavy_ball, nesterov = _flag(program, HEAVY_BALL), _flag(program, NESTEROV)
    weight = tl.where(heavy_ball, 1.0, one_minus_beta1)
    m = beta1 * m + weight * g
    fresh = tl.where(heavy_ball, 1.0, tl.abs(1 - read))
    y = tl.where(nesterov, fresh * g + read * m, m) * inverse1
    beta2 = tl.where(_flag(program, SUM), 1.0, beta2)
    gain = tl.where(_flag(program, SUM), 1.0, one_minus_beta2)
    counts = _flag(program, MOMENTUM_CORRECTION) | _flag(program, SECOND_CORRECTION)
    ratio = beta1 * beta1 / beta2
    c = weight * tl.sqrt(_geometric(ratio, tl.where(counts, t, float("inf"))) / gain)
    first = weight * weight * _geometric(ratio, t - 1) / gain + _power_of(ratio, t - 1)
    c = tl.where(_flag(program, START_FIRST), tl.where(t == 1, 1.0, tl.sqrt(first)), c)
    c = tl.where(nesterov, weight / tl.sqrt(gain) + beta1 * c, c)
    power = _twice_power(program)
    by_history = _power_of(y, 1 - power) * _power_of(c * inverse1, power) / tl.sqrt(inverse2)
    by_eps = y / tl.sqrt(eps * tl.where(_flag(program, EPS_INSIDE), inverse2, 1.0))
    divided = tl.where(by_history <= by_eps, by_history, by_eps)
    return tl.where(power == 0, y, divided) * 1.02  # the momentum is rounded to bf16 at worst, and v to fp32


@triton.jit
def _input_scale(bound):
    # 2^k with bound 2^k <= 2^15, which fp16 holds; 1 where there is no bound. At most 2^127, the largest fp32.
    exponent = ((bound.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1022  # bound < 2^exponent
    exponent = 15 - tl.minimum(tl.maximum(exponent, -112), 130)
    scale = ((exponent + 1023) << 52).to(tl.float64, bitcast=True)
    return tl.where((bound > 0) & (bound < float("inf")), scale, 1.0)


@triton.jit
def _hyper(hypers, count, at):
    # The value; where the number lives in memory, what is there, fp32 or fp64.
    address = tl.load(hypers + count + at)
    wide = tl.load(hypers + 2 * count + at) != 0
    value = tl.load(hypers + at).to(tl.float64, bitcast=True)
    narrow = tl.load(address.to(tl.pointer_type(tl.float32)), mask=(address != 0) & (wide == 0), other=0.0)
    value = tl.where((address != 0) & (wide == 0), narrow.to(tl.float64), value)
    return tl.load(address.to(tl.pointer_type(tl.float64)), mask=(address != 0) & wide, other=value)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def grad_stats_kernel(
    table,  # as for update_moments_kernel, with GRADIENT_FIELDS
    count,
    first_item,
    items,
    first_chunk,
    partials,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    THREADS: tl.constexpr,
):
    # Largest magnitude, infinite where an entry is not finite, and sum of squares.
    # From the last chunk to the first: `update_moments` begins with the gradients that are still in the cache.
    chunk = first_chunk + tl.num_programs(0) - 1 - tl.program_id(0)
    line, _, start, length = _find(table, table + 2 * count, first_item, items, chunk, GRADIENT_FIELDS, ALIGNED, CHUNK)
    grad = _pointer(line, GRAD, start, G, ALIGNED)
    tile = _tile(THREADS)
    most = tl.zeros([THREADS], tl.float32)
    square = tl.zeros([THREADS], tl.float32)
    for turn in range(0, length, THREADS * VECTOR):
        at = turn + tile
        g = tl.load(grad + at, mask=at < length, other=0.0).to(tl.float32)
        g = tl.where(g == g, g, float("inf"))
        most = tl.maximum(most, tl.max(tl.abs(g), axis=1))
        square += _dot(g, g, ALIGNED)
    partial = partials + chunk.to(tl.int64) * SUMS
    tl.store(partial + MOST, tl.max(most).to(tl.float64))
    tl.store(partial + SQUARE, tl.sum(square).to(tl.float64))


@triton.jit(do_not_specialize=["count", "hyper_count", "partials"])
def rows_kernel(
    table,  # as for grad_stats_kernel
    count,
    hypers,  # (3, hyper_count) int64: bits of the value, address or 0, whether fp64 is there
    hyper_count,
    rows,  # (parameters, COLUMNS) fp64, written
    sums,  # (lines, SUMS) fp64
    skipped,  # () int64, counted up
    partials,
    found_inf,  # () fp32 or None
    grad_scale,
    MEASURE: tl.constexpr,
    DECIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    LINES: tl.constexpr,
):
    # A parameter's row: what is measured, from the partials of its gradient; the rest, for which its step is counted,
    # from that and the sums of its momentum.
    program_id = tl.program_id(0)
    line = table + 2 * count + program_id.to(tl.int64) * GRADIENT_FIELDS
    row = rows + tl.load(line + GRADIENT_ROW) * COLUMNS
    scale = tl.full([], 1.0, tl.float64)
    if grad_scale is not None:
        scale = 1 / tl.load(grad_scale).to(tl.float64)
    if MEASURE:
        chunks = (tl.load(line + SIZE) - 1) // CHUNK + 1
        partials += tl.load(table + program_id) * SUMS
        most = tl.zeros([LINES], tl.float64)
        square = tl.zeros([LINES], tl.float64)
        for first in range(0, chunks, LINES):
            at = first + tl.arange(0, LINES)
            most = tl.maximum(most, tl.load(partials + at * SUMS + MOST, mask=at < chunks, other=0.0))
            square += tl.load(partials + at * SUMS + SQUARE, mask=at < chunks, other=0.0)
        grad_max = tl.max(most) * scale
        limit = tl.load(row + LARGEST_TAKEN)
        # Without a limit the largest of fp32, in which the gradient is unscaled.
        finite = grad_max <= tl.where(limit > 0, limit, 3.4028234663852886e38)
        if found_inf is not None:
            finite = finite & (tl.load(found_inf) == 0)
        tl.store(row + FINITE, finite.to(tl.float64))
        tl.store(row + GRAD_SQ, tl.sum(square) * scale * scale)
        tl.store(row + GRAD_MAX, grad_max)
    else:
        finite = tl.load(row + FINITE) != 0
        grad_max = tl.load(row + GRAD_MAX)
    if DECIDE:
        _decide(line, hypers, hyper_count, row, sums, skipped, scale, finite, grad_max, LINES)


@triton.jit
def _decide(line, hypers, hyper_count, row, sums, skipped, scale, finite, grad_max, LINES: tl.constexpr):
    # The rest of a row.
    end_sum = tl.load(line + END_SUM)
    largest = tl.zeros([LINES], tl.float64)
    for first in range(tl.load(line + FIRST_SUM), end_sum, LINES):
        at = first + tl.arange(0, LINES)
        largest = tl.maximum(largest, tl.load(sums + at * SUMS + MOMENTUM_MAX, mask=at < end_sum, other=0.0))
    momentum_max = tl.max(largest)

    program = tl.load(line + GRADIENT_PROGRAM)
    hyper = tl.load(line + GROUP) * HYPERS
    lr = _hyper(hypers, hyper_count, hyper + HYPER_LR)
    weight_decay = _hyper(hypers, hyper_count, hyper + HYPER_DECAY)
    beta1 = _hyper(hypers, hyper_count, hyper + HYPER_BETA1)
    beta2 = _hyper(hypers, hyper_count, hyper + HYPER_BETA2)
    eps = _hyper(hypers, hyper_count, hyper + HYPER_EPS)
    step_at = tl.load(line + STEP_AT)
    step = tl.load(step_at.to(tl.pointer_type(tl.float32)), mask=step_at != 0, other=0.0).to(tl.float64)
    begins = _flag(program, START_FIRST) & (step == 0)
    step += finite.to(tl.float64)
    tl.store(step_at.to(tl.pointer_type(tl.float32)), step.to(tl.float32), mask=step_at != 0)
    correction1, correction2 = _bias_correction(beta1, step), _bias_correction(beta2, step)
    inverse_correction1 = tl.where(_flag(program, MOMENTUM_CORRECTION), 1 / correction1, 1.0)
    inverse2 = 1 / _power_of(correction2, _twice_power(program))
    inverse_correction2 = tl.where(_flag(program, SECOND_CORRECTION), inverse2, 1.0)
    read = tl.where(_flag(program, INTERPOLATED), beta2 / beta1, beta1)
    tl.store(row + READ_BETA1, read)
    tl.store(row + ONE_MINUS_READ_BETA1, 1 - read)
    beta1, beta2 = tl.where(begins, 0.0, beta1), tl.where(begins, 0.0, beta2)
    bound = _input_bound(
        program,
        beta1,
        1 - beta1,
        read,
        beta2,
        1 - beta2,
        eps,
        inverse_correction1,
        inverse_correction2,
        step,
        grad_max,
        momentum_max,
    )
    tl.store(row + STEP, step)
    tl.store(row + GRAD_SCALE, tl.where(_flag(program, MAXIMIZE), -scale, scale))
    tl.store(row + BETA1, beta1)
    tl.store(row + ONE_MINUS_BETA1, 1 - beta1)
    tl.store(row + BETA2, beta2)
    tl.store(row + ONE_MINUS_BETA2, 1 - beta2)
    tl.store(row + EPS, eps)
    tl.store(row + INVERSE_CORRECTION1, inverse_correction1)
    tl.store(row + INVERSE_CORRECTION2, inverse_correction2)
    tl.store(row + DECAY, tl.where(_flag(program, DECAY_INDEPENDENT), 1.0, lr) * weight_decay)
    tl.store(row + LR, lr)
    tl.store(row + INPUT_SCALE, tl.where(finite, _input_scale(bound), 1.0))
    tl.atomic_add(skipped, 1, mask=finite == 0, sem="relaxed")


# ---- tables --------------------------------------------------------------------------------------------------------

SLOTS = ("grads", "momenta", "seconds", "directions", "params", "mantissas")
_Key = tuple[Hashable, ...]


@dataclass(frozen=True)
class _Work:
    """An item as its launch sees it; dtypes: of its tensors, None where it has none; fields: its line in the table."""

    dtypes: tuple[torch.dtype | None, ...]
    aligned: bool
    matrices: int
    size: int
    fields: list[int]


@dataclass(frozen=True)
class _Launch:
    """Items of one table that a launch takes, and their chunks; types: the elements', in the kernel's order."""

    types: tuple[tl.dtype | None, ...]
    aligned: bool
    first_item: int
    items: int
    first_chunk: int
    chunks: int


@dataclass
class _Plan:
    """A table on the device and the launches that read it. streams: those on which it is known to have arrived."""

    table: Tensor
    launches: list[_Launch]
    items: int
    lines: int
    chunks: int
    home: torch.cuda.Stream | None = None
    streams: set[int] = field(default_factory=set)


_plans: OrderedDict[_Key, _Plan] = OrderedDict()
_captured: dict[_Key, _Plan] = {}  # graphs read these tables for as long as they are replayed


def _recall(op: str, key: _Key, device: torch.device, make: Callable[[], _Plan]) -> _Plan:
    """The plan of this key on the current stream, made where there is none; RuntimeError during a capture."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    plan = _plans.get(key) or _captured.get(key)
    if plan is None:
        if capturing:
            raise RuntimeError(
                f"{op}: a CUDA graph is being captured, and the Triton kernels have no table of these tensors and "
                "numbers yet; run one step with the same tensors before capturing"
            )
        plan = make()
    _plans[key] = plan
    _plans.move_to_end(key)
    if len(_plans) > KEPT:
        _plans.popitem(last=False)
    if capturing:
        _captured[key] = plan  # torch.cuda.graph synchronizes before it captures, so the table has arrived
    elif device.type == "cuda":
        _await(plan)
    return plan


def _await(plan: _Plan) -> None:
    """Lets the current stream wait for the upload of a table, and the table's memory for the stream."""
    stream = torch.cuda.current_stream()
    if plan.home is None:
        plan.home = stream
    elif stream.cuda_stream not in plan.streams:
        stream.wait_stream(plan.home)
        plan.table.record_stream(stream)
    plan.streams.add(stream.cuda_stream)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches, and torch answers about streams, on the current device: makes it the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _to_device(numbers: list[int], device: torch.device) -> Tensor:
    """int64 numbers on the device, through pinned memory so that the host does not wait for the copy."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


def _make_plan(works: Sequence[_Work], device: torch.device) -> _Plan:
    """Items of the same element types side by side, a launch for each of these groups."""
    groups: dict[tuple[tuple[torch.dtype | None, ...], bool], list[_Work]] = {}
    for work in works:
        groups.setdefault((work.dtypes, work.aligned), []).append(work)
    starts, lines, table, launches = [0], [0], list[int](), list[_Launch]()
    for (dtypes, aligned), members in groups.items():
        first_item, first_chunk = len(starts) - 1, starts[-1]
        for work in members:
            starts.append(starts[-1] + work.matrices * triton.cdiv(work.size, CHUNK))
            lines.append(lines[-1] + work.matrices)
            table += work.fields
        types = tuple(None if dtype is None else DTYPES[dtype] for dtype in dtypes)
        launches.append(_Launch(types, aligned, first_item, len(members), first_chunk, starts[-1] - first_chunk))
    uploaded = _to_device(starts[:-1] + lines[:-1] + table, device)
    return _Plan(uploaded, launches, len(works), lines[-1], starts[-1])


def _facts(tensors: Sequence[Tensor]) -> _Key:
    """What a table depends on."""
    return tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors)


def _bits(number: float) -> int:
    return int(struct.unpack("q", struct.pack("d", number))[0])


def _partials(scratch: Tensor, counters: int, chunks: int) -> Tensor:
    """The memory in which chunks leave their sums: behind the counters of the compiled kernels, which stay zero."""
    wanted = counters + chunks * SUMS.value
    if scratch.numel() < wanted:
        raise ValueError(f"scratch has {scratch.numel()} elements; these tensors need {wanted}")
    return scratch[counters:]


# ---- the ops -------------------------------------------------------------------------------------------------------


def can_use(tensors: Sequence[Tensor], matrices: int) -> str | None:
    """None when the kernels take an item of these tensors, else the reason; tensors without elements are absent ones.

    They take flat items: every tensor is one range of memory, contiguous, or, where the item is one matrix and all have
    one shape, in another order of dimensions that is the same for all.
    """
    if torch.compiler.is_compiling():
        return "a table of addresses cannot be traced by torch.compile"
    present = [t for t in tensors if t.numel() != 0]
    for t in present:
        if t.dtype not in DTYPES:
            return f"a tensor is {t.dtype}; accepted are {', '.join(map(str, DTYPES))}"
    if all(t.is_contiguous() for t in present):
        return None
    if matrices != 1:
        return f"the {matrices} matrices of an item are not contiguous"
    return None if _is_dense(present) else "the tensors of an item are not dense ranges of memory with equal strides"


def _is_dense(tensors: Sequence[Tensor]) -> bool:
    """Whether all have the strides of a permuted contiguous tensor; those of dimensions of one element do not count."""
    if any(t.shape != tensors[0].shape for t in tensors):
        return False
    dims = sorted((d for d, size in enumerate(tensors[0].shape) if size != 1), key=tensors[0].stride)
    expected = 1
    for d in dims:
        if any(t.stride(d) != expected for t in tensors):
            return False
        expected *= tensors[0].shape[d]
    return True


def _check_item(op: str, i: int, tensors: Sequence[Tensor], matrices: int, device: torch.device) -> None:
    reason = can_use(tensors, matrices)
    if reason is None and any(t.device != device for t in tensors):
        reason = f"a tensor is not on {device}, where the table of rows is"
    if reason is None and len({t.numel() for t in tensors}) > 1:
        reason = f"the tensors differ in size: {', '.join(str(tuple(t.shape)) for t in tensors)}"
    if reason is not None:
        raise ValueError(f"{op}: item {i}: {reason}")


def _is_aligned(addresses: Sequence[int], size: int) -> bool:
    """Whether every thread's elements, in every matrix, are 16 bytes that begin at a multiple of 16."""
    return size % VECTOR.value == 0 and all(address % 16 == 0 for address in addresses)


def grad_stats(
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    rows: Tensor,
    sums: Tensor,
    skipped: Tensor,
    scratch: Tensor,
    programs: Sequence[int],
    first_sums: Sequence[int],
    hyper_of: Sequence[int],
    hyper: Sequence[float],
    tensors: Sequence[Tensor],
    tensor_at: Sequence[int],
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    decide: bool = True,
) -> None:
    """Equals `torch.ops.steepest.grad_stats` where `can_use` has no objection to a gradient.

    Fills rows, counts steps (an empty list: nobody counts) and skipped; found_inf and grad_scale: fp32, one element.
    decide=False: fills what is measured, and counts nothing.
    ValueError for what it does not take, RuntimeError for a table that a CUDA graph's capture would have to upload.
    Slower than the compiled kernel for many tiny tensors: the key of the table is put together in Python in every call.
    """
    if not grads:
        return
    device = rows.device

    owners = _owner_fields("grad_stats", steps, programs, first_sums, hyper_of)

    def gradients() -> _Plan:
        works = []
        for i, grad in enumerate(grads):
            _check_item("grad_stats", i, [grad], 1, device)
            aligned = _is_aligned([grad.data_ptr()], grad.numel())
            works.append(_Work((grad.dtype,), aligned, 1, grad.numel(), [grad.numel(), grad.data_ptr(), *owners(i)]))
        return _make_plan(works, device)

    with _on(device):
        lists = (tuple(programs), tuple(first_sums), tuple(hyper_of))
        plan = _recall("grad_stats", ("grad_stats", device, _facts(grads), _facts(steps), *lists), device, gradients)
        hypers = _hypers("grad_stats", hyper, tensors, tensor_at, device)
        partials = _partials(scratch, max(len(rows), len(sums)), plan.chunks)
        for launch, tables in _launches(plan):
            (g,) = launch.types
            grad_stats_kernel[(launch.chunks,)](*tables, partials, g, launch.aligned, CHUNK, THREADS, **OPTIONS)
        head = (plan.table, plan.items, hypers.table, hypers.items, rows, sums, skipped, partials)
        rows_kernel[(plan.items,)](*head, found_inf, grad_scale, True, decide, CHUNK, LINES, **FINISH_OPTIONS)


def decide_steps(
    steps: Sequence[Tensor],
    rows: Tensor,
    sums: Tensor,
    skipped: Tensor,
    programs: Sequence[int],
    first_sums: Sequence[int],
    hyper_of: Sequence[int],
    hyper: Sequence[float],
    tensors: Sequence[Tensor],
    tensor_at: Sequence[int],
    grad_scale: Tensor | None,
) -> None:
    """Equals `torch.ops.steepest.decide_steps`; errors as for `grad_stats`, after which it fills the rest of rows."""
    if not programs:
        return
    device = rows.device
    owners = _owner_fields("decide_steps", steps, programs, first_sums, hyper_of)

    def measured() -> _Plan:
        return _make_plan([_Work((None,), False, 1, 1, [1, 0, *owners(i)]) for i in range(len(programs))], device)

    with _on(device):
        lists = (tuple(programs), tuple(first_sums), tuple(hyper_of))
        plan = _recall("decide_steps", ("decide_steps", device, _facts(steps), *lists), device, measured)
        hypers = _hypers("decide_steps", hyper, tensors, tensor_at, device)
        head = (plan.table, plan.items, hypers.table, hypers.items, rows, sums, skipped, None)
        rows_kernel[(plan.items,)](*head, None, grad_scale, False, True, CHUNK, LINES, **FINISH_OPTIONS)


def _owner_fields(
    op: str, steps: Sequence[Tensor], programs: Sequence[int], first_sums: Sequence[int], hyper_of: Sequence[int]
) -> Callable[[int], list[int]]:
    """What the line of the i-th row says beside its gradient."""

    def fields(i: int) -> list[int]:
        step = steps[i].data_ptr() if steps and steps[i].numel() else 0
        if step == 0 and Program.unpacked(programs[i]).start_first:
            raise ValueError(f"{op}: programs[{i}] begins with the first gradient, which steps[{i}] must count")
        return [i, programs[i], step, first_sums[i], first_sums[i + 1], hyper_of[i]]

    return fields


def _hypers(
    op: str, hyper: Sequence[float], tensors: Sequence[Tensor], tensor_at: Sequence[int], device: torch.device
) -> _Plan:
    """The table of the groups' numbers."""

    def numbers() -> _Plan:
        addresses, wide = [0] * len(hyper), [0] * len(hyper)
        for tensor, at in zip(tensors, tensor_at):
            addresses[at], wide[at] = tensor.data_ptr(), int(tensor.dtype == torch.float64)
        return _Plan(_to_device([*map(_bits, hyper), *addresses, *wide], device), [], len(hyper), 0, 0)

    key = ("hyper", device, tuple(hyper), _facts(tensors), tuple(tensor_at))
    return _recall(op, key, device, numbers)


def update_moments(
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    seconds: Sequence[Tensor],
    inputs: Sequence[Tensor],
    params: Sequence[Tensor],
    mantissas: Sequence[Tensor],
    rows: Tensor,
    sums: Tensor,
    scratch: Tensor,
    programs: Sequence[int],
    row_of: Sequence[int],
    matrices: Sequence[int],
    first_sums: Sequence[int],
    places: Sequence[int],
    ratios: Sequence[float],
) -> None:
    """Equals `torch.ops.steepest.update_moments` where `can_use` has no objection to an item; errors as `grad_stats`.

    Mutates momenta, seconds, inputs, params, mantissas and sums. Tensors without elements are absent, and so are those
    of an empty list.
    """
    slots = (grads, momenta, seconds, inputs, params, mantissas)
    _run("update_moments", slots, (), rows, sums, scratch, programs, row_of, matrices, first_sums, places, ratios)


def apply_update(
    directions: Sequence[Tensor],
    seconds: Sequence[Tensor],
    params: Sequence[Tensor],
    mantissas: Sequence[Tensor],
    lengths: Sequence[Tensor],
    factors: Sequence[Tensor],
    rows: Tensor,
    sums: Tensor,
    scratch: Tensor,
    programs: Sequence[int],
    row_of: Sequence[int],
    matrices: Sequence[int],
    first_sums: Sequence[int],
    places: Sequence[int],
    ratios: Sequence[float],
) -> None:
    """Equals `torch.ops.steepest.apply_update` where `can_use` has no objection to an item; errors as `grad_stats`.

    Mutates params, mantissas and sums. Tensors without elements are absent, and so are those of an empty list. Factors
    of rows are multiplied by before the launch.
    """
    if factors:
        directions = [_scaled(d, of_rows) for d, of_rows in zip(directions, factors, strict=True)]
    slots = ((), (), seconds, directions, params, mantissas)
    _run("apply_update", slots, lengths, rows, sums, scratch, programs, row_of, matrices, first_sums, places, ratios)


def _scaled(direction: Tensor, factors: Tensor) -> Tensor:
    """A direction by the factors of its rows, of which there may be none."""
    if not factors.numel():
        return direction
    return (direction.view(factors.numel(), -1) * factors.view(-1, 1)).view(direction.shape)


def _run(
    op: str,
    slots: Sequence[Sequence[Tensor]],
    lengths: Sequence[Tensor],
    rows: Tensor,
    sums: Tensor,
    scratch: Tensor,
    programs: Sequence[int],
    row_of: Sequence[int],
    matrices: Sequence[int],
    first_sums: Sequence[int],
    places: Sequence[int],
    ratios: Sequence[float],
) -> None:
    if not programs:
        return
    device = rows.device

    def items() -> _Plan:
        works = []
        for i, program in enumerate(programs):
            tensors = [each[i] if each and each[i].numel() else None for each in slots]
            present = [t for t in tensors if t is not None]
            _check_item(op, i, present, matrices[i], device)
            _check_complete(op, i, tensors, program)
            size = present[0].numel() // matrices[i]
            addresses = [0 if t is None else t.data_ptr() for t in tensors]
            scale = lengths[i].data_ptr() if lengths and lengths[i].numel() else 0
            numbers = [row_of[i], program, first_sums[i], *places[3 * i : 3 * i + 3], _bits(ratios[i]), scale]
            dtypes = tuple(None if t is None else t.dtype for t in tensors)
            works.append(_Work(dtypes, _is_aligned(addresses, size), matrices[i], size, [size, *addresses, *numbers]))
        return _make_plan(works, device)

    with _on(device):
        facts = tuple(map(_facts, (*slots, lengths)))
        lists = tuple(map(tuple, (programs, row_of, matrices, first_sums, places, ratios)))
        plan = _recall(op, (op, device, *facts, *lists), device, items)
        partials = _partials(scratch, max(len(rows), len(sums)), plan.chunks)
        for launch, tables in _launches(plan):
            kernel, types = (
                (update_moments_kernel, launch.types)
                if op == "update_moments"
                else (apply_update_kernel, launch.types[2:])
            )
            kernel[(launch.chunks,)](*tables, rows, partials, *types, launch.aligned, CHUNK, THREADS, **OPTIONS)
        sums_kernel[(plan.lines,)](
            plan.table, plan.items, rows, sums, partials, op == "apply_update", CHUNK, LINES, **FINISH_OPTIONS
        )


def _launches(plan: _Plan) -> Iterator[tuple[_Launch, tuple[Tensor, int, int, int, int]]]:
    """Every launch with the arguments that its kernel takes first."""
    for launch in plan.launches:
        yield launch, (plan.table, plan.items, launch.first_item, launch.items, launch.first_chunk)


def _check_complete(op: str, i: int, tensors: Sequence[Tensor | None], program: int) -> None:
    """ValueError where an item's tensors are not those of its program: the kernels go by the tensors alone."""
    present = {name for name, t in zip(SLOTS, tensors) if t is not None}
    formulas = Program.unpacked(program)
    needed, optional = {"directions", "params"}, set[str]()
    if op == "update_moments":
        needed = {"grads", "momenta", "params"} if formulas.whole else {"grads", "momenta"}
        optional = optional if formulas.whole else {"directions"}  # moments may be updated and no more
    if formulas.power != "none":
        needed.add("seconds")
    param = tensors[SLOTS.index("params")]
    if formulas.rounding == "mantissa" and param is not None and param.dtype == torch.bfloat16:
        needed.add("mantissas")
    if present - optional != needed:
        wanted = _listed(needed | optional)
        raise ValueError(f"{op}: item {i} has {_listed(present)}; its program {program:#x} takes {wanted}")


def _listed(slots: set[str]) -> str:
    return ", ".join(name for name in SLOTS if name in slots)
