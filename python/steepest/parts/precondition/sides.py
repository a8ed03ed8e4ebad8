"""The preconditioner of a product metric in the eigenbases of its two factors: one value for a row, one for a column.

    D_ij^2 = (l_i + eps + ridge max l)^e (r_j + eps + ridge max r)^e        e = exponent, damping="added"
    D_ij^2 = l_i^e r_j^e + eps                                              damping="outside"
    D_ij^2 = (l_i + sqrt(eps) / pi)^e (r_j + pi sqrt(eps))^e                damping="factored", pi^2 = mean r / mean l

    into(x) = x / D,   back(d) = d / D,   with 1/0 = 0 where D = 0 or a whole side is 0

In the basis of L = Q_L diag(l) Q_L^T and R = Q_R diag(r) Q_R^T, with the Frobenius direction scaled by its dual norm,
the update is L^-e m R^-e: e = 1/4 is Shampoo (arXiv:1802.09568), 1/2 one-sided Shampoo (arXiv:2503.20762) and
KL-Shampoo (arXiv:2509.03378), 1 K-FAC (arXiv:1503.05671). A side without a factor counts as 1. A side whose values
are all 0 has seen nothing, or was never refreshed: what eps alone would make of a gradient is no step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...ops.power import power
from ...ops.reductions import total
from ..hyper import Hyper
from .base import State

LEFT, RIGHT = "left_values", "right_values"


@dataclass(frozen=True)
class Sides:
    """The preconditioner of a product metric: where its values come from, and their power.

    values: "present", the diagonal of the factor as it is now in the basis of the last refresh; "refresh", what that
        was at the refresh: a direction without a gradient until then has a value near 0, by which the first gradient
        that has it is divided; "average", an average of squares in the basis, which every gradient adds to.
    initial: what an average begins with. limited: 1/sqrt(v) is at most max(10, min(n, 4000)) for a side of length n, in
    the averages too, as KL-Shampoo's authors have it.
    """

    exponent: float = 0.25
    values: Literal["present", "refresh", "average"] = "present"
    initial: float = 0.0
    ridge: float = 1e-6
    damping: Literal["added", "outside", "factored"] = "added"
    limited: bool = False

    keys = (LEFT, RIGHT)
    counts_steps = False

    def __post_init__(self) -> None:
        if not 0.0 < self.exponent <= 1.0:
            raise ValueError(f"exponent should be in (0, 1] but is: {self.exponent}")
        if self.damping not in ("added", "outside", "factored"):
            raise ValueError(f"damping {self.damping!r} is not known; use 'added', 'outside' or 'factored'")
        if self.values not in ("present", "refresh", "average"):
            raise ValueError(f"values {self.values!r} is not known; use 'present', 'refresh' or 'average'")
        if not self.ridge >= 0 or not self.initial >= 0:
            raise ValueError(f"ridge and initial should be >= 0 but are: {self.ridge} and {self.initial}")

    def observe(self, state: State, g: Tensor, hyper: Hyper) -> State:
        """Values are learned with the factors, after the step."""
        return {}

    def into(self, state: State, x: Tensor, hyper: Hyper, step: Tensor | None) -> Tensor:
        return self._inverse(state, hyper) * x

    def back(self, state: State, d: Tensor, hyper: Hyper, step: Tensor | None) -> Tensor:
        return self._inverse(state, hyper) * d

    def inverses(
        self, lefts: Sequence[Tensor], rights: Sequence[Tensor], counts: Sequence[int], hyper: Hyper
    ) -> list[Tensor]:
        """1/D of stacks of matrices of one shape, as many in each as counts say, from the values of their sides."""
        inverse = self._inverse({LEFT: torch.cat(list(lefts)), RIGHT: torch.cat(list(rights))}, hyper)
        return list(inverse.split(list(counts))) if inverse.ndim else [inverse] * len(counts)

    def whitening(self, values: Tensor) -> Tensor:
        """1/sqrt(v), 0 where v = 0."""
        inverse = values.rsqrt()
        inverse = inverse.masked_fill(~torch.isfinite(inverse), 0.0)
        return inverse.clamp(max=_largest_whitening(values)) if self.limited else inverse

    def limit(self, values: Tensor) -> Tensor:
        """Averages as they are kept: where limited not below what `whitening` takes them for; 0 stays 0."""
        if not self.limited:
            return values
        return torch.where(values > 0, values.clamp(min=_largest_whitening(values) ** -2), values)

    def _inverse(self, state: State, hyper: Hyper) -> Tensor:
        """1 / D, (batch, m, n) or what broadcasts to it."""
        left, right = state[LEFT], state[RIGHT]
        squared, unseen = left.new_ones(()), torch.zeros((), dtype=torch.bool, device=left.device)
        for values, other, dim in ((left, right, -1), (right, left, -2)):
            if values.numel():
                squared = squared * self._power(values, other, hyper).unsqueeze(dim)
                unseen = unseen | (values.amax(-1) <= 0)[:, None, None]
        if self.damping == "outside" and unseen.ndim:
            squared = squared + hyper.eps
        return squared.rsqrt().masked_fill((squared == 0) | unseen, 0.0)

    def _power(self, values: Tensor, other: Tensor, hyper: Hyper) -> Tensor:
        """(values + damping)^exponent."""
        if self.limited:
            return power(self.whitening(values), -2 * self.exponent)
        values = values.clamp(min=0)
        if self.damping == "added":
            values = values + values.amax(-1, keepdim=True) * self.ridge + hyper.eps
        elif self.damping == "factored":
            pi = (_mean(values) / _mean(other)).sqrt() if other.numel() else 1.0
            values = values + pi * hyper.eps**0.5
        return power(values, self.exponent)


def _mean(values: Tensor) -> Tensor:
    return total(values, -1, keepdim=True) / values.shape[-1]


def _largest_whitening(values: Tensor) -> float:
    return float(max(10, min(values.shape[-1], 4000)))
