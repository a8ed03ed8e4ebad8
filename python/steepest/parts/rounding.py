"""How a weight computed in fp32 is stored in bf16.

    nearest      round to nearest, ties to even
    stochastic   up with probability equal to the remainder: the expected stored value is the exact one, so that updates
                 smaller than half a unit in the last place are not lost (arXiv:2010.06192)

The random bits are a hash of (step, place of the tensor, element), not a generator's stream: the same step gives the
same bits, on resume too, and no global generator is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: spreads consecutive numbers


@dataclass(frozen=True)
class Rounding:
    """Storage of the new weight; "stochastic" applies to bf16 weights and leaves other dtypes to nearest."""

    mode: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        if self.mode not in ("nearest", "stochastic"):
            raise ValueError(f"rounding mode {self.mode!r} is not known; use 'nearest' or 'stochastic'")

    @property
    def counts_steps(self) -> bool:
        return self.mode == "stochastic"

    def store(self, w: Tensor, dtype: torch.dtype, step: Tensor | None, place: Sequence[int]) -> Tensor:
        """w (fp32) in dtype; step is t (0-d), place tells this tensor from the others: (group, parameter, piece)."""
        if self.mode == "nearest" or dtype != torch.bfloat16:
            return w.to(dtype)
        assert step is not None
        bits = _random16(w, step.to(torch.int64), place)
        # bf16 is the upper half of fp32: adding 16 random bits below it and cutting rounds up with the right odds.
        rounded = (w.view(torch.int32) + bits).bitwise_and_(-0x10000).view(torch.float32)
        return torch.where(torch.isfinite(w), rounded, w).to(torch.bfloat16)


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
