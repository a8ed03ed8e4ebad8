"""What a model says itself of its modules: Hugging Face's get_output_embeddings, timm's get_classifier, its class."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from .architectures import HEAD_CLASSES, HEADS_OF_CLASSES

__all__ = ["Known", "class_name", "class_names", "is_a", "known_roles", "network_prefix"]


_LAYER_CLASS = re.compile(r"(Block|Layer|Attention|MLP|Mlp|FeedForward)$")


@dataclass(frozen=True)
class Known:
    """The role of a module, "head" or "embedding", and who says so."""

    role: str
    source: str


def class_name(module: nn.Module) -> str:
    """The class of a module; of a scripted one that of the original."""
    return str(module.original_name) if isinstance(module, torch.jit.ScriptModule) else type(module).__name__


def class_names(module: nn.Module) -> tuple[str, ...]:
    """The class of a module and those it derives from: parametrizations and FSDP2 put one of theirs before its own."""
    if isinstance(module, torch.jit.ScriptModule):
        return (class_name(module),)
    kind: Any = type(module)
    return _names_of(kind)


@lru_cache(maxsize=1024)
def _names_of(kind: type[Any]) -> tuple[str, ...]:
    return tuple(cls.__name__ for cls in kind.__mro__)


def is_a(module: nn.Module | None, *classes: type[nn.Module]) -> bool:
    """Whether a module is one of torch's of these classes, or was one before it was scripted or traced."""
    if isinstance(module, torch.jit.ScriptModule):
        return issubclass(getattr(nn, class_name(module), nn.Module), classes)
    return isinstance(module, classes)


def known_roles(modules: Mapping[str, nn.Module]) -> dict[nn.Module, Known]:
    """The role of every module of which a model says one. The first word counts."""
    roles: dict[nn.Module, Known] = {}
    for module in modules.values():
        for said, role, source in _said(module):
            for part in said.modules():
                roles.setdefault(part, Known(role, source))
    return roles


def _said(module: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    name = class_name(module)
    if not HEAD_CLASSES.isdisjoint(class_names(module)):
        yield module, "head", name
    for method in ("get_output_embeddings", "get_classifier"):
        for part in _modules(_result_of(module, method)):
            if part is not module:
                yield part, "head", f"{method} of {name}"
    for part in _modules(_result_of(module, "get_input_embeddings")):
        # Of images and sound it is a linear map, which is a matrix like any other.
        is_table = not is_a(part, nn.Linear, _ConvNd) and not list(part.children())
        if part is not module and is_table:
            yield part, "embedding", f"get_input_embeddings of {name}"
    for pattern in next((HEADS_OF_CLASSES[each] for each in class_names(module) if each in HEADS_OF_CLASSES), ()):
        for path, part in module.named_modules():
            if fnmatchcase(path, pattern):
                yield part, "head", f"{path} of {name}"


def _result_of(module: nn.Module, method: str) -> Any:
    """What a method without arguments gives; None where it is not there or has no answer."""
    ask = getattr(type(module), method, None)
    try:
        return None if ask is None else ask(module)
    except (AttributeError, NotImplementedError, TypeError, KeyError):
        return None


def _modules(answer: Any) -> Iterable[nn.Module]:
    if isinstance(answer, nn.Module):
        return [answer]
    answer = answer.values() if isinstance(answer, Mapping) else answer
    return [each for each in answer if isinstance(each, nn.Module)] if isinstance(answer, Iterable) else []


def network_prefix(model: nn.Module) -> str:
    """How names begin in a model that holds one network and nothing else, as "backbone."; "" where it branches at once.

    A wrapper of any name is seen through by this: what is at the top of the network is at the top. A list, a layer or a
    block is no network.
    """
    prefix = ""
    while not isinstance(model, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        if any(True for _ in model.parameters(recurse=False)) or _LAYER_CLASS.search(class_name(model)):
            return ""
        holding = [(name, child) for name, child in model.named_children() if any(True for _ in child.parameters())]
        if len(holding) != 1:
            return prefix
        prefix, model = f"{prefix}{holding[0][0]}.", holding[0][1]
    return ""
