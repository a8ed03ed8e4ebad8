"""How a state tensor lies beside its parameter, said by the part that keeps it and never guessed from a shape.

    elementwise   the parameter's shape: one number an element; without elements where there is nothing to keep
    row           (rows of all matrices,): one number a row
    column        (matrices, columns): one number a column
    matrix        (matrices,): one number a matrix
    factor        (matrices, n, n) or what else a Kronecker factor has: a tensor of its own for every piece
    scalar        0-d, on the parameter's device
    host          0-d, on the CPU: what the host decides by

Matrices are counted piece by piece (see `steepest.matrices`), in the order of the pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .matrices import Piece

__all__ = ["Codes", "Layout", "StateSpec", "StateView", "empty_state", "piece_view"]

Layout = Literal["elementwise", "row", "column", "matrix", "factor", "scalar", "host"]
#: An average of gradients or updates, or one of squares, as `steepest.parts.Blockwise` stores it.
Codes = Literal["signed", "squares"]


@dataclass(frozen=True)
class StateSpec:
    """One state tensor of a part: its key, its layout, and its dtype.

    dtype: None is the gradient's, but at least fp32 unless of_gradient.   nonnegative: whether its entries are >= 0.
    codes: as what it may be stored in 8 bits, None where it may not.
    """

    key: str
    layout: Layout
    dtype: torch.dtype | None = None
    of_gradient: bool = False
    nonnegative: bool = False
    codes: Codes | None = None


class StateView(MutableMapping[str, Tensor]):
    """A view of the state of one parameter, to be used as that; subclasses say how it is read and stored."""

    def __init__(self, state: MutableMapping[str, Tensor]) -> None:
        self._state = state

    def __delitem__(self, key: str) -> None:
        del self._state[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def empty_state(spec: StateSpec, g: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """Zeros of this layout for a parameter whose gradient is like g and is read as these pieces."""
    dtype = spec.dtype or (g.dtype if spec.of_gradient else torch.promote_types(g.dtype, torch.float32))
    if spec.layout == "elementwise":
        return torch.zeros_like(g, dtype=dtype, memory_format=torch.preserve_format)
    return torch.zeros(_shape(spec.layout, pieces), dtype=dtype, device=g.device)


def piece_view(layout: Layout, t: Tensor, pieces: Sequence[Piece], number: int) -> Tensor:
    """The part of a state tensor that belongs to piece `number`: a view; of a factor, a scalar or the host's all.

    row: (batch, rows), column: (batch, columns), matrix: (batch,); elementwise in the piece's natural shape.
    """
    piece = pieces[number]
    if layout == "elementwise":
        return piece.view(t) if t.numel() else t
    if layout == "row":
        first = sum(other.batch * other.rows for other in pieces[:number])
        return t.narrow(0, first, piece.batch * piece.rows).view(piece.batch, piece.rows)
    if layout in ("column", "matrix"):
        return t.narrow(0, sum(other.batch for other in pieces[:number]), piece.batch)
    return t


def _shape(layout: Layout, pieces: Sequence[Piece]) -> tuple[int, ...]:
    matrices = sum(piece.batch for piece in pieces)
    shapes: dict[Layout, tuple[int, ...]] = {
        "row": (sum(piece.batch * piece.rows for piece in pieces),),
        "column": (matrices, pieces[0].cols),
        "matrix": (matrices,),
        "scalar": (),
    }
    return shapes[layout]
