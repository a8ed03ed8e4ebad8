"""How the matrices of one parameter lie over ranks, and which rank takes the direction of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from math import prod

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement

from ..matrices import Piece
from .ranks import Ranks
from .regions import Rectangle, Region, rectangle, regions, shard_dims

__all__ = ["LocalPart", "Part", "Sharding", "Unit"]


@dataclass(frozen=True)
class Part(Piece):
    """What a shard has of consecutive matrices of one piece, as a piece of the shard itself.

    first, count: the range along the dimensions before those of a matrix, read as one.
    """

    first: int = 0
    count: int = 1

    def view(self, t: Tensor) -> Tensor:
        t = super().view(t)
        if not self.batch_dims or (self.first, self.count) == (0, prod(t.shape[: self.batch_dims])):
            return t
        return t.flatten(0, self.batch_dims - 1).narrow(0, self.first, self.count)


@dataclass(frozen=True)
class LocalPart:
    """Consecutive matrices of a piece that one rank owns, as far as they lie here; all have the same rectangle.

    Rows of groups that do not repeat evenly in a shard are several parts of a matrix, from the top to the bottom.
    """

    piece: int
    matrices: range
    owner: int
    part: Part
    rectangle: Rectangle


@dataclass(frozen=True)
class Unit:
    """All matrices of a piece: for every rank what it has of each, and who owns each."""

    piece: Piece
    owners: tuple[int, ...]
    rectangles: tuple[tuple[Rectangle | None, ...], ...]

    def owned(self, rank: int) -> list[int]:
        return [k for k, owner in enumerate(self.owners) if owner == rank]


@dataclass(frozen=True, eq=False)
class Sharding:
    """The places of one parameter's shards.

    shape: of the parameter.   ranks: those that have different shards of it.   regions: their shards, by place.
    mesh, placements: of its DTensor; None of a plain parameter, which all ranks have whole.
    """

    shape: tuple[int, ...]
    ranks: Ranks
    regions: tuple[Region, ...]
    mesh: DeviceMesh | None = None
    placements: tuple[Placement, ...] = ()

    @cached_property
    def region(self) -> Region:
        """The shard of this rank."""
        return self.regions[self.ranks.place]

    def rectangles(self, piece: Piece) -> tuple[tuple[Rectangle | None, ...], ...]:
        """What every rank has of every matrix of a piece."""
        return tuple(
            tuple(rectangle(region, self.shape, piece, matrix) for matrix in range(piece.batch))
            for region in self.regions
        )

    def holders(self, piece: Piece) -> list[tuple[int, ...]]:
        """The ranks that have all of a matrix, one for each copy of the shards; () of one that shards cut."""
        whole, holders = piece.rows * piece.cols, []
        for matrix in zip(*self.rectangles(piece), strict=True):
            parts = {place: part.numel for place, part in enumerate(matrix) if part is not None}
            holders.append(tuple(parts) if all(numel == whole for numel in parts.values()) else ())
        return holders

    def blocks(self, block: int) -> tuple[Region, ...] | None:
        """The shards of a tensor (rows, blocks of a row): a row is what one index of dimension 0 holds, a block so many
        elements of it. None where shards cut blocks, or where a DTensor of that shape and these placements has others.
        """
        if len(self.shape) < 2:
            return None
        inner, cut = prod(self.shape[2:]), self.shape[2:]
        row, boxes = self.shape[1] * inner, []
        for region in self.regions:
            first, last = region.start[1] * inner, region.stop[1] * inner
            if region.shape[2:] != cut or first % block or (last % block and last < row):
                return None
            boxes.append(Region((region.start[0], first // block), (region.stop[0], -(-last // block))))
        if self.mesh is None:
            return tuple(boxes)
        dims, mesh = shard_dims(self.placements), self.mesh
        sizes, along = [mesh.size(i) for i in dims], [self.placements[i] for i in dims]
        there = regions((self.shape[0], -(-row // block)), sizes, along)
        return tuple(boxes) if tuple(boxes) == there * (len(boxes) // len(there)) else None

    def unit(self, piece: Piece, owners: Sequence[int]) -> Unit:
        return Unit(piece, tuple(owners), self.rectangles(piece))

    def local_parts(
        self, pieces: Sequence[Piece], owners: Sequence[Sequence[int]], region: Region | None = None
    ) -> list[LocalPart]:
        """What lies here of every piece, in runs of matrices that have one owner and one rectangle.

        region: the shard of another rank, to be asked about instead.
        """
        region = self.region if region is None else region
        parts = []
        for number, piece in enumerate(pieces):
            heads = piece.heads
            kinds: list[tuple[Rectangle, int, int, int] | None] = []
            for k in range(piece.batch):
                rect = rectangle(region, self.shape, piece, k)
                if rect is None:
                    kinds.append(None)
                    continue
                # Heads follow one another in one matrix of the batch, those that are cut excepted.
                size, of_head = (rect.shape[1], piece.cols) if piece.by_columns else (rect.shape[0], piece.rows)
                cut = k if heads > 1 and size < of_head else -1
                kinds.append((rect, owners[number][k], cut, k // heads if heads > 1 else 0))
            for kind, some in groupby(range(piece.batch), key=kinds.__getitem__):
                if kind is not None:
                    run = list(some)
                    for matrices, rect in _views(piece, range(run[0], run[-1] + 1), kind[0], region):
                        part = self._part(piece, matrices, rect, region)
                        parts.append(LocalPart(number, matrices, kind[1], part, rect))
        return parts

    def _part(self, piece: Piece, run: Sequence[int], rect: Rectangle, region: Region) -> Part:
        """A run of matrices as a piece of the shard."""
        heads, shard = piece.heads, region.shape
        if not shard:
            return Part(0, 1, 1, 1, 1)
        rows, cols = rect.shape
        batch, head = divmod(run[0], heads)
        of_head, size, offset = (piece.cols, cols, rect.left) if piece.by_columns else (piece.rows, rows, rect.top)
        start = piece.place(head * of_head + offset) - region.start[piece.dim]
        length = size * len(run) if heads > 1 else size
        count = 1 if heads > 1 else len(run)
        turned = piece.transposed or piece.by_columns
        another = turned or length < shard[piece.dim] or count < prod(shard[: piece.batch_dims])
        first, dim = self._local_batch(piece, batch, region), piece.dim
        groups = (length // piece.of_group, piece.stride) if piece.groups > 1 and length > piece.of_group else (1, 0)
        ways = (piece.transposed, piece.by_columns, *groups)
        return Part(start, length, len(run), rows, cols, dim, another, *ways, first=first, count=count)

    def _local_batch(self, piece: Piece, batch: int, region: Region) -> int:
        """The place of a batch index in the shard's dimensions before those of a matrix."""
        at, unit = 0, 1
        for d in range(piece.batch_dims - 1, -1, -1):
            batch, index = divmod(batch, self.shape[d])
            at += (index - region.start[d]) * unit
            unit *= region.shape[d]
        return at


