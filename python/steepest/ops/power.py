"""Powers whose bits do not depend on an element's place: a shard has those of the whole tensor.

torch.pow of a tensor is one function in the vectors of the CPU and another in what is left over at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .matmul import by_itself

__all__ = ["power"]


def power(v: Tensor, exponent: float | Tensor) -> Tensor:
    """v^exponent of v >= 0, a new tensor: by square roots, which are correctly rounded, where these are enough; else
    rounded from fp64, in which one unit in the last place is seldom seen, and of fp64 on a CPU number by number.
    """
    if not isinstance(exponent, Tensor):
        if exponent == 1:
            return v.clone()
        if exponent == 0.5:
            return v.sqrt()
        if exponent == 0.25:
            return v.sqrt().sqrt_()
    if v.dtype != torch.float64 or not by_itself(v):
        return v.double().pow(exponent).to(v.dtype)
    return torch.stack([v, v], -1)[..., 0].pow(exponent)  # vectors take no numbers with gaps between them
