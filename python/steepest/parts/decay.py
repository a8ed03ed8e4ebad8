"""Weight decay and the update itself.

    W <- W - lr wd W - step u                           plain: decoupled (arXiv:1711.05101)
    W <- W - lr wd [u o W >= 0] o W - step u            cautious (arXiv:2510.12402): only where decay and update agree
    W <- (1 - lr wd) (W - step u)                       after the update, as the authors of SOAP and KL-Shampoo have it
    W <- W - wd W - step u                              independent of the learning rate, whose schedule is not its own
    g <- g + wd W;   W <- W - step u                    l2: the gradient of wd/2 ||W||_F^2 is a part of g

The last two are `weight_decay_method` of NVIDIA's Emerging-Optimizers; l2 is torch.optim.Adam's and SGD's weight_decay.
Independent decay goes with cautious and after as well: wd stands where lr wd does. Decoupled decay uses the learning
rate before any shape ratio, as `torch.optim.Muon` does, or with `scaled` after it, as SPlus.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .hyper import Number


@dataclass(frozen=True)
class Decay:
    """The new weight from the old one, its update u and the two step lengths."""

    cautious: bool = False
    after: bool = False
    scaled: bool = False
    method: Literal["decoupled", "independent", "l2"] = "decoupled"

    #: whether the fused ops have this formula
    fused: ClassVar[bool] = True
    #: whether a number of the new weight depends on nothing but that number of the old one and of the update
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.cautious and self.after:
            raise ValueError("cautious decay looks at the weight before the update; choose one of cautious and after")
        if self.method not in ("decoupled", "independent", "l2"):
            raise ValueError(
                f"weight_decay_method {self.method!r} is not known; use 'decoupled', 'independent' or 'l2'"
            )
        if self.method == "l2" and (self.cautious or self.after):
            which = "cautious" if self.cautious else "after the update"
            raise ValueError(f"weight_decay_method 'l2' leaves no decay of the weight that could be {which}")

    def length(self, lr: Number, weight_decay: Number, ratio: float) -> Number:
        """What `apply` takes as `decay`; ratio: of the matrix' shape."""
        if self.method == "l2":
            return 0.0
        return weight_decay if self.method == "independent" else lr * weight_decay * (ratio if self.scaled else 1.0)

    def apply(self, w: Tensor, u: Tensor, decay: Number, step: Number) -> Tensor:
        """W - decay W - step u in w's dtype; decay (see `length`) and step broadcast against w."""
        if self.after:
            return (w - u * step) * (1 - decay)
        if not self.cautious:
            return w * (1 - decay) - u * step
        return w - torch.where(u * w >= 0, w, 0) * decay - u * step
