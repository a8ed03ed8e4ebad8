"""Decoupled weight decay (arXiv:1711.05101) and the update itself.

    W <- W - lr wd W - step u                           plain
    W <- W - lr wd [u o W >= 0] o W - step u            cautious (arXiv:2510.12402): only where decay and update agree
    W <- (1 - lr wd) (W - step u)                       after the update, as the authors of SOAP and KL-Shampoo have it

Decay uses the learning rate before any shape ratio, as `torch.optim.Muon` does, or with `scaled` after it, as SPlus.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .hyper import Number


@dataclass(frozen=True)
class Decay:
    """The new weight from the old one, its update u and the two step lengths."""

    cautious: bool = False
    after: bool = False
    scaled: bool = False

    #: whether the fused ops have this formula
    fused: ClassVar[bool] = True
    #: whether a number of the new weight depends on nothing but that number of the old one and of the update
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.cautious and self.after:
            raise ValueError("cautious decay looks at the weight before the update; choose one of cautious and after")

    def apply(self, w: Tensor, u: Tensor, decay: Number, step: Number) -> Tensor:
        """W - decay W - step u in w's dtype; decay = lr wd and step broadcast against w."""
        if self.after:
            return (w - u * step) * (1 - decay)
        if not self.cautious:
            return w * (1 - decay) - u * step
        return w - torch.where(u * w >= 0, w, 0) * decay - u * step
