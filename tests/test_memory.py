"""A step's memory: beyond parameters, gradients and state it holds one chunk's workspace, not the model's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steepest.optimizer import MatrixOptimizer
from training import OPTIMIZERS, give_gradients, parameters

SIDE, COUNT = 64, 16
MATRIX_BYTES = SIDE * SIDE * 4  # fp32


class Peak(TorchDispatchMode):
    """The largest number of bytes alive at once in tensors that were made inside this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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


def storages(tree: Any) -> Iterable[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak_of_a_step(cls: type[MatrixOptimizer], count: int, **options: Any) -> int:
    params = parameters([(SIDE, SIDE)] * count)
    optimizer = cls(params, **options)
    give_gradients(params, 0)
    optimizer.init_state()
    optimizer.step()
    with Peak() as peak:
        optimizer.step()
    return peak.peak


def test_the_meter_sees_what_is_alive() -> None:
    x = torch.ones(1000)
    with Peak() as peak:
        y = x + 1
        del y
        (x * 2).add_(1).view(10, 100)
    assert peak.peak == 4000


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_one_chunk_at_a_time(cls: type[MatrixOptimizer]) -> None:
    """With room for one matrix a chunk, sixteen matrices need no more than one does, but for a few scalars each."""
    alone = peak_of_a_step(cls, 1, max_workspace_bytes=1)
    many = peak_of_a_step(cls, COUNT, max_workspace_bytes=1)
    assert many <= alone + COUNT * 256 + MATRIX_BYTES


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_the_bound_is_respected(cls: type[MatrixOptimizer]) -> None:
    """Square matrices are the worst case: the products of the iteration are as large as its input."""
    bound = 10 * MATRIX_BYTES
    assert peak_of_a_step(cls, COUNT, max_workspace_bytes=bound) <= 2 * bound
    assert peak_of_a_step(cls, COUNT, max_workspace_bytes=bound) < peak_of_a_step(cls, COUNT)
