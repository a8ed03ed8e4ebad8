"""Powers whose bits do not depend on an element's place: a shard has those of the whole tensor.

torch.pow of a tensor is one function in the vectors of the CPU and another in what is left over at the end.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["power"]


def power(v: Tensor, exponent: float) -> Tensor:
    """v^exponent of v >= 0, a new tensor: by square roots, which are correctly rounded, where these are enough; else
    rounded from fp64, in which one unit in the last place is seldom seen (and fp64 itself by torch.pow).
    """
    if exponent == 1:
        return v.clone()
    if exponent == 0.5:
        return v.sqrt()
    if exponent == 0.25:
        return v.sqrt().sqrt_()
    return v.double().pow(exponent).to(v.dtype)
