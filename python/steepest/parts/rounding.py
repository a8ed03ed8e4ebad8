"""How a weight computed in fp32 is stored in bf16.   W is its value, w what the parameter holds.

    nearest      round to nearest, ties to even
    stochastic   up with probability equal to the remainder: the expected stored value is the exact one, so that updates
                 smaller than half a unit in the last place are not lost (arXiv:2010.06192)
    mantissa     the 16 bits that bf16 leaves over are kept as state: w and they are the fp32 number W, as if the weight
                 were fp32, for 2 bytes more an element instead of 4. w is W to nearest, ties away from zero

The random bits are a hash of (step, place of the tensor, element), not a generator's stream: the same step gives the
same bits, on resume too, and no global generator is touched.  steepest/csrc has the same texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_QUIET_NAN = 0x7FC00000
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: spreads consecutive numbers


@dataclass(frozen=True)
class Rounding:
    """Storage of the new weight; "stochastic" and "mantissa" are for bf16 weights, others are rounded to nearest."""

    mode: Literal["nearest", "stochastic", "mantissa"] = "nearest"
    key: str = "mantissa"

    def __post_init__(self) -> None:
        if self.mode not in ("nearest", "stochastic", "mantissa"):
            raise ValueError(f"rounding mode {self.mode!r} is not known; use 'nearest', 'stochastic' or 'mantissa'")

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the state tensors."""
        return (self.key,) if self.mode == "mantissa" else ()

    @property
    def counts_steps(self) -> bool:
        return self.mode == "stochastic"

    def init(self, w: Tensor) -> dict[str, Tensor]:
        """State of a weight: int16, of its shape and layout, and without elements where it has nothing to keep."""
        if self.mode != "mantissa":
            return {}
        if w.dtype != torch.bfloat16:
            return {self.key: torch.empty(0, dtype=torch.int16, device=w.device)}
        return {self.key: torch.zeros_like(w, dtype=torch.int16, memory_format=torch.preserve_format)}

    def value(self, w: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """W in fp32 (fp64 for fp64)."""
        if self.mode != "mantissa" or w.dtype != torch.bfloat16:
            return w.to(torch.promote_types(w.dtype, torch.float32))
        return (w.float().view(torch.int32) + state[self.key].to(torch.int32)).view(torch.float32)

    def store(
        self, value: Tensor, dtype: torch.dtype, step: Tensor | None, place: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(w in dtype, new state) of W; step is t (0-d), place is (group, parameter, piece), as no other tensor's."""
        if self.mode == "nearest" or dtype != torch.bfloat16:
            return value.to(dtype), {}
        bits = value.view(torch.int32)
        # bf16 is the upper half of fp32.
        if self.mode == "mantissa":
            bits = torch.where(value.isnan(), _QUIET_NAN, bits)  # rounding up a NaN could carry into its sign
            high = (bits + 0x8000).bitwise_and_(-0x10000)
            return high.view(torch.float32).to(torch.bfloat16), {self.key: (bits - high).to(torch.int16)}
        assert step is not None
        # Adding 16 random bits below it and cutting rounds up with the right odds.
        rounded = (bits + _random16(value, step.to(torch.int64), place)).bitwise_and_(-0x10000).view(torch.float32)
        return torch.where(torch.isfinite(value), rounded, value).to(torch.bfloat16), {}


def _random16(like: Tensor, step: Tensor, place: Sequence[int]) -> Tensor:
    """Sixteen uniform bits per element (int32, in [0, 2^16)) from the hash of step, place and element."""
    seed = _scramble(step)
    for number in place:
        seed = _scramble(seed + _GOLDEN * (number + 1))
    # The element is hashed before it meets the seed, so that close seeds do not give the same bits in another order.
    x = _scramble(_scramble(torch.arange(like.numel(), device=like.device, dtype=torch.int64)) ^ seed)
    return (x >> 16).to(torch.int32).view(like.shape)


def _scramble(x: Tensor) -> Tensor:
    """The 32-bit integer hash lowbias32 (github.com/skeeto/hash-prospector), in int64 arithmetic masked to 32 bits."""
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)
