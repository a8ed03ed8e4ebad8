"""The Newton-Schulz iteration, its standard and its Gram form in one.

    standard    A = X X^T;  Z = b A + c A^2 + ...;  X <- a X + Z X                                       every step
    Gram        R = X X^T once;  Z = b R + c R^2 + ...;  Q <- a Q + Q Z;  R <- (a I + Z) R (a I + Z)     every step,
                then X <- Q X

The Gram form (Dion3 appendix B; Dao-AILab gram-newton-schulz) touches X only where a *segment* begins and ends; a restart
is the start of a new segment, and restarting before every step is the standard form.

Normalisation is never applied to X.  With X_k = s_k Y_k the iteration runs on Y, the scalars s_k enter the coefficients of
the small m x m matrices, and the last of them scales the last Q.  Coefficients may differ from matrix to matrix: every Y
advances by the same alpha_k and s takes up the rest, s_{k+1} = s_k a_k / alpha_k, so only m x m matrices see elementwise
work and nothing is read back by the host.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..ops.symm_gemm import symm_gemm
from .coefficients import Schedule, Table
from .norm_bound import squared_norm_bound

Number = float | Tensor  # per matrix where a tensor, (batch, 1, 1)


def newton_schulz(x: Tensor, schedule: Schedule, restarts: Collection[int], *, eps: float) -> Tensor:
    """Run ``schedule`` on x: (batch, m, n) in x's dtype, entries of order 1 at most; a zero matrix gives zero.

    ``restarts`` are the steps (from 1) before which a new Gram product is taken.  The norm is never taken below ``eps``.
    x is not written.  A tall matrix is handled as X^T X and X Z, without a transpose in memory.
    """
    last = schedule.steps - 1
    gram, q = _gram(x), None
    scale, slack = _scale(gram, schedule, eps)
    for k in range(schedule.steps):
        if k in restarts:
            gram, q = _gram(x), None
        alpha, step = schedule.tables[0][k][0], _choose(schedule, k, slack)
        z = _polynomial(gram, step, scale.square(), alpha)
        scale = scale * (step[0] / alpha)
        ends = k == last or k + 1 in restarts
        if not ends:
            gram = _advance_gram(gram, z, alpha)
        if ends and k < last and q is None:
            x = _advance(x, z, alpha)
            continue
        q = _add_identity(z, alpha, overwrite=ends) if q is None else symm_gemm(q, z, q, beta=alpha)
        if ends:
            x = _apply(x, times(q, scale) if k == last else q)
    return x


def newton_schulz_plain(x: Tensor, table: Table, *, eps: float) -> Tensor:
    """The standard form as it is printed, quintic, step for step the arithmetic of torch.optim.Muon.

    x: (batch, m, n), overwritten.  X / max(||X||_F, eps), then full products.
    """
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(eps)
    x.div_(torch.where(norm == 0, torch.ones_like(norm), norm))
    wide = x.mT if x.shape[-2] > x.shape[-1] else x
    for a, b, c in table:
        gram = torch.bmm(wide, wide.mT)
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if x.shape[-2] > x.shape[-1] else wide


def times(matrix: Tensor, factor: Number) -> Tensor:
    """``factor matrix`` in the matrix' dtype, with the factor, a number or (batch, 1, 1), in full precision.

    On a CPU a 0-dim factor keeps its precision and takes half the time of a broadcast one (bf16, 768 x 768: 0.26 against
    0.52 ms); elsewhere it would first be rounded to the matrix' dtype.
    """
    if not isinstance(factor, Tensor):
        return matrix * factor
    if factor.device.type == "cpu" and factor.numel() == 1:
        return matrix * factor.reshape(())
    return torch.mul(matrix, factor, out=torch.empty_like(matrix))


def _scale(gram: Tensor, schedule: Schedule, eps: float) -> tuple[Tensor, Tensor]:
    """1 / norm and ||X||_F / norm, both (batch, 1, 1); 1 for a zero matrix."""
    bound, trace = squared_norm_bound(gram)
    square = (bound if schedule.norm == "tight" else trace).clamp_min(eps * eps)
    square = torch.where(square == 0, torch.ones_like(square), square)
    return square.rsqrt(), (trace / square).sqrt()


def _choose(schedule: Schedule, k: int, slack: Tensor) -> list[Number]:
    """Step k's coefficients: those of the first table whose slack is reached, per matrix where the tables differ."""
    chosen: list[Number] = list(schedule.tables[-1][k])
    for table, least in zip(schedule.tables[-2::-1], schedule.slacks[::-1], strict=True):
        reached = slack >= least
        for i, value in enumerate(table[k]):
            if isinstance(chosen[i], Tensor) or value != chosen[i]:
                chosen[i] = torch.where(reached, torch.full_like(slack, value), chosen[i])
    return chosen


