"""Weights that a step has moved, for hooks: by the numbers they stand for, not by what their dtype shows of those."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..sharding.local import is_sharded, local_tensor
from ..step.parameter import Parameter

__all__ = ["Weights"]


class Weights:
    """The weights of the parameters that have a gradient, after a step; what a weight hook is given.

    All is done on the device by torch operations, so that a CUDA graph and torch.compile can hold it. The value of a
    sharded parameter is a DTensor of its placements, and one is stored.
    """

    def __init__(self, parameters: Mapping[Tensor, Parameter]) -> None:
        self._parameters = parameters

    def __contains__(self, p: Tensor) -> bool:
        """Whether the step was about this parameter."""
        return p in self._parameters

    def value(self, p: Tensor) -> Tensor:
        """The weight in fp32 (fp64 for fp64), with the bits that bf16 drops where keep_mantissa keeps them."""
        parameter = self._parameters[p]
        value = parameter.value()
        if parameter.sharding is None:
            return value
        from ..sharding.local_state import as_shard

        return as_shard(value, parameter.sharding)

    def stepped(self, p: Tensor) -> Tensor:
        """0-d bool, whether the step of this parameter was taken, and not left out for its gradient."""
        return self._parameters[p].stepped

    @torch.no_grad()
    def store(self, p: Tensor, value: Tensor) -> None:
        """Makes this the weight, of the shape of `value`, rounded as the step rounds it: the bits that are kept are its
        bits.
        """
        if is_sharded(p):
            value = local_tensor(value.redistribute(p.device_mesh, p.placements))  # type: ignore[attr-defined,operator]
        self._parameters[p].store(value)

    def multiply(self, p: Tensor, factors: Tensor) -> None:
        """Makes the weight factors times itself, rounded as `store` does; where a factor is 1 its bits stay.

        factors: as many dimensions as the parameter, each of the whole parameter's length or 1. Every rank takes those
        of its shard, so that nothing travels.
        """
        parameter = self._parameters[p]
        if parameter.sharding is not None:
            region = parameter.sharding.region
            for d, length in enumerate(factors.shape):
                factors = factors.narrow(d, region.start[d], region.shape[d]) if length > 1 else factors
        parameter.store(parameter.value() * factors)
