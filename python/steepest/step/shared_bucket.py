"""The buckets of a fused step whose matrices ranks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..ops.multi_tensor import Table
from .buckets import Bucket, FusedItem
from .parameter import Matrices
from .shared_matrices import SharedMatrices

__all__ = ["SharedBucket"]


class SharedBucket(Bucket):
    """Matrices whose parts here the fused ops work on, and whose directions their owners take.

    items: of the parts here, in the order of `SharedMatrices.parts`.   rows: of each of its matrices' parameters.
    """

    def __init__(self, shared: SharedMatrices, items: Sequence[FusedItem], rows: Sequence[int]) -> None:
        p = shared.matrices[0].parameter
        self.shared, self.items = shared, items
        self.recipe, self.device = shared.recipe, shared.device
        self.by_torch, self.moves_weights = p.recipe.by_matrix, False
        self.sharded_dim = shared.sharded_dim
        self.dtype = p.input_dtype
        self.stored_dtype = p.wide_dtype if self.by_torch else p.input_dtype
        self.sizes, self.shape = shared.sizes, shared.input_shape
        self._row_of = {item.place: row for item, row in zip(shared.matrices, rows, strict=True)}
        self.slack = torch.full(self.shape[:1], float("nan"), dtype=torch.float32, device=self.device)

    def empty(self) -> Tensor:
        return torch.empty(self.shared.numel, dtype=self.stored_dtype, device=self.device)

    def parts(self, t: Tensor) -> list[Tensor]:
        return self.shared.split(t)

    def send(self, stored: Tensor) -> Callable[[], Tensor]:
        return self.shared.send(stored, self.dtype)

    def send_back(self, d: Tensor) -> Callable[[], Sequence[Tensor]]:
        return self.shared.send_back(d, self.stored_dtype)

    def matrices(self) -> list[Matrices]:
        return list(self.shared.matrices)

    def measured(self, x: Tensor, d: Tensor, table: Table) -> tuple[list[Tensor], list[Tensor]]:
        return self.shared.of_all(self.dual_norm(x, d, table))

    @cached_property
    def _rows(self) -> Tensor:
        owned = zip(self.shared.worked_on, self.sizes, strict=True)
        rows = [self._row_of[item.place] for item, size in owned for _ in range(size)]
        return torch.tensor(rows, dtype=torch.int64, device=self.device)

    def slack_of(self, group: int) -> list[Tensor]:
        parts = zip(self.shared.worked_on, self.slack.split(self.sizes), strict=True)
        some = [slack for item, slack in parts if item.parameter.group == group]
        return [torch.cat(some)] if some else []
