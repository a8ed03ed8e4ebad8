"""Decoupled weight decay (arXiv:1711.05101) and the update itself.

    W <- W - lr wd W - step u                           plain
    W <- W - lr wd [u o W >= 0] o W - step u            cautious (arXiv:2510.12402): only where decay and update agree
    W <- (1 - lr wd) (W - step u)                       after the update, as the authors of SOAP and KL-Shampoo have it
    W <- W - step u,  u made of m + wd W                inside: the gradient of wd/2 ||W||_F^2, added by the recipe
    W <- (W - step ||W||_F u / ||u||_F) / sqrt(1 + step^2)   relative: as long as the weight is, Fromage's step

Decay uses the learning rate before any shape ratio, as `torch.optim.Muon` does, or with `scaled` after it, as SPlus.
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
    after: bool = False
    scaled: bool = False
    inside: bool = False
    relative: bool = False

    def __post_init__(self) -> None:
        if (self.inside or self.relative) and (self.cautious or self.after or self.scaled):
            raise ValueError("decay inside the model and relative steps leave no decay to be cautious, after or scaled")
        if self.cautious and self.after:
            raise ValueError("cautious decay looks at the weight before the update; choose one of cautious and after")

    def apply(self, w: Tensor, u: Tensor, decay: Number, step: Number) -> Tensor:
        """W - decay W - step u in w's dtype; decay = lr wd and step broadcast against w.

        relative: w and u are one tensor, and where either is 0 the step is plain.
        """
        if self.relative:
            length, own = torch.linalg.vector_norm(w), torch.linalg.vector_norm(u)
            factor = torch.where((length > 0) & (own > 0), length / own, 1)
            return (w - u * (factor * step)) * (1 + step * step) ** -0.5
        if self.inside:
            return w - u * step
        if self.after:
            return (w - u * step) * (1 - decay)
        if not self.cautious:
            return w * (1 - decay) - u * step
        return w - torch.where(u * w >= 0, w, 0) * decay - u * step
