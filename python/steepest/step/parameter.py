"""The parameters of a step, and the matrices they are read as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..chunking import WORKSPACE
from ..matrices import Piece
from ..ops.state import copy_if
from ..parts import Hyper, shape_ratio
from ..parts.precondition import Phase
from ..recipe import Recipe, State
from ..sharding.local import local_tensor
from ..sharding.owners import owned_pieces
from ..state_layout import piece_view
from .working_state import WorkingState

if TYPE_CHECKING:
    from ..sharding.layout import LocalPart, Sharding
    from ..sharding.ranks import Ranks

__all__ = [
    "LocalMatrices",
    "Matrices",
    "OwnedMatrices",
    "Parameter",
    "StepOptions",
    "StepValues",
    "signed_gradient",
    "store_if",
]


@dataclass(frozen=True)
class StepOptions:
    """What a group says about its steps besides recipe and numbers; see `steepest.zoo.shared.Extras`."""

    maximize: bool = False
    backend: str = "auto"
    max_workspace_bytes: int = WORKSPACE
    fuse_update: bool = False


@dataclass(frozen=True)
class StepValues:
    """What one step of one parameter goes by.

    grad: of what is minimised, unscaled.   finite: 0-d bool, whether the step is taken.   phase: what its factors do.
    """

    grad: Tensor
    finite: Tensor
    phase: Phase
    hyper: Hyper


@dataclass(eq=False)
class Parameter:
    """One parameter of a step: its tensor and state, its recipe, and how it is read as matrices.

    source: the optimizer's parameter; `tensor` is what of it lies here.   state: the optimizer's own dictionary, of a
    sharded parameter what of it lies here (`steepest.sharding.local_state`).   pieces: of the whole parameter.
    group, index: parameter `index` of group `group` of the optimizer.
    sharding, owners: of a parameter that ranks share, and for every piece the rank that owns each matrix.
    step: what the present step goes by, between its decision and its end.   flag: 0-d, where the executor says by a
    number that is not 0 that the last step was taken.   allowed: 0-d bool, whether the weight lets this step be taken,
    or None: it is not asked.   corrected: the gradient that the present step's fused ops read in place of `grad`.
    """

    source: Tensor
    state: State
    recipe: Recipe
    pieces: tuple[Piece, ...]
    group: int = 0
    index: int = 0
    options: StepOptions = field(default_factory=StepOptions)  # as in `Recipe`
    sharding: Sharding | None = None
    owners: tuple[tuple[int, ...], ...] = ()
    step: StepValues | None = field(default=None, repr=False)
    flag: Tensor | None = field(default=None, repr=False)
    allowed: Tensor | None = field(default=None, repr=False)
    corrected: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.momentum_key = self.recipe.keys[0]

    @property
    def ranks(self) -> Ranks | None:
        """The ranks that share it, if any do."""
        return None if self.sharding is None else self.sharding.ranks

    @property
    def tensor(self) -> Tensor:
        """What of the parameter lies here."""
        return self.source if self.sharding is None else local_tensor(self.source)

    @property
    def grad(self) -> Tensor:
        """The gradient as it is stored, of a parameter that has one; what of it lies here."""
        assert self.source.grad is not None
        return self.source.grad if self.sharding is None else local_tensor(self.source.grad)

    @property
    def grad_of_ops(self) -> Tensor:
        """The gradient that the fused ops read: as it is stored, unless the recipe corrects it."""
        return self.grad if self.corrected is None else self.corrected

    @property
    def grad_dtype(self) -> torch.dtype:
        """The dtype of the gradient, or where there is none yet of the parameter."""
        return self.source.dtype if self.source.grad is None else self.source.grad.dtype

    @property
    def wide_dtype(self) -> torch.dtype:
        """The dtype that is computed in: the gradient's, but at least fp32."""
        return torch.promote_types(self.grad_dtype, torch.float32)

    @property
    def input_dtype(self) -> torch.dtype:
        """The dtype in which the direction works."""
        return self.recipe.direction_dtype(self.wide_dtype, self.source.device)

    @property
    def step_values(self) -> StepValues:
        """The values of the step that is being taken."""
        assert self.step is not None
        return self.step

    @property
    def stepped(self) -> Tensor:
        """0-d bool, whether the last step was taken, and not left out for its gradient."""
        assert self.flag is not None
        return self.flag != 0

    @property
    def momentum(self) -> Tensor:
        """The state that averages gradients or updates."""
        return self.state[self.momentum_key]

    def value(self) -> Tensor:
        """The weight in fp32 (fp64 for fp64), with the bits that its dtype drops where they are kept."""
        return self.recipe.rounding.value(self.tensor, self.state)

    def store(self, value: Tensor) -> None:
        """Makes this the weight, of which it has what lies here, rounded as the step rounds it: the bits that are kept
        are its bits.
        """
        place = (self.group, self.index, len(self.pieces))  # of none of its pieces
        wide = value.to(torch.promote_types(self.source.dtype, torch.float32))
        stored, remainder = self.recipe.rounding.store(wide, self.source.dtype, self.state.get("step"), place)
        self.tensor.copy_(stored)
        for key, t in remainder.items():
            self.state[key].copy_(t)

    def accepts(self, largest: Tensor, square: Tensor) -> Tensor:
        """Whether this gradient leaves a finite state, of factors those that are here, bool of the shape of both; see
        `Recipe.accepts`.
        """
        return self.recipe.accepts(largest, square, self.state, self.factor_names, self.grad_dtype)

    @property
    def factor_names(self) -> list[Mapping[str, str]]:
        """The names of the state of factors, by their keys, for every piece of which matrices are here."""
        return [self.recipe.names(number) for number, piece in enumerate(self.pieces_here) if piece.batch]

    def factors(self) -> list[State]:
        """The state of factors that are here, of every piece."""
        return [{key: self.state[name] for key, name in of_piece.items()} for of_piece in self.factor_names]

    @property
    def is_coded(self) -> bool:
        """Whether some of its state is stored in codes, which its step decodes."""
        return isinstance(self.state, WorkingState)

    @property
    def decoded_bytes(self) -> int:
        """About the memory of all that is in codes once it is decoded; the same on all ranks."""
        whole = self.source.numel()
        here = whole if self.sharding is None else max(region.numel for region in self.sharding.regions)
        layouts = self.recipe.layouts
        return sum(here if layouts[key] == "elementwise" else whole for key in self.recipe.averages) * 4

    # ---- its matrices -----------------------------------------------------------------------------------------------

    @property
    def pieces_here(self) -> tuple[Piece, ...]:
        """The pieces with those of their matrices only that this rank owns."""
        if self.sharding is None:
            return self.pieces
        return owned_pieces(self.pieces, self.owners, self.sharding.ranks.place)

    def matrices(self) -> list[Matrices]:
        """One item a piece; none of a parameter without elements."""
        numbers = range(len(self.pieces)) if self.source.numel() else ()
        return [Matrices(self, number) for number in numbers]

    def local_matrices(self) -> list[Matrices]:
        """The items that elementwise work is done by: one a piece, of a sharded parameter one a run of matrices that
        one rank owns, as far as they lie here.
        """
        if self.sharding is None:
            return self.matrices()
        parts = self.sharding.local_parts(self.pieces, self.owners)
        return [LocalMatrices(self, part, number) for number, part in enumerate(parts)]

    def owned_matrices(self) -> list[Matrices]:
        """The items whose directions are taken here: one a piece, of those matrices that this rank owns."""
        if self.sharding is None:
            return self.matrices()
        pieces = self.pieces_here if self.source.numel() else ()
        return [OwnedMatrices(self, number) for number, piece in enumerate(pieces) if piece.batch]


