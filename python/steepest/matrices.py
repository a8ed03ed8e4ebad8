"""How a parameter is read as matrices.

A parameter of shape (*batch, n, *rest) is a batch of matrices n x prod(rest). With `batch_dims=0` that is a plain
matrix or a convolution flattened to (out, in * kernel); with `batch_dims=1`, experts stacked in one tensor (E, m, n).
A fused weight holds several matrices one under the other: `split_sizes` gives their rows (q, k, v; gate and up), and
`num_heads` cuts the rows of each into equal heads that are matrices of their own.

    (3 * 64, 64), split_sizes=(64, 64, 64)               three pieces, each 1 matrix   64 x 64
    (3 * 64, 64), split_sizes=(64, 64, 64), num_heads=4  three pieces, each 4 matrices 16 x 64
    (8, 128, 64), split_sizes=(64, 64), batch_dims=1     two pieces, each 8 matrices   64 x 64

A layer that computes x W stores in x out: `transposed` reads it as out x in, so that rows are outputs in all that
counts rows: splits, heads, and the shape's ratio of the learning rate.

    (64, 3 * 64), split_sizes=(64, 64, 64), transposed   three pieces, each 1 matrix   64 x 64

A transposed convolution stores (in, out, *kernel) and sends every input to out * kernel outputs: `transposed` reads it
as (out * kernel) x in. Groups are heads along its columns.

    (16, 8, 2, 2), transposed                            one piece of 1 matrix         32 x 16
    (16, 8, 2, 2), transposed, num_heads=2, split_columns  one piece of 2 matrices     32 x 8

Some layers store q, k and v group by group, as GPT-NeoX each head's and Megatron those of each key head: `interleaved`
is the number of groups. Every split has as many rows in each, and its matrix is all of them, one below the other.

    (48, 64), split_sizes=(32, 8, 8), interleaved=4      q is rows 0-7, 12-19, 24-31, 36-43; k 8-9, 20-21, 32-33, 44-45

Heads of a projection back from attention lie side by side: `split_columns` counts splits and heads along the columns.

    (64, 96), num_heads=4, split_columns                 one piece of 4 matrices       64 x 24

A shape-dependent learning rate is computed from (rows, cols) of a piece: the matrix that is really orthogonalized.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# The group values that `pieces` takes: what an optimizer passes on from a parameter group.
LAYOUT_KEYS = ("split_sizes", "num_heads", "batch_dims", "transposed", "split_columns", "interleaved")


@dataclass(frozen=True)
class Piece:
    """Rows [start, start + length) of dimension `dim`, read as `batch` matrices of `rows` x `cols`.

    transposed: rows are what the tensor has as columns, so that `dim` is the one after those.   by_columns: [start,
    start + length) are columns, and `dim` is theirs, as in every transposed convolution.   groups, stride: its rows are
    length / groups ones from start on, as many from start + stride on, and so on, so that the view has a dimension
    more. `dim` then has groups * stride or more.

    `piece.view(t).reshape(piece.shape)` are the matrices; `d.reshape(piece.view(t).shape)` goes back.
    The pieces of one parameter are disjoint and cover it.
    """

    start: int
    length: int
    batch: int
    rows: int
    cols: int
    dim: int = 0
    narrow: bool = False  # whether its view is another one than its parameter
    transposed: bool = False
    by_columns: bool = False
    groups: int = 1
    stride: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, rows, cols)."""
        return self.batch, self.rows, self.cols

    @property
    def batch_dims(self) -> int:
        """How many dimensions come before those of a matrix."""
        return self.dim - (self.transposed != self.by_columns)

    @property
    def row_dim(self) -> int:
        """The dimension along which rows follow one another; columns follow along `col_dim`. Those of a kernel come
        after both, and belong to the columns, or to the rows of what is transposed.
        """
        return self.batch_dims + self.transposed

    @property
    def col_dim(self) -> int:
        return self.batch_dims + 1 - self.transposed

    @property
    def heads(self) -> int:
        """How many matrices lie one after another in `length`; 1 without elements."""
        size = self.cols if self.by_columns else self.rows
        return self.length // size if size else 1

    @property
    def of_group(self) -> int:
        """How many of `length` lie in each group."""
        return self.length // self.groups

    def before(self, place: int) -> int:
        """How many of `length` come before this place of `dim`."""
        if self.groups == 1:
            return min(max(place - self.start, 0), self.length)
        group, rest = divmod(max(place - self.start, 0), self.stride)
        return min(group * self.of_group + min(rest, self.of_group), self.length)

    def place(self, number: int) -> int:
        """The index along `dim` of entry `number` of `length`."""
        group, rest = divmod(number, self.of_group)
        return self.start + group * self.stride + rest

    def view(self, t: Tensor) -> Tensor:
        """The piece of `t` in its natural shape: always a view, whatever the strides of `t`. All of a scalar."""
        if self.groups > 1:
            return self._view_of_groups(t)
        part = t.narrow(self.dim, self.start, self.length) if t.ndim else t
        part = part.movedim(self.batch_dims, -1) if self.transposed else part
        if not self.by_columns:
            return part
        return part.unflatten(-1, (self.heads, self.cols)).movedim(-2, self.batch_dims)

    def _view_of_groups(self, t: Tensor) -> Tensor:
        rows = t.mT if self.transposed else t
        d, whole = self.batch_dims, self.groups * self.stride
        first = min(self.start, rows.shape[d] - whole)  # of as many rows for every group
        groups = rows.narrow(d, first, whole).unflatten(d, (self.groups, self.stride))
        return groups.narrow(d + 1, self.start - first, self.of_group)


