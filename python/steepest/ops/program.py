"""What the fused elementwise ops are told: what happens to an element, as one integer, and the columns of their tables.

Stated here once, from the lowest bit and the first column on. The Triton kernels take their constants from here, and
what csrc/multi_tensor/params.h says is compared with it by a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Power = Literal["none", "quarter", "half", "sixth"]
Kind = Literal["given", "identity", "sign"]
Mode = Literal["nearest", "stochastic", "mantissa"]

#: What each field of a program may be; a field has as many bits as its values need.
FIELDS: dict[str, tuple[bool | str, ...]] = {
    "heavy_ball": (False, True),
    "nesterov": (False, True),
    "momentum_correction": (False, True),
    "power": ("none", "quarter", "half", "sixth"),
    "sum": (False, True),
    "second_correction": (False, True),
    "eps_inside": (False, True),
    "direction": ("given", "identity", "sign"),
    "cautious": (False, True),
    "rounding": ("nearest", "stochastic", "mantissa"),
    "maximize": (False, True),
    "start_first": (False, True),
    "decay_after": (False, True),
    "decay_scaled": (False, True),
    "frozen_moments": (False, True),
    "decay_independent": (False, True),
    "interpolated": (False, True),
}


def _lowest_bits() -> dict[str, int]:
    places, at = {}, 0
    for name, values in FIELDS.items():
        places[name] = at
        at += (len(values) - 1).bit_length()
    return places


#: The lowest bit of each field.
LOWEST_BIT = _lowest_bits()

#: Numbers of a parameter, `Column` in params.h; the first three are measured, the last is the caller's, the others
#: follow from them.
COLUMNS = (
    "finite",
    "grad_sq",
    "grad_max",
    "step",
    "grad_scale",
    "beta1",
    "one_minus_beta1",
    "beta2",
    "one_minus_beta2",
    "read_beta1",
    "one_minus_read_beta1",
    "eps",
    "inverse_correction1",
    "inverse_correction2",
    "decay",
    "lr",
    "input_scale",
    "largest_taken",
)
#: Sums over a matrix, `Sum` there.
SUMS = ("input_sq", "input_max", "grad_dot", "momentum_sq", "momentum_max", "update_sq", "param_sq")
#: Numbers of a group, `Hyper` there.
HYPERS = ("lr", "weight_decay", "beta1", "beta2", "eps")
#: Elements of a chunk: the work of a block, whose sums take a line of the scratch.
CHUNK = 16384


@dataclass(frozen=True)
class Program:
    """The formulas of one item; every field has the meaning of the part it is named after.

    power: of the second moment in D.   direction: "given" by another op between `update_moments` and `apply_update`, or
    taken by the element itself, so that `update_moments` is the whole step.   start_first: averages begin with the
    first gradient, by beta1 = beta2 = 0 for it; Nesterov's momentum reads with beta1 as ever.
    decay_after: W <- (1 - lr wd) (W - step u).   decay_scaled: the decay is lr wd ratio, the ratio the item's.
    decay_independent: it is wd, and lr plays no part in it.
    interpolated: Nesterov's momentum reads with beta2 / beta1 in place of beta1, which with the average as it was is
    beta2 m + (1 - beta2) g: Lion's reading. No power divides it.
    frozen_moments: `update_moments` reads momentum and second moment as they are stored and leaves them alone. So an
    earlier call without inputs can have updated them, where all layers are looked at before one moves.
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
    start_first: bool = False
    decay_after: bool = False
    decay_scaled: bool = False
    frozen_moments: bool = False
    decay_independent: bool = False
    interpolated: bool = False

    def __post_init__(self) -> None:
        if self.cautious and self.decay_after:
            raise ValueError("cautious decay looks at the weight before the update; choose cautious or decay_after")
        if self.interpolated and self.power != "none":
            raise ValueError("what a power divides has Nesterov's own reading; choose interpolated or a power")

    @property
    def whole(self) -> bool:
        """Whether `update_moments` takes the whole step."""
        return self.direction != "given"

    def packed(self) -> int:
        """The fields as the bits of one integer."""
        return sum(values.index(getattr(self, name)) << LOWEST_BIT[name] for name, values in FIELDS.items())

    @staticmethod
    def unpacked(bits: int) -> Program:
        """The program that is packed so."""
        masks = {name: (1 << (len(values) - 1).bit_length()) - 1 for name, values in FIELDS.items()}
        fields: dict[str, Any] = {name: FIELDS[name][bits >> LOWEST_BIT[name] & mask] for name, mask in masks.items()}
        return Program(**fields)
