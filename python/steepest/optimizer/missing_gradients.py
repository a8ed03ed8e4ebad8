"""Gradients that some ranks lack, where nothing is read from the device: no rank steps such a parameter.

Every step begins with a word of all ranks: whether one goes on with the plan that all have agreed on, and which of its
gradients a rank lacks (`steepest.sharding.agreement.Agreement.any`). A rank that goes on reads no answer. One whose
gradients have changed reads whether another goes on; if so it takes the agreed step too, with zeros for what it lacks
and without what it has beyond, and on every rank the word says which parameters stay as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..sharding.local import is_sharded, local_tensor
from ..step import Plan
from ..step.executor import Executor
from .stale import level_of_caller

if TYPE_CHECKING:
    from ..sharding.ranks import Ranks

__all__ = ["AgreedStep", "Layout", "layouts_of"]

Names = Mapping[Tensor, str]


class Layout(NamedTuple):
    """How a gradient lies here; placements: None of a plain tensor."""

    dtype: torch.dtype
    shape: torch.Size
    placements: Any


def layouts_of(params: Sequence[Tensor]) -> dict[Tensor, Layout]:
    """How the gradients of these parameters lie, of those that have one."""
    return {p: _layout(p.grad) for p in params if p.grad is not None}


def _layout(g: Tensor) -> Layout:
    return Layout(g.dtype, local_tensor(g).shape, getattr(g, "placements", None) if is_sharded(g) else None)


class AgreedStep:
    """What all ranks that share parameters have found to be the same: their plan's collectives, and its gradients.

    layouts: of the gradients of shared parameters, before those that are sums over ranks are summed.   peers: for a
    shared parameter the ranks that have it, None: this one alone.
    """

    def __init__(self, plan: Plan, layouts: dict[Tensor, Layout], peers: Mapping[Tensor, Ranks | None]) -> None:
        self.layouts = layouts
        self.executors = _described(plan)
        #: for every executor of shared parameters who has these, and the parameters
        self._parts = [
            (peers[executor.parameters[0].source], [p.source for p in executor.parameters])
            for executor in _shared(plan)
        ]

    def lacked(self) -> dict[Ranks, list[bool]]:
        """Says which gradients this rank lacks, for each set of ranks that have the parameters."""
        flags: dict[Ranks, list[bool]] = {}
        for ranks, params in self._parts:
            if ranks is not None:
                flags.setdefault(ranks, []).extend(p.grad is None for p in params)
        return flags

    def of_executors(self, plan: Plan, lacking: Mapping[Ranks, Tensor]) -> dict[Executor, Tensor]:
        """The answer to `lacked`, in the order of a plan's executors, (parameters,) bool."""
        found: dict[Executor, Tensor] = {}
        first = dict.fromkeys(lacking, 0)
        for executor, (ranks, params) in zip(_shared(plan), self._parts, strict=True):
            if ranks is not None:
                found[executor] = lacking[ranks][first[ranks] : first[ranks] + len(params)]
                first[ranks] += len(params)
        return found

    def is_step_of(self, plan: Plan) -> bool:
        """Whether a plan has the same collectives."""
        return _described(plan) == self.executors

    def lend(self, names: Names, optimizer: str) -> dict[Tensor, Tensor | None]:
        """Gives shared parameters the gradients of the agreed step; -> what they had, of those that had another.

        names: of all shared parameters.
        """
        before: dict[Tensor, Tensor | None] = {}
        missing, beyond = ([name for p, name in names.items() if which(p)] for which in (self._lacks, self._exceeds))
        for p in names:
            if self._lacks(p) or self._exceeds(p):
                before[p] = p.grad
                p.grad = _zeros(p, self.layouts[p]) if p in self.layouts else None
        for some, has, have in ((missing, "no gradient", "one"), (beyond, "a gradient", "none")):
            if some:
                warnings.warn(
                    f"{optimizer}: {', '.join(some[:3])}{', ...' if len(some) > 3 else ''} of {len(names)} sharded "
                    f"parameters: {has} on rank {dist.get_rank()} and {have} on another rank, so that no rank steps "
                    "them. A layer that one rank does not use is the usual reason: give all ranks a loss that reaches "
                    "it",
                    UserWarning,
                    stacklevel=level_of_caller(),
                )
        return before

    def _lacks(self, p: Tensor) -> bool:
        return p in self.layouts and p.grad is None

    def _exceeds(self, p: Tensor) -> bool:
        return p not in self.layouts and p.grad is not None


def _shared(plan: Plan) -> Iterator[Executor]:
    return (executor for executor in plan.executors if executor.parameters[0].ranks is not None)


def _described(plan: Plan) -> list[tuple[object, ...]]:
    """What the collectives of a plan follow from, executor by executor."""
    recipes = {recipe: repr(recipe) for recipe in plan.recipes}
    return [
        (executor.backend, *((p.group, p.index, recipes[p.recipe]) for p in executor.parameters))
        for executor in _shared(plan)
    ]


def _zeros(p: Any, layout: Layout) -> Tensor:
    here = torch.zeros(layout.shape, dtype=layout.dtype, device=local_tensor(p).device)
    if layout.placements is None:
        return here
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(here, p.device_mesh, layout.placements, run_check=False, shape=p.shape, stride=p.stride())
