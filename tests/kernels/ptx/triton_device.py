"""Two GPUs for Triton, of compute capability 8.0 and 9.0, that the simulator of PTX stands for.

Triton itself is as users have it: the JIT specialises and compiles, its driver.c loads, packs the arguments, encodes
tensor maps and launches. What they call of the CUDA driver is in cuda_driver.cpp. Tensors are the host's; a launch may
touch those that it is given, and those that `lent` names, from their first element to their last.

For a process of its own (triton_process.py), in which `prepare` has been called.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton import backends, runtime
from triton.backends.nvidia.compiler import CUDABackend
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher

CAPABILITIES = ((8, 0), (9, 0))  # by number of the device, as in cuda_driver.cpp
MULTIPROCESSORS = 132

library = ctypes.CDLL("libcuda.so.1")


class PtxBackend(CUDABackend):
    """Compiles to PTX and no further: what ptxas makes of it, no simulator executes."""

    def __init__(self, target: Any) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: dict[str, Any], options: Any, language: Any) -> None:
        super().add_stages(stages, options, language)
        del stages["cubin"]


def fenced(ptx: str) -> str:
    """With the fence that Triton 3.6 leaves out and 3.7 makes, before wgmma reads what cp.async has written.

    The one reads by the async proxy, the other writes by the generic one: PTX asks for a fence between the two. The
    simulator shows stale memory without it. Everything else of 3.6 is executed as it is.
    """
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return ptx
    return ptx.replace("wgmma.fence.sync.aligned;", "fence.proxy.async.shared::cta; wgmma.fence.sync.aligned;")


class Launcher(CudaLauncher):
    def __call__(self, *arguments: Any) -> None:
        given = (getattr(x, "base", x) for x in arguments)  # a tensor descriptor has its tensor as base
        with lent(x for x in given if isinstance(x, Tensor)):
            super().__call__(*arguments)


class Driver(CudaDriver):
    """Triton's, but for what torch.cuda answers where there is a GPU. edit: of every PTX that is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.device = 0
        self.edit: Callable[[str], str] = str
        self.launcher_cls = Launcher
        self.get_current_device = lambda: self.device
        self.get_device_capability = lambda device: CAPABILITIES[device]
        self.get_current_stream = lambda device: 0
        self.set_current_device = self._set
        load = self.utils.load_binary
        self.utils.load_binary = lambda name, ptx, *rest: load(name, self.edit(fenced(ptx.decode())).encode(), *rest)

    def _set(self, device: int) -> None:
        self.device = device
        library.ptxsim_set_device(device)


backends.backends["nvidia"] = replace(backends.backends["nvidia"], compiler=PtxBackend)
driver = Driver()
runtime.driver.set_active(driver)


@contextlib.contextmanager
def device(capability: tuple[int, int], seed: int = 1) -> Iterator[torch.device]:
    """Makes a device the current one. seed: of the order of blocks and warps and the times of asynchronous copies."""
    before = driver.device
    driver.set_current_device(CAPABILITIES.index(capability))
    library.ptxsim_seed(ctypes.c_uint64(seed))
    try:
        yield torch.device("cpu")
    finally:
        driver.set_current_device(before)


@contextlib.contextmanager
def lent(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Lets kernels touch these, from the first element to the last."""
    _lent.append([(t.data_ptr(), _bytes(t)) for t in tensors if t.numel() != 0])
    _register()
    try:
        yield
    finally:
        _lent.pop()
        _register()


_lent: list[list[tuple[int, int]]] = []  # addresses and bytes


def _register() -> None:
    library.ptxsim_unregister_all()
    for address, size in {each for some in _lent for each in some}:
        library.ptxsim_register(ctypes.c_void_p(address), ctypes.c_uint64(size), b"a tensor", 1)


def _bytes(t: Tensor) -> int:
    return (1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride()))) * t.element_size()


@contextlib.contextmanager
def edited(edit: Callable[[str], str], *kernels: Any) -> Iterator[None]:
    """The PTX of these kernels is edited when it is loaded."""
    driver.edit = edit
    for kernel in kernels:
        kernel.device_caches.clear()
    try:
        yield
    finally:
        driver.edit = str
        for kernel in kernels:
            kernel.device_caches.clear()
