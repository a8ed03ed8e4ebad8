"""The elementwise kernels against the host's version: every program, layout, chunk, row and rounding.

What a GPU computes element by element: who works on what, the paths for aligned, odd and strided elements, sums over a
block and over the chunks of a matrix, rows, random bits, mantissas, and what is left alone.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ptx.kernels import Kernels
from steepest.ops.multi_tensor import CHUNK, Table
from support import fused_ops
from support.fused_ops import State, assert_close, compare, compare_step, random_state

pytestmark = pytest.mark.kernels

CPU = torch.device("cpu")
F = torch.float32


@pytest.mark.parametrize("capability", [90, 80])
def test_every_program(capability: int, kernels: Kernels) -> None:
    kernels.library.ptxsim_capability(capability)
    compare(kernels.ops, CPU)


# ---- layouts -------------------------------------------------------------------------------------------------------

View = Callable[[Tensor], Tensor]


def place(room: Tensor, t: Tensor) -> Tensor:
    return room.copy_(t)


#: Where a tensor's elements may lie.
LAYOUTS: dict[str, View] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "rows": lambda t: place(t.new_zeros(*t.shape[:-1], t.shape[-1] + 3)[..., 3:], t) if t.dim() else t,
    "columns": lambda t: place(t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])[..., ::2], t) if t.dim() else t,
    "shifted": lambda t: place(t.new_zeros(t.numel() + 1)[1:].view(t.shape), t),
}
SLOTS = ("grads", "momenta", "seconds", "inputs", "params", "mantissas")


def laid_out(turn: int) -> State:
    """An item's tensors lie in ways that take turns, all in one or each in its own; inputs are contiguous."""
    state = random_state()
    views = list(LAYOUTS.values())
    for i in range(len(state.programs)):
        for k, slot in enumerate(SLOTS):
            view = views[(i + turn + (k if i % 2 else 0)) % len(views)]
            tensors = getattr(state, slot)
            if tensors[i].numel() != 0:
                tensors[i] = view(tensors[i]) if slot != "inputs" else LAYOUTS["shifted"](tensors[i])
    return state


@pytest.mark.orders(2)
@pytest.mark.parametrize("turn", range(len(LAYOUTS)))
def test_layouts(turn: int, kernels: Kernels) -> None:
    compare(kernels.ops, CPU, lambda: laid_out(turn))


# ---- chunks --------------------------------------------------------------------------------------------------------

#: Matrices, shape: several chunks of 2 CHUNK and more elements, the first parameter with more matrices than its row.
LONG = (
    (3, (3, CHUNK + 5)),
    (1, (40000,)),
    (2, (2, 160, 128)),
    (1, (2 * CHUNK,)),
    (3, (3, 130, 131)),
    (2, (2, CHUNK)),
    (1, (CHUNK + 8,)),
    (4, (4, CHUNK - 1)),
)
#: Among so many elements the last place of a momentum near 0 decides a sign somewhere; these programs take none.
SMOOTH = [program for program in fused_ops.PROGRAMS if program.direction != "sign" and not program.cautious]


def flat() -> State:
    return random_state(LONG, SMOOTH)


def transposed() -> State:
    """Where elements are walked one at a time over several chunks."""
    state = random_state(LONG, SMOOTH)
    for tensors in (state.grads, state.params):
        tensors[::2] = map(LAYOUTS["transposed"], tensors[::2])
    return state


@pytest.mark.orders(2)
@pytest.mark.parametrize("make", [flat, transposed])
def test_several_chunks(make: Callable[[], State], kernels: Kernels) -> None:
    compare(kernels.ops, CPU, make)


def test_a_scratch_serves_every_step(kernels: Kernels) -> None:
    """Both take their own steps, each in memory of its own: what an op leaves behind is in nobody's way."""
    wanted = random_state(LONG, SMOOTH, types=((F, F, F, F, F),))
    state = wanted.copy(CPU)
    for _ in range(3):
        for ops, each in ((kernels.ops, state), (torch.ops.steepest, wanted)):
            fused_ops.grad_stats(ops, each, None, None)
            fused_ops.update_moments(ops, each)
            fused_ops.apply_update(ops, each)
        assert_close(state, wanted)


@pytest.mark.orders(2)
def test_more_items_than_a_launch_takes(kernels: Kernels) -> None:
    wanted = random_state(shapes=((1, (5,)), (2, (2, 8)), (1, (3, 3))), times=16)
    for i in range(0, len(wanted.params), 2):  # every other one strided
        wanted.grads[i] = LAYOUTS["columns"](wanted.grads[i])
        wanted.params[i] = LAYOUTS["columns"](wanted.params[i])
    assert len(wanted.programs) > 800
    before = kernels.launches()
    compare_step(kernels.ops, CPU, wanted)
    assert kernels.launches() - before > 2 * 6, "each of six kernels is launched at least twice"


def test_rows_without_a_matrix(kernels: Kernels) -> None:
    """More rows than lines: what `update_moments` leaves in the scratch is behind the counters of `grad_stats`."""
    table = Table.empty(torch.zeros((), dtype=torch.int64), [CHUNK + 1] * 3, [(1, CHUNK + 1)])
    momentum, into = torch.zeros(2, CHUNK + 1)
    memory = (table.rows, table.sums, table.scratch)
    for step in (1, 2):
        grads = list(torch.full((3, CHUNK + 1), float(step)))
        numbers = ([0, 0, 0], [0, 1, 1, 1], [0, 0, 0], list(fused_ops.GROUPS[0]), [], [], None, None)
        kernels.ops.grad_stats(grads, [], *memory[:2], table.skipped, memory[2], *numbers)
        kernels.ops.update_moments(
            grads[:1], [momentum], [], [into], [], [], *memory, [0], [0], [1], [0], [0] * 3, [1.0]
        )
        assert table.column("grad_max").tolist() == [step] * 3
