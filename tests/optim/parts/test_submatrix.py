"""Which rows or columns of a momentum step, against a choice row by row, and that shards do not change it."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steepest.parts import Submatrix
from support.training import noise

SHAPES = ((3, 5, 7), (2, 7, 5), (1, 6, 6), (4, 1, 3), (2, 3, 1))
both_sides = pytest.mark.parametrize("along", ["shorter", "rows"])


def chosen_one_by_one(m: Tensor, fraction: float, dim: int) -> list[list[int]]:
    found = []
    for matrix in m if dim == -2 else m.mT:
        sums = [sum(abs(float(x)) for x in row) for row in matrix]
        count = max(1, math.ceil(fraction * len(sums)))
        found.append(sorted(sorted(range(len(sums)), key=lambda i: (-sums[i], i))[:count]))
    return found


@both_sides
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_largest_are_chosen(shape: tuple[int, int, int], fraction: float, along: str) -> None:
    part, m = Submatrix(fraction, along), noise(shape, 1)  # type: ignore[arg-type]
    dim = part.dim(*shape[1:])
    assert dim == (-2 if along == "rows" or shape[1] <= shape[2] else -1)
    chosen = part.chosen(m)
    assert chosen.tolist() == chosen_one_by_one(m, fraction, dim)
    assert part.take(m, chosen, dim).shape == part.shape(shape)


@both_sides
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_taken_is_put_back(shape: tuple[int, int, int], along: str) -> None:
    part, m = Submatrix(0.5, along), noise(shape, 2)  # type: ignore[arg-type]
    dim, chosen = part.dim(*shape[1:]), part.chosen(m)
    taken = part.take(m, chosen, dim)
    back, damped = part.put(taken, chosen, m, dim), part.damped(m, chosen, 0.75, dim)
    assert torch.equal(part.take(back, chosen, dim), taken)
    assert torch.equal(damped, torch.where(back != 0, 0.75 * m, m))
    whole = Submatrix(1.0, along)  # type: ignore[arg-type]
    every = whole.chosen(m)
    assert torch.equal(whole.put(whole.take(m, every, dim), every, m, dim), m)


def test_of_equal_ones_the_first() -> None:
    m = torch.ones(1, 4, 5)
    assert Submatrix(0.5).chosen(m).tolist() == [[0, 1]]
    assert Submatrix(0.5).chosen(torch.zeros(1, 4, 5)).tolist() == [[0, 1]]
    assert Submatrix().chosen(torch.zeros(2, 0, 4)).shape == (2, 0)


def test_large_and_small_numbers_are_measured() -> None:
    m = torch.tensor([[3e38, 3e38, 0.0], [3e38, 3e38, 3e38], [1e-38, 0.0, 0.0], [0.0, 1e-40, 0.0]]).view(1, 4, 3)
    assert Submatrix(0.25, "rows").chosen(m).tolist() == [[1]]
    assert Submatrix(0.5, "rows").chosen(m * 1e-38).tolist() == [[0, 1]]


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 10**6), st.integers(1, 5))
def test_sums_of_parts_choose_alike(rows: int, cols: int, seed: int, ranks: int) -> None:
    part, m = Submatrix(0.25, "rows"), noise((2, rows, cols), seed)
    norms = torch.stack([part.sizes(t, -2) for t in m.tensor_split(ranks, dim=-1)]).sum(0)
    assert torch.equal(part.largest(norms), part.chosen(m))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0.0,), "the fraction of a matrix that steps should be in (0, 1] but is: 0.0"),
        ((1.5,), "the fraction of a matrix that steps should be in (0, 1] but is: 1.5"),
        ((0.5, "columns"), "a submatrix is along 'rows' or the 'shorter' side, not along 'columns'"),
    ],
)
def test_what_is_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Submatrix(*arguments)  # type: ignore[arg-type]
