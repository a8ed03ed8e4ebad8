"""What a call does by torch's own account: products, bytes alive at once, launches.

Of what is called from Python or from compiled code by torch's dispatcher, not of what kernels do inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Where the first factor stands among the arguments of a product.
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}


class Products(TorchDispatchMode):
    """Floating-point operations of matrix products while it is entered, 2 for a multiply and add."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        place = PRODUCTS.get(func._schema.name.removeprefix("aten::").rstrip("_"))
        if place is not None:
            self.flop += 2.0 * result.numel() * args[place].shape[-1]
        return result


class Peak(TorchDispatchMode):
    """The largest number of bytes alive at once in tensors that were made while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for storage in storages((args, kwargs)):
            if storage._cdata not in self.live:
                self.known.add(storage._cdata)
        result = func(*args, **kwargs)
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
        for storage in storages(result):
            if storage._cdata not in self.known:
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def storages(tree: Any) -> Iterable[Any]:
    """The storages of the tensors in nested lists, tuples and dicts."""
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def flop_of(call: Callable[[], Any]) -> float:
    with Products() as products:
        call()
    return products.flop


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """The peak of memory beyond what was there before: the allocator's on a GPU, that of `Peak` elsewhere."""
    if not device.startswith("cuda"):
        with Peak() as peak:
            call()
        return peak.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - allocated


def launches(call: Callable[[], Any], device: str) -> dict[str, int]:
    """The profiler's counts: "launches" of any kernel on a GPU and "ours" of them, or "operators" called on a CPU."""
    cuda = device.startswith("cuda")
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA] if cuda else [activity.CPU]) as profile:
        call()
        if cuda:
            torch.cuda.synchronize()
    events = list(profile.events() or [])
    if not cuda:
        return {"operators": sum(_operator(event) and not _operator(event.cpu_parent) for event in events)}
    kernels = [event.name for event in events if event.device_type.name == "CUDA"]
    return {"launches": len(kernels), "ours": sum("steepest" in name or "multi_tensor" in name for name in kernels)}


def _operator(event: Any) -> bool:
    """Rather than a stretch of Python that has a name, as a step has."""
    return event is not None and "::" in event.name
