"""Which parameter of a checkpoint is which of the optimizer's: by name where both have names, else by order."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..routing.groups import names_of
from .group_options import Group, frozen, name_the_rule, same

__all__ = ["AUTHOR", "GIVE_NAMES", "Match", "match", "read_groups", "values_of"]

#: The key under which a checkpoint names the class that wrote it.
AUTHOR = "optimizer"
#: What to do where the order of parameters cannot be relied upon.
GIVE_NAMES = (
    "State goes by name, whatever the order and the groups, where checkpoint and optimizer have names: make both from "
    "a module or from model.named_parameters()"
)
_OF_PARAMETERS = ("params", "param_names")
_NAME_EACH = (
    "give every parameter a name of its own there, or take 'param_names' out of all of checkpoint['param_groups'] for "
    "the order to decide"
)
#: What DistributedDataParallel, torch.compile, FSDP, activation checkpoints and Lightning Fabric put into names.
_WRAPPED = re.compile(
    r"^(?:module\.|_orig_mod\.)+|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_forward_module\."
)


@dataclass(frozen=True)
class Entry:
    """A parameter in a checkpoint: the number of its group, its key in the state, and its name if it has one."""

    group: int
    key: Hashable
    name: str | None = None


@dataclass
class Match:
    """What a checkpoint has for an optimizer's groups.

    entries: for every parameter of every group, None where the checkpoint has nothing that it can take.
    sources: for every group, the checkpoint's groups of the same rule that its parameters come from.
    removed, rerouted: names whose state is dropped: not here any more, or taken by another rule.
    kept: group values that stay what they are, as "lr of group 1".   begun: by its key what the checkpoint does not
    have, and of which parameters.
    """

    entries: list[list[Entry | None]]
    sources: list[list[int]]
    removed: list[str] = field(default_factory=list)
    rerouted: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    begun: dict[str, list[str]] = field(default_factory=dict)

    def source(self, number: int) -> str:
        """The checkpoint's groups from which a group has its values, in words."""
        numbers = self.sources[number] or [number]
        return f"group{'s' if len(numbers) > 1 else ''} {' and '.join(map(str, numbers))}"

    def dropped(self) -> str:
        """Everything that is not taken over, in words; "" where all is."""
        said = (
            ("state is dropped of parameters that are not here any more", self.removed),
            ("state is dropped of parameters that another rule takes now, they begin anew", self.rerouted),
            ("groups are other ones, and values in which they differ stay as they are", self.kept),
            (
                "what the checkpoint does not have begins anew",
                [f"{key} of {_some(names)}" for key, names in self.begun.items()],
            ),
        )
        return "; ".join(f"{what}: {', '.join(names)}" for what, names in said if names)


def read_groups(checkpoint: Mapping[str, Any]) -> tuple[list[Group], Mapping[Hashable, Any]]:
    """Copies of the groups, each saying use_muon where it says its rule at all, and the state by parameter.

    TypeError or ValueError for what is no state_dict.
    """
    if not isinstance(checkpoint, Mapping):
        what = type(checkpoint).__name__
        raise TypeError(f"the checkpoint should be a dictionary, as state_dict() gives, but is of type {what}")
    for key in ("state", "param_groups"):
        if key not in checkpoint:
            raise ValueError(
                f"the checkpoint has no {key!r}, only {', '.join(map(repr, checkpoint)) or 'nothing'}: give what "
                "state_dict() gives"
            )
    state, groups = checkpoint["state"], checkpoint["param_groups"]
    if not isinstance(state, Mapping):
        raise TypeError(f"the checkpoint's 'state' should be a dictionary but is: {state!r}")
    for key, entry in state.items():
        if not isinstance(entry, Mapping):
            raise TypeError(f"the checkpoint's state of {key!r} should be a dictionary but is: {entry!r}")
    if not isinstance(groups, list | tuple):
        raise TypeError(f"the checkpoint's 'param_groups' should be a list of dictionaries but is: {groups!r}")
    copies = []
    for number, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list | tuple):
            raise TypeError(
                f"the checkpoint's group {number} should be a dictionary with a list 'params' but is: {group!r}"
            )
        odd = next((key for key in group["params"] if isinstance(key, bool) or not isinstance(key, int | str)), None)
        if odd is not None:
            raise TypeError(f"the checkpoint's group {number} should list numbers in 'params' but has: {odd!r}")
        copies.append(dict(group))
        name_the_rule(copies[-1], of=f"the checkpoint's group {number}: ")
    return copies, state


