"""Chunks of batches of matrices: how many are worked on at once, what memory they take, and where the results go."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...chunking import chunk_by_bytes
from ...ops.polar_chain import Update
from ...ops.weight_update import add_into

# Elements of X worked on at once on a CPU: a larger matrix goes alone, whose products are then taken by block rows.
CPU_CHUNK = 1 << 17


class Result:
    """The polar factors of x: memory made for them, or a tensor that happens to be them."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.tensor: Tensor | None = None

    def batch(self) -> Tensor:
        """(batch, m, n) to write to."""
        if self.tensor is None:
            self.tensor = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)
        return self.tensor.view(math.prod(self.x.shape[:-2]), *self.x.shape[-2:])

    def whole(self) -> Tensor:
        """The factors in x's shape."""
        return self.batch().view(self.x.shape)


@dataclass(frozen=True, eq=False)
class Job:
    """Matrices x, (batch, m, n), their slack, (batch,), and where their polar factors go.

    The first of them goes to place ``first`` of the result, or all go into the weights of an update.
    """

    x: Tensor
    slack: Tensor
    result: Result
    first: int
    update: Update | None

    def split(self, size: int) -> list[Job]:
        """Jobs of so many matrices at a time."""
        firsts = range(0, len(self.x), size)
        updates = [None] * len(firsts) if self.update is None else self.update.split(size)
        parts = zip(self.x.split(size), self.slack.split(size), firsts, updates, strict=True)
        return [Job(x, slack, self.result, first, update) for x, slack, first, update in parts]

    def chunks(self, dtype: torch.dtype, max_workspace_bytes: int | None) -> list[Job]:
        """Jobs of as many matrices as are worked on at once in ``dtype``."""
        _, m, n = self.x.shape
        return self.split(chunk_size(self.x, workspace_bytes(m, n, dtype), max_workspace_bytes))

    def finish(self, y: Tensor, *, reused: bool = False) -> None:
        """Puts the polar factors y where they belong; reused: whether y is written to again."""
        whole = self.result.x
        if self.update is not None:
            add_factors(y, self.update)
        elif not reused and y.numel() == whole.numel() and y.dtype == whole.dtype and y.is_contiguous():
            self.result.tensor = y
        else:
            self.result.batch()[self.first : self.first + len(y)].copy_(y)

    def workspace_bytes(self, dtype: torch.dtype) -> int:
        """What the matrices occupy while they are iterated in ``dtype``."""
        batch, m, n = self.x.shape
        return batch * workspace_bytes(m, n, dtype)


def add_factors(factors: Tensor, update: Update) -> None:
    """W <- beta W + eta factors, for the weights of the update."""
    add_into(factors.reshape(-1, *factors.shape[-2:]), update.weights, update.eta, update.beta)


def at_once(jobs: list[Job], dtype: torch.dtype, max_bytes: int | None) -> Iterable[list[Job]]:
    """Jobs that are worked on at once: on a CPU one, whose buffers then stay in its cache."""
    if jobs[0].x.device.type == "cpu":
        return [[job] for job in jobs]
    return [jobs] if max_bytes is None else chunk_by_bytes(jobs, lambda job: job.workspace_bytes(dtype), max_bytes)


def chunk_size(batch: Tensor, matrix_bytes: int, max_workspace_bytes: int | None) -> int:
    """The number of matrices of a batch, (batch, m, n), worked on at once, if one takes ``matrix_bytes``."""
    count, m, n = batch.shape
    size = max(1, CPU_CHUNK // (m * n)) if batch.device.type == "cpu" else count
    if max_workspace_bytes is not None:
        size = min(size, max(1, max_workspace_bytes // matrix_bytes))
    return min(size, count)


def workspace_bytes(m: int, n: int, dtype: torch.dtype) -> int:
    """Upper bound on what one m x n matrix occupies while it is iterated.

    X, its second buffer and what is made of the result; six short-side squares, one more in which sums are taken, fp32
    at least, and the mask of a triangle.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return 3 * m * n * dtype.itemsize + min(m, n) ** 2 * (6 * dtype.itemsize + wide.itemsize + 1)
