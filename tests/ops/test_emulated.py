"""The source of the CUDA kernels, compiled for the CPU with a block's threads as fibers, against the host's version.

What a GPU would compute element by element: who works on what, the paths for aligned, odd and strided elements, sums
over a block and over the chunks of a matrix, rows, random bits, mantissas, and what is left alone.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import twins
from cases import orthogonal, polynomial_of, with_spectrum
from chains import given, grams, kernel
from emulations import COMPILER, FLAGS, ORDERS, require_compiler, run, sanitizer, shared_library
from spectra import assert_refreshed, drifting, exact_basis, symmetric
from steepest.linalg.basis import ACCEPTED, FELL_BACK, LARGE_ROTATION, Refreshed, eigh_refresh, orthonormality
from steepest.linalg.chain import chain
from steepest.linalg.coefficients import SCHEDULES
from steepest.linalg.polar import _prescaled
from steepest.ops import backend, eigh, small_polar
from steepest.ops.chain_numbers import squared_norm_bound
from steepest.ops.multi_tensor import CHUNK, Table
from twins import State, assert_close, compare, compare_step, random_state

pytestmark = pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")

CPU = torch.device("cpu")
F = torch.float32
KERNELS = (
    "csrc/multi_tensor/inspect.cu",
    "csrc/multi_tensor/items.cu",
    "csrc/polar/numbers.cu",
    "csrc/polar/sum.cu",
    "csrc/small_polar/small_polar.cu",
    "csrc/eigh/refresh.cu",
)
OPS = (
    *("inspect", "before", "after", "chain_numbers", "polar_chain", "small_polar"),
    *("eigh_refresh", "eigh_batched"),
)
REST = (
    "csrc/ops/eigh.cpp",
    "csrc/ops/multi_tensor.cpp",
    "csrc/ops/polar.cpp",
    "csrc/polar/chain.cpp",
    "csrc/polar/chunks.cpp",
    "csrc/small_polar/plan.cpp",
    "csrc/eigh/plan.cpp",
    "csrc/eigh/cusolver.cpp",
    "csrc/symm_gemm/plan.cpp",
    "csrc/multi_tensor/layout.cpp",
    "csrc/multi_tensor/plan.cpp",
    "tests/emulation/door.cpp",
)


class Emulated:
    """The ops whose kernels run on this CPU."""

    def __init__(self, path: Path) -> None:
        # Under the schemas of the compiled part, in a namespace of its own.
        self.definitions = torch.library.Library("steepest_emulated", "DEF")
        for op in OPS:
            self.definitions.define(str(getattr(torch.ops.steepest, op).default._schema).removeprefix("steepest::"))
        torch.ops.load_library(path)
        self.ops: Any = torch.ops.steepest_emulated
        self.library = ctypes.CDLL(str(path))
        self.library.emulation_launches.restype = ctypes.c_int64
        self.library.emulation_load_cusolver.restype = ctypes.c_char_p

    def order(self, name: str) -> None:
        self.library.emulation_order(ORDERS.index(name))

    def launches(self) -> int:
        """Of all kernels so far."""
        return int(self.library.emulation_launches())


def build(folder: Path) -> Path:
    """The door and the kernels as they are in csrc, with the headers of tests/emulation for those of CUDA."""
    torch_folder = Path(torch.__file__).parent
    found = sanitizer()
    flags = [
        *FLAGS,
        "-DTORCH_TARGET_VERSION=0x020a000000000000ULL",
        "-DSTEEPEST_EMULATION",  # ops that have kernels alone
        *("-isystem", str(torch_folder / "include")),
    ]
    objects = {source: folder / f"{source.replace('/', '_')}.o" for source in (*KERNELS, *REST)}
    run(
        [
            [COMPILER, *flags, *(found if source in KERNELS else []), "-c", source, "-o", str(to)]
            for source, to in objects.items()
        ]
    )
    library = folder / "emulated.so"
    libraries = ["-L", str(torch_folder / "lib"), "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    run([[COMPILER, "-shared", "-o", str(library), *map(str, objects.values()), *found, *libraries]])
    return library


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    require_compiler()
    return Emulated(build(tmp_path_factory.mktemp("emulated")))


class Guards:
    """Memory around tensors and between their elements, which nobody may write; read, it is NaN."""

    MARGIN = 64  # bytes; an allocation of torch's begins at a multiple of it

    def __init__(self) -> None:
        self.rooms: list[tuple[Tensor, Tensor]] = []

    def twin(self, t: Tensor, device: torch.device) -> Tensor:
        """The same numbers at the same distance from 16 bytes, inside a room of ones."""
        if t.numel() == 0:
            return t
        width = t.element_size()
        offset = (self.MARGIN + t.data_ptr() % 16) // width
        reach = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
        room = torch.full(((offset + reach) * width + self.MARGIN,), 255, dtype=torch.uint8)
        inside = room.view(t.dtype).as_strided(t.shape, t.stride(), offset).copy_(t)
        self.rooms.append((room, inside))
        return inside

    def check(self) -> None:
        for room, inside in self.rooms:
            outside = torch.ones(room.numel() // inside.element_size(), dtype=torch.bool)
            outside.as_strided(inside.shape, inside.stride(), inside.storage_offset()).fill_(False)
            assert (room.view(-1, inside.element_size())[outside] == 255).all(), "written beside a tensor"


in_one_order = pytest.mark.parametrize("emulated", ["shuffled"], indirect=True)


@pytest.fixture(params=ORDERS)
def emulated(
    request: pytest.FixtureRequest,
    library: Emulated,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Iterator[Emulated]:
    """In one of the orders, on guarded memory."""
    guards = Guards()
    monkeypatch.setattr(twins, "twin", guards.twin)
    library.order(request.param)
    yield library
    guards.check()
    errors = capfd.readouterr().err
    assert "runtime error" not in errors, errors


def test_every_program(emulated: Emulated) -> None:
    compare(emulated.ops, CPU)


@pytest.mark.parametrize("dtype", [F, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 5, 64, 136, 139])
def test_chain_numbers(m: int, dtype: torch.dtype, emulated: Emulated) -> None:
    schedule, gram = SCHEDULES["auto"], grams(m, dtype)
    arguments = given(schedule)
    for some in (gram, gram[:1]):
        found, wanted = (kernel(ops, some, arguments, True, 1e-7) for ops in (emulated.ops, torch.ops.steepest))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0, equal_nan=True)


@in_one_order
def test_small_polar(emulated: Emulated) -> None:
    """Through its door: stacks of all types and shapes in one call, rows with gaps, a tall matrix, a cluster."""
    schedule = SCHEDULES["auto"]
    xs = [with_spectrum(m, n, "root").float()[None] for m, n in ((3, 5), (40, 17), (33, 70), (131, 130))]
    xs += [torch.stack([xs[2][0], 0 * xs[2][0]])[..., 2:], xs[1].bfloat16(), xs[1].half()]
    outs = [torch.empty(x.shape, dtype=x.dtype) for x in xs]
    slacks = [torch.empty(len(x)) for x in xs]
    flat = [v for table in schedule.tables for step in table for v in small_polar._padded(step)]
    before = emulated.launches()
    emulated.ops.small_polar(xs, outs, slacks, flat, len(schedule.tables), schedule.slacks, True, 1e-7)
    assert emulated.launches() == before + 2
    for x, out, slack in zip(xs, outs, slacks, strict=True):
        for each, found, own in zip(x.double(), out.double(), slack, strict=True):
            if not each.any():
                assert not found.any()
                continue
            torch.testing.assert_close(found, polynomial_of(each, schedule), rtol=0, atol=0.03)
            norm = torch.linalg.matrix_norm(each)
            bound, _ = squared_norm_bound((each @ each.mT if len(each) <= each.shape[1] else each.mT @ each)[None])
            assert own.item() == pytest.approx((norm / bound.sqrt()).item(), rel=1e-2)


@in_one_order
def test_eigh_refresh(emulated: Emulated) -> None:
    """Through its door: where the rotation is enough, and where it is not."""
    before, after = list(drifting(20, "power", 2))
    P = torch.stack([after, before])
    Q = torch.stack([exact_basis(before), orthogonal(20).float()])
    found = torch.empty(2, 20, 20), torch.empty(2, 20), torch.empty(2, dtype=torch.int32), torch.empty(2, 20).long()
    launches = emulated.launches()
    emulated.ops.eigh_refresh(P, Q, *found, eigh.METHODS.index("auto"), 1)
    assert emulated.launches() == launches + 1
    for own, Q_of, refreshed in zip(P, Q, zip(*found)):
        assert_refreshed(own, Q_of, Refreshed(*refreshed))
    torch.testing.assert_close(found[0][0], eigh_refresh(after, Q[0]).basis, atol=1e-4, rtol=0)
    assert found[2].tolist() == [ACCEPTED, ACCEPTED | FELL_BACK | LARGE_ROTATION]
    with pytest.raises(RuntimeError, match="basis must be a contiguous tensor of Float with 800 elements"):
        emulated.ops.eigh_refresh(P, Q, found[0].double(), *found[1:], 0, 1)


@in_one_order
def test_the_batched_solver(emulated: Emulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of cuSOLVER, of a library with its names: it refuses arguments and a workspace that are wrong."""
    P = torch.stack([symmetric(torch.logspace(0, -2, 7).double(), seed) for seed in range(3)])
    with pytest.raises(RuntimeError, match="no cuSOLVER is loaded"):
        emulated.ops.eigh_batched(P.clone(), torch.empty(3, 7).double(), torch.empty(3, dtype=torch.int32))
    stand_in = shared_library(tmp_path / "libcusolver.so", ["tests/emulation/cusolver.cpp"])
    assert emulated.library.emulation_load_cusolver(str(stand_in).encode()) == b""
    monkeypatch.setattr(eigh, "_batched", lambda P: True)
    monkeypatch.setattr(torch.ops.steepest, "eigh_batched", emulated.ops.eigh_batched)
    for dtype, tolerance in ((torch.float64, 1e-12), (F, 1e-5)):
        own = P.to(dtype)
        own[1, 2, 2] = math.nan
        kept, V = own.clone(), eigh.eigenvectors(own)
        assert V[1].isnan().all()
        torch.testing.assert_close(own, kept, rtol=0, atol=0, equal_nan=True)
        for i in (0, 2):
            values = torch.logspace(0, -2, 7).double().flip(0).to(dtype)
            torch.testing.assert_close(own[i] @ V[i], V[i] * values, atol=tolerance, rtol=0)
            assert orthonormality(V[i]) < tolerance