def _polynomial(gram: Tensor, step: list[Number], square: Tensor, alpha: float) -> Tensor:
    """Z = (alpha / a) (b R + c R^2 + d R^3 + e R^4) for R = ``square`` gram.

    Degree 9 by completing the square, T = R^2 + u R with u = d / 2e, so that e R^4 + d R^3 + c R^2 + b R =
    e (T^2 + kappa T + lambda R): one product fewer than by powers of R, and the large terms of opposite sign, which in
    bf16 leave an off-diagonal error of .04-.26 instead of .01-.03, never meet.
    """
    ratio = alpha / step[0]
    b, c, d, e = [ratio * v for v in step[1:]] + [0.0] * (5 - len(step))
    if len(step) == 2:
        return times(gram, b * square)
    if len(step) == 3:
        return _linear_plus_product(gram, b * square, gram, c * square**2)
    if len(step) == 4:
        inner = _linear_plus_product(gram, c * square**2, gram, d * square**3)
        return _linear_plus_product(gram, b * square, inner, 1.0)
    u = d / (2 * e)
    kappa = c / e - u * u
    t = _linear_plus_product(gram, u * square, gram, square**2)
    z = _linear_plus_product(t, e * kappa, t, e)
    return z.add_(times(gram, (b - e * u * kappa) * square))


def _linear_plus_product(a: Tensor, beta: Number, b: Tensor, gamma: Number) -> Tensor:
    """beta A + gamma A B with per-matrix numbers, the sum accumulated in one product."""
    return symm_gemm(
        a, b if isinstance(gamma, float) and gamma == 1.0 else times(b, gamma), times(a, beta), overwrite_c=True
    )


def _gram(x: Tensor) -> Tensor:
    return symm_gemm(x.mT, x) if x.shape[-2] > x.shape[-1] else symm_gemm(x, x.mT)


def _advance_gram(gram: Tensor, z: Tensor, alpha: float) -> Tensor:
    """(alpha I + Z) R (alpha I + Z); the factors commute."""
    half = symm_gemm(gram, z, gram, beta=alpha)
    return symm_gemm(z, half, half, beta=alpha)


def _advance(x: Tensor, z: Tensor, alpha: float) -> Tensor:
    """alpha X + Z X, or alpha X + X Z when tall."""
    left, right = (x, z) if x.shape[-2] > x.shape[-1] else (z, x)
    return (
        torch.baddbmm(x, left, right, beta=alpha)
        if len(x) > 1
        else torch.addmm(x[0], left[0], right[0], beta=alpha)[None]
    )


def _apply(x: Tensor, q: Tensor) -> Tensor:
    """Q X, or X Q when tall."""
    return x @ q if x.shape[-2] > x.shape[-1] else q @ x


def _add_identity(z: Tensor, alpha: float, *, overwrite: bool) -> Tensor:
    q = z if overwrite else z.clone()
    q.diagonal(dim1=-2, dim2=-1).add_(alpha)
    return q
