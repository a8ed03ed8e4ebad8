"""The error of a polar factor against fp64, with the singular vectors of a matrix found once for all variants.

    X X^T = U S^2 U^T,  V^T = S^-1 U^T X,  C = U^T Y V

The relative error is ||Y - U V^T||_F / ||U V^T||_F; ||C - diag C||_F / sqrt(rank) is what rounding leaves beside the
polynomial's own error.  Both are those of `tests/support/polar_error.py`, which takes the singular value decomposition;
of the Gram product the eigenvectors of singular values below 1e-6 of the largest are left out, and a GPU takes seconds
at 8192 rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 1e-6  # of the largest singular value


@dataclass(frozen=True)
class Error:
    relative: float
    off_diagonal: float

    def row(self) -> dict[str, float]:
        """The two numbers as errors of a variant."""
        return {"relative_error": self.relative, "off_diagonal": self.off_diagonal}

    def worse(self, other: Error) -> Error:
        """The larger of either; NaN is larger than anything."""
        pairs = ((self.relative, other.relative), (self.off_diagonal, other.off_diagonal))
        return Error(*(a if a >= b or a != a else b for a, b in pairs))


class Truth:
    """Singular vectors of one matrix (m, n), in fp64 on its device."""

    def __init__(self, x: Tensor) -> None:
        self.tall = x.shape[0] > x.shape[1]
        wide = self._wide(x)
        squares, u = torch.linalg.eigh(wide @ wide.mT)
        kept = squares > LEAST**2 * squares[-1]
        self.u = u[:, kept]
        self.vh = self.u.mT @ wide / squares[kept].sqrt()[:, None]

    def error(self, y: Tensor) -> Error:
        y = self._wide(y)
        root = len(self.vh) ** 0.5
        c = self.u.mT @ y @ self.vh.mT
        off_diagonal = (c - c.diagonal().diag()).norm() / root
        return Error(((y - self.u @ self.vh).norm() / root).item(), off_diagonal.item())

    def _wide(self, x: Tensor) -> Tensor:
        return (x.mT if self.tall else x).double()
