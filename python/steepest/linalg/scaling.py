"""Powers of two that bring matrices of any magnitude to order 1, so that neither squares nor conversions overflow.

A factor is exact: no digit of a normal number is lost, and a matrix times a power of two has the same bits.  From the
least fp32, 2^-149, it is 2^148, which fp32 does not hold, and from the largest 2^-128, which a flush of subnormals
makes 0.  So a power of two comes as two numbers, and one is applied after the other.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.symm_gemm import times

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


def prescaled(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A new contiguous x in ``dtype``, times a power of two that brings its largest entry into [1/2, 1).

    The factor is exact, so neither a Gram product nor a conversion over- or underflows and no digit is lost.  In fp16
    it brings the mean eigenvalue of X X^T into [1/4, 1) instead, the largest below m.  NaN if x is not finite.
    """
    if x.dtype == torch.float64 and dtype != torch.float64:  # whose range no other dtype has
        x = narrowed(x, torch.float32)
    if dtype != torch.float16:
        return _scaled(x, inverse_power_of_two(largest_entry(x)), _like(x, dtype))
    half = x if x.dtype == torch.float16 else narrowed(x, torch.float16)
    # fp32 holds the squares, and torch reads fp16 into it without a copy.
    norm = torch.linalg.vector_norm(half, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    prescale = inverse_power_of_two(norm / math.sqrt(min(x.shape[-2:])))
    return _scaled(half, prescale, _like(x, dtype) if half is x else half)


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _scaled(x: Tensor, prescale: PowerOfTwo, out: Tensor) -> Tensor:
    """``prescale x`` into ``out``, which may be x."""
    first, second = (factor.flatten() for factor in prescale)
    if x.dtype == torch.float16:  # for whose range one number is enough
        return times(x, first * second, out=out)
    return times(times(x, first, out=out), second, out=out)


def _exponent(value: Tensor) -> Tensor:
    """k with value in [2^(k-1), 2^k); 0 for zero and for what is not finite."""
    return torch.where(value.isfinite(), torch.frexp(value).exponent, 0)


def _power(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent, normal in dtype, from its bits: a library's power may be off by a bit."""
    if dtype == torch.float64:
        return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
    return ((exponent + 127) << 23).view(torch.float32)
