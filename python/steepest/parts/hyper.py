"""The numbers of one step: read from the parameter group every time, because schedulers change them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

Number = float | Tensor


@dataclass(frozen=True)
class Hyper:
    """Numbers of one step. Each is a float or a 0-d tensor on the parameters' device (never read by the host).

    beta1 multiplies the old momentum, beta2 the old second moment; eps is absolute, in units of the preconditioner's
    statistics (see `Diagonal`). step_factor multiplies the step and not the weight decay: what layers that are coupled
    agree upon (see `steepest.parts.product_norm`).
    """

    lr: Number
    weight_decay: Number = 0.0
    beta1: Number = 0.9
    beta2: Number = 0.999
    eps: Number = 1e-8
    step_factor: Number = 1.0

    def beginning(self, taken: Tensor) -> Hyper:
        """The numbers with which an average that has no term yet takes the first one whole; taken: 0-d, how many."""
        begun = (taken != 0).double()
        return replace(self, beta1=begun * self.beta1, beta2=begun * self.beta2)


def bias_correction(beta: Number, step: Tensor | None) -> Tensor:
    """1 - beta^t, the total weight of t terms of an average that began at zero: fp64, 0-d, on the step's device."""
    if step is None:
        raise ValueError("bias correction needs the step count; the state has no 'step'")
    return 1 - beta ** step.to(torch.float64)
