"""The radii of the spheres that constrained weights stay on: state of every parameter, the same on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ..parts import Sphere
from ..recipe import State
from ..state_layout import Layout
from ..step import Parameter
from ..step.retraction import norms_of
from .averages import Averages
from .group_options import Group

__all__ = ["Constraints"]

RADIUS = Sphere.key


class Constraints(Averages):
    """Groups whose weights may be constrained, with checkpoints."""

    _kept: ClassVar[dict[str, Layout | None]] = {RADIUS: None}

    def _parameter(self, number: int, index: int, p: Tensor, state: State) -> Parameter:
        raise NotImplementedError

    def _fresh_radii(self, p: Tensor, group: Group) -> State:
        """The radii of a parameter that is to be constrained and has none: the norms of its matrices as they are.

        ValueError for a matrix of norm 0. Collective among the ranks of a sharded parameter.
        """
        if self._recipe(group).constraint is None or RADIUS in self.state[p]:
            return {}
        radii = norms_of([self._parameter(self._number(group), 0, p, self._state_here(p))])[0]
        if p.numel() and not bool((radii > 0).all()):
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} has a matrix of norm 0, which has no sphere to stay on: put it "
                "into a group with constraint=None"
            )
        return {RADIUS: radii}

    def _loaded_state(self, tensors: Any, what: str, p: Tensor, group: Group, foreign: bool) -> dict[str, Any]:
        state = super()._loaded_state(tensors, what, p, group, foreign)
        count = sum(piece.batch for piece in self._pieces(p, group))
        if isinstance(tensors, Mapping) and RADIUS in state and state[RADIUS].shape != (count,):
            raise ValueError(
                f"the checkpoint's {RADIUS!r} of {what} has shape {tuple(state[RADIUS].shape)} and the parameter "
                f"{count} {'matrix' if count == 1 else 'matrices'}: it is of another model, or is read otherwise here"
            )
        return state
