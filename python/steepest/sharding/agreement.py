"""That ranks are about to do the same: compared among all that have a parameter, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from .ranks import Ranks

__all__ = ["Agreement"]

Rows = Sequence[tuple[str, ...]]


class Agreement:
    """Compares what ranks say within each of some sets, which overlap, until all ranks know of a difference.

    sets: of two ranks and more; equal ones count once. They are asked in one order on all ranks, so that none waits for
    one that waits for it.
    """

    def __init__(self, sets: Iterable[Ranks]) -> None:
        self._distinct = {_key(ranks): ranks for ranks in sets if ranks.size > 1}
        order = sorted(self._distinct, key=lambda key: (len(key[1]), key))
        self._sets = [self._distinct[key] for key in order]
        everyone = {rank for _, world in order for rank in world}
        # A set of all ranks comes last and hears of every difference; without one a round takes it a set further.
        rounds = 1 if not order or len(order[-1][1]) == len(everyone) else len(order)
        self._asked = self._sets * rounds

    def name(self, call: str) -> None:
        """What this rank is doing, for an error of the collectives that follow."""
        for ranks in self._sets:
            ranks.call = call

    def one_of(self, ranks: Ranks) -> Ranks | None:
        """The set that stands for these ranks; None where they are one."""
        return self._distinct.get(_key(ranks))

    def any(self, said: bool, flags: Mapping[Ranks, Sequence[bool]]) -> tuple[Tensor | None, dict[Ranks, Tensor]]:
        """Whether a rank says so, 0-d, and of each flag of a set whether a rank of the set has it, (flags,) bool.
        Collective; the host reads nothing and waits for nothing.

        flags: of `one_of`, as many on all ranks of a set.   -> None: there is no other rank.
        """
        words: dict[Ranks, Tensor] = {}
        known: Tensor | None = None
        for ranks in self._asked:
            if ranks not in words:
                words[ranks] = _on_device([said, *flags.get(ranks, ())], ranks.device)
            word = words[ranks]
            if known is not None:
                torch.maximum(word[:1], known.to(word.device), out=word[:1])
            ranks.all_reduce(word, "max", f"which of {len(word) - 1} gradients a rank lacks")
            known = word[:1]
        found = {ranks: word[1:] != 0 for ranks, word in words.items()}
        return (None if known is None else known[0] != 0), found

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


def _key(ranks: Ranks) -> tuple[str, tuple[int, ...]]:
    return ranks.device.type, tuple(sorted(ranks.world))


def _on_device(flags: Sequence[bool], device: torch.device) -> Tensor:
    """Numbers 0 and 1, filled in place but for those after the first that are not 0, which come from the host."""
    if any(flags[1:]):
        return torch.tensor(flags, dtype=torch.int32, device=device)
    word = torch.zeros(len(flags), dtype=torch.int32, device=device)
    word[:1].fill_(int(flags[0]))
    return word


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
