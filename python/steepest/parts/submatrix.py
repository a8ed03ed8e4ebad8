"""The rows or columns of a momentum that a step is taken in, those of the largest 1-norm.

    K = the ceil(fraction n) rows i of largest sum_j |m_ij|;   d_K = direction(m_K), the others 0;   m_K <- beta m_K

so that what is left for later steps, m beside K, is not damped: momentum of kind "error_feedback". The direction is of
a smaller matrix, and of matrices that ranks share only its rows travel. Source: Dion2, arXiv:2512.16928, and the
authors' code (microsoft/dion) for the norm, the count and the side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..ops.matmul import by_itself
from .hyper import Number

__all__ = ["Submatrix"]

# What a CPU takes magnitudes of at once: of 12 matrices 768 x 3072 it takes 16 ms so, and 101 to 149 by a norm in fp64,
# which makes a copy of all of them in fresh memory.
ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Submatrix:
    """Which part of a matrix steps: this fraction of its rows or of its columns, at least one and rounded up.

    along: "shorter": rows of a matrix with no more rows than columns, else columns; "rows": rows of any.

    `put(take(m, K, dim), K, m, dim)` is m with zeros beside K, and with fraction=1 m itself. Of equal norms the first
    counts. Norms are sums in fp64, so that those of parts of a matrix add up to the same choice.
    """

    fraction: float = 0.25
    along: Literal["shorter", "rows"] = "shorter"

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"the fraction of a matrix that steps should be in (0, 1] but is: {self.fraction}")
        if self.along not in ("shorter", "rows"):
            raise ValueError(f"a submatrix is along 'rows' or the 'shorter' side, not along {self.along!r}")

    def dim(self, rows: int, cols: int) -> int:
        """The dimension in which a rows x cols matrix is cut, -2 or -1."""
        return -2 if self.along == "rows" or rows <= cols else -1

    def shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The shape of what steps of matrices (batch, rows, cols)."""
        batch, rows, cols = shape
        if self.dim(rows, cols) == -2:
            return batch, self._count(rows), cols
        return batch, rows, self._count(cols)

    def _count(self, n: int) -> int:
        return min(n, max(1, math.ceil(self.fraction * n)))

    def sizes(self, m: Tensor, dim: int) -> Tensor:
        """1-norms in fp64, (batch, n), of the rows (dim -2) or columns (-1) of m, or the addends of a part of them."""
        along = -3 - dim
        if not by_itself(m):
            return torch.linalg.vector_norm(m, 1, dim=along, dtype=torch.float64)
        some = m.split(max(1, ELEMENTS // max(1, m.shape[-2] * m.shape[-1])))
        return torch.cat([each.abs().sum(along, dtype=torch.float64) for each in some])

    def largest(self, sizes: Tensor) -> Tensor:
        """(batch, k) int64, ascending: the places of the largest."""
        order = sizes.sort(dim=-1, descending=True, stable=True).indices
        return order[..., : self._count(sizes.shape[-1])].sort(dim=-1).values

    def chosen(self, m: Tensor) -> Tensor:
        """The rows or columns of m (batch, rows, cols) that step, as `largest` gives them."""
        return self.largest(self.sizes(m, self.dim(*m.shape[-2:])))

    def take(self, t: Tensor, chosen: Tensor, dim: int) -> Tensor:
        """The chosen rows or columns of t."""
        return t.gather(dim, _along(chosen, dim, t))

    def put(self, t: Tensor, chosen: Tensor, like: Tensor, dim: int) -> Tensor:
        """Zeros of the shape of `like`, but t in the chosen rows or columns."""
        return t.new_zeros(like.shape).scatter_(dim, _along(chosen, dim, t), t)

    def damped(self, m: Tensor, chosen: Tensor, beta: Number, dim: int) -> Tensor:
        """The momentum once its chosen part has been stepped by, in fp32 or fp64."""
        wide = m.to(torch.promote_types(m.dtype, torch.float32))
        part = self.take(wide, chosen, dim)
        return wide.scatter(dim, _along(chosen, dim, part), (part * beta).to(wide.dtype))


def _along(chosen: Tensor, dim: int, t: Tensor) -> Tensor:
    """Places of rows or columns as `torch.gather` takes them for t."""
    if dim == -2:
        return chosen.unsqueeze(-1).expand(-1, -1, t.shape[-1])
    return chosen.unsqueeze(-2).expand(-1, t.shape[-2], -1)
