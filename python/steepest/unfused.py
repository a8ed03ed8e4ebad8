"""The step of a group by the parts of its recipe, in torch ops: what the fused ops do not take, and what torch.compile
traces and fuses itself.

    observe    every parameter's state takes its gradient, unless that gradient is not finite
    chunks     matrices of equal shape, dtype and device, at most max_workspace_bytes at a time
      gather   P.into(momentum), stacked in the direction's own dtype      (b, m, n)
      towards  one direction call for the chunk
      store    P.back, step size, decay and rounding
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .budget import cut
from .matrices import Piece
from .ops.multi_tensor import NOT_SCALED, Scaling
from .parts import Hyper, shape_ratio
from .recipe import Recipe, State, all_finite


@dataclass(frozen=True)
class Batch:
    """What one group hands over, index by index: parameters with gradients, their state and their matrices.

    pieces[i] says how parameter i is read as matrices, places[i] where it stands: (group, parameter); skipped[i] is the
    int64 counter of its device.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[State]
    skipped: Sequence[Tensor]
    pieces: Sequence[tuple[Piece, ...]]
    places: Sequence[tuple[int, int]]
    maximize: bool = False
    scaling: Scaling = NOT_SCALED

    def signed(self, g: Tensor) -> Tensor:
        """The gradient of what is minimised, unscaled."""
        if self.scaling.grad_scale is not None:
            wide = torch.promote_types(g.dtype, torch.float32)
            g = g.to(wide) / self.scaling.grad_scale.to(wide)
        return -g if self.maximize else g

    def finite(self, g: Tensor) -> Tensor:
        """0-d bool: whether a step is taken with this gradient."""
        finite = all_finite(g)
        found = self.scaling.found_inf
        return finite if found is None else finite & (found.reshape(()) == 0)


@dataclass(frozen=True)
class Member:
    """One piece of one parameter: its place, views of the parameter's tensors, the flag of its whole gradient."""

    place: tuple[int, int, int]
    piece: Piece
    param: Tensor
    grad: Tensor
    state: State
    finite: Tensor


@dataclass(frozen=True)
class Sums:
    """Sums of squares over a group's parameters, 0-d fp64 on the first one's device; empty lists before a step."""

    grad: list[Tensor]
    momentum: list[Tensor]
    update: list[Tensor]
    param: list[Tensor]

    def by_name(self) -> dict[str, Tensor]:
        return {f"{name}_sq": _total(getattr(self, name)) for name in ("grad", "momentum", "update", "param")}


def _total(parts: list[Tensor]) -> Tensor:
    """parts: 0-d, at least one."""
    return torch.stack(parts).sum()


def _square(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)).double().square()


def update(recipe: Recipe, hyper: Hyper, batch: Batch, *, max_workspace_bytes: int = 1 << 30) -> Sums:
    """One step, in place on batch.params, batch.states and batch.skipped.

    A parameter whose gradient holds a NaN or an infinity keeps its value and its state, bit for bit, and the counter
    of its device goes up by one.
    """
    members: list[Member] = []
    sums = Sums([], [], [], [])
    for i, (p, g, state) in enumerate(zip(batch.params, batch.grads, batch.states, strict=True)):
        g = batch.signed(g)
        finite = batch.finite(g)
        batch.skipped[i].add_(finite.logical_not())
        for key, fresh in recipe.observe(state, g, hyper).items():
            torch.where(finite, fresh.to(state[key].dtype), state[key], out=state[key])
        sums.grad.append(torch.where(finite, _square(g), 0))
        sums.momentum.append(_square(state[recipe.momentum.key]))
        for number, piece in enumerate(batch.pieces[i] if p.numel() else ()):
            members.append(_member((*batch.places[i], number), piece, p, g, state, finite))
    for chunk in _chunks(recipe, members, max_workspace_bytes):
        x = _gather(recipe, hyper, chunk)
        sums.update.extend(_store(recipe, hyper, chunk, recipe.towards(x)))
    sums.update.extend(torch.zeros((), dtype=torch.float64, device=p.device) for p in batch.params[:1])
    sums.param.extend(map(_square, batch.params))
    return sums


