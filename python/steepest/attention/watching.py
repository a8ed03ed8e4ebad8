"""Calls of torch's scaled_dot_product_attention, seen from outside of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from .maxima import max_logits

__all__ = ["Watching"]

Observe = Callable[[str, Tensor], None]


class Watching:
    """Hands the largest logits of the attention calls inside of modules to observe(name, maxima)."""

    def __init__(self, observe: Observe) -> None:
        self._observe = observe
        self._handles: list[Any] = []

    def __bool__(self) -> bool:
        """Whether a module is watched."""
        return bool(self._handles)

    def add(self, name: str, module: nn.Module) -> None:
        """Watches a module's forward from now on; in training mode and where gradients are taken."""
        hooks = _Hooks(self._observe, name)
        self._handles.append(module.register_forward_pre_hook(hooks.enter))
        self._handles.append(module.register_forward_hook(hooks.leave, always_call=True))

    def remove(self) -> None:
        """Ends it."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _Hooks:
    """The hooks of one module. A copy of the module, or what is loaded of it, hands nothing over."""

    def __init__(self, observe: Observe | None, name: str) -> None:
        self._observe, self._name = observe, name
        self._entered: list[_Calls | None] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hooks, (None, self._name)

    def enter(self, module: nn.Module, inputs: Any) -> None:
        calls = None
        if self._observe is not None and module.training and torch.is_grad_enabled():
            calls = _Calls(self._observe, self._name)
            calls.__enter__()
        self._entered.append(calls)

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        calls = self._entered.pop()
        if calls is not None:
            calls.__exit__(None, None, None)


class _Calls(TorchFunctionMode):
    """Observes calls of attention while it is entered, after they were made."""

    def __init__(self, observe: Observe, name: str) -> None:
        super().__init__()
        self._observe, self._name = observe, name

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is scaled_dot_product_attention:
            self._observe(self._name, _of_call(*args, **(kwargs or {})))
        return output


def _of_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`max_logits` of a call, whose arguments these are."""
    return max_logits(query, key, attn_mask, is_causal, scale)
