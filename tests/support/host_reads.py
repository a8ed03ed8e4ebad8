"""While `no_host_reads` is entered, no tensor is asked for its value and nothing waits for a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor


@contextmanager
def no_host_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(name: str) -> Callable[..., Any]:
        def read(*_: Any, **__: Any) -> Any:
            raise AssertionError(f"Tensor.{name} in a step")

        return read

    names = ("item", "cpu", "tolist", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__")
    waits = [(torch.cuda, "synchronize"), (torch.cuda.Event, "synchronize"), (torch.cuda.Event, "wait")]
    waits += [(torch.cuda.Stream, name) for name in ("synchronize", "wait_event", "wait_stream")]
    with monkeypatch.context() as patch:
        for owner, name in [*((Tensor, name) for name in names), *waits]:
            patch.setattr(owner, name, refuse(name))
        yield
