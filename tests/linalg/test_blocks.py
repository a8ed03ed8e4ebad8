"""A matrix as equal blocks: every entry in its place, zeros in what is added, and back again."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steepest.linalg.blocks import block_length, from_blocks, parts, to_blocks
from support.problems import FEW, gaussian


@FEW
@given(length=st.integers(1, 200), most=st.integers(1, 50))
def test_parts_are_few_and_equal(length: int, most: int) -> None:
    """No fewer would do, none is longer than allowed, none is empty, and less than one a part is added."""
    own = block_length(length, most)
    count = parts(length, own)
    assert count == math.ceil(length / most)
    assert 1 <= own <= most
    assert length <= count * own < length + count


@pytest.mark.parametrize(
    ("m", "n", "most"), [(7, 3, 3), (3, 7, 3), (8, 8, 4), (5, 5, 8), (1, 9, 2), (9, 1, 2), (6, 7, 1)]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_blocks_are_the_parts_of_the_matrix(m: int, n: int, most: int, batch: int) -> None:
    x = gaussian(batch, m, n)
    rows, cols = block_length(m, most), block_length(n, most)
    down, across = parts(m, rows), parts(n, cols)
    blocks = to_blocks(x, rows, cols)
    assert blocks.shape == (batch * down * across, rows, cols)
    whole = torch.zeros(batch, down * rows, across * cols, dtype=x.dtype)
    whole[:, :m, :n] = x
    for b in range(batch):
        for i in range(down):
            for j in range(across):
                own = whole[b, i * rows : (i + 1) * rows, j * cols : (j + 1) * cols]
                assert torch.equal(blocks[(b * down + i) * across + j], own)
    assert torch.equal(from_blocks(blocks, m, n), x)


def test_one_block_is_the_matrix_itself() -> None:
    x = gaussian(2, 4, 3)
    assert to_blocks(x, 4, 3) is x
    assert from_blocks(x, 4, 3) is x


@pytest.mark.parametrize(("m", "n"), [(0, 4), (4, 0), (0, 0)])
def test_an_empty_matrix(m: int, n: int) -> None:
    x = torch.zeros(2, m, n)
    blocks = to_blocks(x, block_length(m, 3), block_length(n, 3))
    assert blocks.numel() == 0
    assert from_blocks(blocks, m, n).shape == (2, m, n)


def test_a_matrix_that_is_not_contiguous() -> None:
    x = gaussian(5, 7).mT[None]
    assert torch.equal(from_blocks(to_blocks(x, 4, 3), 7, 5), x)
