"""state_dict and load_state_dict: what is loaded is checked whole before anything changes, and goes to its name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops import streams
from ..parts import Blockwise
from ..parts.blockwise import scale_key
from ..recipe import ADAMW, Recipe, State
from ..sharding.local import is_sharded
from ..step.modes import in_default_modes
from ..step.state_storage import stack
from .checkpoint_matching import AUTHOR, Match, match, read_groups, values_of
from .checkpoint_state import (
    COUNTS,
    check_kept,
    check_no_meta,
    check_state,
    in_its_dtype,
    refuse_incomplete,
    restored,
    without_kept,
)
from .group_options import Group, name_the_rule, parameter_name
from .option_types import OPTION_TYPES, plain_numbers
from .shards import Shards

__all__ = ["Checkpoints"]

# What torch's optimizers have in their groups: switches, which say nothing about a method; options of the methods here
# and their values that AdamW has here too; and those of methods that are not here.
_SWITCHES = ("foreach", "fused", "differentiable")
_OF_ADAMW = {"amsgrad": False, "decoupled_weight_decay": True}
_SAME_STATE = "every rank loads the same checkpoint, with its own parts of the tensors that it has in parts"
_ELSEWHERE = ("dampening", "alpha", "centered", "rho", "lambd", "momentum_decay", "beta2_decay", "lr_decay", "etas")


class Checkpoints(Shards):
    """Groups with checkpoints, which keep dtypes, name their class, and are loaded whole or not at all."""

    #: the state that is being loaded, and what it was matched by
    _loading: tuple[dict[Any, Any], Match] | None = None

    # ---- saving -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state as torch gives it, and under "optimizer" the class, by which `load_state_dict` knows its own.

        What is made beside the steps is in it: the present stream waits for it. With sharded parameters all ranks call
        this together, and every tensor of the state that is not a number is a DTensor.
        """
        streams.join()
        saved = {**super().state_dict(), AUTHOR: type(self).__name__}
        # A scheduler puts what its function gives into groups, and torch.load refuses numbers of numpy.
        saved["param_groups"] = [
            {key: plain_numbers(value) for key, value in group.items()} for group in saved["param_groups"]
        ]
        # An entry is there once somebody has looked at `optimizer.state[p]`.
        saved["state"] = {key: entry for key, entry in saved["state"].items() if entry != {}}
        if not self._has_shards:
            return saved
        parameters = [(p, group) for group in self.param_groups for p in group["params"]]
        self._name_collectives("state_dict()")
        for number, (p, group) in enumerate(parameters):
            if number in saved["state"]:
                saved["state"][number] = self._saved_state(p, group)
        return saved

    def __getstate__(self) -> dict[str, Any]:
        streams.join()
        return {**super().__getstate__(), **{key: getattr(self, key) for key in self._merged("carried")}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch's base sets it, and no group here has it
        self.forget()
        if self._loading is not None:  # before the user's post-hooks
            self.state.update(self._loading[0])
            return
        for group in self.param_groups:  # of a copy, which an older version may have pickled
            if not name_the_rule(group):
                group["use_muon"] = True
            self._fill(group)
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            self.check_parameters(group)
            self._check_shards(group)

    # ---- loading ----------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this class, of `torch.optim.Muon` or KellerJordan's Muon into `Muon`, of
        `torch.optim.AdamW` into `Adam` and groups with use_muon=False. `steepest convert` translates others.

        Where both sides have names (a module, or named parameters), state goes to its name, whatever the order and the
        groups. A parameter that the checkpoint does not have begins anew. State of one that is not here any more, or
        that another rule takes now (a matrix that has become AdamW's, or the reverse), is dropped, with one warning
        that names them all. Group values are those of the checkpoint; where groups have been split or merged, one in
        which they differ stays what it is. A parameter whose entry is empty begins anew, as the warning says; one
        without an entry had no gradient yet. Without names the order decides, and sizes and shapes must agree.

        State keeps the dtype it was saved in, torch's own loader would cast fp32 averages of bf16 parameters to bf16;
        what a trainer has halved on the way is widened again.
        TypeError or ValueError, with nothing changed, for another optimizer's checkpoint, for a group value that the
        constructor refuses, and for state that lacks a tensor or has one of another shape or kind, or not finite.
        """
        if text := self._load(state_dict).dropped():
            warnings.warn(f"{type(self).__name__}.load_state_dict: {text}", UserWarning, stacklevel=2)

    @torch._disable_dynamo
    @in_default_modes
    def _load(self, state_dict: Mapping[str, Any]) -> Match:
        """Loads, and says what has been matched with what."""
        streams.join()
        self._name_collectives("load_state_dict()")
        with self._telling("load_state_dict()"):
            if not isinstance(state_dict, Mapping):
                raise TypeError(
                    "load_state_dict takes what state_dict() gives, a dictionary with 'state' and 'param_groups', but "
                    f"is given: {state_dict!r}"
                )
        handle = self.register_load_state_dict_pre_hook(self._read)  # after the user's hooks
        try:
            super().load_state_dict(dict(state_dict))
            assert self._loading is not None
            matched = self._loading[1]
        finally:
            handle.remove()
            self._loading = None
            self.forget()
        stack([state for state in self.state.values() if state])
        return matched

    def _read(self, _: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint in this optimizer's order, all of it checked. Its state, which is not torch's to cast, is kept
        for `__setstate__`.
        """
        with self._telling("load_state_dict()"):
            saved, state = read_groups(given)
            author = given.get(AUTHOR)
            self._check_author(author)
            matched = match(type(self).__name__, saved, state, self.param_groups)
            numbers = range(len(self.param_groups))
            groups = [self._loaded_group(number, saved, matched, author is None) for number in numbers]
            entries = self._entries(state, matched, groups)
        self._agree_on_state(entries)
        loaded: dict[Any, Any] = {}
        failed: Exception | None = None
        for what, p, group, tensors in entries:
            try:
                whole = self._whole_state(tensors, p, group)
                if failed is None:
                    loaded[p] = self._loaded_state(whole, what, p, group, matched, author is None)
            except Exception as error:  # of this rank, to be raised once the others have gathered what it has
                failed = failed or error
        with self._telling("load_state_dict()"):
            if failed is not None:
                raise failed
            self._share(loaded, state, matched, groups)
            self._check_together(loaded, groups)
            listed = {key for group in saved for key in group["params"]}
            _refuse_numbered([key for key, entry in state.items() if key not in listed and entry != {}])
            loaded |= {key: copy.deepcopy(value) for key, value in state.items() if key not in listed}
        self._check_agreement(None)
        self._loading = {key: value for key, value in loaded.items() if value or not isinstance(key, Tensor)}, matched
        first = 0
        for group in groups:
            group["params"] = list(range(first, first := first + len(group["params"])))
        return {"state": {}, "param_groups": groups}

    def _entries(
        self, state: Mapping[Any, Any], matched: Match, groups: list[Group]
    ) -> list[tuple[str, Tensor, Group, Any]]:
        """Every parameter with its name, its group and what the checkpoint has of its state."""
        entries = []
        taken: dict[Any, tuple[Tensor, str]] = {}
        empty = {key for key, tensors in state.items() if tensors == {}} if any(state.values()) else set()
        for number, group in enumerate(groups):
            for i, p in enumerate(group["params"]):
                entry, what = matched.entries[number][i], parameter_name(group, i)
                tensors = {} if entry is None else state.get(entry.key, {})
                if entry is not None and taken.setdefault(entry.key, (p, what))[0] is not p:
                    raise ValueError(
                        f"the checkpoint's groups list {entry.key!r} in 'params' for {taken[entry.key][1]} and for "
                        f"{what}: give each a number of its own"
                    )
                if entry is not None and entry.key in empty:
                    matched.begun.setdefault("everything", []).append(what)
                check_no_meta(tensors, what)
                entries.append((what, p, group, tensors))
        return entries

    def _agree_on_state(self, entries: list[tuple[str, Tensor, Group, Any]]) -> None:
        """RuntimeError on all ranks where they are not about to gather the same of a checkpoint."""
        if self._has_shards:
            rows = [
                (what, f"with {key} of shape {tuple(value.shape)} as {value.placements}")
                for what, _, _, tensors in entries
                for key, value in tensors.items()
                if is_sharded(value)
            ]
            self._check_agreement(rows, rows=lambda: rows, but=("ranks load different states", _SAME_STATE))

    def _check_author(self, author: object) -> None:
        """ValueError for a checkpoint of another class; one of a base class will do for a class of the user's own."""
        name, module = type(self).__name__, type(self).__module__
        bases = () if module.startswith("steepest.") else tuple(kind.__name__ for kind in type(self).__mro__)
        if author is not None and author not in (name, *bases):
            raise ValueError(
                f"the checkpoint is of {author}, and this is {name}: load it into {author}, or begin {name} without it"
            )

    def _loaded_group(self, number: int, saved: list[Group], matched: Match, foreign: bool) -> Group:
        """This optimizer's group with the checkpoint's values, checked, and its own names and parameters."""
        present = self.param_groups[number]
        loaded = values_of(number, saved, matched, self.param_groups)
        group = {**self._options(present), **loaded}
        group |= {key: present[key] for key in ("params", "param_names", "use_muon", "share_work") if key in present}
        try:
            self._check_options({key: loaded[key] for key in ("share_work",) if key in loaded})  # and not taken
            if foreign:
                self._check_keys(group)
            self._check_group(group, routed=True)
        except (TypeError, ValueError) as error:
            raise type(error)(f"the checkpoint's {matched.source(number)}: {error}") from error
        return group

    def _check_keys(self, group: Group) -> None:
        """ValueError for options that only other optimizers have; drops those of torch's that say nothing new."""
        for key in _SWITCHES:
            group.pop(key, None)
        options = self._options(group)
        others = [key for key in group if key in (*OPTION_TYPES, *_ELSEWHERE) and key not in options]
        if not others and any(key in group for key in _OF_ADAMW):
            plain = all(group.pop(key, value) == value for key, value in _OF_ADAMW.items())
            others = [] if plain and _is_adam(self._recipe(group)) else list(_OF_ADAMW)
        if others:
            raise ValueError(
                f"it has {', '.join(others)}, which {type(self).__name__} does not take here: it is of another "
                "optimizer; `steepest convert` translates some"
            )

    def _loaded_state(
        self, tensors: Any, what: str, p: Tensor, group: Group, matched: Match, foreign: bool
    ) -> dict[str, Any]:
        """A parameter's state as it will be, checked; without state of this optimizer it begins anew. tensors: as
        `_whole_state` has them.
        """
        kept, owner = self.kept_state(p, group), type(self).__name__
        fresh = self._fresh_like(tensors, p, group)
        alone = {key: kind for key, kind in kept.items() if key not in self._merged("common_state")}
        others = [key for key in tensors if key not in kept]
        if any(key in tensors for key in (*fresh, *alone)) or (foreign and others):
            begun = check_state(tensors, what, p, fresh, self._recipe(group), owner)
            refuse_incomplete(tensors, what, without_kept(tensors, alone, "refuse"), owner)
            for key in (*begun, *without_kept(tensors, alone, "begin")):
                matched.begun.setdefault(key, []).append(what)
        elif others and fresh:
            matched.begun.setdefault("everything", []).append(what)
        check_kept(tensors, what, alone)
        recipe = self._recipe(group)
        wide = {key: in_its_dtype(key, tensors[key], fresh[key], recipe) for key in fresh if _is_floating(tensors, key)}
        tensors = {**tensors, **wide}
        state = {key: restored(key, value, p) for key, value in self._state_kept_here(tensors, p, group).items()}
        self._recode(p, group, state)
        return state

    def _fresh_like(self, tensors: Mapping[str, Any], p: Tensor, group: Group) -> State:
        """The state before a first gradient, without memory; in codes where the checkpoint has codes."""
        fresh = self.fresh_state(torch.empty(p.shape, dtype=p.dtype, device="meta"), p.dtype, group)
        for name, kind in self._recipe(group).names_of_averages(len(self._pieces(p, group))).items():
            value = tensors.get(name)
            integers = isinstance(value, Tensor) and not value.is_floating_point()
            if name in fresh and p.ndim > 1 and (scale_key(name) in tensors or integers):
                fresh[name], fresh[scale_key(name)] = Blockwise().empty(fresh[name], kind)
        return fresh

    def _share(self, loaded: dict[Any, Any], state: Mapping[Any, Any], matched: Match, groups: list[Group]) -> None:
        """Puts what belongs to all parameters into the state of the one that is the first now. ValueError where it is
        not there and should be.
        """
        self.check_loaded(state)
        shared = self._merged("common_state")
        states = [tensors for tensors in state.values() if isinstance(tensors, Mapping)]
        values = {key: tensors[key] for tensors in states for key in shared if key in tensors}
        if not shared or not any(loaded.values()):
            return
        for of_parameter in loaded.values():
            for key in values:
                of_parameter.pop(key, None)
        group, first = next((group, p) for group in groups for p in group["params"])
        kept = {key: kind for key, kind in self.kept_state(first, group).items() if key in shared}
        refuse_incomplete(values, "all parameters", without_kept(values, kept, "refuse"), type(self).__name__)
        for key in without_kept(values, kept, "begin"):
            matched.begun.setdefault(key, []).append("all parameters")
        check_no_meta(values, "all parameters")
        check_kept(values, "all parameters", kept)
        loaded[first] |= {key: restored(key, value, first) for key, value in values.items()}

    def _check_together(self, loaded: Mapping[Any, Mapping[str, Any]], groups: list[Group]) -> None:
        """ValueError for a parameter without what parameters have all at once or none has."""
        there = {key for of_parameter in loaded.values() for key in of_parameter}
        for group in groups:
            for i, p in enumerate(group["params"]):
                lacking = [
                    key for key in without_kept(loaded[p], self.kept_state(p, group), "together") if key in there
                ]
                begun = all(key in loaded[p] for key in self._recipe(group).layouts)
                if lacking and begun and loaded[p]:
                    refuse_incomplete(loaded[p], parameter_name(group, i), lacking, type(self).__name__)


def _refuse_numbered(unlisted: list[Any]) -> None:
    """ValueError for entries of parameters that no group lists; those under other keys are the user's own."""
    numbered = [key for key in unlisted if isinstance(key, int) or (isinstance(key, str) and key.isdecimal())]
    if numbered:
        raise ValueError(
            f"the checkpoint's state has an entry {numbered[0]!r}, which no group lists in 'params', so it would be "
            "lost: both are the same numbers, of which JSON makes strings in the state; make them int again, or leave "
            "the entry out"
        )


def _is_floating(tensors: Mapping[str, Any], key: str) -> bool:
    """Whether there is such a tensor, other than a count of steps."""
    value = tensors.get(key)
    return key not in COUNTS and isinstance(value, Tensor) and value.is_floating_point()


def _is_adam(recipe: Recipe) -> bool:
    """Whether a recipe is torch.optim.AdamW's, state and all."""
    kinds = [(each.precondition, each.direction, each.scale, list(each.layouts)[:1]) for each in (recipe, ADAMW)]
    return kinds[0] == kinds[1]
