"""One step for all parameters of a group: the same algorithm as `recipe.step_one`, over many matrices at once.

    observe    every parameter's state takes its gradient, unless that gradient is not finite
    chunks     matrices of equal shape, dtype and device, at most max_workspace_bytes at a time
      gather   P.into(momentum), stacked in the direction's own dtype      (b, m, n)
      towards  one direction call for the chunk
      store    P.back, step size, decay and rounding: the fused op `after` where it applies, else the parts

Nothing here reads a tensor on the host, so a step neither waits for the device nor depends on the data's values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .matrices import Piece
from .ops.after import after, route
from .parts import Hyper, shape_ratio
from .recipe import ADAMW, Recipe, State, adamw, all_finite


@dataclass(frozen=True)
class Batch:
    """What one group hands to `update`, index by index: parameters with gradients, their state and their matrices.

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

    def signed(self, g: Tensor) -> Tensor:
        """The gradient of what is minimised."""
        return -g if self.maximize else g


@dataclass(frozen=True)
class Member:
    """One piece of one parameter: its place, views of the parameter's tensors, the flag of its whole gradient."""

    place: tuple[int, int, int]
    piece: Piece
    param: Tensor
    grad: Tensor
    state: State
    finite: Tensor


def update(
    recipe: Recipe,
    hyper: Hyper,
    batch: Batch,
    *,
    backend: str = "auto",
    max_workspace_bytes: int = 1 << 28,
) -> None:
    """One step, in place on batch.params, batch.states and batch.skipped.

    A parameter whose gradient holds a NaN or an infinity keeps its value and its state, bit for bit, and the counter
    of its device goes up by one.
    """
    members: list[Member] = []
    for i, (p, g, state) in enumerate(zip(batch.params, batch.grads, batch.states, strict=True)):
        finite = all_finite(g)
        batch.skipped[i].add_(finite.logical_not())
        if _takes_fused_adamw(recipe, hyper, p, g, state):
            _fused_adamw(hyper, p, g, state, finite, batch.maximize)
            continue
        for key, fresh in recipe.observe(state, batch.signed(g), hyper).items():
            torch.where(finite, fresh.to(state[key].dtype), state[key], out=state[key])
        for number, piece in enumerate(batch.pieces[i] if p.numel() else ()):
            members.append(_member((*batch.places[i], number), piece, p, g, state, finite))
    for chunk in _chunks(recipe, members, max_workspace_bytes):
        x = _gather(recipe, hyper, batch, chunk)
        _store(recipe, hyper, chunk, recipe.towards(x), backend)


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
        chunk: list[Member] = []
        used = 0
        for member in bucket:
            size = _workspace_bytes(recipe, member)
            if chunk and used + size > max_bytes:
                yield chunk
                chunk, used = [], 0
            chunk.append(member)
            used += size
        yield chunk


def _store(recipe: Recipe, hyper: Hyper, chunk: list[Member], d: Tensor, backend: str) -> None:
    """P.back, step size, decay and rounding for the directions d of a chunk."""
    sizes = [member.piece.batch for member in chunk]
    updates = [
        recipe.back(member.state, part.reshape(member.param.shape), hyper)
        for member, part in zip(chunk, d.split(sizes), strict=True)
    ]
    params = [member.param for member in chunk]
    wide = torch.promote_types(params[0].dtype, torch.float32)
    moves = torch.stack([member.finite for member in chunk]).to(wide)  # 1 where the gradient was finite, else 0
    ratio = shape_ratio(recipe.adjust_lr, chunk[0].piece.rows, chunk[0].piece.cols)
    decay, step = moves * (hyper.lr * hyper.weight_decay), moves * (hyper.lr * ratio)
    if not recipe.decay.cautious and recipe.rounding.mode == "nearest":
        after(params, updates, 1 - decay, step, backend=backend)
        return
    for member, u, decay_one, step_one in zip(chunk, updates, decay.unbind(), step.unbind(), strict=True):
        moved = recipe.decay.apply(member.param.to(wide), u.to(wide), decay_one, step_one)
        stored = recipe.rounding.store(moved, member.param.dtype, member.state.get("step"), member.place)
        member.param.copy_(torch.where(member.finite, stored, member.param))


