"""Matrices shared out among ranks: bounds, ties, agreement, and time."""

from __future__ import annotations

import itertools
import math
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.sharding.owners import assign, imbalance

COSTS = st.lists(st.integers(0, 50), max_size=7)
SOME = settings(max_examples=200, deadline=None)


def loads_of(costs: list[int], owners: list[int], ranks: int) -> list[int]:
    """The sum of the costs on every rank."""
    loads: list[int] = [0] * ranks
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] += cost
    return loads


def makespan(costs: list[int], owners: list[int], ranks: int) -> float:
    return max(loads_of(costs, owners, ranks))


@SOME
@given(COSTS, st.integers(1, 4))
def test_grahams_bound(costs: list[int], ranks: int) -> None:
    """Against the best of all assignments."""
    best = min(makespan(costs, list(owners), ranks) for owners in itertools.product(range(ranks), repeat=len(costs)))
    owners = assign(costs, ranks)
    assert len(owners) == len(costs)
    assert all(0 <= owner < ranks for owner in owners)
    assert makespan(costs, owners, ranks) <= (Fraction(4, 3) - Fraction(1, 3 * ranks)) * best


def test_the_bound_is_reached() -> None:
    """Graham's worst case for two ranks: 3, 3, 2, 2, 2 take 7 where 6 is possible."""
    owners = assign([3, 3, 2, 2, 2], 2)
    assert makespan([3, 3, 2, 2, 2], owners, 2) == 7 == (Fraction(4, 3) - Fraction(1, 6)) * 6


@SOME
@given(COSTS, st.integers(1, 5), st.randoms())
def test_the_order_of_matrices_does_not_change_the_loads(costs: list[int], ranks: int, random: object) -> None:
    shuffled = list(costs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    loads = sorted(loads_of(costs, assign(costs, ranks), ranks))
    assert sorted(loads_of(shuffled, assign(shuffled, ranks), ranks)) == loads


def test_ties_go_to_the_rank_with_fewer_matrices_then_the_lower_one() -> None:
    assert assign([5, 5, 5, 5], 2) == [0, 1, 0, 1]
    assert assign([1, 7, 3], 4) == [2, 0, 1]
    assert assign([0] * 6, 3) == [0, 1, 2, 0, 1, 2]
    assert assign([4, 2, 2, 4], 2) == [0, 0, 1, 1]


def test_matrices_that_only_some_ranks_may_have() -> None:
    """The largest first, each to the rank with the least to do of those it may go to."""
    assert assign([5, 5, 5, 4], 4, [(0, 2), (0, 2), (0, 2), None]) == [0, 2, 0, 1]
    assert assign([1, 9, 2], 3, [(2,), None, (2,)]) == [2, 0, 2]
    for costs in ([4, 2, 2, 4], [3, 1, 7, 7, 2]):  # any rank is as without a word
        assert assign(costs, 3, [(0, 1, 2)] * len(costs)) == assign(costs, 3)


def test_large_whole_numbers_are_exact() -> None:
    """A float holds no difference of 1 here."""
    large = 10**18
    costs = [large + 1, large, 1, 1]
    owners = assign(costs, 2)
    assert owners == [0, 1, 1, 0]
    assert loads_of(costs, owners, 2) == [large + 2, large + 1]


def test_extremes() -> None:
    assert assign([], 3) == []
    assert assign([1.5, 2.5], 1) == [0, 0]
    assert imbalance(loads_of([3, 1], [0, 1], 2)) == 1.5
    assert imbalance([0, 0]) == 1.0


def test_ten_thousand_matrices_take_a_moment() -> None:
    costs = [(i * 7919) % 1009 + 1 for i in range(10_000)]
    begin = time.process_time()
    owners = assign(costs, 4096)
    assert time.process_time() - begin < 0.5
    assert imbalance(loads_of(costs, owners, 4096)) < 1.5


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf])
def test_errors_name_the_value(bad: float) -> None:
    with pytest.raises(ValueError, match=f"a cost is finite and not negative, got {bad} at position 1"):
        assign([1, bad], 2)
    with pytest.raises(ValueError, match="among 1 or more ranks, got 0"):
        assign([1], 0)
