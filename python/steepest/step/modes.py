"""What torch is set to while a step computes: nothing of what a caller has set for the model beside it.

    autocast                     off: factors, statistics and weights have the dtypes they are stored in
    default dtype and device     float32 and the CPU: state lies where its layout says
    fp32 products                in fp32, on the CPU and in cuBLAS
    grad and inference mode      neither, so that state made in one step can be written in another
    `torch.func` transforms      none: a step is not part of the function that is transformed

Deterministic algorithms stay as they are asked for; what a step computes does not depend on them. Numbers below the
normal ones that torch.set_flush_denormal makes 0 are 0 in a step too, for torch does not tell whether it was called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

__all__ = ["in_default_modes"]

P = ParamSpec("P")
T = TypeVar("T")

# Whose products of fp32 may be rounded by a setting of the user's.
_PRODUCTS = (("cuda", "matmul"), ("mkldnn", "matmul"))
_precision_of = torch._C._get_fp32_precision_getter


def in_default_modes(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """An optimizer's method, which computes without gradients and as if nothing had been set in torch.

    Costs a microsecond where nothing is. Of what torch.compile traces only autocast is turned off: the graph has
    explicit dtypes and devices, and its products are those that it was compiled for.
    """

    @functools.wraps(method)
    def called(optimizer: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            with _autocast_off("cpu"), _autocast_off("cuda"), torch.no_grad():
                return method(optimizer, *args, **kwargs)
        modes = _modes(optimizer)
        if not modes:
            return method(optimizer, *args, **kwargs)
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            return method(optimizer, *args, **kwargs)

    return called


def _autocast_off(device: str) -> AbstractContextManager[Any]:
    """A context without autocast, as the tracer knows it: by `torch.autocast`."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _modes(optimizer: Any) -> list[AbstractContextManager[Any]]:
    """What has to be entered, in this order."""
    modes: list[AbstractContextManager[Any]] = []
    if torch._C._functorch.peek_interpreter_stack() is not None:
        modes.append(temporarily_clear_interpreter_stack())
    if torch.is_inference_mode_enabled() and not _is_for_inference(optimizer):
        modes += [torch.inference_mode(False), torch.no_grad()]
    elif torch.is_grad_enabled():
        modes.append(torch.no_grad())
    if torch._C._is_any_autocast_enabled():
        modes.append(torch._C._DisableAutocast())
    if torch.get_default_dtype() is not torch.float32:
        modes.append(_default_dtype())
    if torch._C._len_torch_function_stack():  # a default device is a mode of these
        modes.append(torch.device("cpu"))
    rough = [place for place in _PRODUCTS if _precision_of(*place) in ("tf32", "bf16")]
    return [*modes, *map(_exact_products, rough)]


def _is_for_inference(optimizer: Any) -> bool:
    """Whether a parameter can be written in inference mode only."""
    return any(p.is_inference() for group in optimizer.param_groups for p in group["params"])


@contextmanager
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _exact_products(place: tuple[str, str]) -> Iterator[None]:
    """One that had no precision of its own but that of all has none afterwards."""
    before = _precision_of(*place)
    after = "none" if _precision_of("generic", "all") == before else before
    torch._C._set_fp32_precision_setter(*place, "ieee")
    try:
        yield
    finally:
        torch._C._set_fp32_precision_setter(*place, after)
