"""State that is stored in codes, as a step works on it: decoded while the step is at its parameter, in borrowed memory.

Executors hold views of it, which stay valid: what is borrowed and given back is the memory behind them.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor

from ..ops.state import copy_if
from ..parts import Blockwise
from ..parts.blockwise import scale_key
from ..state_layout import Codes, StateView

__all__ = ["WorkingState", "WorkingStates"]


class WorkingState(StateView):
    """A view of a parameter's state, to be used as that: what is in codes is seen in fp32 (fp64 for fp64).

    state: what of the state lies here.   names: of what is in codes, and as what.
    """

    def __init__(self, state: MutableMapping[str, Tensor], storage: Blockwise, names: dict[str, Codes]) -> None:
        super().__init__(state)
        self._storage, self._names = storage, names
        self._working = {name: _like(state[name], state[scale_key(name)].dtype) for name in names}
        self.release()

    def __getitem__(self, key: str) -> Tensor:
        return self._working[key] if key in self._working else self._state[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        if key in self._working:
            raise KeyError(f"{key} is stored in codes: write into the tensor")
        self._state[key] = value

    def borrow(self) -> None:
        """Puts memory behind what codes stand for, so that there can be views of it."""
        for t in self._working.values():
            _resize(t, t.numel() * t.itemsize)

    def load(self) -> None:
        """Borrows memory and decodes."""
        self.borrow()
        for name, t in self._working.items():
            self._storage.decode(self._state[name], self._state[scale_key(name)], out=t)

    def store(self, flag: Tensor) -> None:
        """Encodes, where the 0-d flag says so; elsewhere codes and scales keep their bits."""
        for name, kind in self._names.items():
            fresh = self._storage.encode(self._working[name], kind)
            copy_if(flag, (self._state[name], self._state[scale_key(name)]), fresh)

    def release(self) -> None:
        """Gives the memory back."""
        for t in self._working.values():
            _resize(t, 0)

    def version(self) -> int:
        """Another number whenever somebody has written into the codes or the scales."""
        return sum(self._state[key]._version for name in self._names for key in (name, scale_key(name)))


class WorkingStates:
    """The states of the parameters of one executor, which are decoded at once.

    flags[i] says, after a step, whether the step of parameter i was taken.
    """

    def __init__(self, states: Sequence[WorkingState]) -> None:
        self._states = states
        self._version = self._seen()

    def load(self) -> None:
        for state in self._states:
            state.load()

    def store(self, flags: Sequence[Tensor]) -> None:
        """Encodes what has been stepped, and gives the memory back."""
        for state, flag in zip(self._states, flags, strict=True):
            state.store(flag)
            state.release()
        self._version = self._seen()

    def release(self) -> None:
        for state in self._states:
            state.release()

    def changed(self) -> bool:
        """Whether somebody has written into the codes since the last step."""
        return self._seen() != self._version

    def _seen(self) -> int:
        return 0 if torch.compiler.is_compiling() else sum(state.version() for state in self._states)


def _like(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype, memory_format=torch.preserve_format)


def _resize(t: Tensor, size: int) -> None:
    """The memory behind a tensor; torch.compile borrows and gives back what it traces by itself."""
    if not torch.compiler.is_compiling():
        t.untyped_storage().resize_(size)