def match(optimizer: str, saved: Sequence[Group], state: Mapping[Hashable, Any], groups: Sequence[Group]) -> Match:
    """Which entry of the checkpoint belongs to which parameter; where one side has no names the order decides, as in
    torch. ValueError, which says how to give names, where the order cannot tell, where no name is on both sides, and
    where one is that of two parameters, unless names and order say the same.
    """
    theirs, ours = _saved_names(saved), _names(groups, f"this {optimizer}'s ")
    if theirs is not None and ours is not None and theirs != ours:
        _refuse_twice(theirs, "the checkpoint's ")
        _refuse_twice(ours, f"this {optimizer}'s ")
    if theirs is not None and ours is not None and _distinct(theirs):
        theirs, ours = _comparable(theirs, ours)
        if set(_flat(theirs)) & set(_flat(ours)):
            return _by_name(theirs, ours, saved, state, groups)
        if _flat(theirs) and _flat(ours):
            raise ValueError(
                f"none of the checkpoint's names ({_some(_flat(theirs))}) is one of this {optimizer}'s "
                f"({_some(_flat(ours))}): give the parameters the names they were saved with, or change "
                "'param_names' in checkpoint['param_groups'] to the names here; without them the order decides"
            )
    sizes = [[len(group["params"]) for group in each] for each in (saved, groups)]
    why = None
    if len(saved) != len(groups):
        why = "loaded state dict has a different number of parameter groups"
    elif sizes[0] != sizes[1]:
        why = "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
    else:
        rules = [(a.get("use_muon", b["use_muon"]), b["use_muon"]) for a, b in zip(saved, groups, strict=True)]
        if any(a != b for a, b in rules):
            why = "loaded state dict has other groups with use_muon=True and False"
    if why is not None:
        raise ValueError(
            f"{why}: {_in_words(saved)} in the checkpoint, and {_in_words(groups)} in this {optimizer}. {GIVE_NAMES}"
        )
    entries: list[list[Entry | None]] = [
        [Entry(number, key) for key in group["params"]] for number, group in enumerate(saved)
    ]
    return Match(entries, [[number] for number in range(len(groups))])


def values_of(number: int, saved: Sequence[Group], matched: Match, groups: Sequence[Group]) -> Group:
    """The checkpoint's values for a group.

    A group that corresponds to one of the checkpoint's takes all of its values. Where groups have been split or merged
    it takes those in which the checkpoint's groups agree and the optimizer's too.
    """
    sources = matched.sources[number]
    siblings = [group for group, others in zip(groups, matched.sources, strict=True) if set(others) & set(sources)]
    loaded: Group = {}
    for key in dict.fromkeys(key for source in sources for key in saved[source] if key not in _OF_PARAMETERS):
        values = [saved[source].get(key) for source in sources]
        if (len(sources) == 1 or _agree(values)) and (len(siblings) == 1 or _agree([g.get(key) for g in siblings])):
            loaded[key] = values[0]
        elif key in groups[number]:
            matched.kept.append(f"{key} of group {number}")
    return loaded


def _agree(values: Sequence[Any]) -> bool:
    first, *others = (frozen({"value": value}, ["value"])["value"] for value in values)
    return all(same(first, other) for other in others)


def _names(groups: Sequence[Group], of: str) -> list[list[str]] | None:
    """The names of all parameters; None where none has one. TypeError or ValueError for what are no names of them, and
    where only some groups have names.
    """
    names = []
    for number, group in enumerate(groups):
        try:
            names.append(names_of(group))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{of}group {number}: {error}; {_NAME_EACH}") from error
    without = [number for number, each in enumerate(names) if each is None and groups[number]["params"]]
    with_names = [number for number, each in enumerate(names) if each]
    if without and with_names:
        raise ValueError(
            f"{of}group {without[0]} has no param_names, and group {with_names[0]} has: {_NAME_EACH}. {GIVE_NAMES}"
        )
    return None if without else [each or [] for each in names]


