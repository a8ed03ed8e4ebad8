"""Who is a matrix, what a group may say, and that a group is checked whole before it is taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import routing
from ..matrices import Piece, pieces
from ..ops.backend import requested
from ..parts import ADJUST_LR, Hyper
from ..recipe import Recipe, State, adamw
from .group_options import (
    CHANGING,
    ON_DEVICE,
    Group,
    adam_hyper,
    changed,
    finish,
    frozen,
    name_the_rule,
    number_on,
    parameter_name,
    read_switches,
)
from .option_types import OptionType, check_options

__all__ = ["Groups", "Params"]

Params = nn.Module | Mapping[str, Tensor] | Iterable[Any]


class Groups(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` with two kinds of group, which parameters without groups are routed to.

    Groups with use_muon=True take the class's own recipe, those with use_muon=False AdamW.
    """

    _adamw_defaults: Group
    _reasons: dict[Tensor, str]
    #: by the identity of a group: its values, its recipe, and a number that is new whenever these have changed
    _recipes: dict[int, tuple[Group, Recipe, int]]
    #: options whose type is another one than in every other optimizer; of all classes in the order of resolution
    _own_types: ClassVar[dict[str, OptionType]] = {}

    def recipe(self, group: Group) -> Recipe:
        """The method of a matrix group."""
        raise NotImplementedError

    def hyper(self, group: Group) -> Hyper:
        """The numbers of this step for a matrix group, read from the group."""
        raise NotImplementedError

    # ---- recipes and numbers of any group ---------------------------------------------------------------------------

    def _recipe(self, group: Group) -> Recipe:
        """The group's recipe, the same object until a value it may depend on changes."""
        if torch.compiler.is_compiling():
            return self._new_recipe(group)
        return self._known_recipe(group)[0]

    def _known_recipe(self, group: Group) -> tuple[Recipe, int]:
        """A group's recipe, and a number that is another one whenever its values have changed."""
        values = frozen(group, (key for key in self.defaults if key not in CHANGING))
        known = self._recipes.get(id(group))
        if known is None or changed(known[0], values) is not None:
            version = 1 + max((version for _, _, version in self._recipes.values()), default=0)
            known = self._recipes[id(group)] = (values, self._new_recipe(group), version)
        return known[1:]

    def _new_recipe(self, group: Group) -> Recipe:
        return self.recipe(group) if group["use_muon"] else adamw(group["momentum_dtype"], **finish(group))

    def _hyper(self, group: Group) -> Hyper:
        return self.hyper(group) if group["use_muon"] else adam_hyper(group)

    def _fresh_state(self, p: Tensor, dtype: torch.dtype, group: Group) -> State:
        """State before the first gradient, which has this dtype."""
        g = torch.empty_like(p, dtype=dtype, requires_grad=False)
        return self._recipe(group).init(p.detach(), g, self._pieces(p, group))

    # ---- what a subclass may check or route otherwise ---------------------------------------------------------------

    def _check_values(self, group: Group) -> None:
        """ValueError for a value the matrix method cannot take; each has been found to be what `OPTION_TYPES` says."""
        if group["adjust_lr_fn"] is not None and group["adjust_lr_fn"] not in ADJUST_LR:
            raise ValueError(
                f"Adjust learning rate function {group['adjust_lr_fn']} is not supported; use one of "
                f"{', '.join(ADJUST_LR)} or None (original)"
            )
        requested(group["backend"])
        self.recipe(group)

    def _merged(self, name: str) -> dict[str, Any]:
        """A class attribute of this name, of this class and its bases: dictionaries as one, tuples as their keys."""
        found: dict[str, Any] = {}
        for kind in reversed(type(self).__mro__):
            found |= dict.fromkeys(value) if isinstance(value := vars(kind).get(name, {}), tuple) else value
        return found

    def _check_options(self, values: Group, prefix: str = "") -> None:
        """`check_options` with the types of this class; prefix: of the names in messages."""
        check_options(values, self._merged("_own_types"), prefix)

    def _options(self, group: Group) -> Group:
        """Those values of a group that are this optimizer's, and none that a user or a scheduler has put there."""
        own = {"use_muon", *self.defaults, *(() if group["use_muon"] else self._adamw_defaults)}
        return {key: value for key, value in group.items() if key in own}

    def _check_shape(self, p: Tensor, group: Group, declared: bool) -> None:
        """ValueError for a parameter that cannot be read as matrices. `declared`: the group said use_muon itself."""
        if p.ndim < 2:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is not a matrix: put it in a group with use_muon=False, "
                "or pass the module so that parameters are routed"
            )
        if p.ndim == 3 and group["batch_dims"] is None:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is either a batch of matrices or a convolution: "
                "say batch_dims=1 or batch_dims=0 in its group"
            )

    def _bare_groups(self, params: list[Any]) -> list[Any]:
        """Groups for parameters that came without names or a module."""
        return self._route(params)

    # ---- groups ---------------------------------------------------------------------------------------------------

    def _groups(self, params: Params) -> Any:
        if isinstance(params, (nn.Module, Mapping)):
            return self._route(params)
        if isinstance(params, Tensor):
            return params  # torch says what is wrong with it
        found = list(params)
        if not found or isinstance(found[0], dict):
            return found
        return self._route(found) if isinstance(found[0], tuple) else self._bare_groups(found)

    def _route(self, params: Any) -> list[Group]:
        """Routed groups; AdamW does not decay parameters with fewer than two dimensions (gains, biases)."""
        decay = self._adamw_defaults["weight_decay"]
        return routing.param_groups(params, adamw={"weight_decay": decay} if decay else None)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group; use_muon (or algorithm="muon"/"adamw") says which method takes it, by default the matrix one.

        The group is checked whole, and an unsuitable one leaves the optimizer as it was.
        """
        if not isinstance(param_group, dict):
            return super().add_param_group(param_group)
        param_group = dict(param_group)  # the caller may use his own again
        declared = name_the_rule(param_group)
        read_switches(param_group)
        reasons = param_group.pop("param_reasons", None)
        self._fill(param_group)
        super().add_param_group(param_group)
        try:
            self._check_group(param_group, declared=declared, routed=reasons is not None)
            self._numbers_on_device(param_group)
        except Exception:
            self.param_groups.pop()
            raise
        if reasons is not None:
            self._reasons.update(zip(param_group["params"], reasons, strict=True))
        return None

    def _fill(self, group: Group) -> None:
        if not group.setdefault("use_muon", True):
            for key, value in self._adamw_defaults.items():
                group.setdefault(key, value)

    def _check_group(self, group: Group, *, declared: bool, routed: bool) -> None:
        for i, p in enumerate(group["params"]):
            self._check_shaped(p)
            routing.check_not_flattened(p, parameter_name(group, i))
        self._check_devices(group)
        self._check_options(values := self._options(group))
        group.update(values)
        if not group["use_muon"]:
            requested(group["backend"])
            self._new_recipe(group)
        else:
            self._check_values(group)
            for p in group["params"]:
                if not routed:
                    self._check_shape(p, group, declared)
                self._pieces(p, group)
        self._check_shards(group)

    @staticmethod
    def _check_shaped(p: Tensor) -> None:
        if is_lazy(p):
            raise ValueError("a parameter has no shape yet (lazy module): run the model once before this")

    def _check_shards(self, group: Group) -> None:
        """ValueError for a parameter that lies on several ranks in a way that cannot be stepped."""

    def _check_devices(self, group: Group) -> None:
        devices = list(dict.fromkeys(p.device for p in group["params"]))
        if len(devices) > 1:
            raise ValueError(
                f"a group has parameters on {' and '.join(map(str, devices))}: make one group per device, "
                "its numbers live where its parameters do"
            )

    @staticmethod
    def _numbers_on_device(group: Group) -> None:
        """Turns numbers that a graph must read anew into tensors, of a group that is capturable, on its device."""
        if group["capturable"] and group["params"]:
            for key in ON_DEVICE:
                group[key] = number_on(group[key], group["params"][0].device)

    def _pieces(self, p: Tensor, group: Group) -> tuple[Piece, ...]:
        if not group["use_muon"]:
            return (Piece(0, p.shape[0] if p.ndim else 1, 1, 1, p.numel()),)
        return pieces(
            p.shape,
            split_sizes=group["split_sizes"],
            num_heads=group["num_heads"],
            batch_dims=group["batch_dims"] or 0,
        )
