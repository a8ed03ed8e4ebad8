"""Inverse roots A^(-1/p) of symmetric positive semidefinite matrices, by products alone.

The coupled iteration carries the square root and its inverse together.  With A scaled to eigenvalues in (0, 1],

    Y = A,  Z = I;    T = Z Y,    Y <- Y W,    Z <- W Z,    W = a I + b T + c T^2,

Y tends to A^(1/2) and Z to A^(-1/2), because with t the eigenvalues of T each step is s <- a s + b s^3 + c s^5 on
s = sqrt t: the polynomials that send singular values to 1 (Polar Express, arXiv:2505.16932) are those wanted here.
Fourth and eighth roots are roots of roots.  The identity is left out of every product,

    Y <- a Y + Y (b T + c T^2),    and last    Y <- Y + Y (I - T) / 2,

so that rounding meets the small corrections and not the large part.  TF32 in three terms does as well as fp32.  Plain
TF32 loses digits, and with a few large eigenvalues above a flat floor it diverges from condition 1e6 on; as it is
printed the iteration then does so on any spectrum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.power import power
from ..ops.products import product
from ..ops.reductions import total, vector_norm
from .basis import symmetrize
from .chain import product_flop
from .coefficients import Table
from .scaling import inverse_power_of_two, largest_entry

ROOT_ORDERS = (1, 2, 4, 8)
# The bound exceeds the norms that it is taken from by more than their rounding.
BOUND_SAFETY = 1.002
# Where the lifting steps stop: all s within this of 1.  The steady quintic cubes the distance, the cubic squares it.
LIFTED = 0.055
# (l, h, step): the best quintic on [l, 1] (`best_odd` of tests/support/remez.py), with x / 1.01 in place of x so that
# rounding may carry an s beyond the interval, takes it to [l' h, h], where l' is the next row's l; the last to within
# LIFTED.  So a composition begins at any row, every later step taking x / h.  Rounded to 7 digits.
LIFTING = (
    (2.093299e-05, 1.999822, (8.429086, -24.53467, 17.85382)),
    (8.822995e-05, 1.99925, (8.426144, -24.52328, 17.84493)),
    (0.000371855, 1.99684, (8.413762, -24.47534, 17.80754)),
    (0.001566809, 1.986768, (8.361977, -24.27485, 17.65119)),
    (0.006594327, 1.945722, (8.15064, -23.45708, 17.01356)),
    (0.02761995, 1.79488, (7.368909, -20.43875, 14.66241)),
    (0.1131533, 1.41126, (5.314533, -12.59298, 8.580457)),
    (0.4132953, 1.047501, (2.919478, -4.033202, 2.144832)),
)
STEADY = (1.875, -1.25, 0.375)
STEADY_STEPS = {torch.float32: 1, torch.float64: 2}


@torch.no_grad()
def inverse_root(A: Tensor, p: int, *, ridge_rel: float = 1e-6) -> tuple[Tensor, Tensor]:
    """X = (A + r I)^(-1/p) with r = ridge_rel c, c = `spectral_bound(A)`, and a residual of each X.

    A: (..., n, n) symmetric positive semidefinite, fp32 or fp64; of another matrix the symmetric part is taken.  X is
    symmetric, of A's shape and dtype.  p is 1, 2, 4 or 8.  Not differentiable; no host synchronisation.

    The residual, (...), is that of X itself, computed in A's dtype: with H = A + r I, ||H X - I||_F / sqrt n for p = 1,
    ||X^(p/2) H X^(p/2) - I||_F / sqrt n for the others.

    The ridge bounds the condition number by 1 / ridge_rel, which sets the number of steps (8 for 1e-6, twice that for p
    = 4, three times for p = 8) and how far rounding is amplified: in fp32 1e-6 is the least that leaves digits of the
    smallest eigenvalues.  The relative error in the Frobenius norm is then 4e-6 at condition 1e2, 3e-5 at 1e4, 1e-3 at
    1e6, 4e-3 at 1e8 for p = 2, twice that for p = 1, half for p = 4 and a quarter for p = 8; from 1e4 on a third to a
    thirtieth of that by torch.linalg.eigh in fp32, whose error is eps times the largest eigenvalue in all of them.

    A = 0 gives X = 0 and residual 0.  A that is not finite gives X = 0 and residual inf and leaves the rest of the
    batch alone.  The scale of A does not matter, as long as X itself is representable.

    Raises:
        TypeError: A is not fp32 or fp64.
        ValueError: A is not square, p is not 1, 2, 4 or 8, ridge_rel is not between eps and 1.
    """
    _check(A, p, ridge_rel)
    if A.numel() == 0:
        return A.clone(), A.new_zeros(A.shape[:-2])
    n = A.shape[-1]
    largest = largest_entry(A)
    # The identity stands in for what has no root.
    regular = largest.isfinite() & (largest != 0)
    eye = torch.eye(n, dtype=A.dtype, device=A.device)
    prescale = inverse_power_of_two(torch.where(regular, largest, 0))
    scaled = symmetrize(prescale.times(torch.where(regular, A, eye)))
    bound = _bound(scaled)[..., None, None]
    unit = (scaled / bound + ridge_rel * eye) / (1 + ridge_rel)
    low = ridge_rel / (1 + ridge_rel)
    Y, Z = _coupled(unit, eye, low)
    for done in (2, 4):
        if done < p:
            low = math.sqrt(low)
            Y, Z = _coupled(Y, eye, low)
    Z = symmetrize(_exact(Z, Z) if p == 1 else Z)
    residual = vector_norm(_whitened(unit, Z, p) - eye) / math.sqrt(n)
    X = Z / power(bound * (1 + ridge_rel), 1 / p) * power(prescale.first, 1 / p) * power(prescale.second, 1 / p)
    largest = largest[..., 0, 0]
    residual = torch.where(largest.isfinite(), torch.where(largest == 0, 0, residual), torch.inf)
    return torch.where(regular, X, 0), residual


def inverse_root_flop(n: int, p: int, *, ridge_rel: float = 1e-6) -> int:
    """Floating-point operations of `inverse_root` of one n x n fp32 matrix, all in products that count in full."""
    low, products = ridge_rel / (1 + ridge_rel), 2
    for done in (1, 2, 4):
        if done == 1 or done < p:
            low = low if done == 1 else math.sqrt(low)
            products += 4 * (len(lifting_steps(math.sqrt(low))) + STEADY_STEPS[torch.float32]) + 3
    products += {1: 2, 2: 2, 4: 3, 8: 4}[p]  # the square of a root, and the residual
    return products * product_flop(n, n, n, symmetric=False)


@torch.no_grad()
def spectral_bound(A: Tensor) -> Tensor:
    """min(||A||_inf, ||A^4||_F^(1/4)) with a margin of .2% for rounding: never below ||A||_2.   (..., n, n) -> (...).

    At most n^(1/8) times too large; 1.3 times on spectra that fall.  An estimate by power iteration would be closer
    and now and then too small, on which the iteration diverges.
    """
    if A.numel() == 0:
        return A.new_zeros(A.shape[:-2])
    largest = largest_entry(A)
    regular = largest.isfinite()
    prescale = inverse_power_of_two(torch.where(regular, largest, 0))
    bound = prescale.divide(_bound(symmetrize(prescale.times(torch.where(regular, A, 0))))[..., None, None])
    return torch.where(regular, bound, torch.inf)[..., 0, 0]


def lifting_steps(low: float) -> Table:
    """Quintics that take s in [low, 1] to within LIFTED of 1: as many of the last rows of LIFTING as that needs.

    The first row, which lifts small s by half its first number, is repeated for low beyond it.
    """
    least, top, step = LIFTING[0]
    rows = [LIFTING[0]] * max(0, math.ceil(math.log(least / low) / math.log(step[0] / top)))
    rows += LIFTING[max(0, sum(row[0] <= low for row in LIFTING) - 1) :]
    steps, high = [], 1.0
    for _, top, step in rows:
        steps.append(tuple(v / high ** (2 * power + 1) for power, v in enumerate(step)))
        high = top
    return tuple(steps)


def _coupled(A: Tensor, eye: Tensor, low: float) -> tuple[Tensor, Tensor]:
    """A^(1/2) and A^(-1/2) of A with eigenvalues in [low, 1]."""
    # T is not made symmetric, nor taken from a product that is: Z Y and Y Z round apart, and their mean diverges.
    Y, Z = A, eye.expand_as(A)
    for a, b, c in (*lifting_steps(math.sqrt(low)), *(STEADY,) * STEADY_STEPS[A.dtype]):
        T = _exact(Z, Y)
        V = _exact(T, T, T, alpha=c, beta=b)
        Y, Z = _exact(Y, V, Y, beta=a), _exact(V, Z, Z, beta=a)
    E = _exact(Z, Y, eye.expand_as(A), alpha=-0.5, beta=0.5)
    return _exact(Y, E, Y), _exact(E, Z, Z)


def _bound(A: Tensor) -> Tensor:
    """`spectral_bound` of A with entries of order 1."""
    square = _exact(A, A)
    fourth = power(vector_norm(_exact(square, square)), 0.25)
    return torch.minimum(total(A.abs(), -1).amax(-1), fourth) * BOUND_SAFETY


def _whitened(A: Tensor, X: Tensor, p: int) -> Tensor:
    """A of inverse root X brought to the identity: X A, or X^(p/2) A X^(p/2)."""
    if p == 1:
        return _exact(X, A)
    for done in (2, 4):
        X = _exact(X, X) if done < p else X
    return _exact(X, _exact(A, X))


def _exact(A: Tensor, B: Tensor, C: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """alpha A B + beta C, any product here: fp32, or TF32 in three terms.  Plain TF32 can end in NaN."""
    return product(A, B, C, precision="tf32x3", alpha=alpha, beta=beta)


def _check(A: Tensor, p: int, ridge_rel: float) -> None:
    if A.dtype not in STEADY_STEPS:
        raise TypeError(f"inverse_root takes float32 or float64, got {A.dtype}; convert it first")
    if A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"inverse_root takes square matrices (..., n, n), got shape {tuple(A.shape)}")
    if p not in ROOT_ORDERS:
        known = ", ".join(map(str, ROOT_ORDERS))
        raise ValueError(f"p must be one of {known}, got {p}; eigh_refresh has a basis for others")
    least = torch.finfo(A.dtype).eps
    if not least <= ridge_rel <= 1:
        raise ValueError(f"ridge_rel must be between {least:.1e} ({A.dtype} rounding) and 1, got {ridge_rel}")