def _saved_names(saved: Sequence[Group]) -> list[list[str]] | None:
    """torch.distributed.checkpoint has names in place of numbers, in the order of whoever loads."""
    keys = [list(group["params"]) for group in saved]
    if all(isinstance(key, str) for each in keys for key in each):
        return keys
    return _names(saved, "the checkpoint's ")


def _refuse_twice(names: list[list[str]], of: str) -> None:
    """ValueError for two parameters of one name."""
    places: dict[str, str] = {}
    for number, each in enumerate(names):
        for i, name in enumerate(each):
            place = f"parameter {i} of group {number}"
            if name in places:
                raise ValueError(f"{of}{place} and {places[name]} are both named {name!r}: {_NAME_EACH}. {GIVE_NAMES}")
            places[name] = place


def _comparable(theirs: list[list[str]], ours: list[list[str]]) -> tuple[list[list[str]], list[list[str]]]:
    """Names without what wrappers put in front, unless two become one by it; and where all names of one side stand
    behind a prefix on the other, as in a module that holds the model, without that.
    """
    bare = _bare(theirs), _bare(ours)
    theirs, ours = bare if all(map(_distinct, bare)) else (theirs, ours)
    if not set(_flat(theirs)) & set(_flat(ours)):
        theirs, ours = _without_prefix(theirs, ours), _without_prefix(ours, theirs)
    return theirs, ours


def _bare(names: list[list[str]]) -> list[list[str]]:
    return [[_WRAPPED.sub("", name) for name in each] for each in names]


def _without_prefix(names: list[list[str]], others: list[list[str]]) -> list[list[str]]:
    """Names without the parts in front that all have, where it makes all of one side names of the other's."""
    flat, wanted = _flat(names), set(_flat(others))
    first, last = min(flat, default=""), max(flat, default="")  # which differ where any two do
    common = next((first[:i] for i, (a, b) in enumerate(zip(first, last)) if a != b), first)
    for prefix in (common[: dot.end()] for dot in re.finditer(r"\.", common)):
        shorter = {name.removeprefix(prefix) for name in flat}
        if shorter <= wanted or wanted <= shorter:
            return [[name.removeprefix(prefix) for name in each] for each in names]
    return names


def _flat(names: list[list[str]]) -> list[str]:
    return [name for each in names for name in each]


def _distinct(names: list[list[str]]) -> bool:
    return len(_flat(names)) == len(set(_flat(names)))


def _by_name(
    theirs: list[list[str]],
    ours: list[list[str]],
    saved: Sequence[Group],
    state: Mapping[Hashable, Any],
    groups: Sequence[Group],
) -> Match:
    by_name = {
        name: Entry(number, key, name)
        for number, (group, names) in enumerate(zip(saved, theirs, strict=True))
        for key, name in zip(group["params"], names, strict=True)
    }
    wanted = set(_flat(ours))
    matched = Match([], [], [name for name, e in by_name.items() if name not in wanted and state.get(e.key)])
    for number, (group, names) in enumerate(zip(groups, ours, strict=True)):
        entries = [by_name.get(name) for name in names]
        sources = [number] if not names and number < len(saved) and not saved[number]["params"] else []
        for i, entry in enumerate(entries):
            if entry is None:
                continue
            if saved[entry.group].get("use_muon", group["use_muon"]) == group["use_muon"]:
                sources.append(entry.group)
                continue
            entries[i] = None
            if state.get(entry.key):
                matched.rerouted.append(f"{entry.name} (now {'a matrix' if group['use_muon'] else 'of AdamW'})")
        matched.entries.append(entries)
        matched.sources.append(list(dict.fromkeys(sources)))
    return matched


def _some(first: list[str]) -> str:
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")


def _in_words(groups: Sequence[Group]) -> str:
    sizes = " and ".join(str(len(group["params"])) for group in groups)
    return f"{len(groups)} {'group' if len(groups) == 1 else 'groups'} of {sizes} parameters"
