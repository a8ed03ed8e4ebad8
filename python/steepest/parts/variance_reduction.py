"""Gradients of less variance: what has changed since the last gradient is counted more (arXiv:2411.10438).

    c = g + gamma beta1 / (1 - beta1) (g - g'),     g' the gradient before; c = g at first
    g <- c min(1, 1 / ||c||_F)                      the norm of all of a parameter

Everything else takes the new g: momentum, second moment, factors. This is MARS with the gradient of the batch before in
the place of the present batch's at the weights before ("MARS-approx"), so that no gradient is computed twice: with Adam
its MARS-AdamW, with `SignSGD` like its MARS-Lion, and with `Muon` its MARS-Shampoo, whose roots are polar factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..state_layout import StateSpec
from .hyper import Hyper
from .precondition import State

__all__ = ["VarianceReduction"]


@dataclass(frozen=True)
class VarianceReduction:
    """The correction of a gradient; gamma > 0, .025 in the paper.

    key: of the gradient before, in the gradient's dtype. state["step"] says whether there has been one.
    """

    gamma: float = 0.025
    key: str = "previous_gradient"

    @property
    def specs(self) -> tuple[StateSpec, ...]:
        return (StateSpec(self.key, "elementwise", of_gradient=True),)

    def corrected(self, state: State, g: Tensor, hyper: Hyper) -> Tensor:
        """c, in fp32 at least."""
        wide = torch.promote_types(g.dtype, torch.float32)
        before, now = state[self.key].to(wide), g.to(wide)
        weight = self.gamma * hyper.beta1 / (1 - hyper.beta1)
        return torch.where(state["step"] > 0, now + (now - before) * weight, now)

    def clipped(self, c: Tensor, square: Tensor) -> Tensor:
        """c of norm 1 at most; square: 0-d fp64, the sum of squares of all of the parameter's."""
        return c * square.sqrt().clamp(min=1).reciprocal().to(c.dtype)
