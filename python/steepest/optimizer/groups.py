"""Who is a matrix, what a group may say, and that a group is checked whole before it is taken."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import routing
from ..matrices import Piece, pieces
from ..ops.backend import requested
from ..parts import ADJUST_LR, Hyper, Number
from ..parts.step_size import name_here, shape_ratio
from ..recipe import ROOM, Recipe, State
from ..routing.groups import names_of
from .group_options import (
    CHANGING,
    LENGTHS,
    NUMBERS,
    ON_DEVICE,
    Group,
    changed,
    frozen,
    has_smaller_lr,
    is_as_it_was,
    name_the_rule,
    number_on,
    numbers_are,
    numbers_of,
    parameter_name,
    read_switches,
    same,
)
from .method import Method, merged
from .option_types import OPTION_TYPES, check_option, check_options, is_on_host, is_within

__all__ = ["Groups", "Params", "check_shaped"]

_UNKNOWN = (object(),) * len(NUMBERS)
# A decay of more than twice the weight leaves one that is larger.
_MOST_DECAY = 2.0
Params = nn.Module | Mapping[str, Tensor] | Iterable[Any]


class Groups(Method):
    """A `torch.optim.Optimizer` with two kinds of group, which parameters without groups are routed to.

    Groups with use_muon=True take the class's own recipe, those with use_muon=False AdamW.
    """

    _adamw_defaults: Group
    _reasons: dict[Tensor, str]
    #: by the identity of a group: its values, its recipe, and a number that is new whenever these have changed
    _recipes: dict[int, tuple[Group, Recipe, int]]
    #: by the identity of a group: the numbers of its steps, as they were when they were last checked
    _numbers: dict[int, tuple[Any, ...]]

    # ---- recipes and numbers of any group ---------------------------------------------------------------------------

    def _recipe(self, group: Group) -> Recipe:
        """The group's recipe, the same object until a value it may depend on changes."""
        if torch.compiler.is_compiling():
            return self._new_recipe(group)
        return self._known_recipe(group)[0]

    def _known_recipe(self, group: Group) -> tuple[Recipe, int]:
        """A group's recipe, and a number that is another one whenever its values have changed."""
        known = self._recipes.get(id(group))
        if known is not None and is_as_it_was(known[0], group):
            return known[1:]
        values = frozen(group, (key for key in self.defaults if key not in CHANGING))
        if known is None or changed(known[0], values) is not None:
            values, recipe = self._check_recipe(group, values)
            version = 1 + max((version for _, _, version in self._recipes.values()), default=0)
            known = self._recipes[id(group)] = (values, recipe, version)
        return known[1:]

    def _check_changed(self, group: Group, keys: Iterable[str]) -> None:
        """TypeError or ValueError, which names the group, for a value that the constructor refuses or that is not there
        any more. Tensors on a device are not read.
        """
        wanted = self._adamw_defaults if group.get("use_muon") is False else ()
        gone = next((key for key in (*self.defaults, *wanted) if key not in group), None)
        if gone is not None:
            raise ValueError(
                f"{self._called(group)}{gone} is not there any more: put it back, as group[{gone!r}] = ..."
            )
        values = {key: group[key] for key in keys}
        try:
            check_options(values, self._merged("option_types"), on_host=True)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self._called(group)}{error}") from error
        group.update(values)

    def _check_recipe(self, group: Group, keys: Iterable[str]) -> tuple[Group, Recipe]:
        """The values of these keys, checked as `_check_changed` does, and the group's recipe anew."""
        self._check_changed(group, keys)
        try:
            self._check_values(group)
            recipe = self._new_recipe(group)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self._called(group)}{error}") from error
        self._check_lengths(group, recipe)
        return frozen(group, keys), recipe

    def _called(self, group: Group) -> str:
        """A group's name, in front of a message; of one that is not among the optimizer's there is none."""
        number = next((i for i, other in enumerate(self.param_groups) if other is group), None)
        return "" if number is None else f"group {number}: "

    def check_numbers(self) -> None:
        """`_check_changed` of the numbers of every group that are others than at the last call. A tensor on a device is
        another one by its identity: what it is filled with is not read, which would wait for the device.
        """
        for group in self.param_groups:
            if not isinstance(group.get("use_muon"), bool):
                self._check_changed(group, ["use_muon"])
            known = self._numbers.get(id(group), _UNKNOWN)
            if numbers_are(known, group):
                continue
            if has_smaller_lr(known, group):
                self._numbers[id(group)] = (group["lr"], *known[1:])
                continue
            now = numbers_of(group, known)
            if all(map(same, known, now)):
                continue
            others = [key for key, old, new in zip(NUMBERS, known, now, strict=True) if not same(old, new)]
            self._check_changed(group, [key for key in others if self._is_option(key, group)])
            if not set(LENGTHS).isdisjoint(others):
                read = self._recipes.get(id(group))
                self._check_lengths(group, self._new_recipe(group) if read is None else read[1])
            self._numbers[id(group)] = numbers_of(group, known)

    def _takes_lr(self, group: Group, lr: float) -> bool:
        """Whether a group may have this learning rate beside its other numbers, and so each smaller one above 0."""
        try:
            check_option("lr", lr)
            self._check_lengths({**group, "lr": lr}, self._recipe(group))
        except ValueError:
            return False
        return True

    def _check_lengths(self, group: Group, recipe: Recipe) -> None:
        """ValueError for a learning rate or a weight decay that makes weights infinite whatever the gradients are.
        Tensors on a device are not read.
        """
        dtypes = [dtype for dtype in {p.dtype for p in group["params"]} if dtype.is_floating_point]
        narrowest = min(dtypes, key=lambda dtype: torch.finfo(dtype).max, default=torch.float64)
        most = torch.finfo(narrowest).max * (1.0 if narrowest is torch.float16 else ROOM)
        for key in LENGTHS:
            if _is_above(group[key], most):
                raise ValueError(
                    f"{self._called(group)}{key} should be at most {most:.3g} but is: {float(group[key])}; weights in "
                    f"{narrowest} do not stay finite with it"
                )
        hyper, ratio = self._hyper(group), 1.0
        if recipe.decay.scaled and group["params"]:
            ratio = math.sqrt(max(p.numel() for p in group["params"]))  # none is larger
            if _is_above(recipe.decay.length(hyper.lr, hyper.weight_decay, ratio), _MOST_DECAY):
                pieces_of_all = [piece for p in group["params"] for piece in self._pieces(p, group)]
                ratio = max(shape_ratio(recipe.adjust_lr, piece.rows, piece.cols) for piece in pieces_of_all)
        decay = recipe.decay.length(hyper.lr, hyper.weight_decay, ratio)
        if _is_above(decay, _MOST_DECAY):
            raise ValueError(
                f"{self._called(group)}lr={float(group['lr'])} and weight_decay={float(group['weight_decay'])} "
                f"multiply weights by 1 - {float(decay):.4g} in every step, which makes them larger whatever the "
                "gradients are: choose smaller ones"
            )

    def _check_traced(self, group: Group) -> None:
        """`_check_changed` of what is no tensor while torch.compile traces: the comparisons become guards of the graph,
        so that a value which fails one is traced anew, and raises.
        """
        special = self._merged("option_types")
        for key in group:
            kind = special.get(key, OPTION_TYPES.get(key)) if self._is_option(key, group) else None
            if kind is not None and not _has_tensor(group[key]) and not is_within(group[key], kind):
                raise ValueError(f"{self._called(group)}{key} should be {kind.wanted}, and is not")

    def _new_recipe(self, group: Group) -> Recipe:
        return self.recipe(group) if group["use_muon"] else self.recipe_of_others(group)

    def _hyper(self, group: Group) -> Hyper:
        return self.hyper(group) if group["use_muon"] else self.hyper_of_others(group)

    def fresh_state(self, p: Tensor, dtype: torch.dtype, group: Group) -> State:
        """State before the first gradient, which has this dtype."""
        g = torch.empty_like(p, dtype=dtype, requires_grad=False)
        return self._recipe(group).init(p.detach(), g, self._pieces(p, group))

    # ---- checks -----------------------------------------------------------------------------------------------------

    def _check_values(self, group: Group) -> None:
        """ValueError for a value that a group's method cannot take; each has been found to be what its type says."""
        if not group["use_muon"]:
            return self.check_values_of_others(group)
        if group["adjust_lr_fn"] is not None and group["adjust_lr_fn"] not in ADJUST_LR:
            raise ValueError(
                f"Adjust learning rate function {group['adjust_lr_fn']} is not supported; use one of "
                f"{', '.join(ADJUST_LR)} or None (original) as adjust_lr_fn{name_here(group['adjust_lr_fn'])}"
            )
        requested(group["backend"])
        self.check_values(group)
        self.recipe(group)
        return None

    def _check_state_bits(self, group: Group) -> None:
        """ValueError where the state of a group cannot be stored in codes and the group wants it to be."""

    def _number(self, group: Group) -> int:
        """The place of one of the groups among all."""
        return next(i for i, other in enumerate(self.param_groups) if other is group)

    def _merged(self, name: str) -> dict[str, Any]:
        """`merged` of this class."""
        return merged(type(self), name)  # type: ignore[arg-type]  # mypy looks at the instances' __hash__

    def _check_options(self, values: Group, prefix: str = "") -> None:
        """`check_options` with the types of this class; prefix: of the names in messages."""
        check_options(values, self._merged("option_types"), prefix)

    def _options(self, group: Group) -> Group:
        """The values of a group that are this optimizer's, and none that a user or a scheduler has put there."""
        return {key: value for key, value in group.items() if self._is_option(key, group)}

    def _is_option(self, key: str, group: Group) -> bool:
        return key == "use_muon" or key in self.defaults or (not group["use_muon"] and key in self._adamw_defaults)

    def _check_shape(self, p: Tensor, group: Group) -> None:
        """ValueError for a parameter that cannot be read as matrices."""
        if self.takes_any_shape:
            return
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

    # ---- groups ---------------------------------------------------------------------------------------------------

    def _groups(self, params: Params) -> Any:
        if isinstance(params, (nn.Module, Mapping)):
            return self.route(params)
        if isinstance(params, Tensor):
            return params  # torch says what is wrong with it
        if not isinstance(params, Iterable):
            raise TypeError(
                f"{type(self).__name__} takes a module, named parameters, tensors or groups, but is given: {params!r}"
            )
        listed = list(params)
        if not listed or isinstance(listed[0], dict):
            return listed
        return self.route(listed) if isinstance(listed[0], tuple) else self.route_tensors(listed)

    def route(self, params: Any) -> list[Group]:
        """Routed groups; AdamW does not decay parameters with fewer than two dimensions (gains, biases)."""
        return routing.param_groups(params, adamw=self._decay_of_others())

    def split_group(self, group: Group) -> list[Group]:
        if routing.says_how(group):
            return [group]
        return routing.split_group(group, adamw=self._decay_of_others())

    def _decay_of_others(self) -> Group | None:
        decay = self._adamw_defaults["weight_decay"]
        return {"weight_decay": decay} if decay else None

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group; use_muon (or algorithm="muon"/"adamw") says which method takes it.

        A group that does not say it is routed, as `steepest.param_groups` does, by names where it has them and by
        shapes. It may become two groups and more, matrices first, one after another where the group would be, each with
        all of its values: learning rate, weight decay and what a framework has put there. A group that says
        split_sizes, num_heads, batch_dims, transposed, split_columns or interleaved is of matrices.
        The group is checked whole, and an unsuitable one leaves the optimizer as it was.
        """
        if not isinstance(param_group, dict):
            return super().add_param_group(param_group)
        param_group = dict(param_group)  # the caller may use his own again
        params = param_group.get("params")
        if params is None:
            raise TypeError(
                "a parameter group should have 'params', a list of tensors, of (name, tensor) or a module, but has "
                f"{'None' if 'params' in param_group else ', '.join(map(repr, param_group)) or 'nothing'}"
            )
        if isinstance(params, Iterator):
            params = param_group["params"] = list(params)
        parts = [param_group] if name_the_rule(param_group) or _none(params) else self.split_group(param_group)
        before = len(self.param_groups)
        try:
            for part in parts:
                self._add_group(part)
        except Exception:
            del self.param_groups[before:]
            raise
        return None

    def _check_arguments(self, group: Group) -> None:
        """TypeError for an argument of the whole optimizer, which a group would only carry along."""
        others = [key for key in group if key not in self.defaults and key != "params"]
        whole = next((key for key in others if key in inspect.signature(type(self)).parameters), None)
        if whole is not None:
            of_adamw = whole.removeprefix("adamw_")
            more = f", or to a group with use_muon=False as {of_adamw}=" if of_adamw != whole else ""
            raise TypeError(
                f"{whole}={group[whole]!r} is of the whole optimizer, not of a group: give it to "
                f"{type(self).__name__}(...){more}"
            )

    def _add_group(self, group: Group) -> None:
        read_switches(group)
        self._check_arguments(group)
        reasons = group.pop("param_reasons", None)
        self._fill(group)
        super().add_param_group(group)
        self._check_group(group, routed=reasons is not None)
        self._numbers_on_device(group)
        self._numbers[id(group)] = numbers_of(group)
        if reasons is not None and len(reasons) == len(group["params"]):  # as many, unless a routed group was split
            self._reasons.update(zip(group["params"], reasons, strict=True))

    def group_lrs(self, lr: float) -> list[float]:
        """A learning rate for every group, in the ratios that they have now: lr is that of the first group of matrices.

        For a scheduler that gives one rate to all, AdamW's groups too: OneCycleLR(optimizer, optimizer.group_lrs(0.1))
        """
        rates = [float(group["lr"]) for group in self.param_groups]
        first = next((i for i, group in enumerate(self.param_groups) if group["use_muon"]), 0)
        if rates[first] == 0:
            raise ValueError(f"group {first} has the learning rate 0, to which the others have no ratio")
        return [lr * rate / rates[first] for rate in rates]

    def _fill(self, group: Group) -> None:
        if not group.setdefault("use_muon", True):
            for key, value in self._adamw_defaults.items():
                group.setdefault(key, value)

    def _check_group(self, group: Group, *, routed: bool) -> None:
        names_of(group)
        for i, p in enumerate(group["params"]):
            check_shaped(p, parameter_name(group, i))
        self._check_devices(group)
        self._check_options(values := self._options(group))
        group.update(values)
        self._check_values(group)
        self._check_state_bits(group)
        if not group["use_muon"]:
            requested(group["backend"])
            self._new_recipe(group)
        else:
            for p in group["params"]:
                if not routed:
                    self._check_shape(p, group)
                self._pieces(p, group)
        self.check_parameters(group)
        self._check_lengths(group, self._new_recipe(group))
        self._check_shards(group)

    def _check_shards(self, group: Group) -> None:
        """ValueError for a parameter that lies on several ranks in a way that cannot be stepped."""

    def _check_devices(self, group: Group) -> None:
        devices = list(dict.fromkeys(p.device for p in group["params"]))
        if len(devices) > 1:
            raise ValueError(
                f"a group has parameters on {' and '.join(map(str, devices))}: make one group per device, "
                "its numbers live where its parameters do"
            )

    def _numbers_on_device(self, group: Group) -> None:
        """Turns numbers that a graph must read anew into tensors, of a group that is capturable, on its device."""
        if group["capturable"] and group["params"]:
            for key in ON_DEVICE:
                group[key] = number_on(group[key], group["params"][0].device)
            self._numbers[id(group)] = numbers_of(group)

    def _pieces(self, p: Tensor, group: Group) -> tuple[Piece, ...]:
        if not group["use_muon"]:
            return (Piece(0, p.shape[0] if p.ndim else 1, 1, 1, p.numel()),)
        if self.takes_any_shape and p.ndim < 2:
            return (Piece(0, p.numel(), 1, p.numel(), 1),)
        return pieces(
            p.shape,
            split_sizes=group["split_sizes"],
            num_heads=group["num_heads"],
            batch_dims=group["batch_dims"] or 0,
            transposed=group.get("transposed", False),
            split_columns=group.get("split_columns", False),
            interleaved=group.get("interleaved", 1),
        )


def check_shaped(p: Tensor, what: str) -> None:
    """ValueError or RuntimeError for a parameter without a shape of its own; what: names it."""
    if is_lazy(p):
        raise ValueError("a parameter has no shape yet (lazy module): run the model once before this")
    routing.check_not_flattened(p, what)


def _is_above(value: Number, limit: float) -> bool:
    """Whether a number is larger than a limit, as far as it can be read."""
    return (not isinstance(value, Tensor) or is_on_host(value)) and bool(value > limit)


def _has_tensor(value: Any) -> bool:
    return any(isinstance(each, Tensor) for each in (value if isinstance(value, (list, tuple)) else (value,)))


def _none(params: Any) -> bool:
    """Whether there is nothing to route: a group may be empty, and a set is refused by torch."""
    return isinstance(params, set) or (not isinstance(params, (Tensor, nn.Module)) and not len(params))
