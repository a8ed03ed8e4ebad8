"""Matrices whose parts lie on several ranks, between their elementwise halves: at their owners.

    parts of momenta here  >  whole momenta of what this rank owns  >  directions, updates  >  parts of updates here

Both executors do the elementwise work on the parts. A recipe that measures gradients of matrices, for Kronecker factors
or a transform of the update, also needs whole gradients, and of what keeps elementwise state, transforms and the
preconditioner before them, whole tensors of that, which travel likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, reduce
from itertools import accumulate, product

import torch
from torch import Tensor

from ..recipe import Recipe, State
from ..sharding.exchange import Exchange
from ..sharding.layout import Unit
from .parameter import LocalMatrices, Matrices, OwnedMatrices
from .routes import gram_dim

__all__ = ["Place", "SharedMatrices", "SplitMatrices", "place_of", "share_bytes", "share_of", "unit_of"]

Place = tuple[int, int, int]


class SharedMatrices:
    """Matrices of one shape and one recipe, of parameters that the same ranks share.

    matrices: one item a piece, the same on all ranks and without state.   parts: what lies here of them, in the order
    in which it is sent.   owned: those that this rank owns.
    """

    #: the dimension of the matrices that ranks share where all of them take the directions together
    sharded_dim: int | None = None

    def __init__(self, matrices: Sequence[Matrices], parts: Sequence[LocalMatrices], owned: Sequence[OwnedMatrices]):
        first = matrices[0].parameter
        assert first.sharding is not None
        self.ranks, self.recipe, self.device = first.sharding.ranks, first.recipe, first.source.device
        self.matrices, self.parts, self.owned = matrices, parts, owned
        self.counts = [item.piece.batch for item in owned]
        self.sizes = [item.input_shape[0] for item in owned]
        self._numels = [part.piece.batch * part.piece.rows * part.piece.cols for part in parts]
        self._momenta = torch.empty(0)

    @cached_property
    def exchange(self) -> Exchange:
        """How the parts travel."""
        first = self.matrices[0]
        what = f"matrices of {first.piece.rows} x {first.piece.cols} of group {first.parameter.group}"
        return Exchange(self.ranks, [unit_of(item) for item in self.matrices], what)

    @property
    def worked_on(self) -> Sequence[Matrices]:
        """The items whose directions this rank has a hand in."""
        return self.owned

    @property
    def numel(self) -> int:
        """Elements of all parts here."""
        return sum(self._numels)

    @property
    def input_bytes(self) -> int:
        """About what a rank's share of the directions' inputs and of the directions takes; the same on all ranks."""
        return sum(map(share_of, self.matrices))

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of the directions' input here, which may be of no matrix at all."""
        rows, cols = self.matrices[0].input_shape[1:]
        return sum(self.sizes), rows, cols

    def split(self, buffer: Tensor) -> list[Tensor]:
        """Each part of a buffer, (batch, rows, cols)."""
        pieces = buffer.split(self._numels)
        return [t.view(part.piece.shape) for t, part in zip(pieces, self.parts, strict=True)]

    def packed(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The buffer of one tensor a part; the inverse of `split`."""
        none = torch.empty(0, dtype=dtype, device=self.device)
        return torch.cat([none, *(t.reshape(-1).to(dtype) for t in tensors)])

    # ---- there ------------------------------------------------------------------------------------------------------

    def send(self, momenta: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
        """Sends what the directions depend on to the owners; gives what waits for their inputs, in a dtype.

        momenta: the buffer of all parts.
        """
        moved = self.exchange.to_owners(momenta)
        if not self.recipe.by_matrix:
            return lambda: moved().to(dtype)
        elementwise = {key: self._send([part.state[key] for part in self.parts]) for key in self._fetched_keys()}
        weights = self._send_weights() if self.recipe.reads_weight else None

        def inputs() -> Tensor:
            self._momenta = moved()
            for key, wait in elementwise.items():
                for item, t in zip(self.owned, wait().split(self.counts), strict=True):
                    item.state[key] = t
            return self._inputs(dtype, None if weights is None else weights())

        return inputs

    def _inputs(self, dtype: torch.dtype, weights: Tensor | None) -> Tensor:
        """The directions' inputs, from the momenta, state and weights that have come."""
        inputs = [self._momenta.new_empty((0, *self.input_shape[1:]), dtype=dtype)]
        ws = [None] * len(self.owned) if weights is None else weights.split(self.counts)
        for item, m, w in zip(self.owned, self._momenta.split(self.counts), ws, strict=True):
            inputs.append(self.recipe.direction_input(item.state, m, item.parameter.step_values.hyper, w).to(dtype))
        return torch.cat(inputs)

    def receive_gradients(self) -> None:
        """Has the owners know the whole gradients of this step."""
        whole = self._send([part.grad for part in self.parts], self._grad_dtype)()
        for item, g in zip(self.owned, whole.split(self.counts), strict=True):
            item.received = g.to(item.parameter.step_values.grad.dtype)

    def _send(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Callable[[], Tensor]:
        """Sends one tensor a part to the owners, in fp32 or wider where no dtype is given."""
        return self.exchange.to_owners(self.packed(tensors, dtype or self._wide))

    def _send_weights(self) -> Callable[[], Tensor]:
        """Sends the weights of the owned matrices, in fp32 (fp64 for fp64)."""
        values = [self.recipe.rounding.value(part.weight, part.state) for part in self.parts]
        return self._send(values, torch.promote_types(self.matrices[0].parameter.source.dtype, torch.float32))

    def _elementwise_keys(self) -> list[str]:
        """State of transforms that has the parameter's shape."""
        specs = [spec for transform in self.recipe.transforms for spec in transform.specs]
        return [spec.key for spec in specs if spec.layout == "elementwise"]

    def _fetched_keys(self) -> list[str]:
        """`_elementwise_keys`, and the state of an elementwise preconditioner, which the parts here update."""
        second = self.recipe.precondition.keys if self.recipe.kronecker is None else ()
        return [*second, *self._elementwise_keys()]

    @property
    def _wide(self) -> torch.dtype:
        """The dtype of what transforms keep: the gradients', but at least fp32."""
        return torch.promote_types(self._grad_dtype, torch.float32)

    @property
    def _grad_dtype(self) -> torch.dtype:
        """One that holds the gradients of all parameters, the same on all ranks."""
        return reduce(torch.promote_types, (item.parameter.step_values.grad.dtype for item in self.matrices))

    # ---- and back ---------------------------------------------------------------------------------------------------

    def send_back(self, d: Tensor, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
        """Sends the updates back that the directions of what is owned make; gives what waits for those of the parts
        here, (batch, rows, cols) and contiguous.
        """
        if not self.recipe.by_matrix:
            moved = self.exchange.from_owners(d)
            return lambda: self.split(moved())
        updates, remembered = [d.new_empty((0, *self.exchange.shape), dtype=dtype)], []
        rows = zip(self.owned, d.split(self.sizes), self._momenta.split(self.counts), strict=True)
        for item, of_item, m in rows:
            u, fresh = self.recipe.update(item.state, of_item, m, item.parameter.step_values.hyper, item.received)
            item.keep({key: t for key, t in fresh.items() if key not in self._elementwise_keys()})
            updates.append(u.to(dtype))
            remembered.append(fresh)
        elementwise = {key: self._send_state_back(key, remembered) for key in self._elementwise_keys()}
        for item, key in product(self.owned, self._fetched_keys()):
            del item.state[key]
        self._momenta = torch.empty(0)
        moved = self.exchange.from_owners(torch.cat(updates))

        def received() -> list[Tensor]:
            for key, wait in elementwise.items():
                for part, t in zip(self.parts, self.split(wait()), strict=True):
                    part.keep({key: t})
            return self.split(moved())

        return received

    def _send_state_back(self, key: str, remembered: Sequence[State]) -> Callable[[], Tensor]:
        """Sends elementwise state to the parts: what the update remembered of it, or as it was."""
        whole = [fresh.get(key, item.state[key]) for item, fresh in zip(self.owned, remembered, strict=True)]
        none = torch.empty((0, *self.exchange.shape), dtype=self._wide, device=self.device)
        return self.exchange.from_owners(torch.cat([none, *(t.to(self._wide) for t in whole)]))

    # ---- numbers of matrices ----------------------------------------------------------------------------------------

    def of_all(self, numbers: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(of each of `matrices`, of each of `parts`), from a number for each direction of what is owned, (n,) fp64."""
        sizes = [item.input_shape[0] for item in self.matrices]
        everyone = numbers.new_zeros(sum(sizes))
        everyone[self._numbers_owned] = numbers
        self.ranks.all_reduce(everyone)
        of_parts = []
        for part in self.parts:
            first, run = self._first_number[place_of(part)], part.run.matrices
            of_parts.append(everyone[first + run.start * self._blocks : first + run.stop * self._blocks])
        return list(everyone.split(sizes)), of_parts

    @property
    def _blocks(self) -> int:
        """Directions that are taken for a matrix."""
        first = self.matrices[0]
        return first.input_shape[0] // first.piece.batch

    @cached_property
    def _first_number(self) -> dict[Place, int]:
        firsts = accumulate((item.input_shape[0] for item in self.matrices), initial=0)
        return {item.place: first for item, first in zip(self.matrices, firsts, strict=False)}

    @cached_property
    def _numbers_owned(self) -> Tensor:
        """The places of the directions of what is owned among those of all matrices."""
        firsts = [self._first_number[item.place] for item in self.matrices]
        blocks = range(self._blocks)
        places = [firsts[i] + k * self._blocks + block for i, k in self.exchange.owned for block in blocks]
        return torch.tensor(places, dtype=torch.int64, device=self.device)


class SplitMatrices(SharedMatrices):
    """Matrices whose directions all ranks take together, each its part, by the Gram form (`steepest.step.routes`).

    All have one shape and are cut alike.
    """

    def __init__(self, matrices: Sequence[Matrices], parts: Sequence[LocalMatrices]) -> None:
        p, piece = matrices[0].parameter, matrices[0].piece
        assert p.sharding is not None
        super().__init__(matrices, parts, ())
        self.sharded_dim = gram_dim(p.recipe, p.sharding, piece)
        self.sizes = self.counts = [item.piece.batch for item in matrices]
        first = p.sharding.rectangles(piece)[self.ranks.place][0]
        rows = (0, piece.cols) if self.sharded_dim == -2 else (piece.rows, 0)
        self._part = rows if first is None else first.shape

    @property
    def worked_on(self) -> Sequence[Matrices]:
        return self.matrices

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return sum(self.sizes), *self._part

    def send(self, momenta: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
        return lambda: momenta.view(self.input_shape).to(dtype)

    def send_back(self, d: Tensor, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
        return lambda: self.split(d.reshape(-1))

    def of_all(self, numbers: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        everyone = numbers.clone()
        self.ranks.all_reduce(everyone)
        each = list(everyone.split(self.sizes))
        return each, each if self.parts else []


def place_of(part: LocalMatrices) -> Place:
    return part.parameter.group, part.parameter.index, part.run.piece


def unit_of(item: Matrices) -> Unit:
    sharding = item.parameter.sharding
    assert sharding is not None
    return sharding.unit(item.piece, item.parameter.owners[item.number])


def share_of(item: Matrices) -> int:
    """The `share_bytes` of an item."""
    p = item.parameter
    assert p.sharding is not None
    return share_bytes(p.recipe, item.shape, p.input_dtype, p.sharding.ranks.size)


def share_bytes(recipe: Recipe, shape: tuple[int, int, int], dtype: torch.dtype, ranks: int) -> int:
    """A rank's share of the memory of matrices' inputs, directions and what they need."""
    batch, rows, cols = shape
    return (
        batch * (rows * cols * (4 * dtype.itemsize + 8) + recipe.direction.workspace_bytes(rows, cols, dtype)) // ranks
    )
