"""The parameters of a step, and the matrices they are read as."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..matrices import Piece
from ..parts import Hyper, shape_ratio
from ..parts.precondition import Phase
from ..recipe import Recipe, State
from ..state_layout import piece_view

__all__ = ["Matrices", "Parameter", "StepOptions", "StepValues", "signed_gradient", "store_if"]


@dataclass(frozen=True)
class StepOptions:
    """What a group says about its steps besides recipe and numbers; see `steepest.zoo.shared.Extras`."""

    maximize: bool = False
    backend: str = "auto"
    max_workspace_bytes: int = 1 << 30
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

    group, index: parameter `index` of group `group` of the optimizer.   state: the optimizer's own dictionary.
    step: what the present step goes by, between its decision and its end.   flag: 0-d, where the executor says by a
    number that is not 0 that the last step was taken.
    """

    tensor: Tensor
    state: State
    recipe: Recipe
    pieces: tuple[Piece, ...]
    group: int = 0
    index: int = 0
    options: StepOptions = StepOptions()
    step: StepValues | None = field(default=None, repr=False)
    flag: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.momentum_key = self.recipe.keys[0]

    @property
    def grad(self) -> Tensor:
        """The gradient as it is stored, of a parameter that has one."""
        assert self.tensor.grad is not None
        return self.tensor.grad

    @property
    def grad_dtype(self) -> torch.dtype:
        """The dtype of the gradient, or where there is none yet of the parameter."""
        return self.tensor.dtype if self.tensor.grad is None else self.tensor.grad.dtype

    @property
    def wide_dtype(self) -> torch.dtype:
        """The dtype that is computed in: the gradient's, but at least fp32."""
        return torch.promote_types(self.grad_dtype, torch.float32)

    @property
    def input_dtype(self) -> torch.dtype:
        """The dtype in which the direction works."""
        return self.recipe.direction_dtype(self.wide_dtype, self.tensor.device)

    @property
    def taken(self) -> StepValues:
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

    def takes(self, largest: Tensor, square: Tensor) -> Tensor:
        """0-d bool: whether this gradient leaves a finite state; see `Recipe.takes`."""
        names = [self.recipe.names(number) for number in range(len(self.pieces))]
        return self.recipe.takes(largest, square, self.state, names, self.grad_dtype)

    def matrices(self) -> list[Matrices]:
        """One item a piece; none of a parameter without elements."""
        numbers = range(len(self.pieces)) if self.tensor.numel() else ()
        return [Matrices(self, number) for number in numbers]


class Matrices:
    """The matrices of one piece of a parameter, (batch, rows, cols), and views of what belongs to them.

    state: under the recipe's keys; what is elementwise in the piece's natural shape. It is looked up once, as state
    stays where it is while a plan holds; weight and gradient may be others in every step.
    """

    def __init__(self, parameter: Parameter, number: int) -> None:
        recipe, pieces = parameter.recipe, parameter.pieces
        self.parameter, self.number, self.piece = parameter, number, pieces[number]
        self.place = (parameter.group, parameter.index, number)
        self.ratio = shape_ratio(recipe.adjust_lr, self.piece.rows, self.piece.cols)
        self.by_matrix = recipe.by_matrix
        names = recipe.names(number)
        self.state: State = {}
        for key, layout in recipe.layouts.items():
            self.state[key] = piece_view(layout, parameter.state[names.get(key, key)], pieces, number)

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
        return self.piece.view(self.parameter.taken.grad)

    @property
    def finite(self) -> Tensor:
        return self.parameter.taken.finite

    @property
    def phase(self) -> Phase:
        return self.parameter.taken.phase

    def elementwise(self, t: Tensor) -> Tensor:
        """A tensor of the parameter's shape in the shape the recipe's elementwise parts want: by matrix or natural."""
        return t.reshape(self.shape) if self.by_matrix else t

    def recipe_state(self) -> State:
        """The state as the recipe reads it: elementwise tensors as `elementwise` has them."""
        if not self.by_matrix:
            return self.state
        layouts = self.recipe.layouts
        return {
            key: t.reshape(self.shape) if layouts[key] == "elementwise" and t.numel() else t
            for key, t in self.state.items()
        }

    def keep(self, fresh: State) -> None:
        """Takes these tensors into the state, unless the step is not taken."""
        store_if(self.finite, self.state, fresh)


def store_if(flag: Tensor, state: State, fresh: State) -> None:
    """Overwrites tensors of the state, in place and in their dtypes, where the 0-d flag says so."""
    for key, t in fresh.items():
        torch.where(flag, t.reshape(state[key].shape).to(state[key].dtype), state[key], out=state[key])


def signed_gradient(g: Tensor, maximize: bool, grad_scale: Tensor | None) -> Tensor:
    """The gradient of what is minimised, unscaled."""
    if grad_scale is not None:
        wide = torch.promote_types(g.dtype, torch.float32)
        g = g.to(wide) / grad_scale.to(wide)
    return -g if maximize else g
