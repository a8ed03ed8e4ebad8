"""The ops as a GPU has them, on CPU tensors: their doors and compiled kernels, executed by the simulator."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TILES = ("any", "wide", "small")
STREAMS = ("by model", "never", "always")


class Kernels:
    """The library of build.py."""

    def __init__(self, path: Path) -> None:
        # Under the schemas of the compiled part, in a namespace of its own.
        self.definitions = torch.library.Library("steepest_ptx", "DEF")
        for name in torch._C._dispatch_get_all_op_names():
            if name.startswith("steepest::"):
                schema = getattr(torch.ops.steepest, name.removeprefix("steepest::")).default._schema
                self.definitions.define(str(schema).removeprefix("steepest::"))
        torch.ops.load_library(str(path))
        self.ops: Any = torch.ops.steepest_ptx
        self.library = ctypes.CDLL(str(path))
        for name in ("ptxsim_text", "ptxsim_kernel", "ptxsim_replace", "ptxsim_error", "door_load_cusolver"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.library.ptxsim_launches.restype = ctypes.c_uint64

    def reset(self, *, seed: int = 1, capability: int = 90, multiprocessors: int = 4) -> None:
        """As a test finds it: the order of blocks, of warps and of asynchronous copies, the device."""
        self.library.door_clear()
        self.seed(seed)
        self.library.ptxsim_truncating(0)
        self.library.ptxsim_capability(capability)
        self.library.ptxsim_clusters(1)
        self.library.ptxsim_multiprocessors(multiprocessors)

    def seed(self, number: int) -> None:
        self.library.ptxsim_seed(ctypes.c_uint64(number))

    def plan(self, tiles: str = "any", streams: str = "by model") -> None:
        """What the planner of products may choose from."""
        self.library.door_tiles(TILES.index(tiles))
        self.library.door_streams(STREAMS.index(streams))

    def on_the_host(self, tensor: Tensor) -> None:
        """A tensor that does not pass for one of a GPU."""
        self.library.door_host(ctypes.c_void_p(tensor.data_ptr()))

    def truncate(self) -> None:
        """Tensor cores cut sums off below fp32's last place instead of rounding them."""
        self.library.ptxsim_truncating(1)

    def launches(self) -> int:
        """Of all kernels so far."""
        return int(self.library.ptxsim_launches())

    def allowed(self) -> list[tuple[int, int, int]]:
        """(kernel, device, bytes) of every call so far that asked for more dynamic shared memory than the usual."""
        kernel, device, calls = ctypes.c_void_p(), ctypes.c_int(), []
        while (size := self.library.door_allowed(len(calls), ctypes.byref(kernel), ctypes.byref(device))) >= 0:
            calls.append((kernel.value or 0, device.value, size))
        return calls

    def names(self) -> list[str]:
        """Mangled names of all kernels."""
        names: list[str] = []
        while (name := self.library.ptxsim_kernel(len(names))) is not None:
            names.append(name.decode())
        return names

    def text(self, name: str) -> str:
        """PTX of one kernel, with what its module has beside kernels."""
        module = self.library.ptxsim_text(name.encode()).decode()
        first, *entries = re.split(r"(?=^(?:\.visible |\.weak )?\.entry )", module, flags=re.MULTILINE)
        (entry,) = [each for each in entries if re.match(rf"\S* ?\.entry {re.escape(name)}\b", each)]
        return first + entry

    @contextmanager
    def replaced(self, name: str, text: str) -> Iterator[None]:
        """Launches of a kernel run this PTX."""
        error = self.library.ptxsim_replace(name.encode(), text.encode())
        assert error is None, error
        try:
            yield
        finally:
            self.library.ptxsim_replace(name.encode(), None)


class Guards:
    """Memory around tensors and between their elements, which nobody may write; read, it is NaN."""

    MARGIN = 64  # bytes; an allocation of torch's begins at a multiple of it

    def __init__(self) -> None:
        self.rooms: list[tuple[Tensor, Tensor]] = []

    def twin(self, t: Tensor, device: torch.device | None = None) -> Tensor:
        """The same numbers at the same distance from 16 bytes, inside a room of ones."""
        if t.numel() == 0:
            return t
        width = t.element_size()
        offset = (self.MARGIN + t.data_ptr() % 16) // width
        reach = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
        room = torch.full(((offset + reach) * width + self.MARGIN,), 255, dtype=torch.uint8)
        inside = room.view(t.dtype).as_strided(t.shape, t.stride(), offset).copy_(t)
        self.rooms.append((room, inside))
        return inside

    def check(self) -> None:
        for room, inside in self.rooms:
            outside = torch.ones(room.numel() // inside.element_size(), dtype=torch.bool)
            outside.as_strided(inside.shape, inside.stride(), inside.storage_offset()).fill_(False)
            assert (room.view(-1, inside.element_size())[outside] == 255).all(), "written beside a tensor"