def pieces(
    shape: Sequence[int],
    *,
    split_sizes: Sequence[int] | None = None,
    num_heads: int | Sequence[int] | None = None,
    batch_dims: int = 0,
    transposed: bool = False,
    split_columns: bool = False,
    interleaved: int = 1,
) -> tuple[Piece, ...]:
    """The matrices in a parameter of this shape, as one `Piece` per split, from the first row to the last.

    shape: at least `batch_dims + 2` dimensions.
    split_sizes: rows of each piece along dimension `batch_dims`; they sum to `shape[batch_dims]`. None: one piece.
    transposed: the matrices lie as cols x rows, so that splits and heads are along the last dimension, which is
        `batch_dims + 1`; of a transposed convolution they are along its inputs, with split_columns.
    num_heads: heads in each piece, one number for all or one per split (grouped-query attention: (32, 8, 8)).
    split_columns: splits and heads are along the columns, of a parameter that is no convolution but a transposed one.
    interleaved: the groups of rows that each hold an equal part of every split, one below the other; heads are counted
        in the rows of a split as they are gathered. Not with split_columns.
    Raises TypeError or ValueError that names the values. Cached: cheap enough to call in every step.
    """
    splits = None if split_sizes is None else _integers("split_sizes", split_sizes)
    num_heads = 1 if num_heads is None else num_heads
    heads = num_heads if isinstance(num_heads, int) else _integers("num_heads", num_heads)
    # Dynamo traces through a cache and warns about it; the function itself folds to constants.
    read = _pieces if torch.compiler.is_compiling() else _cached_pieces
    return read(tuple(shape), splits, heads, batch_dims, transposed, split_columns, interleaved)


