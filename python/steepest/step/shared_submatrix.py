"""Matrices of which steps take a submatrix, on several ranks: the rows or columns that are chosen travel, no others.

    1-norms of what lies here  >  summed  >  places of the largest, on all ranks  >  those rows to the owner, and back

Ranks choose alike, and as one process does but for norms that agree to 1e-15, where a sum over parts of a row may round
otherwise. How many rows of a matrix lie on a rank is known once they are chosen: sizes of messages are read on the
host, once in a step for all matrices.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from ..recipe import State
from ..sharding.exchange import Exchange
from ..sharding.layout import Unit
from ..sharding.regions import Rectangle
from .parameter import LocalMatrices, Matrices, OwnedMatrices
from .shared_matrices import SharedMatrices, place_of, unit_of

__all__ = ["SharedSubmatrices", "choose"]


class SharedSubmatrices(SharedMatrices):
    """Matrices of one shape, of which steps take rows, or columns, which then are rows of transposed matrices here."""

    def __init__(self, matrices: Sequence[Matrices], parts: Sequence[LocalMatrices], owned: Sequence[OwnedMatrices]):
        super().__init__(matrices, parts, owned)
        part, piece = self.recipe.submatrix, matrices[0].piece
        assert part is not None
        self.part, self.dim = part, part.dim(piece.rows, piece.cols)
        self._length = piece.rows if self.dim == -2 else piece.cols

    @cached_property
    def _units(self) -> list[Unit]:
        """The units of the matrices as they are cut here: with chosen columns transposed."""
        units = [unit_of(item) for item in self.matrices]
        return units if self.dim == -2 else list(map(_transposed, units))

    @cached_property
    def _of_parts(self) -> list[tuple[LocalMatrices, range, Rectangle]]:
        """(part, its matrices among all of them, what it has of each, which is the same)."""
        cut = []
        for part in self.parts:
            first, run = self._first_number[place_of(part)], part.run.matrices
            here = part.run.rectangle if self.dim == -2 else part.run.rectangle.transposed
            cut.append((part, range(first + run.start, first + run.stop), here))
        return cut

    # ---- which rows -------------------------------------------------------------------------------------------------

    def norms(self) -> Tensor:
        """(matrices, n) fp64: the 1-norms of rows as far as they lie here."""
        matrices = sum(item.piece.batch for item in self.matrices)
        norms = torch.zeros(matrices, self._length, dtype=torch.float64, device=self.device)
        for part, numbers, r in self._of_parts:
            m = self.recipe.momentum_of(
                part.recipe_state(), part.elementwise(part.grad), part.parameter.step_values.hyper
            )
            norms[numbers.start : numbers.stop, r.top : r.bottom] += self.part.sizes(m, self.dim)
        return norms

    def choose(self, chosen: Tensor, places: Sequence[Sequence[int]]) -> None:
        """Takes the choice of this step, and says how its rows travel.

        chosen: (matrices, k), ascending, of all matrices.   places: the same on the host.
        """
        self._chosen = chosen
        units, first = [], 0
        for unit in self._units:
            of_unit = places[first : first + unit.piece.batch]
            units.append(_chosen(unit, of_unit, self.ranks.place))
            first += unit.piece.batch
        self._rows_travel = Exchange(self.ranks, units, self.exchange.what)
        # Whether there are messages at all is what all ranks must agree on, whatever is chosen.
        self._rows_travel.travels, self._rows_travel.returns = self.exchange.travels, self.exchange.returns
        rows: list[int] = []
        self._rows_here: list[int] = []
        for _, numbers, r in self._of_parts:
            before = len(rows)
            for k, number in enumerate(numbers):
                some = places[number][bisect_left(places[number], r.top) : bisect_left(places[number], r.bottom)]
                rows += [k * r.shape[0] + place - r.top for place in some]
            self._rows_here.append(len(rows) - before)
        self._rows = torch.tensor(rows, dtype=torch.int64).to(self.device, non_blocking=True).split(self._rows_here)

    # ---- there and back ---------------------------------------------------------------------------------------------

    def send(self, momenta: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
        """momenta: the buffer of all parts, of which only chosen rows are sent."""
        of_parts = zip(self.split(momenta), self._rows, strict=True)
        rows = [self._flat(m).index_select(0, places) for m, places in of_parts]
        moved = self._rows_travel.to_owners(self.packed(self._joined(rows), dtype))

        def inputs() -> Tensor:
            self._momenta = self._turned(moved())
            return self._momenta

        return inputs

    def send_back(self, d: Tensor, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
        """Sends updates as of whole matrices, with zeros beside the chosen rows; damps the momenta of these."""
        back = dtype if self.recipe.transforms else d.dtype
        updates = [d.new_empty((0, *d.shape[1:]), dtype=back)]
        for item, of_item, m, chosen in self._of_owned(d):
            g = None if item.received is None else self.part.take(item.received, chosen, self.dim)
            hyper = item.parameter.step_values.hyper
            u, fresh = self.recipe.update_chosen(item.state, of_item, m, hyper, chosen, g)
            item.keep(fresh)
            updates.append(u.to(back))
        self._momenta = torch.empty(0)
        moved = self._rows_travel.from_owners(self._turned(torch.cat(updates)))

        def received() -> list[Tensor]:
            whole = []
            rows = zip(self._of_parts, self._rows, self._rows_of_parts(moved()), strict=True)
            for (part, _, _), places, of_part in rows:
                batch, length, other = self._flat_shape(part)
                u = of_part.new_zeros(batch * length, other)
                u[places] = of_part
                whole.append(self._turned(u.view(batch, length, other)))
                part.keep(self._damped(part, places))
            return whole

        return received

    def _of_owned(self, d: Tensor) -> Iterator[tuple[OwnedMatrices, Tensor, Tensor, Tensor]]:
        """(item, directions, momenta, places of its rows) of what is owned."""
        firsts = [self._first_number[item.place] for item in self.matrices]
        numbers = torch.tensor([firsts[i] + k for i, k in self._rows_travel.owned], dtype=torch.int64)
        chosen = self._chosen.index_select(0, numbers.to(self.device))
        parts = (t.split(self.counts) for t in (d, self._momenta, chosen))
        return zip(self.owned, *parts, strict=True)  # type: ignore[arg-type]

    def _damped(self, part: LocalMatrices, places: Tensor) -> State:
        assert self.recipe.momentum is not None
        key, beta = self.recipe.momentum.key, part.parameter.step_values.hyper.beta1
        m = part.elementwise(part.state[key])
        wide = self._flat(m.to(torch.promote_types(m.dtype, torch.float32))).clone()
        wide[places] = (wide[places] * beta).to(wide.dtype)
        return {key: self._turned(wide.view(self._flat_shape(part)))}

    # ---- shapes -----------------------------------------------------------------------------------------------------

    def _turned(self, t: Tensor) -> Tensor:
        """Transposed where columns are chosen."""
        return t if self.dim == -2 else t.mT.contiguous()

    def _flat(self, m: Tensor) -> Tensor:
        """The rows of all matrices, one below the other; where columns are chosen these."""
        return self._turned(m).reshape(-1, m.shape[-1 if self.dim == -2 else -2])

    def _flat_shape(self, part: LocalMatrices) -> tuple[int, int, int]:
        batch, rows, cols = part.shape
        return (batch, rows, cols) if self.dim == -2 else (batch, cols, rows)

    @cached_property
    def _runs(self) -> list[list[int]]:
        """Numbers of the parts that a chosen row goes through: of columns, all parts of a matrix."""
        if self.dim == -2:
            return [[i] for i in range(len(self.parts))]
        runs = groupby(range(len(self.parts)), key=lambda i: (place_of(self.parts[i]), self.parts[i].run.matrices))
        return [list(run) for _, run in runs]

    def _joined(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Chosen rows of the parts, as they are sent."""
        return [torch.cat([rows[i] for i in run], 1) if len(run) > 1 else rows[run[0]] for run in self._runs]

    def _rows_of_parts(self, buffer: Tensor) -> list[Tensor]:
        """The inverse of `_joined`, from the buffer of all of them."""
        others = [self._flat_shape(part)[-1] for part in self.parts]
        widths = [[others[i] for i in run] for run in self._runs]
        sizes = [self._rows_here[run[0]] * sum(width) for run, width in zip(self._runs, widths, strict=True)]
        rows = zip(buffer.split(sizes), widths, strict=True)
        return [part for t, width in rows for part in t.view(-1, sum(width)).split(width, 1)]


