"""Steps whose layers wait for one another: what all of them measured decides how far each one goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops.multi_tensor import Scaling
from ..parts import Number
from .executor import Directed, Executor
from .parameter import Parameter

__all__ = ["Coupling", "dot", "inner_products"]


class Coupling(Protocol):
    """What a step asks before it is decided upon, and between the moments, which have taken the gradients, and the
    first weight that moves.
    """

    def allowed(self, parameters: Sequence[Parameter], scaling: dict[torch.device, Scaling]) -> Sequence[Tensor] | None:
        """Whether what the coupling keeps of each parameter stays finite, 0-d bool; None: whatever it is."""
        ...

    def factors(self, executors: Sequence[Executor]) -> list[Number]:
        """What the step of every group is multiplied by (`Hyper.step_factor`)."""
        ...

    def directed(self, executor: Executor, batch: Any) -> Directed | None:
        """The directions of a batch that `factors` has kept, or None: they are to be made."""
        ...

    def moving(self, executor: Executor, batch: Any, directed: Directed) -> None:
        """Hears of the directions, measured, along which a batch is about to move."""
        ...


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b>, 0-d fp64, of products in fp32 or fp64."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return (a.to(wide) * b.to(wide)).sum(dtype=torch.float64)


def inner_products(pairs: Sequence[tuple[Parameter, Tensor, Tensor]]) -> list[Tensor]:
    """<a, b> of every (parameter, a, b), 0-d fp64; a, b: of the parameter's shape, of a sharded one what lies here."""
    products = [dot(a, b) for _, a, b in pairs]
    shared: dict[Any, list[int]] = {}
    for i, (p, _, _) in enumerate(pairs):
        if p.sharding is not None:
            shared.setdefault(p.sharding.ranks, []).append(i)
    for ranks, some in shared.items():
        sums = torch.stack([products[i] for i in some])
        ranks.sum_parts(sums)
        for i, product in zip(some, sums.unbind(), strict=True):
            products[i] = product
    return products
