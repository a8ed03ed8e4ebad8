"""State that only the owners of matrices have, in checkpoints: Kronecker factors, bases, statistics of rows.

In a checkpoint it has the shape it has in one process, cut evenly over the ranks, so that any number of ranks may load
it, and all ranks name the same tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..matrices import Piece
from ..parts import Blockwise
from ..parts.blockwise import scale_key
from ..recipe import Recipe
from ..sharding.layout import Sharding
from ..sharding.local import is_sharded, whole_tensor
from ..sharding.local_state import as_shard
from ..sharding.owners import owned_pieces
from ..sharding.regions import shard_dims
from ..state_layout import Layout, piece_view

__all__ = ["owned_part", "spread", "whole"]

Owners = Sequence[Sequence[int]]
_EVERYWHERE = ("elementwise", "scalar", "host")


def spread(
    state: Mapping[str, Any], sharding: Sharding, recipe: Recipe, pieces: Sequence[Piece], owners: Owners
) -> dict[str, Any]:
    """The state with what is at owners as DTensors of the shapes of one process, in one order on all ranks, which
    collectives over a checkpoint follow. Collective among the ranks.
    """
    saved: dict[str, Any] = {}
    here = owned_pieces(pieces, owners, sharding.ranks.place)
    for name, full in _of_one_process(sharding, recipe, pieces).items():
        layout, numbers = _tensors_at_owners(recipe, pieces).get(name, (None, []))
        if layout is None:
            if name in state:
                saved[name] = state[name]
            continue
        t = torch.zeros(full.shape, dtype=torch.promote_types(full.dtype, torch.float32), device=sharding.ranks.device)
        if t.ndim:
            for number in numbers if t.numel() else ():
                mine = [k for k, owner in enumerate(owners[number]) if owner == sharding.ranks.place]
                if mine:
                    part = piece_view(layout, state[name], here, number).reshape(len(mine), -1)
                    _rows(piece_view(layout, t, pieces, number), pieces[number])[mine] = part.to(t.dtype)
            sharding.ranks.all_reduce(t)
        else:
            t = t + state[name] if name in state else t
            sharding.ranks.all_reduce(t, "max")
        saved[name] = _cut(t.to(full.dtype), sharding)
    return {**saved, **{key: value for key, value in state.items() if key not in saved}}


def whole(
    tensors: Mapping[str, Any], sharding: Sharding, elementwise: set[str], scales: Collection[str] = ()
) -> dict[str, Any]:
    """A checkpoint's state of a parameter: what is elementwise cut as the parameter is, everything else whole.

    scales: the keys of scales of elementwise state, which are cut with it.   Collective where it is cut in another way.
    """
    gathered: dict[str, Any] = {}
    for key, value in tensors.items():
        alike = is_sharded(value) and (value.device_mesh, tuple(value.placements)) == (
            sharding.mesh,
            sharding.placements,
        )
        if (key in elementwise or key in scales) and alike:
            gathered[key] = value
            continue
        value = whole_tensor(value)
        if key in elementwise and isinstance(value, Tensor) and tuple(value.shape) == sharding.shape:
            box = sharding.region
            part = value[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))]
            value = as_shard(part.contiguous(), sharding)
        elif key in scales and isinstance(value, Tensor):
            value = _scales_here(value, sharding)
        gathered[key] = value
    return gathered


def _scales_here(scales: Tensor, sharding: Sharding) -> Tensor:
    """What lies here of the scales of a parameter's elementwise state."""
    boxes, shape = sharding.blocks(Blockwise().block), Blockwise().scale_shape(sharding.shape)
    if boxes is None or tuple(scales.shape) != shape:  # of another model, which is said where shapes are looked at
        return scales
    box = boxes[sharding.ranks.place]
    part = scales[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))]
    return as_shard(part.contiguous(), sharding, shape)


def owned_part(
    tensors: Mapping[str, Any], sharding: Sharding, recipe: Recipe, pieces: Sequence[Piece], owners: Owners
) -> dict[str, Any]:
    """What this rank keeps of state that is whole."""
    kept = dict(tensors)
    place = sharding.ranks.place
    for name, (layout, numbers) in _tensors_at_owners(recipe, pieces).items():
        if name not in tensors:
            continue
        t = tensors[name]
        parts = []
        for number in numbers:
            mine = [k for k, owner in enumerate(owners[number]) if owner == place]
            view = piece_view(layout, t, pieces, number)
            if t.ndim and t.numel() and len(mine) < pieces[number].batch:
                blocks = view.reshape(pieces[number].batch, -1, *view.shape[1:])
                view = blocks[mine].flatten(0, 1)
            parts.append((mine, view))
        if t.ndim and t.numel():
            kept[name] = torch.cat([view.reshape(-1, *t.shape[1:]) for mine, view in parts if mine] or [t[:0]])
    return kept


def _tensors_at_owners(recipe: Recipe, pieces: Sequence[Piece]) -> dict[str, tuple[Layout, list[int]]]:
    """Names of state tensors that owners have, each with its layout and the pieces it is of."""
    names: dict[str, tuple[Layout, list[int]]] = {}
    for key, layout in recipe.layouts.items():
        if layout in _EVERYWHERE:
            continue
        for number in range(len(pieces)):
            name = recipe.names(number).get(key, key)
            names.setdefault(name, (layout, []))[1].append(number)
            if key in recipe.averages:
                names.setdefault(scale_key(name), (layout, []))[1].append(number)
    return names


def _of_one_process(sharding: Sharding, recipe: Recipe, pieces: Sequence[Piece]) -> dict[str, Tensor]:
    like = torch.empty(sharding.shape, device="meta")
    state = recipe.init(like, like, pieces)
    for name, kind in recipe.coded(sharding.shape, len(pieces)).items():
        state[name], state[scale_key(name)] = Blockwise().empty(state[name], kind)
    return state


def _rows(view: Tensor, piece: Piece) -> Tensor:
    return view.view(piece.batch, -1)


def _cut(t: Tensor, sharding: Sharding) -> Tensor:
    """The DTensor of a tensor that all ranks have; numbers stay as they are."""
    mesh, dims = sharding.mesh, shard_dims(sharding.placements)
    if mesh is None or not t.numel() or not t.ndim or not dims:
        return t
    d = max(range(t.ndim), key=lambda d: t.shape[d])
    size = -(-t.shape[d] // mesh.size(dims[0]))
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    first = min(coordinate[dims[0]] * size, t.shape[d])
    part = t.narrow(d, first, min(size, t.shape[d] - first)).clone()
    placements = [Shard(d) if i == dims[0] else Replicate() for i in range(mesh.ndim)]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=t.shape, stride=t.stride())
