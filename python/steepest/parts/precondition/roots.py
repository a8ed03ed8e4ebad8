"""A norm in the metric of running Kronecker factors, by inverse roots:  ||X|| = N(L^(e/2) X R^(e/2)).

    into(x) = A x B,    back(d) = A d B,    A = s^(-e/2) (L_k + r I)^(-e/2),    r = ridge c,  c >= ||L_k||

and so B of R, where k is the last refresh. It is what `Rotated` with `Sides` does by eigenbases, here by products alone
(`steepest.linalg.roots.inverse_root`). Between refreshes a root knows nothing of what its factor takes in: a direction
without a gradient until k is divided by r^e. So its scale follows the factor, as the mean of what it whitens:

    s = tr(H^-1 L) / tr(H^-1 L_k),    H = L_k + r I

Of a gradient that has the weight w in L, ||H^(-1/2) G||^2 / s <= n / w, whatever it is.

With the Frobenius direction scaled by its dual norm the update is L^-e m R^-e: e = 1/4 is Shampoo (arXiv:1802.09568),
1/2 one-sided Shampoo and KL-Shampoo. With `coupling` each factor is measured in the metric of the other
(arXiv:2509.03378):

    L <- beta L + (1 - beta) G R^-1 G^T / n        R <- beta R + (1 - beta) G^T L^-1 G / m        first rms(G) I both

A root is taken only if the residual ||X H X - I||_F / sqrt n, X = H^(-1/2), that was computed with it is at most
TRUSTED, else the one before stays: it bounds the relative error of what is whitened. A side that has seen nothing has
root 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...linalg.roots import ROOT_ORDERS, inverse_root, inverse_root_flop
from ...linalg.work import Work, square_flop
from ...ops.matmul import matmul
from ...ops.power import power
from ...ops.products import product
from ...ops.reductions import total
from ..hyper import Hyper, Number
from .base import State
from .kronecker import FACTORS, NEXT, Gathered, Kronecker, Pair, shape_of, turn_flop, wide

ROOTS: Pair = ("left_root", "right_root")
INVERSES: Pair = ("left_inverse", "right_inverse")  # H^-1 / tr(H^-1 L_k)
NEXT_INVERSES: Pair = ("left_next_inverse", "right_next_inverse")
RESIDUALS: Pair = ("left_residual", "right_residual")
# Twice what fp32 leaves at the default ridge and the worst condition number that it lets through.
TRUSTED = 0.1


@dataclass(frozen=True)
class Roots(Kronecker):
    """The part; see the module, and `Kronecker` for what else it takes.

    exponent: e.   ridge: r, relative to a bound on the largest eigenvalue (1 to 1.3 times it).
    scale: "present", s as above, or "refresh", s = 1, for which nothing but the root is kept.

    The state has the residual of the last root of each matrix that was made, taken or not.
    """

    exponent: float = 0.25
    ridge: float = 1e-6
    scale: Literal["present", "refresh"] = "present"
    coupling: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = [2 / p for p in ROOT_ORDERS if p > 1]
        if self.exponent not in choices:
            raise ValueError(
                f"exponent should be one of {', '.join(f'{e:g}' for e in choices)} but is: {self.exponent}; "
                "others go by Rotated"
            )
        if self.scale not in ("present", "refresh"):
            raise ValueError(f"scale {self.scale!r} is not known; use 'present' or 'refresh'")
        if self.coupling and (self.beta == 1 or self.exponent != 0.5):
            raise ValueError("coupled factors are averages (beta, or shampoo_beta, below 1) and have the exponent 1/2")
        if self.dtype is not None:
            raise ValueError("rounding a factor to bf16 moves its small eigenvalues beyond the ridge: use Rotated")

    @property
    def extra_keys(self) -> tuple[str, ...]:
        kept = () if self.scale == "refresh" else (*INVERSES, *(NEXT_INVERSES if self.delay else ()))
        return (*ROOTS, *RESIDUALS, *kept)

    @property
    def may_overflow(self) -> tuple[str, ...]:
        return (*RESIDUALS, *NEXT, *NEXT_INVERSES)

    def init_side(self, side: int, count: int, n: int, like: Tensor) -> State:
        pairs = [ROOTS, *([NEXT] if self.delay else [])]
        if self.scale == "present":
            pairs += [INVERSES, *([NEXT_INVERSES] if self.delay else [])]
        state = {pair[side]: like.new_zeros(shape_of(count, n, n)) for pair in pairs}
        return {**state, RESIDUALS[side]: like.new_zeros((count,) if n else (0,))}

    # ---- the change of variables ------------------------------------------------------------------------------------

    def into(self, state: State, x: Tensor, hyper: Hyper, step: Tensor | None) -> Tensor:
        return self._whiten(state, self.to_blocks(x.to(state[ROOTS[0]].dtype)))

    def back(self, state: State, d: Tensor, hyper: Hyper, step: Tensor | None) -> Tensor:
        return self._whiten(state, d.to(state[ROOTS[0]].dtype))

    def _whiten(self, state: State, x: Tensor) -> Tensor:
        return self._root_times(state, 1, self._root_times(state, 0, x).mT).mT

    def _root_times(self, state: State, side: int, x: Tensor) -> Tensor:
        """A x, or B x; x itself where the side has no factor."""
        root = state[ROOTS[side]]
        if not root.numel():
            return x
        if self.scale == "refresh":
            return matmul(root, x)
        whitened = total(state[INVERSES[side]] * state[FACTORS[side]], keepdim=True)
        return matmul(root, x) * power(torch.where(whitened > 0, whitened, 1), -self.exponent / 2)

    # ---- what it takes ----------------------------------------------------------------------------------------------

    def turns_flop(self, rows: int, cols: int, left: int, right: int) -> int:
        return (4 if self.coupling else 2) * turn_flop(rows, cols, left, right)

    def refresh_work(self, n: int, device: torch.device | str) -> Work:
        power = int(2 / self.exponent)
        squarings = power.bit_length() - 1 if self.scale == "present" else 0
        return Work(wide=inverse_root_flop(n, power, ridge_rel=self.ridge) + squarings * square_flop(n))

    # ---- factors ----------------------------------------------------------------------------------------------------

    def update_factors(self, state: State, g: Tensor, hyper: Hyper) -> State:
        fresh = super().update_factors(state, g, hyper)
        if not self.coupling:
            return fresh
        present = [key for key in FACTORS if state[key].numel()]
        x = self.to_blocks(wide(g)).square()
        size = power(total(x) / max(1, x.shape[-2] * x.shape[-1]), 1 / max(1, len(present)))
        for key in present:
            factor = state[key]
            first = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device) * size[:, None, None]
            begun = factor.diagonal(dim1=-2, dim2=-1).sum(-1) > 0
            fresh[key] = torch.where(begun[:, None, None], fresh[key], first)
        return fresh

    @property
    def _updates_factors_alone(self) -> bool:
        return super()._updates_factors_alone and not self.coupling

    def weight(self, hyper: Hyper, count: Tensor) -> Number | None:
        return 1 - self.rate(hyper) if self.coupling else super().weight(hyper, count)

    def factor_inputs(self, state: State, g: Tensor, hyper: Hyper, count: Tensor) -> tuple[dict[str, Tensor], State]:
        if not self.coupling:
            return super().factor_inputs(state, g, hyper, count)
        x = self.to_blocks(g.to(state[ROOTS[0]].dtype))
        m, n = x.shape[-2:]

        def measured(side: int, y: Tensor) -> Tensor:
            """L^-1/2 y or R^-1/2 y."""
            return self._root_times(state, side, self._root_times(state, side, y))

        return {"left": measured(1, x.mT).mT / max(1, n) ** 0.5, "right": measured(0, x).mT / max(1, m) ** 0.5}, {}

    @property
    def bounds_read_state(self) -> bool:
        return super().bounds_read_state or self.coupling

    def gains(self, states: Sequence[State]) -> Tensor | float:
        return torch.stack(list(map(self._gain, states))) if self.coupling else super().gains(states)

    def _gain(self, state: State) -> Tensor:
        parts = [state[ROOTS[0]].new_ones((1,), dtype=torch.float64)]
        for side, key in enumerate(ROOTS):
            if state[key].numel():
                eye = torch.eye(state[key].shape[-1], dtype=state[key].dtype, device=state[key].device)
                root = self._root_times(state, side, eye.expand_as(state[key]))
                parts.append(root.double().square().sum((-2, -1)).square())
        return torch.cat(parts).amax()

    # ---- the refresh ------------------------------------------------------------------------------------------------

    def solve(self, some: Gathered) -> Mapping[Pair, Tensor]:
        (factors,), power = some.tensors, int(2 / self.exponent)
        root, residual = inverse_root(factors, power, ridge_rel=self.ridge)
        if self.scale == "refresh":
            return {NEXT: root, RESIDUALS: torch.where(_finite(root), residual, torch.inf)}
        inverse = root
        while power > 1:
            inverse, power = product(inverse, inverse, precision="tf32x3", symmetric=True), power // 2
        whitened = total(inverse * factors, keepdim=True)
        inverse = inverse / torch.where(whitened > 0, whitened, 1)
        residual = torch.where(_finite(root) & _finite(inverse), residual, torch.inf)
        return {NEXT: root, NEXT_INVERSES: inverse, RESIDUALS: residual}

    def new_metric(self, state: State) -> State:
        """The new roots, where they can be trusted."""
        pairs = [(ROOTS, NEXT), *([(INVERSES, NEXT_INVERSES)] if self.scale == "present" else [])]
        fresh: State = {}
        for side, factor in enumerate(FACTORS):
            if state[factor].numel():
                trusted = (state[RESIDUALS[side]] <= TRUSTED)[:, None, None]
                fresh |= {
                    present[side]: torch.where(trusted, state[new[side]], state[present[side]])
                    for present, new in pairs
                }
        return fresh


def _finite(x: Tensor) -> Tensor:
    """Whether each matrix is finite; a factor near the smallest numbers there are has an inverse beyond the largest."""
    return torch.isfinite(x).flatten(1).all(-1)
