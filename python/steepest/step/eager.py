"""The step of a group by the parts of its recipe, in torch ops: what the fused ops do not take, and what torch.compile
traces and fuses itself.

    observe    every parameter's state takes its gradient, unless that gradient is not finite
    chunks     matrices of equal shape, dtype and device, at most max_workspace_bytes at a time
      gather   P.into(momentum), stacked in the direction's own dtype      (b, m, n)
      towards  one direction call for the chunk
      store    P.back, step size, decay and rounding
    learn      where the preconditioner has factors: what they learn, before or after the rest; refreshed together

Where layers are coupled, all groups observe before any of them moves: `Observed` is a group between the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .budget import cut
from .matrices import Piece
from .ops import streams
from .ops.multi_tensor import NOT_SCALED, Scaling
from .parts import Hyper, shape_ratio
from .parts.precondition import PENDING, Gathered, Kronecker, Phase, refresh_bytes
from .recipe import CLOCK, Recipe, State, all_finite


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
    max_workspace_bytes: int = 1 << 30

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
    """One piece of one parameter: its place, views of the parameter's tensors, the flag of its whole gradient.

    state: under the recipe's keys; what is elementwise in the piece's natural shape.
    """

    place: tuple[int, int, int]
    piece: Piece
    param: Tensor
    grad: Tensor
    state: State
    finite: Tensor
    phase: Phase

    def keep(self, fresh: State) -> None:
        """Takes these tensors into the state, unless the gradient was not finite."""
        _keep(self.state, fresh, self.finite)


@dataclass(frozen=True)
class Sums:
    """Sums of squares over a group's parameters, 0-d fp64 on the first one's device; empty lists before a step."""

    grad: list[Tensor]
    momentum: list[Tensor]
    update: list[Tensor]
    param: list[Tensor]

    def by_name(self) -> dict[str, Tensor]:
        return {f"{name}_sq": _total(getattr(self, name)) for name in ("grad", "momentum", "update", "param")}


def _keep(state: State, fresh: State, finite: Tensor) -> None:
    for key, t in fresh.items():
        torch.where(finite, t.to(state[key].dtype), state[key], out=state[key])


def _total(parts: list[Tensor]) -> Tensor:
    """parts: 0-d, at least one."""
    return torch.stack(parts).sum()


def _square(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)).double().square()


@dataclass(frozen=True)
class Observed:
    """A group whose states have taken their gradients and whose weights have not moved yet.

    grads: unscaled and of what is minimised; finite: of each, whether a step is taken with it.
    """

    recipe: Recipe
    hyper: Hyper
    batch: Batch
    grads: Sequence[Tensor]
    finite: Sequence[Tensor]
    members: Sequence[Member]
    sums: Sums

    def chunks(self) -> Iterator[list[Member]]:
        """What steps, as it shares direction calls."""
        stepping = [member for member in self.members if member.phase.steps]
        yield from _chunks(self.recipe, stepping, self.batch.max_workspace_bytes)

    def towards(self, chunk: list[Member]) -> Tensor:
        """The direction of a chunk, scaled where the recipe says so."""
        return self.recipe.towards(_gather(self.recipe, self.hyper, chunk), self.hyper)

    def measured(self, chunk: list[Member]) -> tuple[Tensor, list[Tensor]]:
        """(direction d, <m, u> for every matrix of each member: fp32 or fp64), where u is d in the weight's variables.

        That is the dual norm, or its square where the recipe scales by it.
        """
        x = _gather(self.recipe, self.hyper, chunk)
        d = self.recipe.towards(x)
        inner = self.recipe.direction.dual_norm(x, d).flatten()
        return d, list(inner.split([self.recipe.input_shape(member.piece.shape)[0] for member in chunk]))

    def move(self, hyper: Hyper, chunk: list[Member], d: Tensor) -> None:
        """Moves the weights of a chunk along its direction."""
        self.sums.update.extend(_store(self.recipe, hyper, chunk, d))

    def finish(self) -> Sums:
        """What is left to do once every chunk has moved."""
        recipe, batch = self.recipe, self.batch
        after = [member for member in self.members if member.phase.after]
        _learn(recipe, self.hyper, after, batch.max_workspace_bytes)
        for state in batch.states if recipe.kronecker is not None else ():
            state[CLOCK].add_(1)
        self.sums.update.extend(torch.zeros((), dtype=torch.float64, device=p.device) for p in batch.params[:1])
        self.sums.momentum.extend(_square(state[recipe.momentum.key]) for state in batch.states)
        self.sums.param.extend(map(_square, batch.params))
        return self.sums


def update(recipe: Recipe, hyper: Hyper, batch: Batch) -> Sums:
    """One step, in place on batch.params, batch.states and batch.skipped.

    A parameter whose gradient holds a NaN or an infinity keeps its value and its state, bit for bit, and the counter
    of its device goes up by one.
    """
    observed = observe(recipe, hyper, batch)
    for chunk in observed.chunks():
        observed.move(hyper, chunk, observed.towards(chunk))
    return observed.finish()


def observe(recipe: Recipe, hyper: Hyper, batch: Batch) -> Observed:
    """The first half of a step: states and counters, in place, and nothing of a weight."""
    members: list[Member] = []
    sums = Sums([], [], [], [])
    flags, phases = [], [recipe.phase(state) for state in batch.states]
    grads = [batch.signed(g) for g in batch.grads]
    for i, (p, g, state, phase) in enumerate(zip(batch.params, grads, batch.states, phases, strict=True)):
        flags.append(batch.finite(g))
        batch.skipped[i].add_(flags[i].logical_not())
        for number, piece in enumerate(batch.pieces[i] if p.numel() else ()):
            members.append(_member(recipe, (*batch.places[i], number), piece, p, g, state, flags[i], phase))
    _learn(recipe, hyper, [member for member in members if member.phase.before], batch.max_workspace_bytes)
    for g, state, finite, phase in zip(grads, batch.states, flags, phases, strict=True):
        if phase.steps:
            _keep(state, recipe.observe(state, g, hyper), finite)
        sums.grad.append(torch.where(finite, _square(g), 0))
    if recipe.kronecker is not None:
        for member in members:
            if member.phase.steps:
                member.keep(recipe.kronecker.observe(member.state, member.grad.reshape(member.piece.shape), hyper))
    return Observed(recipe, hyper, batch, grads, flags, members, sums)


def _member(
    recipe: Recipe,
    place: tuple[int, int, int],
    piece: Piece,
    p: Tensor,
    g: Tensor,
    state: State,
    finite: Tensor,
    phase: Phase,
) -> Member:
    def look(t: Tensor) -> Tensor:
        return piece.view(t) if t.ndim else t.unsqueeze(0)

    names = recipe.names(place[-1])
    shared = ((key, state[key]) for key in recipe.keys if key not in names)
    parts = {key: look(t) if t.shape == p.shape else t for key, t in shared}
    parts |= {key: state[name] for key, name in names.items()}
    return Member(place, piece, look(p), look(g), parts, finite, phase)


def _learn(recipe: Recipe, hyper: Hyper, members: Sequence[Member], max_bytes: int) -> None:
    """What the factors learn from the gradients, and the refresh of those that are due."""
    part = recipe.kronecker
    phases: dict[Phase, list[Member]] = {}
    for member in members:
        phases.setdefault(member.phase, []).append(member)
    for phase, some in phases.items():
        assert part is not None
        for member in some:
            member.keep(part.learn(member.state, member.grad.reshape(member.piece.shape), hyper))
        if phase.takes:
            streams.join(member.state[PENDING] for member in some)
            for member in some:
                member.keep(part.take(member.state))
        for due in cut(some, lambda member: refresh_bytes(member.state), max_bytes) if phase.refreshes else ():
            _refresh(part, phase, due)


def _refresh(part: Kronecker, phase: Phase, members: Sequence[Member]) -> None:
    states = [member.state for member in members]
    gathered = part.gather(states, exact=phase.exact)
    device = members[0].param.device
    with nullcontext() if phase.at_once else streams.beside(device, _touched(part, gathered, members)):
        found = part.refresh(gathered, states)
        for member, own in zip(members, found, strict=True):
            member.keep({key: t for key, t in own.items() if key in part.keys})
        streams.written([state[key] for state, own in zip(states, found) for key in own if key in state])
    if phase.at_once:
        for member, own in zip(members, found, strict=True):
            member.keep(part.take({**member.state, **own}))


def _touched(part: Kronecker, gathered: Sequence[Gathered], members: Sequence[Member]) -> Iterator[Tensor]:
    """What a refresh reads and writes."""
    for some in gathered:
        yield from some.tensors
    for member in members:
        yield member.finite
        yield from (member.state[key] for key in part.keys)


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
    parts = d.split([recipe.input_shape(member.piece.shape)[0] for member in chunk])
    for member, part in zip(chunk, parts, strict=True):
        state, g = _as_matrices(recipe, member)
        u = recipe.update(state, part if recipe.by_matrix else part.reshape(g.shape), g, hyper)
        u, remembered = recipe.remember(member.state, u, hyper)
        value = recipe.rounding.value(member.param, member.state)
        u = torch.where(member.finite, u.reshape(member.param.shape), 0).to(value.dtype)  # 0 NaN is NaN
        moved = recipe.moved(value, u, hyper, ratio)
        stored, left_over = recipe.rounding.store(moved, member.param.dtype, member.state.get("step"), member.place)
        member.param.copy_(torch.where(member.finite, stored, member.param))
        member.keep({**left_over, **remembered})
        yield _square(u * (hyper.lr * ratio * hyper.scale))


def _as_matrices(recipe: Recipe, member: Member) -> tuple[State, Tensor]:
    """State and gradient as the recipe reads them: (batch, m, n) where it goes by matrices."""
    if not recipe.by_matrix:
        return member.state, member.grad
    shape, own = member.piece.shape, member.param.shape
    state = {key: t.reshape(shape) if t.shape == own else t for key, t in member.state.items()}
    return state, member.grad.reshape(shape)


def _gather(recipe: Recipe, hyper: Hyper, chunk: list[Member]) -> Tensor:
    """The direction's input, (b, rows, cols) in its own dtype; a lone member is reshaped, several are stacked."""

    def given(member: Member) -> Tensor:
        state, g = _as_matrices(recipe, member)
        w = recipe.rounding.value(member.param, member.state).reshape(g.shape) if recipe.decay.inside else None
        return recipe.into(state, g, hyper, w)

    first, dtype = chunk[0], _work_dtype(recipe, chunk[0])
    shapes = [recipe.input_shape(member.piece.shape) for member in chunk]
    if len(chunk) == 1:
        return given(first).to(dtype).reshape(shapes[0])
    sizes = [shape[0] for shape in shapes]
    x = torch.empty((sum(sizes), *shapes[0][1:]), dtype=dtype, device=first.param.device)
    for member, part in zip(chunk, x.split(sizes), strict=True):
        own = given(member)
        part.view(own.shape).copy_(own)
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
