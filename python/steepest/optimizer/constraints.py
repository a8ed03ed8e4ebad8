"""The radii of the spheres that constrained weights stay on: state of every parameter, the same on all ranks."""

from __future__ import annotations

from torch import Tensor

from ..parts import Sphere
from ..recipe import State
from ..step import Parameter
from ..step.retraction import norms_of
from .averages import Averages
from .checkpoint_state import Kept
from .group_options import Group

__all__ = ["Constraints"]

RADIUS = Sphere.key


class Constraints(Averages):
    """Groups whose weights may be constrained, with checkpoints."""

    def kept_state(self, p: Tensor, group: Group) -> dict[str, Kept]:
        """The radii too. A parameter that has none yet begins with the norms of its matrices as they are."""
        count, constrained = sum(piece.batch for piece in self._pieces(p, group)), self._recipe(group).constraint
        radii = Kept((count,), "> 0" if p.numel() else None, missing="leave" if constrained is None else "begin")
        return {**super().kept_state(p, group), RADIUS: radii}

    def _parameter(self, number: int, index: int, p: Tensor, state: State) -> Parameter:
        raise NotImplementedError

    def _fresh_radii(self, p: Tensor, group: Group) -> State:
        """The radii of a parameter that is to be constrained and has none: the norms of its matrices as they are.

        ValueError for a matrix of norm 0. Collective among the ranks of a sharded parameter.
        """
        sphere = self._recipe(group).constraint
        if sphere is None or RADIUS in self.state[p]:
            return {}
        norms = norms_of([self._parameter(self._number(group), 0, p, self._state_here(p))])[0]
        if p.numel() and not bool((norms > 0).all()):
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} has a matrix of norm 0, which has no sphere to stay on: put it "
                "into a group with constraint=None"
            )
        return {RADIUS: sphere.radii(norms, p.dtype)}
