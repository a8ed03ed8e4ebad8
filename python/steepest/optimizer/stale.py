"""Notices parameters that are no longer the model's: `fully_shard` and others put new ones in their places.

An optimizer that was made before goes on with the old ones, which never get a gradient, and steps nothing.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ..sharding.local import is_sharded
from .group_options import Group

__all__ = ["IDLE_STEPS", "StaleParameters"]

#: Steps without any gradient after which an optimizer says so.
IDLE_STEPS = 3
_WAY_OUT = (
    "Make the optimizer from the model as it is trained, after fully_shard and whatever else makes parameters anew"
)


class StaleParameters:
    """What an optimizer notices of parameters without gradients.

    params: what the optimizer was made from; a module is compared with what it holds later, and not kept alive.
    """

    def __init__(self, optimizer: str, params: object = None) -> None:
        self._optimizer = optimizer
        self._module = weakref.ref(params) if isinstance(params, nn.Module) else None
        self._idle = 0
        self._warned: set[str] = set()

    def compare(self, groups: Sequence[Group]) -> None:
        """RuntimeError where the module holds others in the place of all parameters, or sharded ones in that of some;
        one warning where it holds others for some. Parameters that have a gradient are not looked at.
        """
        module = None if self._module is None else self._module()
        idle = {name: p for name, p in _named(groups) if p.grad is None}
        if module is None or not idle:
            return
        now = dict(module.named_parameters(remove_duplicate=False))
        stale = [name for name, p in idle.items() if name in now and now[name] is not p]
        if not stale:
            return
        text = (
            f"the model holds other parameters than this {self._optimizer} under {len(stale)} "
            f"{'name' if len(stale) == 1 else 'names'} ({_some(stale)}), and it would step the old ones, which get no "
            f"gradients. {_WAY_OUT}"
        )
        if len(stale) == sum(len(group["params"]) for group in groups):
            raise RuntimeError(text)
        if any(is_sharded(now[name]) for name in stale):
            raise RuntimeError(text)
        self._warn("stale", text)

    def count(self, stepped: bool, groups: Sequence[Group]) -> None:
        """Warns once after `IDLE_STEPS` steps in which nothing had a gradient."""
        self._idle = 0 if stepped else self._idle + 1
        if self._idle == IDLE_STEPS:
            what = f"this {self._optimizer}"
            numbered = [f"parameter {i}" for i in range(sum(len(group["params"]) for group in groups))]
            names = [name for name, _ in _named(groups)] or numbered
            self._warn(
                "idle",
                f"none of the {len(names)} parameters of {what} ({_some(names)}) has had a gradient for {IDLE_STEPS} "
                f"steps: it trains nothing. {_WAY_OUT}, and call step() between backward() and zero_grad()",
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, UserWarning, stacklevel=level_of_caller())


def level_of_caller() -> int:
    """The `stacklevel` for `warnings.warn`, of the function that asks: the step of whoever called the optimizer."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("steepest", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def _named(groups: Sequence[Group]) -> Iterator[tuple[str, Tensor]]:
    for group in groups:
        yield from zip(group.get("param_names") or (), group["params"])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
