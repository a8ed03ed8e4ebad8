"""A matrix as equal blocks, so that a factor has the size of a block: (batch, m, n) and (batch * blocks, rows, cols).

A side longer than `most` is cut into as few parts as possible, all of one length; where that length does not divide
the side, zeros fill the last part.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad


def block_length(length: int, most: int) -> int:
    """The length of the parts of a side."""
    return -(-length // parts(length, most))


def parts(length: int, most: int) -> int:
    """The number of parts of a side; an empty one is a part."""
    return max(1, -(-length // max(1, most)))


def to_blocks(x: Tensor, rows: int, cols: int) -> Tensor:
    """x: (batch, m, n) -> (batch * blocks, rows, cols), block row by block row; x itself where it is one block."""
    batch, m, n = x.shape
    if (m, n) == (rows, cols):
        return x
    down, across = parts(m, rows), parts(n, cols)
    padded = pad(x, (0, across * cols - n, 0, down * rows - m))
    return padded.reshape(batch, down, rows, across, cols).transpose(2, 3).reshape(batch * down * across, rows, cols)


def from_blocks(blocks: Tensor, m: int, n: int) -> Tensor:
    """The inverse of `to_blocks`: (batch, m, n)."""
    rows, cols = blocks.shape[-2:]
    if (m, n) == (rows, cols):
        return blocks
    down, across = parts(m, rows), parts(n, cols)
    batch = len(blocks) // (down * across)
    whole = blocks.reshape(batch, down, across, rows, cols).transpose(2, 3)
    return whole.reshape(batch, down * rows, across * cols)[:, :m, :n]
