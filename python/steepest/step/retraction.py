"""Weights that stay on spheres: what is measured of their matrices, and how they are put back.

Of sharded parameters every rank has the numbers of all matrices. Sums of squares are those of the shards, added up in
fp64. For a largest singular value, which is of whole matrices, the parameter is gathered, and so is an fp64 parameter,
where another order of summation shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..matrices import Piece
from ..sharding.local import whole_tensor
from ..state_layout import piece_view
from .parameter import LocalMatrices, Matrices, Parameter

__all__ = ["norms_of", "retract"]


def retract(parameters: Sequence[Parameter]) -> None:
    """Puts the matrices of these weights back on their spheres, of those whose step was taken."""
    for p, norms in zip(parameters, norms_of(parameters), strict=True):
        sphere = p.recipe.constraint
        assert sphere is not None
        value, scales = p.value(), sphere.scales(p.state[sphere.key], norms)
        scaled = value.clone()
        for item in p.local_matrices():
            part = item.piece.view(scaled)
            of_item = _of_item(scales, item).to(part.dtype).view(-1, 1, 1)
            part.copy_((part.reshape(item.piece.shape) * of_item).reshape(part.shape))
        p.store(torch.where(p.stepped, scaled, value))


def norms_of(parameters: Sequence[Parameter]) -> list[Tensor]:
    """The norms of the matrices of every parameter, (matrices,) fp64, in the norm of its constraint."""
    measured = [_measured_whole(p) if _gathers(p) else _squares(p) for p in parameters]
    shared: dict[Any, list[int]] = {}
    for i, p in enumerate(parameters):
        if p.ranks is not None and not _gathers(p):
            shared.setdefault(p.ranks, []).append(i)
    for ranks, some in shared.items():
        sums = torch.cat([measured[i] for i in some])
        ranks.sum_parts(sums)
        for i, of_parameter in zip(some, sums.split([len(measured[i]) for i in some]), strict=True):
            measured[i] = of_parameter
    return [m if _is_spectral(p) else m.sqrt() for p, m in zip(parameters, measured, strict=True)]


def _is_spectral(p: Parameter) -> bool:
    assert p.recipe.constraint is not None
    return p.recipe.constraint.norm == "spectral"


def _gathers(p: Parameter) -> bool:
    return _is_spectral(p) or (p.sharding is not None and p.source.dtype == torch.float64)


def _squares(p: Parameter) -> Tensor:
    """Sums of squares of what lies here of every matrix."""
    sums = torch.zeros(sum(piece.batch for piece in p.pieces), dtype=torch.float64, device=p.tensor.device)
    value, sphere = p.value(), p.recipe.constraint
    assert sphere is not None
    for item in p.local_matrices():
        _of_item(sums, item).add_(sphere.norms(item.piece.view(value).reshape(item.piece.shape)).square())
    return sums


def _measured_whole(p: Parameter) -> Tensor:
    """The norms of whole matrices, squared unless they are spectral."""
    value, sphere = p.value(), p.recipe.constraint
    assert sphere is not None
    if p.sharding is not None:
        from ..sharding.local_state import as_shard

        value = whole_tensor(as_shard(value, p.sharding))
    none = torch.zeros(0, dtype=torch.float64, device=value.device)
    pieces: Sequence[Piece] = p.pieces if value.numel() else ()
    norms = torch.cat([none, *(sphere.norms(piece.view(value).reshape(piece.shape)) for piece in pieces)])
    return norms if _is_spectral(p) else norms.square()


def _of_item(t: Tensor, item: Matrices) -> Tensor:
    """A view of those of a number for every matrix of the parameter, (matrices,), that belong to these."""
    of_piece = piece_view("matrix", t, item.parameter.pieces, item.number)
    return of_piece[item.run.matrices.start : item.run.matrices.stop] if isinstance(item, LocalMatrices) else of_piece
