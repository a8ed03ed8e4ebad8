"""The places of parameters: a module, names or tensors, read into one list of places per parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .architectures import ADAPTED, WRAPPERS
from .known import Known, class_name, known_roles, network_prefix

Routable: TypeAlias = nn.Module | Mapping[str, Tensor] | Iterable[Tensor] | Iterable[tuple[str, Tensor]]

_PARAMETRIZED = ".parametrizations."


def without_wrappers(parts: list[str]) -> list[str]:
    """Components of a path without those of wrappers and without the names of adapters."""
    kept = []
    for before, part in zip(["", *parts], parts):
        if part not in WRAPPERS and before not in ADAPTED and not ADAPTED.get(part, False):
            kept.append(part)
    return kept


@dataclass(frozen=True, eq=False)
class Place:
    """One place of a parameter in a model: its full name there and the module that holds it (None: names only).

    role: what the model itself says it is.   parent: the module that has this one.
    inside: how the name begins of all that is not in a wrapper around it.
    """

    name: str
    param: Tensor
    module: nn.Module | None = None
    role: Known | None = None
    parent: nn.Module | None = None
    inside: str = ""

    @cached_property
    def path(self) -> list[str]:
        """Lower-case components of the name without wrappers; the last is the parameter's own name."""
        layer, _, parametrized = self.name.removeprefix(self.inside).lower().partition(_PARAMETRIZED)
        parts = without_wrappers(layer.split("."))
        return [*parts, parametrized.split(".")[0]] if parametrized else parts or [layer]

    @property
    def kind(self) -> str:
        """The module's class, or the dimensions where only names are known."""
        return f"{self.param.ndim}-D" if self.module is None else class_name(self.module)


def read_places(params: Routable) -> tuple[list[list[Place]], bool]:
    """The places of each parameter, in order of first appearance, and whether the names are the caller's own."""
    if isinstance(params, nn.Module):
        places, named = _in_module(params), True
    else:
        places, named = _in_iterable(params)
    if not places:
        raise ValueError(f"optimizer got an empty parameter list: no parameters in {type(params).__name__}")
    for place in places:
        if is_lazy(place.param):
            raise ValueError(f"parameter {place.name!r} has no shape yet (lazy module): run the model once before this")
        check_not_flattened(place.param, f"parameter {place.name!r}")
    by_param: dict[int, list[Place]] = {}
    for place in places:
        by_param.setdefault(id(place.param), []).append(place)
    return _with_shared_storage(list(by_param.values())), named


def _with_shared_storage(parameters: list[list[Place]]) -> list[list[Place]]:
    """The places of each parameter, and behind them those of others that are the same memory."""
    by_memory: dict[object, list[Place]] = {}
    for places in parameters:
        by_memory.setdefault(_memory(places[0].param), []).extend(places)
    return [[*places, *(o for o in by_memory[_memory(places[0].param)] if o not in places)] for places in parameters]


def _memory(t: Tensor) -> object:
    """What two tensors share if they are one in memory; the tensor's identity where it cannot be told."""
    if type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided or t.is_meta or not t.numel():
        return id(t)
    return t.data_ptr(), t.shape, t.stride(), t.dtype, t.device


def check_not_flattened(p: Tensor, what: str) -> None:
    """RuntimeError for a parameter of FSDP1, flattened whatever use_orig_params says: its shape is gone, or a lie on
    this rank. what: names the parameter.
    """
    if getattr(p, "_fsdp_flattened", False):
        raise RuntimeError(
            f"{what} of shape {tuple(p.shape)} is flattened by FullyShardedDataParallel (FSDP1), and its matrices are "
            "cut anywhere: shard the model with torch.distributed.fsdp.fully_shard, or use DistributedDataParallel"
        )


def _in_module(model: nn.Module) -> list[Place]:
    modules = dict(model.named_modules(remove_duplicate=False))
    roles, inside = known_roles(modules), network_prefix(model)
    places = []
    for prefix, module in modules.items():
        # A parametrized weight belongs to its layer, not to the list of its parametrizations.
        owner = modules[prefix.partition(_PARAMETRIZED)[0]] if _PARAMETRIZED in prefix else module
        parent = modules[prefix.partition(_PARAMETRIZED)[0].rpartition(".")[0]] if prefix else None
        for leaf, param in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            places.append(Place(name, param, owner, roles.get(owner), parent, inside))
    return places


def _in_iterable(params: Any) -> tuple[list[Place], bool]:
    if isinstance(params, Tensor | str | set) or not isinstance(params, Iterable):
        raise TypeError(
            "params argument given to the optimizer should be an iterable of Tensors or dicts, but got "
            f"{type(params).__name__}: pass a model, model.named_parameters() or a list of tensors"
        )
    items = list(params.items() if isinstance(params, Mapping) else params)
    pairs = [item for item in items if isinstance(item, tuple) and len(item) == 2]
    if pairs and len(pairs) < len(items):
        raise ValueError("all optimizer params should be with/without names. Some param names are missing")
    named = bool(pairs)
    places = [Place(*item) if named else Place(f"param_{i}", item) for i, item in enumerate(items)]
    for place in places:
        _check(place)
    if len({place.name for place in places}) < len(places):
        raise ValueError("two parameters have the same name: names must be unique, as named_parameters() gives them")
    return places, named


def _check(place: Place) -> None:
    if isinstance(place.param, dict):
        raise TypeError("parameter groups (dict) are already routed: pass them to the optimizer, not through routing")
    if not isinstance(place.name, str) or not isinstance(place.param, Tensor):
        raise TypeError(
            f"optimizer can only optimize Tensors, but {place.name!r} is {type(place.param).__name__}: "
            "pass a model, model.named_parameters() or a list of tensors"
        )