def _pieces(
    shape: tuple[int, ...],
    splits: tuple[int, ...] | None,
    heads: int | tuple[int, ...],
    batch_dims: int,
    transposed: bool,
    split_columns: bool,
    interleaved: int,
) -> tuple[Piece, ...]:
    _check_dimensions(shape, batch_dims, split_columns and not transposed)
    batch, rows, cols = math.prod(shape[:batch_dims]), shape[batch_dims], math.prod(shape[batch_dims + 1 :])
    if transposed:
        rows, cols = cols, rows
        if len(shape) > batch_dims + 2 and not split_columns:
            _check_transposed_convolution(shape, splits, heads)
            split_columns = True
    dim, along = batch_dims + (transposed != split_columns), cols if split_columns else rows
    lengths = _lengths(shape, splits, dim, along)
    _check_groups(interleaved, splits, split_columns)
    parts, start = [], 0
    for length, h in zip(lengths, _heads(heads, lengths, "columns" if split_columns else "rows"), strict=True):
        size = (rows, length // h) if split_columns else (length // h, cols)
        another = length < along or transposed or split_columns
        groups = (interleaved, along // interleaved) if interleaved > 1 and length < along else (1, 0)
        parts.append(Piece(start, length, batch * h, *size, dim, another, transposed, split_columns, *groups))
        start += length // interleaved
    return tuple(parts)


_cached_pieces = lru_cache(maxsize=4096)(_pieces)


def _integers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence) or not all(isinstance(v, int) for v in values):
        raise TypeError(f"{name} must be integers, as in {name}=(64, 64, 64), but is: {values!r}")
    return tuple(values)


def _check_dimensions(shape: tuple[int, ...], batch_dims: int, split_columns: bool) -> None:
    if not isinstance(batch_dims, int) or batch_dims < 0:
        raise ValueError(f"batch_dims must be an integer >= 0 but is: {batch_dims!r}")
    if len(shape) < batch_dims + 2:
        raise ValueError(
            f"shape {shape} has {len(shape)} dimensions, but a matrix needs {batch_dims + 2} "
            f"with batch_dims={batch_dims}: send the parameter to AdamW, or lower batch_dims"
        )
    if split_columns and len(shape) > batch_dims + 2:
        raise ValueError(
            f"shape {shape} has {len(shape)} dimensions, of which split_columns=True takes {batch_dims + 2} with "
            f"batch_dims={batch_dims}: it is not for a convolution, unless for a transposed one (transposed=True)"
        )


def _check_transposed_convolution(
    shape: tuple[int, ...], splits: tuple[int, ...] | None, heads: int | tuple[int, ...]
) -> None:
    if splits is not None or heads not in (1, (1,)):
        option = f"num_heads={heads}" if splits is None else f"split_sizes={splits}"
        raise ValueError(
            f"{option} would cut the kernels of shape {shape}, a transposed convolution with transposed=True; its "
            "splits and heads go along its inputs: say split_columns=True as well, or batch_dims=1 for a stack"
        )


def _lengths(shape: tuple[int, ...], splits: tuple[int, ...] | None, dim: int, size: int) -> tuple[int, ...]:
    if splits is None:
        return (size,)
    if not splits or min(splits) < 1:
        raise ValueError(f"split_sizes must be one or more positive integers but is: {splits}")
    if sum(splits) != size:
        raise ValueError(
            f"split_sizes {splits} sum to {sum(splits)}, but dimension {dim} of shape {shape} is {size}: "
            f"give the size of each fused matrix along it so that they sum to {size}"
        )
    return splits


def _check_groups(interleaved: int, splits: tuple[int, ...] | None, split_columns: bool) -> None:
    if not isinstance(interleaved, int) or isinstance(interleaved, bool) or interleaved < 1:
        raise ValueError(f"interleaved must be a number of groups, an integer >= 1, but is: {interleaved!r}")
    if interleaved == 1:
        return
    if splits is None:
        raise ValueError(
            f"interleaved={interleaved} says in how many groups the splits lie: give split_sizes, the rows of each in "
            "all groups together"
        )
    if split_columns:
        raise ValueError(f"interleaved={interleaved} is of rows: leave out split_columns=True, or interleaved")
    for length in splits:
        if length % interleaved:
            raise ValueError(
                f"interleaved={interleaved} does not divide the split of {length} rows (splits {splits}): every group "
                "has as many rows of a split; give the rows of each in all groups together"
            )


def _heads(heads: int | tuple[int, ...], lengths: tuple[int, ...], what: str) -> tuple[int, ...]:
    counts = (heads,) * len(lengths) if isinstance(heads, int) else heads
    if len(counts) != len(lengths):
        raise ValueError(
            f"num_heads {counts} has {len(counts)} entries for {len(lengths)} splits {lengths}: give one per split"
        )
    for count, length in zip(counts, lengths, strict=True):
        if count < 1 or length % count:
            raise ValueError(
                f"num_heads={count} does not divide the {length} {what} of a piece (splits {lengths}): "
                "give the heads of each split, as in num_heads=(32, 8, 8) for grouped-query attention"
            )
    return counts
