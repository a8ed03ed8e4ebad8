"""Cautious updates: an entry that the gradient is against is not stepped (arXiv:2411.16085).

u <- u o [u o g > 0] d / (k + 1),     d the entries of a matrix, k those that stay
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .hyper import Hyper
from .precondition import State
from .update_transform import UpdateTransform

__all__ = ["Cautious"]


@dataclass(frozen=True)
class Cautious(UpdateTransform):
    """Keeps the entries of an update that have the sign of the gradient, and makes those longer for the others.

    Identity: <u, g> >= 0 after it, and without momentum an update of Adam or of signs is d / (d + 1) of itself. Source:
    the paper's Algorithm 1, with its scale dim / (nnz + 1); means are of each matrix, where its code has whole tensors.
    """

    reads_gradient: ClassVar[bool] = True

    def apply(self, state: State, u: Tensor, m: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
        agrees = torch.sign(u) * torch.sign(m).to(u.dtype) > 0  # u m itself may be too small for its dtype
        stay = agrees.sum((-2, -1), keepdim=True, dtype=u.dtype)
        return torch.where(agrees, u, 0) * (u.shape[-2] * u.shape[-1] / (stay + 1)), {}