@in_one_order
def test_polar_chain_with_the_kernels_of_its_sums(emulated: Emulated) -> None:
    """Sums by their kernels, products by the host: 16 entries and more a row. In chunks too."""
    schedule, plan = SCHEDULES["auto"], chain(SCHEDULES["auto"], (2,))
    x = _prescaled(torch.stack([with_spectrum(16, 24, "root"), with_spectrum(16, 24, "log")]).float(), torch.float16)
    constants = [value for row in plan.constants for value in row]

    def run(ops: Any, chunks: int) -> tuple[Tensor, ...]:
        own, y, slack, sums = x.clone(), torch.empty_like(x), torch.empty(2), torch.empty(2, 16)
        numbers = (*plan.packed, constants, plan.powers, schedule.slacks, True, 1e-7, chunks)
        ops.polar_chain([own], [y], [slack], [sums], [], [], [], *numbers)
        return own, y, slack, sums

    found = run(emulated.ops, 1)
    for a, b in zip(found, run(torch.ops.steepest, 0), strict=True):  # the kernel of the numbers adds in another order
        torch.testing.assert_close(a, b, rtol=1e-6 if a.dtype == torch.float32 else 2e-3, atol=2e-3)
    for a, b in zip(found, run(emulated.ops, 2), strict=True):
        assert torch.equal(a, b)


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


