"""What happens to an element in the fused ops, as one integer that a kernel takes apart.

The order of the fields and their widths are those of `Program` in csrc/multi_tensor/params.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Power = Literal["none", "quarter", "half", "sixth"]
Kind = Literal["given", "identity", "sign"]
Mode = Literal["nearest", "stochastic", "mantissa"]

_POWERS = ("none", "quarter", "half", "sixth")
_KINDS = ("given", "identity", "sign")
_MODES = ("nearest", "stochastic", "mantissa")


@dataclass(frozen=True)
class Program:
    """The formulas of one item; every field has the meaning of the part it is named after.

    power: of the second moment in D.   direction: "given" by another op between `before` and `after`, or taken by the
    element itself, so that `before` is the whole step.
    """

    heavy_ball: bool = False
    nesterov: bool = False
    momentum_correction: bool = False
    power: Power = "none"
    sum: bool = False
    second_correction: bool = False
    eps_inside: bool = False
    direction: Kind = "given"
    cautious: bool = False
    rounding: Mode = "nearest"
    maximize: bool = False

    @property
    def whole(self) -> bool:
        """Whether `before` takes the whole step."""
        return self.direction != "given"

    def packed(self) -> int:
        bits, at = 0, 0
        for value, width in (
            (self.heavy_ball, 1),
            (self.nesterov, 1),
            (self.momentum_correction, 1),
            (_POWERS.index(self.power), 2),
            (self.sum, 1),
            (self.second_correction, 1),
            (self.eps_inside, 1),
            (_KINDS.index(self.direction), 2),
            (self.cautious, 1),
            (_MODES.index(self.rounding), 2),
            (self.maximize, 1),
        ):
            bits |= int(value) << at
            at += width
        return bits
