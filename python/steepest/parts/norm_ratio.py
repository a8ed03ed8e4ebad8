"""A matrix's step as long as its momentum is, relative to a running norm of its gradients (NAMO, arXiv:2602.17080).

v <- beta2 v + (1 - beta2) ||g||_F^2;   u <- u ||m||_F sqrt(1 - beta2^t) / (sqrt(v) + eps)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.reductions import vector_norm
from ..state_layout import StateSpec
from .hyper import Hyper, bias_correction
from .precondition import State
from .update_transform import UpdateTransform

__all__ = ["NormRatio"]


@dataclass(frozen=True)
class NormRatio(UpdateTransform):
    """Adam's ratio of a mean to a root mean square, of whole matrices: near 1 where gradients agree, small in noise.

    m is what the momentum reads, with its own bias correction where the recipe has it. Without noise, and with both
    corrections, the first factor is 1.
    """

    eps: float = 1e-8
    key: str = "grad_norm_exp_avg_sq"

    measures_gradients = True

    @property
    def specs(self) -> tuple[StateSpec, ...]:
        return (StateSpec(self.key, "matrix", nonnegative=True),)

    @property
    def counts_steps(self) -> bool:
        return True

    def observe_matrices(self, state: State, g: Tensor, hyper: Hyper) -> State:
        v = state[self.key]
        square = vector_norm(g, dtype=torch.promote_types(g.dtype, v.dtype)).square()
        return {self.key: hyper.beta2 * v + (1 - hyper.beta2) * square}

    def scale(self, state: State, m: Tensor, hyper: Hyper) -> Tensor:
        v = state[self.key]
        length = vector_norm(m, dtype=torch.promote_types(m.dtype, v.dtype))
        corrected = bias_correction(hyper.beta2, state.get("step")).sqrt().to(v.dtype)
        return length * corrected / (v.sqrt() + self.eps)

    def apply(self, state: State, u: Tensor, m: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
        return u * self.scale(state, m, hyper).unsqueeze(-1).unsqueeze(-1), {}
