"""A GPU that is not there: what asks for "cuda" gets the CPU, clocks and graphs are the host's.

For harnesses, whose own code then runs as it would on a GPU; of the device itself it says nothing.
"""

from __future__ import annotations

import contextlib
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode


class OnCpu(TorchFunctionMode):
    """While it is entered, tensors that are to be on "cuda" are on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*["cpu" if isinstance(each, str) and each == "cuda" else each for each in args], **kwargs)


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


class Graph:
    """Replays the call that was made while it was captured only in that nothing is left to do."""

    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


@contextlib.contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Gives the cycles that the GPU was kept busy for."""
    busy: list[int] = []
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "get_device_name": lambda: "a GPU that is not there",
        "mem_get_info": lambda: (1 << 36, 1 << 36),
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 1 << 20,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": lambda graph: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "Event": Event,
        "_sleep": busy.append,
        **{name: lambda: None for name in ("synchronize", "empty_cache", "reset_peak_memory_stats")},
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer, raising=False)
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator("cpu"))
    kernel = types.SimpleNamespace(name="gemm", device_type=types.SimpleNamespace(name="CUDA"))
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype: autocast("cpu", dtype))
    profile = contextlib.nullcontext(types.SimpleNamespace(events=lambda: [kernel]))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profile)
    try:
        with OnCpu():
            yield busy
    finally:
        torch.get_device_module.cache_clear()  # which remembers what "cuda" was in here
