"""Grafting: every matrix's update is made as long as another method's would be (arXiv:2002.11803).

u <- u ||a||_F / ||u||_F,     a = m / D^2, the update of an elementwise preconditioner: Adam's
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops.reductions import vector_norm
from ..state_layout import StateSpec
from .hyper import Hyper
from .precondition import Diagonal, State
from .update_transform import UpdateTransform

__all__ = ["Graft"]


@dataclass(frozen=True)
class Graft(UpdateTransform):
    """The length, in the Frobenius norm, of what `magnitude` alone would give; an update of length 0 stays 0."""

    magnitude: Diagonal = field(default_factory=lambda: Diagonal(eps_inside=False, key="graft_exp_avg_sq"))

    @property
    def specs(self) -> tuple[StateSpec, ...]:
        return (StateSpec(self.magnitude.key, "elementwise", nonnegative=True, codes="squares"),)

    @property
    def counts_steps(self) -> bool:
        return self.magnitude.counts_steps

    def observe(self, state: State, g: Tensor, hyper: Hyper) -> State:
        return self.magnitude.observe(state, g, hyper)

    def apply(self, state: State, u: Tensor, m: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
        step = state.get("step")
        other = self.magnitude.back(state, self.magnitude.into(state, m, hyper, step), hyper, step)
        wanted, length = (vector_norm(t, keepdim=True) for t in (other, u))
        return u * torch.where(length > 0, wanted / length, 0), {}