class Matrices:
    """The matrices of one piece of a parameter, (batch, rows, cols), and views of what belongs to them.

    state: under the recipe's keys; what is elementwise in the piece's natural shape. It is looked up once, by the first
    who asks, as state stays where it is while a plan holds; weight and gradient may be others in every step. A sharded
    parameter's are on many ranks, and have no state.   chosen: the rows or columns of this step, of a recipe with a
    submatrix.
    """

    def __init__(self, parameter: Parameter, number: int) -> None:
        recipe = parameter.recipe
        self.parameter, self.number, self.piece = parameter, number, parameter.pieces[number]
        self.place = (parameter.group, parameter.index, number)
        self.ratio = shape_ratio(recipe.adjust_lr, self.piece.rows, self.piece.cols)
        self.by_matrix = recipe.by_matrix
        self._elementwise = frozenset(key for key, layout in recipe.layouts.items() if layout == "elementwise")
        self.chosen: Tensor | None = None
        self._state: State | None = None

    @property
    def state(self) -> State:
        if self._state is None:
            self._state = self._views()
        return self._state

    def _views(self) -> State:
        """The state as it lies in memory now."""
        recipe, parameter = self.recipe, self.parameter
        if parameter.sharding is not None:
            return {}
        names = recipe.names(self.number)
        return {
            key: piece_view(layout, parameter.state[names.get(key, key)], parameter.pieces, self.number)
            for key, layout in recipe.layouts.items()
        }

    @property
    def recipe(self) -> Recipe:
        return self.parameter.recipe

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, rows, cols)."""
        return self.piece.shape

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of the direction's input."""
        return self.recipe.input_shape(self.piece.shape)

    @property
    def weight(self) -> Tensor:
        """The piece of the weight, in its natural shape."""
        return self.piece.view(self.parameter.tensor)

    @property
    def grad(self) -> Tensor:
        """The piece of this step's gradient, in its natural shape."""
        grad = self.parameter.step_values.grad
        return self.piece.view(grad) if self.piece.narrow else grad

    @property
    def finite(self) -> Tensor:
        return self.parameter.step_values.finite

    @property
    def phase(self) -> Phase:
        return self.parameter.step_values.phase

    def by_matrices(self, t: Tensor) -> Tensor:
        """The piece of a tensor, in its natural shape, as matrices that follow one another: strides choose a product's
        roundings.
        """
        return t.reshape(self.shape).contiguous()

    def elementwise(self, t: Tensor) -> Tensor:
        """A tensor of the parameter's shape in the shape the recipe's elementwise parts want: by matrix or natural."""
        return self.by_matrices(t) if self.by_matrix else t

    def recipe_state(self) -> State:
        """The state as the recipe reads it: elementwise tensors as `elementwise` has them."""
        if not self.by_matrix:
            return self.state
        return {
            key: self.by_matrices(t) if key in self._elementwise and t.numel() else t for key, t in self.state.items()
        }

    def keep(self, fresh: State) -> None:
        """Takes these tensors into the state, unless the step is not taken."""
        store_if(self.finite, self.state, fresh)


