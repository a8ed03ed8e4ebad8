"""Best odd polynomials for lifting singular values to 1, by the Remez exchange in double precision.

On [l, u] the odd polynomial p of degree 2k - 1 that minimises max |1 - p| touches 1 +- error at k + 1 points in turn
(Chebyshev).  Composing such steps, each for the interval the last one leaves, is optimal over all compositions of the
same degrees (arXiv:2505.16932, theorem 3.1).  `steepest.linalg.coefficients` and `steepest.linalg.roots` hold results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SAFETY = 1.02


def best_odd(low: float, high: float, degree: int) -> tuple[tuple[float, ...], float]:
    """Coefficients (a, b, c, ...) of the odd ``degree`` polynomial nearest to 1 on [low, high], and its error."""
    terms, ratio = (degree + 1) // 2, low / high
    powers = 2 * torch.arange(terms, dtype=torch.float64) + 1
    sines = torch.linspace(0, torch.pi / 2, terms + 1, dtype=torch.float64).sin()
    points = (ratio**2 + (1 - ratio**2) * sines**2).sqrt()
    for _ in range(100):
        coefficients, error = _interpolate(points, powers)
        moved = torch.cat(
            [points.new_tensor([ratio]), _turning_points(coefficients * powers, ratio), points.new_ones(1)]
        )
        if moved.shape != points.shape:
            raise ValueError(f"no equioscillating polynomial of degree {degree} on [{low}, {high}]")
        if (moved - points).abs().max() < 1e-14:
            break
        points = moved
    return tuple((coefficients / high**powers).tolist()), abs(error)


def tight_table(
    low: float, degrees: Sequence[int], *, safety: float = SAFETY, margin: float = 1.0
) -> tuple[tuple[float, ...], ...]:
    """Composition of best odd steps for singular values in [low, 1].

    ``safety``: every step but the last takes x / safety.  ``margin``: the last step is good up to margin times the
    largest singular value it should meet, so that rounding does not push one out of the interval where the polynomial
    is tame.
    """
    high, table = 1.0, []
    for index, degree in enumerate(degrees):
        last = index + 1 == len(degrees)
        step, _ = best_odd(low, high * (margin if last else 1.0), degree)
        if not last:
            step = tuple(v / safety ** (2 * power + 1) for power, v in enumerate(step))
        low, high = image(step, low, high)
        table.append(step)
    return tuple(table)


def image(step: Sequence[float], low: float, high: float) -> tuple[float, float]:
    """Least and greatest value of the polynomial on [low, high]: at the ends or where it turns."""
    coefficients = torch.tensor(step, dtype=torch.float64)
    powers = 2 * torch.arange(len(step), dtype=torch.float64) + 1
    ends = coefficients.new_tensor([low, high])
    turns = _turning_points(coefficients * powers * high ** (powers - 1), low / high) * high
    values = (torch.cat([ends, turns])[:, None] ** powers) @ coefficients
    return values.min().item(), values.max().item()


def _interpolate(points: Tensor, powers: Tensor) -> tuple[Tensor, float]:
    """Solve p(x_i) + (-1)^i error = 1 at the k + 1 points."""
    signs = (-1.0) ** torch.arange(len(points), dtype=torch.float64)
    solution = torch.linalg.solve(
        torch.cat([points[:, None] ** powers, signs[:, None]], dim=1), torch.ones_like(points)
    )
    return solution[:-1], solution[-1].item()


def _turning_points(slope: Tensor, low: float) -> Tensor:
    """Roots in (low, 1) of p', an even polynomial with coefficients ``slope`` in x^2: eigenvalues of its companion."""
    companion = torch.diag(torch.ones(len(slope) - 2, dtype=torch.float64), -1)
    companion[:, -1] = -slope[:-1] / slope[-1]
    squares = torch.linalg.eigvals(companion)
    real = squares.real[squares.imag.abs() < 1e-9]
    return real[(real > low * low) & (real < 1)].sqrt().sort().values
