"""The Newton-Schulz iteration, its standard and its Gram form in one.

    standard    A = X X^T;  Z = b A + c A^2 + ...;  X <- a X + Z X                                       every step
    Gram        R = X X^T once;  Z = b R + c R^2 + ...;  Q <- a Q + Q Z;  R <- (a I + Z) R (a I + Z)     every step,
                then X <- Q X

The Gram form (Dion3 appendix B; Dao-AILab gram-newton-schulz) touches X only where a *segment* begins and ends; a
restart is the start of a new segment, and restarting before every step is the standard form.

Normalisation is never applied to X.  With X_k = s_k Y_k the iteration runs on Y, the scalars s_k enter the
coefficients of the small m x m matrices, and the last of them scales the last Q.  Coefficients may differ from matrix
to matrix: every Y advances by the same alpha_k and s takes up the rest, s_{k+1} = s_k a_k / alpha_k, so only m x m
matrices see elementwise work and nothing is read back by the host.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..ops.symm_gemm import symm_gemm
from .coefficients import Schedule, Table
from .norm_bound import squared_norm_bound

Number = float | Tensor  # per matrix where a tensor, (batch, 1, 1)


class Workspace:
    """Buffers by name, kept for the next product, step or chunk of the same shape and dtype.

    On a CPU a fresh megabyte costs its page faults: 0.2 of the 1.8 ms of a symmetric 768 x 768 x 768 product in bf16.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def like(self, name: str, tensor: Tensor) -> Tensor:
        """A contiguous buffer of the tensor's shape and dtype with undefined contents."""
        held = self._buffers.get(name)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = self._buffers[name] = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        return held


def newton_schulz(
    x: Tensor, schedule: Schedule, restarts: Collection[int], workspace: Workspace, *, eps: float, slack: Tensor
) -> Tensor:
    """Run ``schedule`` on x: (batch, m, n) in x's dtype, entries of order 1 at most; a zero matrix gives zero.

    ``restarts`` are the steps (from 1) before which a new Gram product is taken.  The norm is never taken below
    ``eps``.  x is overwritten; the result is x or a buffer of the workspace.  A tall matrix is handled as X^T X and X
    Z, without a transpose in memory.  ``slack``, (batch,), is filled with ||X||_F over the norm taken.
    """
    last = schedule.steps - 1
    gram, q = _gram(x), None
    scale, ratio = _scale(gram, schedule, eps)
    slack.copy_(ratio.flatten())
    for k in range(schedule.steps):
        if k in restarts:
            gram, q = _gram(x, out=gram), None
        alpha, step = schedule.tables[0][k][0], _choose(schedule, k, ratio)
        z = _polynomial(gram, step, scale.square(), alpha, workspace)
        scale = scale * (step[0] / alpha)
        ends = k == last or k + 1 in restarts
        if not ends:
            _advance_gram_(gram, z, alpha, workspace)
        if ends and k < last and q is None:
            x = _advance(x, z, alpha, workspace)
            continue
        q = _advance_q(q, z, alpha, workspace)
        if ends:
            x = _apply(x, times(q, scale, out=q) if k == last else q, workspace)
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


def times(matrix: Tensor, factor: Number, *, out: Tensor) -> Tensor:
    """``factor matrix`` into ``out``, with the factor, a number or (batch, 1, 1), in full precision.

    On a CPU a 0-dim factor keeps its precision and takes half the time of a broadcast one (bf16, 768 x 768: 0.26
    against 0.52 ms); elsewhere it would first be rounded to the matrix' dtype.
    """
    if isinstance(factor, Tensor) and factor.device.type == "cpu" and factor.numel() == 1:
        factor = factor.reshape(())
    return torch.mul(matrix, factor, out=out)


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


def _polynomial(gram: Tensor, step: list[Number], square: Tensor, alpha: float, workspace: Workspace) -> Tensor:
    """Z = (alpha / a) (b R + c R^2 + d R^3 + e R^4) for R = ``square`` gram, in the workspace's "z".

    Degree 9 by completing the square, T = R^2 + u R with u = d / 2e, so that e R^4 + d R^3 + c R^2 + b R =
    e (T^2 + kappa T + lambda R): the large terms of opposite sign, which in bf16 leave an off-diagonal error of .04-.26
    instead of .01-.03, never meet.
    """
    ratio = alpha / step[0]
    b, c, d, e = [ratio * v for v in step[1:]] + [0.0] * (5 - len(step))
    z, t = workspace.like("z", gram), workspace.like("t", gram)
    if len(step) == 2:
        return times(gram, b * square, out=z)
    if len(step) == 3:
        return _linear_plus_product(gram, b * square, gram, c * square**2, z, t)
    if len(step) == 4:
        inner = _linear_plus_product(gram, c * square**2, gram, d * square**3, t, z)
        return symm_gemm(gram, inner, times(gram, b * square, out=z), out=z)
    u = d / (2 * e)
    kappa = c / e - u * u
    _linear_plus_product(gram, u * square, gram, square**2, t, z)
    spare = workspace.like("half", gram)
    _linear_plus_product(t, e * kappa, t, e, z, spare)
    return z.add_(times(gram, (b - e * u * kappa) * square, out=spare))


def _linear_plus_product(a: Tensor, beta: Number, b: Tensor, gamma: Number, out: Tensor, scratch: Tensor) -> Tensor:
    """beta A + gamma A B into ``out``, with per-matrix numbers, the sum accumulated in one product."""
    return symm_gemm(a, times(b, gamma, out=scratch), times(a, beta, out=out), out=out)


def _gram(x: Tensor, out: Tensor | None = None) -> Tensor:
    return symm_gemm(x.mT, x, out=out) if x.shape[-2] > x.shape[-1] else symm_gemm(x, x.mT, out=out)


def _advance_gram_(gram: Tensor, z: Tensor, alpha: float, workspace: Workspace) -> None:
    """R <- (alpha I + Z) R (alpha I + Z), in place; the factors commute."""
    half = symm_gemm(gram, z, gram, beta=alpha, out=workspace.like("half", gram))
    symm_gemm(z, half, half, beta=alpha, out=gram)


def _advance_q(q: Tensor | None, z: Tensor, alpha: float, workspace: Workspace) -> Tensor:
    """alpha Q + Q Z; alpha I + Z where a segment begins."""
    if q is not None:
        other = workspace.like("q" if q is workspace.like("p", q) else "p", q)
        return symm_gemm(q, z, q, beta=alpha, out=other)
    q = workspace.like("q", z).copy_(z)
    q.diagonal(dim1=-2, dim2=-1).add_(alpha)
    return q


def _advance(x: Tensor, z: Tensor, alpha: float, workspace: Workspace) -> Tensor:
    """alpha X + Z X, or alpha X + X Z when tall."""
    left, right = (x, z) if x.shape[-2] > x.shape[-1] else (z, x)
    out = _other(x, workspace)
    if len(x) == 1:
        torch.addmm(x[0], left[0], right[0], beta=alpha, out=out[0])
        return out
    return torch.baddbmm(x, left, right, beta=alpha, out=out)


def _apply(x: Tensor, q: Tensor, workspace: Workspace) -> Tensor:
    """Q X, or X Q when tall."""
    left, right = (x, q) if x.shape[-2] > x.shape[-1] else (q, x)
    return torch.bmm(left, right, out=_other(x, workspace))


def _other(x: Tensor, workspace: Workspace) -> Tensor:
    """Of the two buffers of X's size the one that does not hold X."""
    return workspace.like("x" if x is workspace.like("y", x) else "y", x)
