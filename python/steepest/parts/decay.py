"""Decoupled weight decay (arXiv:1711.05101) and the update itself.

    W <- W - lr wd W - step u                           plain
    W <- W - lr wd [u o W >= 0] o W - step u            cautious (arXiv:2510.12402): only where decay and update agree

Decay uses the learning rate before any shape ratio, as `torch.optim.Muon` does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .hyper import Number


@dataclass(frozen=True)
class Decay:
    """The new weight from the old one, its update direction u and the two step lengths."""

    cautious: bool = False

    def apply(self, w: Tensor, u: Tensor, decay: Number, step: Number) -> Tensor:
        """W - decay W - step u in w's dtype; decay = lr wd and step broadcast against w."""
        if not self.cautious:
            return w * (1 - decay) - u * step
        return w - torch.where(u * w >= 0, w, 0) * decay - u * step
