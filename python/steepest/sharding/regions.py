"""Regions of a tensor's shards: the boxes that the ranks of a DTensor's mesh have of it.

A `Shard(d)` over P ranks cuts a length n into pieces of ceil(n / P), the last of which may be shorter or empty, as
torch.chunk does. Several of one dimension cut one another's pieces: first those of `Shard`, in the order of the mesh,
then those of `_StridedShard`, which FSDP2 makes of parameters that tensor parallelism has cut before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from torch.distributed.tensor import Placement, Shard

from ..matrices import Piece

__all__ = ["Rectangle", "Region", "rectangle", "regions", "shard_dims"]


@dataclass(frozen=True)
class Region:
    """A box of a tensor: for every dimension [start, stop)."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Rectangle:
    """Part of a matrix: rows [top, bottom) and columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def transposed(self) -> Rectangle:
        """The rectangle in the transposed matrix."""
        return Rectangle(self.left, self.right, self.top, self.bottom)


def shard_dims(placements: Sequence[Placement]) -> tuple[int, ...]:
    """The dimensions of the mesh along which a tensor is cut."""
    return tuple(i for i, placement in enumerate(placements) if _dim(placement) is not None)


def regions(shape: Sequence[int], mesh: Sequence[int], placements: Sequence[Placement]) -> tuple[Region, ...]:
    """The box of every rank of a mesh of these lengths, in row-major order of the coordinates."""
    dims = [_dim(placement) for placement in placements]
    plain = [i for i, placement in enumerate(placements) if dims[i] is not None and type(placement) is Shard]
    strided = [i for i in range(len(placements)) if dims[i] is not None and i not in plain]
    boxes = []
    for coordinate in product(*map(range, mesh)):
        start, stop = [0] * len(shape), list(shape)
        for i in (*plain, *strided):
            d = dims[i]
            assert d is not None
            d %= len(shape)
            size = -(-(stop[d] - start[d]) // mesh[i])
            first = min(start[d] + coordinate[i] * size, stop[d])
            start[d], stop[d] = first, min(first + size, stop[d])
        boxes.append(Region(tuple(start), tuple(stop)))
    return tuple(boxes)


def rectangle(region: Region, shape: Sequence[int], piece: Piece, matrix: int) -> Rectangle | None:
    """What a region has of one matrix of a piece, in the matrix' rows and columns; None: nothing.

    ValueError where a region cuts a convolution's kernel, so that what it has of a matrix is no rectangle.
    """
    if not shape:
        return Rectangle(0, 1, 0, 1)
    heads, row_dim, col_dim = piece.heads, piece.row_dim, piece.col_dim
    batch, head = divmod(matrix, heads)
    for d in range(piece.batch_dims - 1, -1, -1):
        batch, at = divmod(batch, shape[d])
        if not region.start[d] <= at < region.stop[d]:
            return None
    # What a kernel has of a column, or of a row of what is transposed.
    inner, kernel = prod(shape[piece.batch_dims + 2 :]), range(piece.batch_dims + 2, len(shape))
    for d in kernel:
        if (region.start[d], region.stop[d]) != (0, shape[d]):
            raise ValueError(
                f"dimension {d} of shape {tuple(shape)} is sharded, which cuts every row of its matrices into many "
                f"pieces: shard dimension {row_dim} or {col_dim}"
            )
    top, bottom = region.start[row_dim], region.stop[row_dim]
    left, right = (0, piece.cols) if col_dim >= len(shape) else (region.start[col_dim], region.stop[col_dim])
    if piece.by_columns:
        left, right = _within(piece.before(left), piece.before(right), head * piece.cols, piece.cols)
        top, bottom = top * inner, bottom * inner
    else:
        top, bottom = _within(piece.before(top), piece.before(bottom), head * piece.rows, piece.rows)
        left, right = left * inner, right * inner
    return Rectangle(top, bottom, left, right) if bottom > top and right > left else None


def _within(start: int, stop: int, first: int, length: int) -> tuple[int, int]:
    """[start, stop) cut to [first, first + length), counted from first."""
    return max(start, first) - first, min(stop, first + length) - first


def _dim(placement: Placement) -> int | None:
    """The dimension that a placement cuts: also `_StridedShard`'s, which need not be a `Shard`."""
    return None if placement.is_replicate() or placement.is_partial() else placement.dim  # type: ignore[attr-defined]
