"""Checkpoints: state in the dtype it was saved in, of this class, of torch's optimizers, and of no other model."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ..ops import streams
from ..recipe import CLOCK
from ..step.modes import in_default_modes
from ..step.state_storage import stack
from .group_options import Group, name_the_rule, parameter_name

__all__ = ["Checkpoints"]


class Checkpoints(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose checkpoints keep dtypes, are checked before they are loaded, and may lack keys.

    A subclass says which state belongs to a parameter, and completes groups that a checkpoint has left incomplete.
    """

    _loading: dict[str, Any] | None = None
    #: attributes that a copy of the optimizer takes along
    _carried: tuple[str, ...] = ()

    def _state_shapes(self, p: Tensor, group: Group) -> dict[str, torch.Size]:
        """What a parameter's state holds, and in which shapes."""
        raise NotImplementedError

    def _fill(self, group: Group) -> None:
        """Completes a group's values."""
        raise NotImplementedError

    def _forget_plans(self) -> None:
        """Forgets what was made for the state that is about to be replaced."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """As torch's. What is made beside the steps is in it: the present stream waits for it."""
        streams.join()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        streams.join()
        carried = {key: getattr(self, key) for kind in type(self).__mro__ for key in vars(kind).get("_carried", ())}
        return {**super().__getstate__(), **carried}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_plans()
        rules = [True] * len(self.param_groups) if self._loading is None else self._loading["rules"]
        for group, use_muon in zip(self.param_groups, rules, strict=True):
            # A checkpoint of torch.optim.Muon, of torch.optim.AdamW or of an older version lacks keys.
            if not name_the_rule(group):
                group["use_muon"] = use_muon
            self._fill(group)
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        if self._loading is not None:
            self._restore_dtypes(self._loading)

    @torch._disable_dynamo
    @in_default_modes
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this class, of `torch.optim.Muon`, or of KellerJordan's Muon groups.

        State keeps the dtype it was saved in: torch's own loader would cast fp32 averages of bf16 parameters to bf16.
        Raises ValueError for state of another shape than its parameter, before anything is loaded.
        """
        streams.join()
        saved: dict[str, Any] = {"rules": [group["use_muon"] for group in self.param_groups]}

        def look(_: Any, given: dict[str, Any]) -> None:
            self._check_shapes(given)
            saved.update(given)

        handle = self.register_load_state_dict_pre_hook(look)  # after the user's hooks
        self._loading = saved  # for __setstate__, which torch calls before the user's post-hooks
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None
            self._forget_plans()
        stack([state for state in self.state.values() if state])

    def _check_shapes(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            return  # torch says what is wrong with it
        for saved, group in zip(groups, self.param_groups, strict=True):
            for i, (key, p) in enumerate(zip(saved["params"], group["params"], strict=True)):
                held = state_dict["state"].get(key, {})
                for name, shape in self._state_shapes(p, group).items() if held else ():
                    value = held.get(name)
                    if name == "step" or not isinstance(value, Tensor) or not value.numel() or value.shape == shape:
                        continue
                    raise ValueError(
                        f"the checkpoint's {name!r} of {parameter_name(group, i)} has shape {tuple(value.shape)} and "
                        f"the parameter {tuple(p.shape)}: it is of another model, or of another order of parameters"
                    )

    def _restore_dtypes(self, saved: dict[str, Any]) -> None:
        ids = itertools.chain.from_iterable(group["params"] for group in saved["param_groups"])
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for key, p in zip(ids, params, strict=True):
            for name, value in saved["state"].get(key, {}).items():
                self.state[p][name] = _restored(name, value, p)


def _restored(name: str, value: Any, p: Tensor) -> Any:
    if name == CLOCK:
        return torch.as_tensor(value, dtype=torch.int64).clone().reshape(()).cpu()
    if name == "step":
        return torch.as_tensor(value).detach().clone().reshape(()).to(p.device, torch.float32)
    return value.detach().clone().to(p.device) if isinstance(value, Tensor) else value