def _views(piece: Piece, run: range, rect: Rectangle, region: Region) -> list[tuple[range, Rectangle]]:
    """A run of matrices, cut where its rows do not repeat evenly in the shard, so that each part is a view of that."""
    if piece.groups == 1:
        return [(run, rect)]
    height, heads = rect.shape[0], piece.heads
    first = run.start % heads * piece.rows + rect.top
    lengths = _even(piece, first, height * len(run) if heads > 1 else height, region.shape[piece.dim])
    if len(lengths) == 1:
        return [(run, rect)]
    if heads > 1 and all(length % height == 0 for length in lengths):
        ends = [run.start + end // height for end in accumulate(lengths, initial=0)]
        return [(range(a, b), rect) for a, b in pairwise(ends)]
    if len(run) > 1:
        return [part for k in run for part in _views(piece, range(k, k + 1), rect, region)]
    ends = list(accumulate(lengths, initial=rect.top))
    return [(run, replace(rect, top=a, bottom=b)) for a, b in pairwise(ends)]


def _even(piece: Piece, first: int, length: int, shard: int) -> list[int]:
    """Lengths into which rows of a piece are cut: in each they are in one group, or whole groups of a shard that has as
    many rows as these groups.
    """
    lengths, size = [], piece.of_group
    while length:
        inside = first % size
        if inside or length < size:
            lengths.append(min(size - inside, length))
        else:
            lengths.append(size * max(1, min(length // size, shard // piece.stride)))
        first, length = first + lengths[-1], length - lengths[-1]
    return lengths
