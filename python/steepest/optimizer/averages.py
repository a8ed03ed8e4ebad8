"""Averages of the iterates in the place of the weights: `eval` and `train` of an optimizer."""

from __future__ import annotations

from torch import Tensor

from ..sharding.local import local_tensor
from ..step.modes import in_default_modes
from .checkpoint_state import Kept
from .checkpoints import Checkpoints
from .group_options import Group

__all__ = ["Averages"]

# State of a parameter while its average is in its place: the weight.
WEIGHTS = "weights"


class Averages(Checkpoints):
    """Groups whose iterates may be averaged, with checkpoints."""

    def kept_state(self, p: Tensor, group: Group) -> dict[str, Kept]:
        averaged = self._recipe(group).average is not None
        return {**super().kept_state(p, group), WEIGHTS: Kept(p.shape, missing="together" if averaged else "leave")}

    @in_default_modes
    def eval(self) -> None:
        """Puts the averages of the iterates in place of the weights, which are kept in the state, where a group says
        `average`. Nothing else changes, and a second call does nothing.
        """
        for group in self.param_groups:
            recipe = self._recipe(group)
            average = recipe.average
            if average is None:
                continue
            for p in group["params"]:
                if not self.state.get(p) or WEIGHTS in self.state[p]:
                    continue
                if any(spec.key not in self.state[p] for spec in average.specs):
                    continue  # a checkpoint without an average: it begins with the next step
                state, here = self._state_here(p), local_tensor(p)
                value = recipe.rounding.value(here, state)
                self.state[p][WEIGHTS] = p.detach().clone()
                here.copy_(average.evaluated(state, value))

    @in_default_modes
    def train(self) -> None:
        """Puts the weights back where `eval` has taken them away."""
        for p, state in self.state.items():
            if WEIGHTS in state:
                p.copy_(state.pop(WEIGHTS))

    def _refuse_averages(self) -> None:
        """RuntimeError for a step while averages are in the place of the weights."""
        averages = any(group.get(key) is not None for group in self.param_groups for key in ("average", "average_rate"))
        if averages and any(WEIGHTS in state for state in self.state.values()):
            raise RuntimeError("the weights are averages since eval(); call train() before the next step")
