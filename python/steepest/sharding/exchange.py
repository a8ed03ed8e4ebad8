"""How parts of matrices travel to their owners, and back.

A buffer of parts is one-dimensional. At the sender it has, for every owner in turn, the parts of the matrices that this
owner takes, in the order of the units and of their matrices; that is the order of `parts`. What comes from a rank lies
in the same order at the owner. So nothing is padded, nothing is sorted, and the fused ops write into what is sent and
read from what has come back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Unit
from .ranks import Ranks
from .regions import Rectangle

__all__ = ["Exchange"]


@dataclass(frozen=True)
class _Block:
    """Consecutive owned matrices [first, stop) of which a rank has the same rectangle."""

    rank: int
    first: int
    stop: int
    rectangle: Rectangle

    def of(self, matrices: Tensor) -> Tensor:
        r = self.rectangle
        return matrices[self.first : self.stop, r.top : r.bottom, r.left : r.right]

    @property
    def numel(self) -> int:
        return (self.stop - self.first) * self.rectangle.numel


class Exchange:
    """Sends the parts of all matrices of some units, which have one shape, to the owners and back.

    units: the same on all ranks, in one order.   owned: (unit, matrix) of what this rank owns, in that order.
    Where several copies of the parameters share the work, an owner gets the parts of its own copy, and all get results.
    """

    def __init__(self, ranks: Ranks, units: Sequence[Unit], what: str = "matrices") -> None:
        """what: names the matrices where a collective fails."""
        self.ranks, self.what = ranks, what
        self.shape = units[0].piece.shape[1:]
        self.owned = [(i, k) for i, unit in enumerate(units) for k in unit.owned(ranks.place)]
        #: elements here of what each rank owns
        self.parts = [
            sum(
                rect.numel
                for unit in units
                for k, rect in enumerate(unit.rectangles[ranks.place])
                if rect is not None and unit.owners[k] == owner
            )
            for owner in range(ranks.size)
        ]
        self._blocks: list[_Block] = []
        for rank in range(ranks.size):
            for at, (i, k) in enumerate(self.owned):
                rect = units[i].rectangles[rank][k]
                last = self._blocks[-1] if self._blocks else None
                if rect is None:
                    continue
                if last is not None and (last.rank, last.stop, last.rectangle) == (rank, at, rect):
                    self._blocks[-1] = _Block(rank, last.first, at + 1, rect)
                else:
                    self._blocks.append(_Block(rank, at, at + 1, rect))
        #: elements of what is owned here that each rank has
        self.shares = [sum(b.numel for b in self._blocks if b.rank == rank) for rank in range(ranks.size)]
        copy = ranks.replica_of[ranks.place]
        alike = [other == copy for other in ranks.replica_of]
        #: elements that go to each owner, and that come from each rank, on the way there
        self.sends = [n if here else 0 for n, here in zip(self.parts, alike, strict=True)]
        self.receives = [n if here else 0 for n, here in zip(self.shares, alike, strict=True)]
        self._gathered = [block for block in self._blocks if alike[block.rank]]
        #: whether anything leaves a rank, there and back: not where every matrix is uncut and its holder's
        self.travels = _travels(units, lambda a, b: ranks.replica_of[a] == ranks.replica_of[b])
        self.returns = _travels(units, lambda a, b: True)

    def to_owners(self, parts: Tensor) -> Callable[[], Tensor]:
        """Begins to send a buffer of parts; gives what waits for (owned matrices, rows, cols)."""
        if self.sends != self.parts:
            parts = torch.cat([t for t, n in zip(parts.split(self.parts), self.sends, strict=True) if n] or [parts[:0]])
        if not self.travels:
            return lambda: self._assembled(parts)
        wait = self.ranks.all_to_all(parts, self.sends, self.receives, f"parts of {self.what}")
        return lambda: self._assembled(wait())

    def _assembled(self, parts: Tensor) -> Tensor:
        """The owned matrices, from the parts that all ranks have of them."""
        matrices = parts.new_empty((len(self.owned), *self.shape))
        for block, part in zip(self._gathered, parts.split([b.numel for b in self._gathered]), strict=True):
            target = block.of(matrices)
            target.copy_(part.view(target.shape))
        return matrices

    def from_owners(self, matrices: Tensor) -> Callable[[], Tensor]:
        """Begins to send (owned matrices, rows, cols) back; gives what waits for the buffer of parts."""
        if self._blocks:
            sent = torch.cat([block.of(matrices).reshape(-1) for block in self._blocks])
        else:
            sent = matrices.new_empty(0)
        if not self.returns:
            return lambda: sent
        return self.ranks.all_to_all(sent, self.shares, self.parts, f"results for {self.what}")


def _travels(units: Sequence[Unit], meet: Callable[[int, int], bool]) -> bool:
    """Whether a rank has a part of what another owns, of those that meet."""
    return any(
        rect is not None and unit.owners[k] != rank and meet(rank, unit.owners[k])
        for unit in units
        for rank, of_rank in enumerate(unit.rectangles)
        for k, rect in enumerate(of_rank)
    )
