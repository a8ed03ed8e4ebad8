"""The steepest direction of a base norm N and its dual norm.

    unit(x) = argmax { <x, d> : N(d) <= 1 }        dual_norm(x) = <x, unit(x)>        scaled(x) = dual_norm(x) unit(x)

    Frobenius   x / ||x||_F          ||x||_F             (SGD, Adam, Shampoo, SOAP when scaled)
    Sign        sign(x)              sum |x_ij|          (SignSGD, SPlus; the norm is max |x_ij|)
    Spectral    U V^T, x = U S V^T   sum of S            (Muon, MuAdam; the norm is the largest singular value)

x is (..., m, n), one matrix per batch element; dual norms are (..., 1, 1) in fp32, or fp64 for fp64 inputs. The zero
matrix has the zero direction. Source: arXiv:2510.10777, section 2; arXiv:2409.20325.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import polar


@dataclass(frozen=True)
class Direction:
    """A base norm. Subclasses give `unit`; the rest follows from it."""

    #: whether many matrices at once are cheaper than one after the other
    batched = False
    #: whether `unit` never waits for the device, so that a CUDA graph can hold it
    capturable = True

    def unit(self, x: Tensor, *, slack: Tensor | None = None) -> Tensor:
        """The direction; slack: (batch,) fp32, filled with what `Spectral` knows of its norm bound and else left."""
        raise NotImplementedError

    def dual_norm(self, x: Tensor, d: Tensor) -> Tensor:
        """<x, d>, which for d = unit(x) is the dual norm of x."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x.to(wide) * d.to(wide)).sum(dim=(-2, -1), keepdim=True)

    def scaled(self, x: Tensor) -> Tensor:
        """The step of regularized steepest descent, argmin <-x, s> + N(s)^2 / 2."""
        d = self.unit(x)
        return d * self.dual_norm(x, d).to(d.dtype)

    def compute_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """The dtype in which `unit` works, so that its input can be gathered in it."""
        return dtype

    def workspace_bytes(self, m: int, n: int, dtype: torch.dtype) -> int:
        """About what `unit` allocates for one matrix of compute dtype."""
        return m * n * dtype.itemsize

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(direction, dual norm)."""
        d = self.unit(x)
        return d, self.dual_norm(x, d)


@dataclass(frozen=True)
class Frobenius(Direction):
    """Euclidean length of the matrix as a vector. `scaled` is the identity."""

    def unit(self, x: Tensor, *, slack: Tensor | None = None) -> Tensor:
        if x.numel() == 0:
            return x.clone()
        # The largest entry is divided out first: squares of 1e-25 and of 1e25 leave fp32.
        largest = x.abs().amax(dim=(-2, -1), keepdim=True).to(torch.promote_types(x.dtype, torch.float32))
        y = torch.where(largest > 0, x / largest, 0)
        norm = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True)  # >= 1, or 0 for the zero matrix
        return (y / norm.clamp(min=1)).to(x.dtype)

    def scaled(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Sign(Direction):
    """Largest magnitude of an entry."""

    def unit(self, x: Tensor, *, slack: Tensor | None = None) -> Tensor:
        return x.sign()


@dataclass(frozen=True)
class Spectral(Direction):
    """Largest singular value, by the Newton-Schulz polar factor; arguments as in `steepest.polar`.

    The direction is only as orthogonal as the preset promises; preset="svd" is exact.
    """

    preset: str = "auto"
    coefficients: tuple[tuple[float, ...], ...] | None = None
    steps: int | None = None
    eps: float = 1e-7
    max_workspace_bytes: int | None = None

    batched = True

    @property
    def capturable(self) -> bool:  # type: ignore[override]
        return self.preset != "svd" or self.coefficients is not None

    def unit(self, x: Tensor, *, slack: Tensor | None = None) -> Tensor:
        return polar.polar(
            x,
            self.preset,
            coefficients=self.coefficients,
            steps=self.steps,
            eps=self.eps,
            max_workspace_bytes=self.max_workspace_bytes,
            slack=slack,
        )

    def compute_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return polar.compute_dtype(self.preset, dtype, device)

    def workspace_bytes(self, m: int, n: int, dtype: torch.dtype) -> int:
        return polar.workspace_bytes(m, n, dtype)
