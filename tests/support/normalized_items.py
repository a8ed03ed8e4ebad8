"""What `normalize_and_apply_update` takes: items of many shapes, layouts and types, some normalized over rows, some
over entries and some not at all, some whose step is not taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from steepest.ops.multi_tensor import CHUNK, Item, Items, Table
from steepest.ops.normalize import scratch_for
from steepest.ops.program import Program
from support.fused_ops import changed

F, B, H = torch.float32, torch.bfloat16, torch.float16
#: Rows of a warp and, from 8192 elements on, of a block; several blocks and several chunks of a matrix, or one.
SHAPES = ((2, 40, 24), (3, 5, 7), (1, 70, 1030), (1, 3, 8200), (2, 130, 3), (1, 1, 40), (1, 2, CHUNK + 8), (1, 1, 1))
KINDS = ("rows", "entries", "none")
RATES = ((0.95, 1e-8, 0.0), (0.5, 1e-3, 0.25), (0.9, 0.0, 0.0))  # beta2, eps, rms


@dataclass
class NormalizedItems:
    """The op's arguments. An item is a parameter, whose row has its number."""

    directions: list[Tensor]
    params: list[Tensor]
    factors: list[Tensor]
    averages: list[Tensor]
    divided: list[Tensor]
    meeting: Tensor
    table: Table
    items: Items
    rates: list[float]
    seconds: list[Tensor] = field(default_factory=list)
    mantissas: list[Tensor] = field(default_factory=list)
    lengths: list[Tensor] = field(default_factory=list)

    def run(self, ops: Any) -> NormalizedItems:
        lists = (self.directions, self.seconds, self.params, self.mantissas, self.lengths, self.factors)
        table = (self.table.rows, self.table.sums, self.table.scratch)
        ops.normalize_and_apply_update(
            *lists, self.averages, self.divided, *table, self.meeting, *self.items.numbers, self.rates
        )
        return self

    def each(self, change: Callable[[Tensor], Tensor]) -> NormalizedItems:
        """With other tensors."""
        return NormalizedItems(**changed(self, change))

    def written(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("params", "factors", "averages", "divided"):
            yield from ((f"{name}[{i}]", t) for i, t in enumerate(getattr(self, name)))
        yield "sums", self.table.sums

    def counters(self) -> Tensor:
        """All that must be zero when the op has ended."""
        return torch.cat([self.meeting[: 1 + 2 * len(self.table.sums)], self.table.scratch[: len(self.table.sums)]])


def normalized_items(
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    kinds: Sequence[str] = KINDS,
    refused: Sequence[int] = (),
    turned: bool = False,
    shift: bool = False,
    seed: int = 0,
) -> NormalizedItems:
    """An item of every shape and kind, in types that take turns.   refused: items whose step is not taken, and whose
    directions are NaN.   turned: every other parameter lies transposed in memory.   shift: an element behind a multiple
    of 16 bytes.
    """
    generator = torch.Generator().manual_seed(seed)
    each = [(shape, kind) for kind in kinds for shape in shapes]
    lists: dict[str, list[Tensor]] = {name: [] for name in ("directions", "params", "factors", "averages", "divided")}
    absent, rates = torch.empty(0), list[float]()

    def random(*shape: int, dtype: torch.dtype = F) -> Tensor:
        t = torch.randn(shape, generator=generator).to(dtype)
        return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(shape) if shift else t

    for i, (shape, kind) in enumerate(each):
        u = random(*shape, dtype=(F, B, H)[i % 3])
        u.mul_(torch.logspace(0, -1, shape[1])[:, None])
        if i in refused:
            u.fill_(torch.nan)
        w = random(*shape, dtype=(F, B)[i // 2 % 2])
        v = random(*(shape[:2] if kind == "rows" else shape)).square_()
        v.view(-1)[:1] = 0
        lists["directions"].append(u)
        lists["params"].append(w.mT.contiguous().mT if turned and i % 2 else w)
        given = torch.rand(shape[:2], generator=generator) if i % 2 else absent
        made = torch.full(shape[:2] if kind == "rows" else (shape[0], 1), torch.nan)
        lists["factors"].append(given if kind == "none" else made)
        lists["averages"].append(absent if kind == "none" else v)
        lists["divided"].append(random(*shape).fill_(torch.nan) if kind == "entries" else absent)
        rates += RATES[i % len(RATES)]
    sizes = [(shape[0], shape[1] * shape[2]) for shape, _ in each]
    table = Table.empty(torch.zeros((), dtype=torch.int64), [matrices * size for matrices, size in sizes], sizes)
    table.column("finite").copy_(torch.tensor([float(i not in refused) for i in range(len(each))]))
    table.column("lr").fill_(0.5)
    table.column("decay").fill_(0.1)
    lines = accumulate((shape[0] for shape, _ in each), initial=0)
    items = [
        Item(Program(cautious=i % 2 == 1), i, shape[0], line, (0, i, 0), 0.75)
        for i, ((shape, _), line) in enumerate(zip(each, lines))
    ]
    meeting = scratch_for([shape for shape, kind in each if kind != "none"], torch.device("cpu"))
    return NormalizedItems(**lists, meeting=meeting, table=table, items=Items(tuple(items)), rates=rates)
