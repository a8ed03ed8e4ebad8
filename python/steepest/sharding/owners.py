"""Which rank works on which matrix: the longest job first, to the rank with the least to do (Graham 1969)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import replace

from ..matrices import Piece

__all__ = ["assign", "imbalance", "owned_pieces"]


def assign(costs: Sequence[float], ranks: int, among: Sequence[Sequence[int] | None] = ()) -> list[int]:
    """The rank, 0 .. ranks - 1, of every matrix, by its cost: deterministic, so that ranks agree without a word.

    among: for every matrix the ranks that it may go to, None: to any; () where all may go to any.

    The largest sum of costs on a rank is at most 4/3 - 1 / (3 ranks) times the least possible, where all may go to any.
    Of equal costs the
    first is placed first, and of ranks with equal sums that with fewer matrices, then the lower one, gets it. Whole
    numbers are summed and compared exactly; floats in one order, alike wherever sums are those of IEEE 754.

    Raises:
        ValueError: ranks below 1, a cost that is negative or not finite.
    """
    if ranks < 1:
        raise ValueError(f"matrices are shared out among 1 or more ranks, got {ranks}")
    for position, cost in enumerate(costs):
        if not 0 <= cost < math.inf:
            raise ValueError(f"a cost is finite and not negative, got {cost} at position {position}")
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    owners = [0] * len(costs)
    if any(some is not None for some in among):
        sums: list[float] = [0] * ranks
        counts = [0] * ranks
        for position in order:
            some = among[position]
            rank = min(range(ranks) if some is None else some, key=lambda r: (sums[r], counts[r], r))
            owners[position] = rank
            sums[rank] += costs[position]
            counts[rank] += 1
        return owners
    loads: list[tuple[float, int, int]] = [(0, 0, rank) for rank in range(ranks)]
    for position in order:
        load, count, rank = loads[0]
        owners[position] = rank
        heapq.heapreplace(loads, (load + costs[position], count + 1, rank))
    return owners


def imbalance(loads: Sequence[float]) -> float:
    """The largest load over the mean, 1 where all are alike or nothing is to be done."""
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0


def owned_pieces(pieces: Sequence[Piece], owners: Sequence[Sequence[int]], place: int) -> tuple[Piece, ...]:
    """The pieces with those of their matrices only that the rank at this place owns; owners: of each matrix."""
    counts = [sum(owner == place for owner in of_piece) for of_piece in owners]
    return tuple(replace(piece, batch=count) for piece, count in zip(pieces, counts, strict=True))
