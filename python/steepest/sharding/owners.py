"""Who works on which matrix."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

__all__ = ["assign"]


def assign(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank of every job: the longest first, each to the rank that has least to do; ties go by position."""
    loads = [(0, rank) for rank in range(ranks)]
    found = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: (-int(costs[job]), job)):
        load, rank = heapq.heappop(loads)
        found[job] = rank
        heapq.heappush(loads, (load + int(costs[job]), rank))
    return found
