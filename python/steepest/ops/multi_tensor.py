"""The elementwise parts of a step, for lists of tensors: three passes over memory, three ops, one launch each for
every 170 gradients or 240 items.

    grad_stats       the gradients: finite or not, largest entry, sum of squares; from them every parameter's numbers
    update_moments   momentum, second moment, x = P^-T m, of 16 bits as a rule; the whole step where it is elementwise
    apply_update     u = P^-1 d, decay, W <- W - step u, stored as the parameter is

Whether a parameter steps is decided by `grad_stats`, or by `decide_steps` from what it measured, once ranks agreed.

An *item* is a run of equal matrices in a parameter: all of it, or one piece of a fused weight. A *row* of numbers
belongs to a parameter and a *line* of sums to a matrix; both are tables on the device, so nothing comes back to the
host. A parameter whose gradient is not finite keeps its value and its state, bit for bit, and its x is zero.

Arithmetic is fp32, for fp64 tensors fp64, with one rounding where a number is stored. Sums are added up in an order
that does not depend on the run. Backends: the CUDA kernels and their host twin (csrc/multi_tensor), and Triton
(`steepest.kernels.multi_tensor`). The reference is `steepest.recipe.step_one`: there is no version in torch ops. The
self-check (`steepest.ops.checks.elementwise`) states the formulas once more, in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import backend as _backend
from . import selfcheck
from .backend import choose
from .fakes import register_fake
from .normalize import Normalization, room_for_factors, scratch_for
from .program import CHUNK, COLUMNS, SUMS, Program

FAMILY = "elementwise"  # of the self-check
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STRIDED_DIMS = 4  # what the kernels walk; kMaxDims in csrc/multi_tensor/layout.h


@dataclass(frozen=True)
class Table:
    """Device memory that outlives a step.

    rows: (parameters, len(COLUMNS)), sums: (matrices, len(SUMS)) and scratch: (n,), fp64; skipped: () int64, a counter.
    """

    rows: Tensor
    sums: Tensor
    scratch: Tensor
    skipped: Tensor

    @staticmethod
    def empty(skipped: Tensor, grads: Sequence[int], items: Sequence[tuple[int, int]]) -> Table:
        """Zeroed memory for gradients of so many elements and items of (matrices, elements of each)."""
        lines = sum(matrices for matrices, _ in items)
        chunks = max(sum(map(_chunks, grads)), sum(matrices * _chunks(size) for matrices, size in items))
        sizes = ((len(grads), len(COLUMNS)), (lines, len(SUMS)), (max(len(grads), lines) + chunks * len(SUMS),))
        rows, sums, scratch = (torch.zeros(size, dtype=torch.float64, device=skipped.device) for size in sizes)
        return Table(rows, sums, scratch, skipped)

    def column(self, name: str) -> Tensor:
        """A column of rows or of sums, by its name."""
        return self.rows[:, COLUMNS.index(name)] if name in COLUMNS else self.sums[:, SUMS.index(name)]


def _chunks(size: int) -> int:
    return -(-size // CHUNK)


@dataclass(frozen=True)
class Item:
    """One item but for its tensors.

    row: of its parameter; first_sum: the line of its first matrix; place: (group, parameter, piece), which tells its
    random bits from another's; ratio: on the learning rate, for the shape.
    """

    program: Program
    row: int
    matrices: int
    first_sum: int
    place: tuple[int, int, int]
    ratio: float


@dataclass(frozen=True)
class Items:
    """Items as the ops take them: lists of numbers, made once."""

    items: tuple[Item, ...]
    numbers: tuple[list[int], list[int], list[int], list[int], list[int], list[float]] = field(init=False)

    def __post_init__(self) -> None:
        columns = (
            [item.program.packed() for item in self.items],
            [item.row for item in self.items],
            [item.matrices for item in self.items],
            [item.first_sum for item in self.items],
            [number for item in self.items for number in item.place],
            [item.ratio for item in self.items],
        )
        object.__setattr__(self, "numbers", columns)


@dataclass(frozen=True)
class Groups:
    """The numbers of every group: `values` flat, those of `program.HYPERS` for each.

    tensors: numbers that live on the device, fp32 or fp64, one element each; the k-th takes place `at[k]` of `values`.
    of: the group of every gradient.
    """

    values: list[float]
    tensors: list[Tensor]
    at: list[int]
    of: list[int]


@dataclass(frozen=True)
class Scaling:
    """What torch.amp.GradScaler says, on the device, fp32 and one element each; None where it says nothing."""

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None


NOT_SCALED = Scaling()


def grad_stats(
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    table: Table,
    programs: Sequence[int],
    first_sums: Sequence[int],
    groups: Groups,
    scaling: Scaling = NOT_SCALED,
    *,
    decide: bool = True,
    backend: str = "auto",
) -> None:
    """Fills table.rows, one row a gradient, and counts steps; nothing else is written.

    A gradient whose largest magnitude, unscaled, is above the row's column largest_taken, if that is not 0, is no step.

    decide=False: fills the columns finite, grad_sq and grad_max, which are the first three, and counts nothing. They
    can be reduced over ranks (by min, sum and max) before `decide_steps` does the rest, to the bit as here.

    grads: fp32, bf16, fp16 (fp64 on the CPU), any strides, at least one element; not mutated.
    steps: fp32 counters of one element, counted up where the gradient is finite; without elements where nobody counts.
    programs: packed; first_sums: (len(grads) + 1,), the lines of gradient i's matrices are first_sums[i : i + 2].
    table.skipped counts the parameters whose step is not taken: a gradient that is not finite or too large, or
    scaling.found_inf.
    """
    name = route("grad_stats", grads, backend)
    arguments = (grads, steps, table.rows, table.sums, table.skipped, table.scratch, programs, first_sums)
    numbers = (groups.of, groups.values, groups.tensors, groups.at, scaling.found_inf, scaling.grad_scale)
    _op("grad_stats", name)(*arguments, *numbers, decide)


def decide_steps(
    steps: Sequence[Tensor],
    table: Table,
    programs: Sequence[int],
    first_sums: Sequence[int],
    groups: Groups,
    scaling: Scaling = NOT_SCALED,
    *,
    backend: str = "auto",
) -> None:
    """Fills the rest of table.rows from its columns finite and grad_max, and counts steps; arguments as `grad_stats`.

    A step is taken where finite is 1. The column momentum_max of table.sums bounds an fp16 input: where parts of a
    matrix are on several ranks that share its input, reduce it by max as well.
    """
    name = route("decide_steps", [table.rows], backend)
    arguments = (steps, table.rows, table.sums, table.skipped, programs, first_sums)
    _op("decide_steps", name)(*arguments, groups.of, groups.values, groups.tensors, groups.at, scaling.grad_scale)


def update_moments(
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    seconds: Sequence[Tensor],
    inputs: Sequence[Tensor],
    params: Sequence[Tensor],
    mantissas: Sequence[Tensor],
    table: Table,
    items: Items,
    *,
    backend: str = "auto",
) -> None:
    """m and v take the gradient, x = read(m) / D is stored in `inputs`; where the program is whole, W moves as well.

    Item by item one tensor of each list, of one shape and any strides, inputs contiguous in any shape; an absent one
    has no elements, and a list without elements is all absent: seconds without a preconditioner, inputs of a whole
    program, params of any other, mantissas but for bf16 params that keep one (int16). Where a program that is not whole
    has no input, its moments are updated and no more. Mutates momenta, seconds (unless the program freezes them),
    inputs, params, mantissas and table.sums. An fp16 input is multiplied by the power of two in the row's
    "input_scale", which a bound on its largest entry gives, so that it cannot overflow.
    """
    name = route("update_moments", grads, backend)
    lists = (grads, momenta, seconds, inputs, params, mantissas)
    _op("update_moments", name)(*lists, table.rows, table.sums, table.scratch, *items.numbers)
    count_writes(params)


def apply_update(
    directions: Sequence[Tensor],
    seconds: Sequence[Tensor],
    params: Sequence[Tensor],
    mantissas: Sequence[Tensor],
    lengths: Sequence[Tensor],
    factors: Sequence[Tensor],
    table: Table,
    items: Items,
    *,
    normalizations: Sequence[Normalization | None] = (),
    meeting: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """W <- (1 - lr wd) W - lr ratio length d / D, stored as the parameter is; lists as for `update_moments`.

    With the program's decay_after the decay is of what the update leaves, with decay_scaled it is lr wd ratio.

    lengths: fp64, one factor on the step for each matrix of the item; without elements: 1.   factors: one on the
    direction for each row of these matrices, or for each matrix, fp32 (fp64 for fp64) and contiguous; without elements:
    none. Mutates params, mantissas and table.sums. Where the step is not taken nothing is read, so a direction may hold
    NaN there.

    normalizations: of each item how its directions, (matrices, rows, columns), are normalized first, which gives the
    item's factors; None: they are taken as they are. Empty: all are. Not in Triton.   meeting: as
    `ops.normalize.scratch_for` gives it for the directions that are normalized; None: new.
    """
    name = route("apply_update", params, backend)
    lists = (directions, seconds, params, mantissas, lengths)
    tables, numbers = (table.rows, table.sums, table.scratch), items.numbers
    if any(each is not None for each in normalizations):
        _normalize_and_apply_update(name, lists, factors, tables, meeting, numbers, normalizations)
    else:
        _op("apply_update", name)(*lists, factors, *tables, *numbers)
    count_writes(params)


def _normalize_and_apply_update(
    name: str,
    lists: tuple[Sequence[Tensor], ...],
    factors: Sequence[Tensor],
    tables: tuple[Tensor, Tensor, Tensor],
    meeting: Tensor | None,
    numbers: tuple[list[int], list[int], list[int], list[int], list[int], list[float]],
    normalizations: Sequence[Normalization | None],
) -> None:
    if name == "triton":
        raise RuntimeError(
            "apply_update normalizes directions in the compiled version alone, not in Triton's; hand it normalized ones"
        )
    directions = lists[0]
    some = [(u, each) for u, each in zip(directions, normalizations, strict=True) if each is not None]
    if meeting is None:
        meeting = scratch_for([u.shape for u, _ in some], directions[0].device)
    made = {}
    for dtype in {each.second.dtype for _, each in some}:
        alike = [(u, each) for u, each in some if each.second.dtype is dtype]
        shapes = [(len(u), u.shape[1] if each.divided is None else 1) for u, each in alike]
        made[dtype] = iter(room_for_factors(shapes, alike[0][1].second))
    absent = some[0][1].second.new_empty(0)
    given = factors or [absent] * len(directions)
    every = [
        f if each is None else next(made[each.second.dtype]) for f, each in zip(given, normalizations, strict=True)
    ]
    averages = [absent if each is None else each.second for each in normalizations]
    divided = [absent if each is None or each.divided is None else each.divided for each in normalizations]
    rates = [rate for each in normalizations for rate in ((0.0, 0.0, 0.0) if each is None else each.rates)]
    torch.ops.steepest.normalize_and_apply_update(*lists, every, averages, divided, *tables, meeting, *numbers, rates)


def _op(name: str, backend: str) -> Callable[..., None]:
    if backend == "triton":
        from ..kernels import multi_tensor as kernels

        kernel: Callable[..., None] = getattr(kernels, name)
        return kernel
    op: Callable[..., None] = getattr(torch.ops.steepest, name)
    return op


def count_writes(params: Sequence[Tensor]) -> None:
    """Kernels write through addresses; autograd, which saves parameters and no state, must see that they changed."""
    if torch.compiler.is_compiling():
        return
    try:
        torch.autograd.graph.increment_version(params)
    except RuntimeError:  # an inference tensor, which has no version; asking each one first takes longer than the op
        torch.autograd.graph.increment_version([p for p in params if not p.is_inference()])


def route(op: str, tensors: Sequence[Tensor], backend: str = "auto") -> str:
    """The backend of a call; RuntimeError where there is none, or a forced one cannot run, with the reasons."""
    device = tensors[0].device if tensors else torch.device("cpu")
    of_cpu = backend == device.type == "cpu" and _backend.extension_reason is None
    if of_cpu and selfcheck.reason(FAMILY, backend, device) is None:  # in every call of a step on a CPU
        return backend
    why = reasons(device)
    chosen = choose(op, backend, why, device, FAMILY)
    if chosen == "torch":
        why |= {name: selfcheck.reason(FAMILY, name, device) for name, reason in why.items() if reason is None}
        raise RuntimeError(f"{op} has no version in torch ops, steepest.recipe.step_one is its reference; {why}")
    return chosen


def reasons(device: torch.device) -> dict[str, str | None]:
    """Why the kernels cannot run on this device, by backend; None where they can."""
    if device.type == "cuda":
        return {
            "cuda": _backend.cuda_reason(device.index),
            "triton": _backend.triton_reason(),
            "cpu": "the tensors are on cuda",
        }
    elsewhere = f"the tensors are on {device.type}"
    cpu = _backend.extension_reason if device.type == "cpu" else elsewhere
    return {"cuda": elsewhere, "triton": elsewhere, "cpu": cpu}


def unsupported(tensors: Sequence[Tensor], dims: int = STRIDED_DIMS) -> str | None:
    """None where the kernels take an item of these tensors, else the reason; dims: they may have, not contiguous."""
    for tensor in tensors:
        if tensor.dtype is torch.float64 and tensor.device.type != "cpu":
            return "float64 is for the CPU"
        if tensor.dtype not in (*FLOATS, torch.float64, torch.int16):
            return f"a tensor is {tensor.dtype}"
        if tensor.dim() > dims and not tensor.is_contiguous():
            return f"a tensor is not contiguous and has more than {dims} dimensions"
    return None


def unsupported_by_triton(tensors: Sequence[Tensor], matrices: int) -> str | None:
    """None where the Triton kernels take an item of these tensors, else the reason."""
    from ..kernels.multi_tensor import can_use

    return can_use(tensors, matrices)


if _backend.extension is not None:

    @register_fake("grad_stats")
    def _(*arguments: object) -> None:
        """Mutates steps, rows, skipped and scratch; no metadata changes."""

    @register_fake("decide_steps")
    def _(*arguments: object) -> None:
        """Mutates steps, rows and skipped; no metadata changes."""

    @register_fake("update_moments")
    def _(*arguments: object) -> None:
        """Mutates momenta, seconds, inputs, params, mantissas, sums and scratch; no metadata changes."""

    @register_fake("apply_update")
    def _(*arguments: object) -> None:
        """Mutates params, mantissas, sums and scratch; no metadata changes."""

    @register_fake("normalize_and_apply_update")
    def _(*arguments: object) -> None:
        """Mutates params, mantissas, factors, averages, divided, sums, scratch and meeting; no metadata changes."""
