"""Ranks that are threads of this process: a collective is where they wait for one another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
TIMEOUT = 60  # seconds until a rank that waits for the others fails


@dataclass
class Ranks:
    """So many ranks, and the tensors they have summed, (elements, dtype), in order."""

    count: int
    sums: list[tuple[int, torch.dtype]] = field(default_factory=list)

    def run(self, work: Callable[[int, Callable[[Tensor], None]], T]) -> list[T]:
        """What ``work(rank, all_reduce)`` returns on every rank; RuntimeError where they do not sum alike."""
        barrier = threading.Barrier(self.count, timeout=TIMEOUT)
        present: list[Tensor] = [torch.empty(0)] * self.count

        def all_reduce_of(rank: int) -> Callable[[Tensor], None]:
            def all_reduce(t: Tensor) -> None:
                assert t.is_contiguous()
                present[rank] = t
                if barrier.wait() == 0:
                    self.sums.append((t.numel(), t.dtype))
                if any(other.shape != t.shape or other.dtype != t.dtype for other in present):
                    raise RuntimeError(f"ranks sum different tensors: {[(o.shape, o.dtype) for o in present]}")
                total = present[0].clone()
                for other in present[1:]:
                    total += other
                barrier.wait()
                t.copy_(total)
                barrier.wait()

            return all_reduce

        def go(rank: int) -> T:
            try:
                return work(rank, all_reduce_of(rank))
            except BaseException:
                barrier.abort()
                raise

        with ThreadPoolExecutor(self.count) as pool:
            return [future.result() for future in [pool.submit(go, rank) for rank in range(self.count)]]
