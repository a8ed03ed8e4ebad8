"""Powers of two that bring matrices of any magnitude to order 1, so that neither squares nor conversions overflow.

A factor is exact: no digit of a normal number is lost, and a matrix times a power of two has the same bits.  From the
least fp32, 2^-149, it is 2^148, which fp32 does not hold, and from the largest 2^-128, which a flush of subnormals
makes 0.  So a power of two comes as two numbers, and one is applied after the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# fp16 holds 65504: the largest entry goes here, so that entries 2^28 times smaller keep all their digits.
FP16_EXPONENT = 15


class PowerOfTwo(NamedTuple):
    """A power of two for each matrix, as a product of two of about the same size.   (..., 1, 1), fp32 or fp64."""

    first: Tensor
    second: Tensor

    def times(self, x: Tensor) -> Tensor:
        return (x * self.first).mul_(self.second)

    def divide(self, x: Tensor) -> Tensor:
        return (x / self.first).div_(self.second)


def inverse_power_of_two(value: Tensor) -> PowerOfTwo:
    """2^-k for the k with value in [2^(k-1), 2^k), in fp32 at least; 1 for zero, NaN for what is not finite.

    value: (..., 1, 1) floating, not negative.
    """
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    exponent = -_exponent(value)
    half = exponent >> 1
    first = torch.where(value.isfinite(), _power(half, value.dtype), torch.nan)
    return PowerOfTwo(first, _power(exponent - half, value.dtype))


def largest_entry(x: Tensor) -> Tensor:
    """max |x_ij| of every matrix, NaN where one is; (..., m, n) -> (..., 1, 1), without a copy of x."""
    return torch.maximum(x.amax((-2, -1), keepdim=True), -x.amin((-2, -1), keepdim=True))


def to_order_one(x: Tensor) -> Tensor:
    """x: (..., m, n) fp32 or fp64, times a power of two that brings its largest entry into [1/2, 1)."""
    return inverse_power_of_two(largest_entry(x)).times(x)


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in fp16, or fp64 in fp32, times a power of two that brings its largest entry near fp16's largest.

    x: (..., m, n), for fp16 not fp64.  One factor does, of at most 2^126, or 2^1022 for fp64: what it leaves small are
    multiples of 2^-23, or 2^-52, which the dtype holds, of a matrix all of whose entries were subnormal.
    """
    largest = largest_entry(x)
    largest = largest.to(torch.promote_types(largest.dtype, torch.float32))
    most = 1022 if largest.dtype == torch.float64 else 126
    exponent = (FP16_EXPONENT - _exponent(largest)).clamp(max=most)
    factor = torch.where(largest.isfinite(), _power(exponent, largest.dtype), torch.nan)
    return torch.mul(x, factor, out=torch.empty(x.shape, dtype=dtype, device=x.device))


def _exponent(value: Tensor) -> Tensor:
    """k with value in [2^(k-1), 2^k); 0 for zero and for what is not finite."""
    return torch.where(value.isfinite(), torch.frexp(value).exponent, 0)


def _power(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent, normal in dtype, from its bits: a library's power may be off by a bit."""
    if dtype == torch.float64:
        return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
    return ((exponent + 127) << 23).view(torch.float32)
