"""A bound on the size of an update: u <- u min(1, most / rms(u)), rms over the entries of a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..ops.reductions import vector_norm
from .hyper import Hyper
from .precondition import State
from .update_transform import UpdateTransform

__all__ = ["ClipRMS"]


@dataclass(frozen=True)
class ClipRMS(UpdateTransform):
    """No matrix's update has a root mean square above `most`, before the learning rate."""

    most: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.most < math.inf:
            raise ValueError(f"the largest rms of an update should be > 0 and finite but is: {self.most}")

    def apply(self, state: State, u: Tensor, m: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
        entries = max(1, u.shape[-2] * u.shape[-1])
        rms = vector_norm(u, keepdim=True) / entries**0.5
        return u * (self.most / rms.clamp(min=self.most)), {}
