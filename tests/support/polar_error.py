"""How far from the polar factor, and by what kind of error.

With X = U S V^T, C = U^T Y V over the singular vectors of X that belong to singular values above rounding.  A
polynomial iteration in exact arithmetic leaves C diagonal, so its off-diagonal part is rounding (or a change of the
matrix), and the distance of its diagonal from 1 is the polynomial's own error.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolarError:
    relative: float  # ||Y - U V^T||_F / ||U V^T||_F
    off_diagonal: float  # ||C - diag C||_F / sqrt(rank)
    largest: float  # ||Y||_2
    worst: float  # the entry of diag C furthest from 1


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """torch.linalg.svd(x, full_matrices=False) in fp64; on a CPU remembered, as many tests take the same matrices."""
    x = x.double()
    if x.is_cuda:
        return torch.linalg.svd(x, full_matrices=False)
    return _svd(tuple(x.shape), x.contiguous().numpy().tobytes())


@functools.lru_cache(64)
def _svd(shape: tuple[int, ...], values: bytes) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.frombuffer(bytearray(values), dtype=torch.float64).view(shape)
    return torch.linalg.svd(x, full_matrices=False)


def polar_error(x: Tensor, y: Tensor) -> PolarError:
    """Errors of ``y`` as the polar factor of ``x`` (m, n), against the fp64 SVD."""
    u, s, vh = svd(x)
    kept = s > 1e-12 * s[0]
    u, vh, y = u[:, kept], vh[kept], y.double()
    c = u.mT @ y @ vh.mT
    diagonal, exact = c.diagonal(), u @ vh
    return PolarError(
        relative=((y - exact).norm() / exact.norm()).item(),
        off_diagonal=((c - diagonal.diag()).norm() / kept.sum().sqrt()).item(),
        largest=torch.linalg.matrix_norm(y, 2).item(),
        worst=diagonal[(diagonal - 1).abs().argmax()].item(),
    )


def assert_polar(x: Tensor, y: Tensor, *, relative: float, off_diagonal: float, largest: float = 1.3) -> PolarError:
    """``y`` approximates the polar factor of ``x`` within the three bounds; the message reports each part."""
    assert y.shape == x.shape
    error = polar_error(x, y)
    assert error.relative <= relative, error
    assert error.off_diagonal <= off_diagonal, error
    assert error.largest <= largest, error
    return error
