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
LAYOUT_KEYS = ("split_sizes", "num_heads", "batch_dims", "transposed")


@dataclass(frozen=True)
class Piece:
    """Rows [start, start + length) of dimension `dim`, read as `batch` matrices of `rows` x `cols`.

    transposed: `dim` is the last one, and rows are what the tensor has as columns.

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

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, rows, cols)."""
        return self.batch, self.rows, self.cols

    @property
    def batch_dims(self) -> int:
        """How many dimensions come before those of a matrix."""
        return self.dim - self.transposed

    @property
    def heads(self) -> int:
        """How many matrices lie one below the other in `length` rows; 1 without elements."""
        return self.length // self.rows if self.rows else 1

    def view(self, t: Tensor) -> Tensor:
        """The piece of `t` in its natural shape: always a view, whatever the strides of `t`. All of a scalar."""
        part = t.narrow(self.dim, self.start, self.length) if t.ndim else t
        return part.mT if self.transposed else part


def pieces(
    shape: Sequence[int],
    *,
    split_sizes: Sequence[int] | None = None,
    num_heads: int | Sequence[int] | None = None,
    batch_dims: int = 0,
    transposed: bool = False,
) -> tuple[Piece, ...]:
    """The matrices in a parameter of this shape, as one `Piece` per row split, from the first row to the last.

    shape: at least `batch_dims + 2` dimensions.
    split_sizes: rows of each piece along dimension `batch_dims`; they sum to `shape[batch_dims]`. None: one piece.
    transposed: the matrices lie as cols x rows, so that splits and heads are along the last dimension, which is
        `batch_dims + 1`.
    num_heads: heads in each piece, one number for all or one per split (grouped-query attention: (32, 8, 8)).
    Raises TypeError or ValueError that names the values. Cached: cheap enough to call in every step.
    """
    splits = None if split_sizes is None else _integers("split_sizes", split_sizes)
    num_heads = 1 if num_heads is None else num_heads
    heads = num_heads if isinstance(num_heads, int) else _integers("num_heads", num_heads)
    # Dynamo traces through a cache and warns about it; the function itself folds to constants.
    read = _pieces if torch.compiler.is_compiling() else _cached_pieces
    return read(tuple(shape), splits, heads, batch_dims, transposed)


def _pieces(
    shape: tuple[int, ...],
    splits: tuple[int, ...] | None,
    heads: int | tuple[int, ...],
    batch_dims: int,
    transposed: bool,
) -> tuple[Piece, ...]:
    _check_dimensions(shape, batch_dims, transposed)
    batch, rows, cols = math.prod(shape[:batch_dims]), shape[batch_dims], math.prod(shape[batch_dims + 1 :])
    if transposed:
        rows, cols = cols, rows
    dim = batch_dims + transposed
    lengths = _lengths(shape, splits, dim, rows)
    found, start = [], 0
    for length, h in zip(lengths, _heads(heads, lengths), strict=True):
        another = length < rows or transposed
        found.append(Piece(start, length, batch * h, length // h, cols, dim, another, transposed))
        start += length
    return tuple(found)


_cached_pieces = lru_cache(maxsize=4096)(_pieces)


def _integers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence) or not all(isinstance(v, int) for v in values):
        raise TypeError(f"{name} must be integers, as in {name}=(64, 64, 64), but is: {values!r}")
    return tuple(values)


def _check_dimensions(shape: tuple[int, ...], batch_dims: int, transposed: bool) -> None:
    if not isinstance(batch_dims, int) or batch_dims < 0:
        raise ValueError(f"batch_dims must be an integer >= 0 but is: {batch_dims!r}")
    if len(shape) < batch_dims + 2:
        raise ValueError(
            f"shape {shape} has {len(shape)} dimensions, but a matrix needs {batch_dims + 2} "
            f"with batch_dims={batch_dims}: send the parameter to AdamW, or lower batch_dims"
        )
    if transposed and len(shape) > batch_dims + 2:
        raise ValueError(
            f"shape {shape} has {len(shape)} dimensions, of which transposed=True takes {batch_dims + 2} with "
            f"batch_dims={batch_dims}: a convolution cannot be transposed"
        )


def _lengths(shape: tuple[int, ...], splits: tuple[int, ...] | None, dim: int, rows: int) -> tuple[int, ...]:
    if splits is None:
        return (rows,)
    if not splits or min(splits) < 1:
        raise ValueError(f"split_sizes must be one or more positive integers but is: {splits}")
    if sum(splits) != rows:
        raise ValueError(
            f"split_sizes {splits} sum to {sum(splits)}, but dimension {dim} of shape {shape} is {rows}: "
            f"give the rows of each fused matrix so that they sum to {rows}"
        )
    return splits


def _heads(heads: int | tuple[int, ...], lengths: tuple[int, ...]) -> tuple[int, ...]:
    counts = (heads,) * len(lengths) if isinstance(heads, int) else heads
    if len(counts) != len(lengths):
        raise ValueError(
            f"num_heads {counts} has {len(counts)} entries for {len(lengths)} splits {lengths}: give one per split"
        )
    for count, length in zip(counts, lengths, strict=True):
        if count < 1 or length % count:
            raise ValueError(
                f"num_heads={count} does not divide the {length} rows of a piece (splits {lengths}): "
                "give the heads of each split, as in num_heads=(32, 8, 8) for grouped-query attention"
            )
    return counts
