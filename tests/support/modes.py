"""What a caller may have set in torch around a step: one context manager a mode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch


@contextlib.contextmanager
def setting(set_to: Callable[[Any], object], value: Any, before: Any) -> Iterator[None]:
    set_to(value)
    try:
        yield
    finally:
        set_to(before)


def deterministic(on: bool) -> None:
    torch.use_deterministic_algorithms(on, warn_only=False)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast fp16": lambda: torch.autocast("cpu", torch.float16),
    "default dtype fp64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype bf16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "device as a context": lambda: torch.device("meta"),
    "matmul precision high": lambda: setting(torch.set_float32_matmul_precision, "high", "highest"),
    "matmul precision medium": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "enable_grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "deterministic": lambda: setting(deterministic, True, False),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
}


@contextlib.contextmanager
def together(*names: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(MODES[name]())
        yield
