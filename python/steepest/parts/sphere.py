"""A matrix that keeps its norm: after every step it is put back on the sphere that it began on.

    W <- R W / ||W||,     R = ||W|| before the first step

frobenius: ||W||_F, as in Hyperball (the hooks of NVIDIA's Emerging-Optimizers, which make the update R long as well).
spectral: the largest singular value, the retraction of arXiv:2601.08393; with Muon its MuonSphere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..ops.reductions import vector_norm
from .direction import Nuclear

__all__ = ["Sphere"]

_LEADING = Nuclear()  # whose dual norm is the largest singular value


@dataclass(frozen=True)
class Sphere:
    """The sphere of a norm; key: of R in the state, (matrices,) fp64, with as many digits as weights have.

    The Frobenius norm is exact. The spectral one is <W, d>, d of rank one by the power method with 2^12 products
    (`steepest.linalg.schatten`), which is at most the largest singular value and at least .998 of it: what is kept to
    rounding is this number.
    """

    norm: Literal["frobenius", "spectral"] = "frobenius"
    key: str = "radius"

    def __post_init__(self) -> None:
        if self.norm not in ("frobenius", "spectral"):
            raise ValueError(f"constraint {self.norm!r} is not known; use 'frobenius' or 'spectral', or None")

    def norms(self, w: Tensor) -> Tensor:
        """(batch,) fp64, of matrices (batch, m, n) in fp32 or fp64."""
        if self.norm == "frobenius":
            return vector_norm(w, dtype=torch.float64)
        return _LEADING.dual_norm(w, _LEADING.unit(w)).flatten().double()

    def radii(self, norms: Tensor, dtype: torch.dtype) -> Tensor:
        """R of weights of this dtype with these norms: of narrower ones than fp64 with the digits of fp32, which the
        order in which ranks have summed squares does not reach.
        """
        if dtype == torch.float64:
            return norms
        mantissa, exponent = torch.frexp(norms)  # a norm may be beyond fp32
        return torch.ldexp(mantissa.float().double(), exponent)

    def scales(self, radii: Tensor, norms: Tensor) -> Tensor:
        """What matrices of these norms are multiplied by; 1 of one that is 0, which no number brings to its sphere."""
        return torch.where(norms > 0, radii / norms, 1)