def choose(travelling: Sequence[SharedMatrices]) -> None:
    """Chooses the rows of those of which some travel, with one sum among the ranks and one reading on the host."""
    shared = [each for each in travelling if isinstance(each, SharedSubmatrices)]
    if not shared:
        return
    norms = [each.norms() for each in shared]
    summed = torch.cat([t.flatten() for t in norms])
    shared[0].ranks.sum_parts(summed)
    parts = summed.split([t.numel() for t in norms])
    chosen = [each.part.largest(t.view(like.shape)) for each, t, like in zip(shared, parts, norms, strict=True)]
    flat = iter(torch.cat([t.flatten() for t in chosen]).tolist())
    for each, t in zip(shared, chosen, strict=True):
        each.choose(t, [[next(flat) for _ in range(t.shape[1])] for _ in range(t.shape[0])])


def _transposed(unit: Unit) -> Unit:
    piece = replace(unit.piece, rows=unit.piece.cols, cols=unit.piece.rows)
    turned = tuple(tuple(None if r is None else r.transposed for r in of_rank) for of_rank in unit.rectangles)
    return Unit(piece, unit.owners, turned)


def _chosen(unit: Unit, places: Sequence[Sequence[int]], here: int) -> Unit:
    """The unit of the chosen rows; those of a rank follow one another, as places ascend.

    here: the rank that is asked what it sends and gets: of what goes from others to others nothing is said.
    """
    rectangles = tuple(
        tuple(
            _rows_of(r, some) if r is not None and here in (rank, owner) else None
            for r, some, owner in zip(of_rank, places, unit.owners, strict=True)
        )
        for rank, of_rank in enumerate(unit.rectangles)
    )
    return Unit(replace(unit.piece, rows=len(places[0])), unit.owners, rectangles)


def _rows_of(r: Rectangle, places: Sequence[int]) -> Rectangle | None:
    top, bottom = bisect_left(places, r.top), bisect_left(places, r.bottom)
    return Rectangle(top, bottom, r.left, r.right) if bottom > top else None
