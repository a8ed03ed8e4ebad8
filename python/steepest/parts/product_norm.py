"""What couples the steps of a model's layers: one norm of all of them, a bound on the loss, a growing step size.

Layer l, with momentum M_l, has a norm, its dual norm d_l and its unit step dz_l = direction(M_l). A product norm psi is
a norm of the layers' norms; steepest descent in it is  W_l <- W_l - lr w_l dz_l  with

    psi                                               dual norm d                  w_l, "lmo"       w_l, "dual"
    max     max_l x_l                                 sum d_l                      1                sum d_k
    l2      sqrt(sum x_l^2)                           sqrt(sum d_l^2)              d_l / d          d_l
    hybrid  sqrt((max_l x_l)^2 / s + sum x_k^2)       sqrt(s S^2 + sum d_k^2)      s S / d; d_k/d   s S; d_k

where in "hybrid" l are the matrices, S = sum d_l over them, and k the other parameters. "lmo" is the constrained step,
of norm lr; "dual" the regularized one, d times as long. Source: arXiv:2510.09827; the table is derived from the
definition psi*(y) = max { <x, y> : psi(x) <= 1 } and checked in tests/optim/test_product_norms.py.

Momo (the same source; arXiv:2305.07583) knows that the loss is at least lb. It models the loss by an average of the
tangents at the weights seen so far, f(X) = h + <M, X>, and stops a step at the point where the model meets lb:

    t = min(1, (f(W) - lb)_+ / <M, D>)                W <- W - t D,    D the step of the base method

For D = lr dz that is the minimizer of max(f, lb) in the ball of radius lr, for D = lr d dz that of
max(f(W + X), lb) + ||X||^2 / (2 lr): min(lr, (f(W) - lb)_+ / d) and min(lr, (f(W) - lb)_+ / d^2) in the paper's terms.

Everything here is a pure function of tensors on one device and reads nothing on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .direction import Direction
from .hyper import Number


@dataclass(frozen=True)
class ProductNorm:
    """psi. Arguments `matrices` and `others` are (k,) tensors, one number a layer, of one dtype and device; either may
    be empty, and but for "hybrid" only their union counts. s: of "hybrid", > 0.

    Raises ValueError for another kind and for s that is not positive.
    """

    kind: Literal["max", "l2", "hybrid"] = "max"
    s: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("max", "l2", "hybrid"):
            raise ValueError(f"product norm {self.kind!r} is not known; use 'max', 'l2' or 'hybrid'")
        if not self.s > 0:
            raise ValueError(f"the scale s of the matrices should be > 0 but is: {self.s}")

    def follows(self, matrix: bool) -> bool:
        """Whether such a layer's weight is proportional to its own dual norm."""
        return self.kind == "l2" or (self.kind == "hybrid" and not matrix)

    def couples(self, scale: Literal["lmo", "dual"]) -> bool:
        """Whether a layer's weight depends on other layers."""
        return (self.kind, scale) not in (("max", "lmo"), ("l2", "dual"))

    def norm(self, matrices: Tensor, others: Tensor) -> Tensor:
        """psi of the layers' norms, 0-d."""
        if self.kind == "hybrid":
            return (_largest(matrices).square() / self.s + others.square().sum()).sqrt()
        norms = torch.cat([matrices, others])
        return _largest(norms) if self.kind == "max" else torch.linalg.vector_norm(norms)

    def dual_norm(self, matrices: Tensor, others: Tensor) -> Tensor:
        """The dual of psi of the layers' dual norms, 0-d."""
        if self.kind == "hybrid":
            return _length(torch.cat([self.s**0.5 * matrices.sum().reshape(1), others]))
        norms = torch.cat([matrices, others])
        return norms.sum() if self.kind == "max" else _length(norms)

    def factors(self, matrices: Tensor, others: Tensor, scale: Literal["lmo", "dual"]) -> tuple[Number, Number]:
        """What the weights of all matrices and of all others share: w_l, or w_l / d_l where the weight `follows` d_l.

        matrices, others: the layers' dual norms. Zero where a dual norm that is zero would be divided by.
        """
        if not self.couples(scale):
            return 1.0, 1.0
        dual = _bounded(self.dual_norm(matrices, others))
        if self.kind == "max":
            return dual, dual
        inverse = torch.where(dual > 0, _bounded(1 / dual), 0) if scale == "lmo" else torch.ones_like(dual)
        return (_bounded(self.s * matrices.sum()) * inverse if self.kind == "hybrid" else inverse), inverse

    def weights(self, matrices: Tensor, others: Tensor, scale: Literal["lmo", "dual"]) -> tuple[Tensor, Tensor]:
        """w_l of every matrix and of every other layer, from their dual norms. Identities: the step w_l dz_l has
        <M, step> = d and psi = 1 ("lmo"), or <M, step> = d^2 and psi = d ("dual").
        """
        shared = self.factors(matrices, others, scale)
        each = (
            factor * (d if self.follows(matrix) else torch.ones_like(d))
            for factor, d, matrix in zip(shared, (matrices, others), (True, False), strict=True)
        )
        return next(each), next(each)


def truncation(above: Tensor, decrease: Tensor) -> Tensor:
    """Momo's t in [0, 1]: how much of a step keeps the model at or above the bound, 0-d fp64.

    above: the model's value minus the bound; below the bound nothing is moved. decrease: <M, D> >= 0, by how much the
    whole step lowers the model.
    """
    # A step that lowers nothing may be taken whole, unless the model is below the bound already.
    share = above.double().clamp(min=0) / decrease.double()
    return torch.where(decrease > 0, share, (above > 0).double()).clamp(max=1)


def escalated(eta: Tensor, gain: Tensor, dual: Tensor) -> Tensor:
    """Prodigy's step size without averages: max(eta, <G, W_0 - W> / ||G||*), where gain is the inner product.

    For a convex loss the quotient is at most the distance from W_0 to a minimizer: <G, W - W*> >= 0 gives
    <G, W_0 - W> <= <G, W_0 - W*> <= ||G||* ||W_0 - W*||. Source: arXiv:2409.20325, section on Prodigy.
    """
    estimate = gain / dual
    return torch.where((dual > 0) & (estimate > eta), estimate, eta)


@dataclass(frozen=True)
class Box(Direction):
    """Largest |d_ij| / |x_ij|: the unit ball is the box that x spans, x its corner, and the dual norm sum x_ij^2.

    With Adam's preconditioner the step is Adam's whole, m / (sqrt(v) + eps): "adam_infty" of arXiv:2510.09827.
    """

    def unit(self, x: Tensor) -> Tensor:
        return x


def _length(norms: Tensor) -> Tensor:
    """The 2-norm, 0-d, of numbers of any size, whose squares may be none of their dtype."""
    most = _bounded(_largest(norms))
    return most * torch.linalg.vector_norm(_bounded(norms) / torch.where(most > 0, most, 1))


def _bounded(norm: Tensor) -> Tensor:
    """The largest number of its dtype where a norm is beyond it: what is multiplied by it stays finite."""
    return norm.clamp(max=torch.finfo(norm.dtype).max)


def _largest(norms: Tensor) -> Tensor:
    """The largest of these numbers >= 0; 0 of none."""
    return torch.cat([norms, norms.new_zeros(1)]).amax()