class LocalMatrices(Matrices):
    """What lies here of a run of matrices of a sharded parameter: weight, gradient and elementwise state.

    run: says which, and who owns them.
    """

    def __init__(self, parameter: Parameter, run: LocalPart, number: int) -> None:
        super().__init__(parameter, run.piece)
        sharding = parameter.sharding
        assert sharding is not None
        self.run, self.piece = run, run.part
        # Random bits follow the place: every shard has its own.
        parts = sum(piece.batch * min(piece.groups, 4) for piece in parameter.pieces)  # or fewer
        first = (1 + sharding.ranks.shards.place) * (1 + parts)
        self.place = (parameter.group, parameter.index, first + number)

    def _views(self) -> State:
        views: State = {}
        for key, layout in self.recipe.layouts.items():
            if layout in ("elementwise", "scalar", "host") and key in self.parameter.state:
                t = self.parameter.state[key]
                views[key] = self.piece.view(t) if layout == "elementwise" and t.numel() else t
        return views


class OwnedMatrices(Matrices):
    """The matrices of a piece of a sharded parameter that this rank owns, with the state that only their owner has.

    received: their gradients, (batch, rows, cols), while a step goes by them.
    """

    def __init__(self, parameter: Parameter, number: int) -> None:
        super().__init__(parameter, number)
        self.piece = parameter.pieces_here[number]
        self.received: Tensor | None = None

    def _views(self) -> State:
        names, pieces = self.recipe.names(self.number), self.parameter.pieces_here
        return {
            key: piece_view(layout, self.parameter.state[names.get(key, key)], pieces, self.number)
            for key, layout in self.recipe.layouts.items()
            if layout != "elementwise"
        }

    @property
    def grad(self) -> Tensor:
        assert self.received is not None
        return self.received


def store_if(flag: Tensor, state: State, fresh: State) -> None:
    """Overwrites tensors of the state, in place and in their dtypes, where the 0-d flag says so."""
    kept = [state[key] for key in fresh]
    copy_if(flag, kept, [t.reshape(old.shape).to(old.dtype) for old, t in zip(kept, fresh.values(), strict=True)])


def signed_gradient(g: Tensor, maximize: bool, grad_scale: Tensor | None) -> Tensor:
    """The gradient of what is minimised, unscaled."""
    if grad_scale is not None:
        wide = torch.promote_types(g.dtype, torch.float32)
        g = g.to(wide) / grad_scale.to(wide)
    return -g if maximize else g