@in_one_order
@pytest.mark.parametrize("turn", range(len(LAYOUTS)))
def test_layouts(turn: int, emulated: Emulated) -> None:
    compare(emulated.ops, CPU, lambda: laid_out(turn))


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
SMOOTH = [program for program in twins.PROGRAMS if program.direction != "sign" and not program.cautious]


def flat() -> State:
    return random_state(LONG, SMOOTH)


def transposed() -> State:
    """Where elements are walked one at a time over several chunks."""
    state = random_state(LONG, SMOOTH)
    for tensors in (state.grads, state.params):
        tensors[::2] = map(LAYOUTS["transposed"], tensors[::2])
    return state


@pytest.mark.parametrize("make", [flat, transposed])
def test_several_chunks(make: Callable[[], State], emulated: Emulated) -> None:
    compare(emulated.ops, CPU, make)


def test_a_scratch_serves_every_step(emulated: Emulated) -> None:
    """Both take their own steps, each in memory of its own: what an op leaves behind is in nobody's way."""
    wanted = random_state(LONG, SMOOTH, types=((F, F, F, F, F),))
    state = wanted.copy(CPU)
    for _ in range(3):
        for ops, each in ((emulated.ops, state), (torch.ops.steepest, wanted)):
            twins.inspect(ops, each, None, None)
            twins.before(ops, each)
            twins.after(ops, each)
        assert_close(state, wanted)


@in_one_order
def test_more_items_than_a_launch_takes(emulated: Emulated) -> None:
    wanted = random_state(shapes=((1, (5,)), (2, (2, 8)), (1, (3, 3))), times=16)
    for i in range(0, len(wanted.params), 2):  # every other one strided
        wanted.grads[i] = LAYOUTS["columns"](wanted.grads[i])
        wanted.params[i] = LAYOUTS["columns"](wanted.params[i])
    assert len(wanted.programs) > 800
    before = emulated.launches()
    compare_step(emulated.ops, CPU, wanted)
    assert emulated.launches() - before > 2 * 6, "each of six kernels is launched at least twice"


@in_one_order
def test_rows_without_a_matrix(emulated: Emulated) -> None:
    """More rows than lines: what `before` leaves in the scratch is behind the counters of `inspect` as well."""
    table = Table.empty(torch.zeros((), dtype=torch.int64), [CHUNK + 1] * 3, [(1, CHUNK + 1)])
    momentum, into = torch.zeros(2, CHUNK + 1)
    memory = (table.rows, table.sums, table.scratch)
    for step in (1, 2):
        grads = list(torch.full((3, CHUNK + 1), float(step)))
        numbers = ([0, 0, 0], [0, 1, 1, 1], [0, 0, 0], list(twins.GROUPS[0]), [], [], None, None)
        emulated.ops.inspect(grads, [], *memory[:2], table.skipped, memory[2], *numbers)
        emulated.ops.before(grads[:1], [momentum], [], [into], [], [], *memory, [0], [0], [1], [0], [0] * 3, [1.0])
        assert table.column("grad_max").tolist() == [step] * 3