def _member(place: tuple[int, int, int], piece: Piece, p: Tensor, g: Tensor, state: State, finite: Tensor) -> Member:
    def look(t: Tensor) -> Tensor:
        return piece.view(t) if t.ndim else t.unsqueeze(0)

    parts = {key: look(t) if t.shape == p.shape else t for key, t in state.items()}
    return Member(place, piece, look(p), look(g), parts, finite)


def _chunks(recipe: Recipe, members: list[Member], max_bytes: int) -> Iterator[list[Member]]:
    """Members that share a direction call: one bucket per shape, dtype and device, cut at max_bytes of workspace.

    A chunk holds its input, what the direction needs, the direction and updates in fp32.
    """
    if not recipe.direction.batched:
        yield from ([member] for member in members)
        return
    buckets: dict[tuple[object, ...], list[Member]] = {}
    for member in members:
        key = (member.piece.rows, member.piece.cols, member.param.dtype, member.grad.dtype, member.param.device)
        buckets.setdefault(key, []).append(member)
    for bucket in buckets.values():
        yield from cut(bucket, lambda member: _workspace_bytes(recipe, member), max_bytes)


def _store(recipe: Recipe, hyper: Hyper, chunk: list[Member], d: Tensor) -> Iterator[Tensor]:
    """P.back, step size, decay and rounding for the directions d of a chunk; the updates' sums of squares."""
    ratio = shape_ratio(recipe.adjust_lr, chunk[0].piece.rows, chunk[0].piece.cols)
    parts = d.split([member.piece.batch for member in chunk])
    for member, part in zip(chunk, parts, strict=True):
        u = recipe.back(member.state, part.reshape(member.param.shape), hyper)
        value = recipe.rounding.value(member.param, member.state)
        u = torch.where(member.finite, u, 0).to(value.dtype)  # 0 NaN is NaN
        moved = recipe.decay.apply(value, u, hyper.lr * hyper.weight_decay, hyper.lr * ratio)
        stored, left_over = recipe.rounding.store(moved, member.param.dtype, member.state.get("step"), member.place)
        member.param.copy_(torch.where(member.finite, stored, member.param))
        for key, t in left_over.items():
            member.state[key].copy_(torch.where(member.finite, t, member.state[key]))
        yield _square(u * (hyper.lr * ratio))


def _gather(recipe: Recipe, hyper: Hyper, chunk: list[Member]) -> Tensor:
    """The direction's input, (b, rows, cols) in its own dtype; a lone member is reshaped, several are stacked."""

    def given(member: Member) -> Tensor:
        return recipe.into(member.state, member.grad, hyper)

    first, dtype = chunk[0], _work_dtype(recipe, chunk[0])
    if len(chunk) == 1:
        return given(first).to(dtype).reshape(first.piece.shape)
    sizes = [member.piece.batch for member in chunk]
    x = torch.empty((sum(sizes), *first.piece.shape[1:]), dtype=dtype, device=first.param.device)
    for member, part in zip(chunk, x.split(sizes), strict=True):
        part.view(member.param.shape).copy_(given(member))
    return x


def _work_dtype(recipe: Recipe, member: Member) -> torch.dtype:
    wide = torch.promote_types(member.grad.dtype, torch.float32)
    # fp16 has no room for what the fused op scales into its range.
    own = recipe.direction.compute_dtype(wide, member.param.device)
    return wide if own == torch.float16 else own


def _workspace_bytes(recipe: Recipe, member: Member) -> int:
    batch, rows, cols = member.piece.shape
    dtype = _work_dtype(recipe, member)
    return batch * (recipe.direction.workspace_bytes(rows, cols, dtype) + rows * cols * (2 * dtype.itemsize + 4))
