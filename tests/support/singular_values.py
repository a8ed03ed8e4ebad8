"""Matrices with known spectra: what `polar` and the optimizers are tested on.   All in fp64, from a seed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from steepest.linalg.coefficients import Schedule, evaluate
from support.polar_error import svd

# Singular values of rank m, largest 1.
SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "flat": lambda m: torch.ones(m),
    "log": lambda m: torch.logspace(0, -4, m),
    "power": lambda m: 1 / torch.arange(1, m + 1),
    "root": lambda m: torch.arange(1, m + 1) ** -0.5,
    "steep": lambda m: 1 / torch.arange(1, m + 1) ** 2,
    "linear": lambda m: torch.linspace(1, 1 / m, m),
    "clusters": lambda m: torch.where(torch.arange(m) < (m + 1) // 2, 1.0, 1e-3),
    "spikes": lambda m: torch.where(torch.arange(m) < max(1, m // 8), 1.0, 0.01),
    "rank 1": lambda m: (torch.arange(m) < 1).float(),
    "rank 2": lambda m: (torch.arange(m) < 2).float(),
}
SHAPES = ((64, 64), (48, 192), (192, 48), (37, 101), (1, 40), (40, 1), (1, 1))


def three_shapes(number: int) -> list[tuple[int, int]]:
    """Three of SHAPES, others for each of seven numbers: of two things that are numbered, each meets all shapes."""
    return [SHAPES[(number + 3 * k) % len(SHAPES)] for k in range(3)]


def gaussian(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_spectrum(m: int, n: int, name: str, seed: int = 0) -> Tensor:
    """An m x n matrix with random singular vectors and the named singular values; "gaussian" keeps its own."""
    if name == "gaussian":
        return gaussian(m, n, seed)
    u, vh = _vectors(m, n, seed)
    return (u * SPECTRA[name](min(m, n)).double()) @ vh


@functools.lru_cache(64)
def _vectors(m: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """The singular vectors of a Gaussian matrix, which all spectra share."""
    u, _, vh = torch.linalg.svd(gaussian(m, n, seed), full_matrices=False)
    return u, vh


def polynomial_of(x: Tensor, schedule: Schedule) -> Tensor:
    """What the schedule makes of x (m, n) in exact arithmetic: its polynomial of the fp64 singular values."""
    u, s, vh = svd(x)
    m, fro, r = len(s), s.norm(), s * s
    bound = (r.mean() + (m - 1) ** 0.5 * (r - r.mean()).norm() / m**0.5).sqrt()
    norm = bound if schedule.norm == "tight" else fro
    table = next((t for t, least in zip(schedule.tables, schedule.slacks) if fro / norm >= least), schedule.tables[-1])
    return (u * torch.tensor([evaluate(table, v) for v in (s / norm).tolist()], dtype=torch.float64)) @ vh


def orthogonal(m: int, seed: int = 0) -> Tensor:
    return _orthogonal(m, seed).clone()


@functools.lru_cache(64)
def _orthogonal(m: int, seed: int) -> Tensor:
    return torch.linalg.qr(gaussian(m, m, seed)).Q


# Views of the same values that are not contiguous.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0],
    "padded rows": lambda x: torch.nn.functional.pad(x, (3, 5), value=torch.nan)[..., 3:-5],
    "storage offset": lambda x: torch.cat([torch.full_like(x, torch.nan), x])[len(x) :],
}
