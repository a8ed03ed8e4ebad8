"""That ranks are about to do the same: compared among all that have a parameter, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest

from .ranks import Ranks

__all__ = ["Agreement"]

Rows = Sequence[tuple[str, ...]]


class Agreement:
    """Compares what ranks say within each of some sets, which overlap, until all ranks know of a difference.

    sets: of two ranks and more; equal ones count once. They are asked in one order on all ranks, so that none waits for
    one that waits for it.
    """

    def __init__(self, sets: Iterable[Ranks]) -> None:
        distinct = {(ranks.device.type, tuple(sorted(ranks.world))): ranks for ranks in sets if ranks.size > 1}
        order = sorted(distinct, key=lambda key: (len(key[1]), key))
        self._sets = [distinct[key] for key in order]
        everyone = {rank for _, world in order for rank in world}
        # A set of all ranks comes last and hears of every difference; without one a round takes it a set further.
        rounds = 1 if not order or len(order[-1][1]) == len(everyone) else len(order)
        self._asked = self._sets * rounds

    def name(self, call: str) -> None:
        """What this rank is doing, for an error of the collectives that follow."""
        for ranks in self._sets:
            ranks.call = call

    def difference(self, said: object, why: str | None, rows: Callable[[], Rows], but: tuple[str, str]) -> str | None:
        """What is wrong, in words that name the first rank that differs; None where all say the same. Collective.

        said: what is compared first, `rows` or something shorter that follows from them.   why: this rank cannot go on.
        but: what is wrong where rows differ, and the way out.
        """
        told: str | None = None
        for ranks in self._asked:
            if not ranks.agree((said, why, told)):
                everyone = ranks.gather_objects((rows() if why is None else (), why, told))
                told = told or _in_words(everyone, ranks, but)
        return told


def _in_words(
    everyone: Sequence[tuple[Rows, str | None, str | None]], ranks: Ranks, but: tuple[str, str]
) -> str | None:
    for _, _, told in everyone:
        if told is not None:
            return told
    for rank, (_, why, _) in zip(ranks.world, everyone, strict=True):
        if why is not None:
            return f"rank {rank} cannot go on with {ranks.call}: {why}"
    first = everyone[0][0]
    for rank, (rows, _, _) in zip(ranks.world, everyone, strict=True):
        different = [(a, b) for a, b in zip_longest(first, rows, fillvalue=("nothing",)) if a != b]
        if different:
            ours, theirs = (" ".join(row) for row in different[0])
            return f"{but[0]}: rank {ranks.world[0]} has {ours} and rank {rank} has {theirs}; {but[1]}"
    return None
