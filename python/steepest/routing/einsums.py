"""Weights of einops' EinMix: which of their axes are inputs and which outputs, as its pattern says."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

__all__ = ["einmix_layout"]


def einmix_layout(module: nn.Module) -> dict[str, Any] | None:
    """Group values that read the weight of an EinMix as outputs x inputs; None where its axes lie in another order.

    An axis that the pattern has on both sides counts matrices, one that is on the left alone is summed over.

        "b t c -> b t d",     weight "c d"      transposed
        "b (h c) -> b h d",   weight "h d c"    batch_dims=1
    """
    left, right = (set(re.findall(r"\w+", side)) for side in str(module.pattern).split("->"))
    axes = str(module.weight_shape).split()
    kinds = "".join("b" if axis in left & right else "i" if axis in left else "o" for axis in axes)
    match = re.fullmatch(r"(b*)(oi+|io+)", kinds)
    if match is None:
        return None
    values: dict[str, Any] = {"batch_dims": len(match[1])} if match[1] else {}
    return {**values, "transposed": True} if match[2].startswith("i") else values
