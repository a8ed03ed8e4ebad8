"""Optimizers as configuration files and command lines have them: a name, and values that were read as words."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import torch

from .. import zoo
from ..optimizer import MatrixOptimizer

__all__ = ["check_class", "named", "pairs", "values"]

_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}


def named(name: str) -> Callable[..., MatrixOptimizer]:
    """The optimizer of this package that has a name, capitals or none; ValueError with close names for any other."""
    classes = {key.lower(): cls for key in zoo.__all__ if _is_optimizer(cls := getattr(zoo, key))}
    if name.lower() not in classes:
        close = get_close_matches(name.lower(), classes, n=3, cutoff=0.5)
        names = sorted(classes[key].__name__ for key in (close or classes))
        hint = f"did you mean {', '.join(names)}?" if close else f"there are {', '.join(names)}"
        raise ValueError(f"no optimizer is called {name!r}: {hint}")
    return classes[name.lower()]


def check_class(cls: Any) -> None:
    """TypeError for what is no class of an optimizer here, and no function that makes one."""
    if isinstance(cls, str):
        raise TypeError(f"{cls!r} is a name: pass the class, as in steepest.MuAdam")
    if isinstance(cls, torch.optim.Optimizer):
        raise TypeError(f"this {type(cls).__name__} is made already: pass its class, as steepest.MuAdam, and arguments")
    if isinstance(cls, type) and not issubclass(cls, MatrixOptimizer):
        raise TypeError(f"{cls.__name__} is no optimizer of this package: pass one that is, as steepest.MuAdam")
    if not callable(cls):
        raise TypeError(f"{cls!r} makes no optimizer: pass a class, as in steepest.MuAdam")


def pairs(text: str) -> dict[str, Any]:
    """Arguments of an optimizer, of a text such as "momentum=0.9, nesterov=False"; ValueError for another form."""
    read: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier() or not value.strip():
            raise ValueError(f"{part!r} is no argument of an optimizer: write name=value, as in momentum=0.9,lr=0.02")
        read[key.strip()] = value.strip()
    return values(read)


def values(read: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an optimizer, of values that may be words, such as YAML's 2e-3; lists become tuples."""
    return {key: _value(value) for key, value in read.items()}


def _is_optimizer(cls: Any) -> bool:
    """Whether a class is a method by itself, and no part of one as Momo."""
    if not isinstance(cls, type) or not issubclass(cls, MatrixOptimizer):
        return False
    return bool({"params", "model"} & inspect.signature(cls).parameters.keys())


def _value(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_value, value))
    if not isinstance(value, str):
        return value
    if value in _WORDS:
        return _WORDS[value]
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return value