def _gather(recipe: Recipe, hyper: Hyper, batch: Batch, chunk: list[Member]) -> Tensor:
    """The direction's input, (b, rows, cols) in its own dtype; a lone member is reshaped, several are stacked."""

    def given(member: Member) -> Tensor:
        return recipe.into(member.state, batch.signed(member.grad), hyper)

    first, dtype = chunk[0], _work_dtype(recipe, chunk[0])
    if len(chunk) == 1:
        return given(first).to(dtype).reshape(first.piece.shape)
    sizes = [member.piece.batch for member in chunk]
    x = torch.empty((sum(sizes), *first.piece.shape[1:]), dtype=dtype, device=first.param.device)
    for member, part in zip(chunk, x.split(sizes), strict=True):
        part.view(member.param.shape).copy_(given(member))
    return x


def backend_of(recipe: Recipe, p: Tensor, backend: str) -> str:
    """Which backends a parameter's step runs on, for a table: the direction's and the weight update's."""
    if recipe == ADAMW and p.dtype in (torch.float32, torch.float64):
        return "torch"
    fused = recipe.rounding.mode == "nearest" and not recipe.decay.cautious
    u = torch.empty(p.shape, dtype=p.dtype, device="meta")  # the strides an update has
    update = route([p], [u], p.device, backend) if fused else "torch"
    return "torch" if update == "torch" else f"torch, weight update {update}"


def _work_dtype(recipe: Recipe, member: Member) -> torch.dtype:
    wide = torch.promote_types(member.grad.dtype, torch.float32)
    return recipe.direction.compute_dtype(wide, member.param.device)


def _workspace_bytes(recipe: Recipe, member: Member) -> int:
    batch, rows, cols = member.piece.shape
    dtype = _work_dtype(recipe, member)
    return batch * (recipe.direction.workspace_bytes(rows, cols, dtype) + rows * cols * (2 * dtype.itemsize + 4))


def _takes_fused_adamw(recipe: Recipe, hyper: Hyper, p: Tensor, g: Tensor, state: State) -> bool:
    """`torch._fused_adamw_` wants one floating dtype throughout and memory it can walk in one line.

    It reads its numbers on the host, all but lr, and has no 0/0 = 0. torch.compile has no fake of it with found_inf or
    a tensor lr; it traces the parts, and fuses them itself.
    """
    numbers = (hyper.beta1, hyper.beta2, hyper.weight_decay, hyper.eps)
    if torch.compiler.is_compiling() or recipe != adamw(recipe.momentum.dtype):
        return False
    if any(isinstance(n, Tensor) for n in numbers) or hyper.eps == 0:
        return False
    dense = p.is_contiguous() or (p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last))
    return (
        dense
        and p.device.type in ("cpu", "cuda")
        and p.dtype in (torch.float32, torch.float64)
        and all(t.dtype == p.dtype and t.stride() == p.stride() for t in (g, state["exp_avg"], state["exp_avg_sq"]))
    )


def _fused_adamw(hyper: Hyper, p: Tensor, g: Tensor, state: State, finite: Tensor, maximize: bool) -> None:
    """torch's own fused AdamW, told by found_inf to leave everything alone where the gradient is not finite."""
    state["step"].add_(finite)
    numbers: dict[str, Any] = {
        "lr": hyper.lr.to(p.device, non_blocking=True) if isinstance(hyper.lr, Tensor) else hyper.lr,
        "beta1": hyper.beta1,
        "beta2": hyper.beta2,
        "weight_decay": hyper.weight_decay,
        "eps": hyper.eps,
    }
    torch._fused_adamw_(
        [p],
        [g],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [state["step"]],
        **numbers,
        amsgrad=False,
        maximize=maximize,
        found_inf=finite.logical_not().float(),
    )
