"""Batched products in Triton: numbers in its interpreter and on a GPU, the code that it makes on any machine."""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from support.cuobjdump import tool
from support.slow import slow
from support.triton_interpreter import mend_the_interpreter, run_interpreted

triton = pytest.importorskip("triton", reason="Triton is not installed")
kernels = pytest.importorskip("steepest.kernels.symm_gemm", reason="steepest.kernels is not importable")
tl = triton.language

from support.triton_products import B, F, H, compare, far_apart, tma_changes_no_bit  # noqa: E402

KERNEL = kernels.product_kernel


# ---- numbers -------------------------------------------------------------------------------------------------------


@triton.jit
def triangle_probe(at, near, found, COUNT: tl.constexpr):
    # (4, programs COUNT): i, j from the root, and from an i that is near
    index = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    line = tl.num_programs(0) * COUNT
    t = tl.load(at + index)
    i, j = kernels.triangle(t)
    tl.store(found + index, i)
    tl.store(found + line + index, j)
    i, j = kernels.settle(t, tl.load(near + index))
    tl.store(found + 2 * line + index, i)
    tl.store(found + 3 * line + index, j)


@triton.jit
def tile_probe(at, rows, columns, found, SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr):
    # Each element is a tile of a matrix of its own size.
    index = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    columns = tl.load(columns + index)
    i, j = kernels.tile_of(tl.load(at + index), tl.load(rows + index), columns, SYMMETRIC, GROUP)
    tl.store(found + index, i * columns + j)


def triangle_is_exact(device: torch.device, block: int) -> None:
    """First, second and last tile of every row that 2^30 tiles have."""
    row = torch.arange(2**16).clamp(max=46338)
    for column, off in product((0 * row, row.clamp(max=1), row), (-1, 0, 1)):
        wanted = torch.stack([row, column] * 2).to(torch.int32)
        at, near = (x.to(device, torch.int32) for x in (row * (row + 1) // 2 + column, (row + off).clamp(min=0)))
        found = torch.empty_like(wanted, device=device)
        triangle_probe[(len(row) // block,)](at, near, found, block)
        assert torch.equal(found.cpu(), wanted)


def every_tile_is_taken_once(device: torch.device, block: int) -> None:
    """Of two thousand random sizes for each way to order tiles."""
    draw = random.Random(0)
    for symmetric, group in product((True, False), (1, 3, 8)):
        sizes = [(draw.randint(1, 40), draw.randint(1, 40)) for _ in range(2000)]
        sizes = [(rows, rows if symmetric else columns) for rows, columns in sizes]
        counts = [rows * (rows + 1) // 2 if symmetric else rows * columns for rows, columns in sizes]
        lines = [torch.tensor([[0], [rows], [columns]]).expand(3, n) for (rows, columns), n in zip(sizes, counts)]
        lines.append(torch.tensor([[0], [1], [1]]).expand(3, -sum(counts) % block))
        table = torch.cat(lines, dim=1).to(torch.int32)
        table[0, : sum(counts)] = torch.cat([torch.arange(n) for n in counts])
        at, rows_of, columns_of = table.to(device).contiguous()
        found = torch.empty_like(at)
        tile_probe[(len(at) // block,)](at, rows_of, columns_of, found, symmetric, group, block)
        for (rows, columns), tiles in zip(sizes, found[: sum(counts)].cpu().split(counts)):
            wanted = torch.arange(rows * columns, dtype=torch.int32)
            wanted = wanted[wanted // columns >= wanted % columns] if symmetric else wanted
            assert torch.equal(tiles.sort().values, wanted), f"{rows} x {columns}, {symmetric=}, {group=}: {tiles}"


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    """In fp32, whose products it takes right."""
    done = run_interpreted(__file__)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [H, B, F])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    compare(torch.device("cuda"), dtype, 48, 700)


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [True, False])
def test_larger_matrices_on_a_gpu(symmetric: bool) -> None:
    """Tiles of every size, many bands of them, and the same bits however many matrices there are."""
    for m, k in ((1024, 1024), (2048, 512), (4096, 256)):
        a = torch.randn(12, m, k, device="cuda", dtype=H)
        out = torch.empty(12, m, m, device="cuda", dtype=H)
        kernels.product(a, a.mT, None, 1.0, 0.0, 0.0, out, symmetric=symmetric)
        torch.testing.assert_close(out.float(), torch.bmm(a.float(), a.float().mT), rtol=1e-3, atol=5e-3)
        for some in (slice(0, 1), slice(1, 4)):
            alone = torch.empty_like(out[some])
            kernels.product(a[some], a[some].mT, None, 1.0, 0.0, 0.0, alone, symmetric=symmetric)
            assert torch.equal(alone, out[some])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [H, B])
def test_tma_on_a_gpu(dtype: torch.dtype) -> None:
    if kernels.architecture(torch.cuda.get_device_capability()) not in kernels.WITH_TMA:
        pytest.skip(f"TMA is for {', '.join(kernels.WITH_TMA)}")
    tma_changes_no_bit(torch.device("cuda"), dtype, 48, 700)


@pytest.mark.gpu
def test_addresses_on_a_gpu() -> None:
    far_apart(torch.device("cuda"))


@pytest.mark.gpu
def test_tiles_on_a_gpu() -> None:
    triangle_is_exact(torch.device("cuda"), 1024)
    every_tile_is_taken_once(torch.device("cuda"), 1024)


@pytest.mark.gpu
def test_in_a_captured_graph() -> None:
    """Numbers are read when the graph is replayed."""
    a, out = torch.randn(2, 96, 64, device="cuda", dtype=H), torch.empty(2, 96, 96, device="cuda", dtype=H)
    alpha = torch.ones(2, device="cuda")

    def run() -> None:
        kernels.product(a, a.mT, None, alpha, 0.0, 0.0, out, symmetric=True)

    run()
    once = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    alpha.fill_(2.0)
    graph.replay()
    assert torch.equal(out, 2 * once)


# ---- what is launched ----------------------------------------------------------------------------------------------

CAPABILITIES = {"sm_80": (8, 0), "sm_86": (8, 9), "sm_90": (9, 0), "sm_100": (10, 0)}


@dataclass
class Launch:
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What would be launched on an H100."""
    made: list[Launch] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: made.append(Launch(grid, arguments, options))

    monkeypatch.setattr(kernels, "product_kernel", Recorder())
    monkeypatch.setattr(kernels, "_machine", lambda device: ((9, 0), 132))
    return made


def test_new_numbers_and_sizes_compile_nothing(launches: list[Launch]) -> None:
    """No argument is looked at for being 1 or even: types and constants are all that a compilation depends on."""
    assert all(argument.is_constexpr or argument.do_not_specialize for argument in KERNEL.params)
    for batch, m, k, alpha in ((3, 256, 512, 1.0), (2, 264, 640, 2.0), (1, 8, 64, 0.25)):
        a, out = torch.empty(batch, m, k, dtype=B), torch.empty(batch, m, m, dtype=B)
        kernels.product(a, a.mT, out, alpha, 1, -alpha, out, symmetric=True)

    def kind(x: object) -> object:
        return x.dtype if isinstance(x, Tensor) else type(x)

    first, *others = ([*map(kind, launch.arguments), launch.options] for launch in launches)
    assert all(other == first for other in others)


def test_an_average_in_fp32_of_gradients(launches: list[Launch]) -> None:
    """Of 16 bits, wherever they lie; a precision is one of fp32 and compiles nothing of its own for them."""
    factor, weight = torch.empty(2, 256, 256), torch.ones(2)
    for precision in ("ieee", "tf32x3"):
        for g in (torch.empty(2, 256, 512, dtype=B), torch.empty(2, 512, 256, dtype=B).mT):
            kernels.product(g, g.mT, factor, weight, None, 0.0, factor, symmetric=True, precision=precision)
    assert [launch.options["PRECISION"] for launch in launches] == ["ieee"] * 4
    names = [argument.name for argument in KERNEL.params]
    for launch in launches:
        given = dict(zip(names, launch.arguments))
        assert given["beta"] is given["beta_stride"] is given["gamma"] is None
        assert given["c"] is given["out"] is factor
        assert given["alpha"] is weight
    assert [launch.options["A_ALONG_K"] for launch in launches] == [True, False] * 2


def test_a_triangle_has_no_idle_programs(launches: list[Launch]) -> None:
    a, out = torch.empty(5, 4096, 64, dtype=H), torch.empty(5, 4096, 4096, dtype=H)
    for symmetric in (True, False):
        kernels.product(a, a.mT, None, 1.0, 0.0, 0.0, out, symmetric=symmetric)
    half, full = launches
    rows = 4096 // half.options["BLOCK_M"]
    assert half.grid == (5 * rows * (rows + 1) // 2,)
    assert full.grid == (5 * 4096**2 // (full.options["BLOCK_M"] * full.options["BLOCK_N"]),)


def test_what_is_loaded_16_bytes_at_a_time(launches: list[Launch]) -> None:
    """Of a size only that of a contiguous dimension counts; and offsets that need 64 bits have them."""
    x = torch.empty(2, 72, 51, dtype=H).mT  # 51 x 72 with columns of 72 apart
    wide = torch.empty(1, 2, 2**26 + 8, dtype=H)[:, :, :64]
    rows = torch.empty(2, 51, 72, dtype=H)
    square = torch.empty(2, 72, 72, dtype=H)
    for a, b in ((x.mT, x), (rows.mT, rows), (x, square), (rows, square), (rows.mT[:, 1:], rows), (wide, wide.mT)):
        out = torch.empty(len(a), a.shape[1], b.shape[2], dtype=H)
        kernels.product(a, b, None, 1.0, 0.0, 0.0, out, symmetric=False)
    assert [launch.options["ALIGNED"] for launch in launches] == [False, True, False, True, False, False]
    assert [launch.options["OFFSET"].primitive_bitwidth for launch in launches] == [32] * 5 + [64]


def test_nothing_is_launched_for_no_elements(launches: list[Launch]) -> None:
    for batch, m, n in ((0, 3, 3), (2, 0, 5), (2, 5, 0)):
        a, b = torch.empty(batch, m, 4, dtype=H), torch.empty(batch, 4, n, dtype=H)
        kernels.product(a, b, None, 1.0, 0.0, 0.0, torch.empty(batch, m, n, dtype=H), symmetric=False)
    assert not launches


@pytest.mark.parametrize(
    "change,message",
    [
        ({"b": torch.ones(2, 5, 4)}, "shapes do not make a product: (2, 4, 3), (2, 5, 4)"),
        ({"out": torch.ones(1, 4, 4)}, "shapes do not make a product"),
        ({"c": torch.ones(2, 4, 5)}, "shapes do not make a product"),
        (
            {"c": torch.ones(2, 4, 4).half()},
            "matrices are torch.float32, torch.float32, torch.float16, torch.float32; accepted",
        ),
        ({"b": torch.ones(2, 3, 5), "c": None, "out": torch.ones(2, 4, 5)}, "is square, not 4 x 5"),
        ({"a": torch.ones(2, 4, 6)[..., ::2]}, "neither rows nor columns are contiguous: shape (2, 4, 3), strides"),
        ({"out": torch.ones(2, 4, 4).mT}, "the rows of out are not contiguous"),
        ({"alpha": torch.ones(2, dtype=torch.float64)}, "a coefficient is torch.float64 of shape (2,)"),
        ({"gamma": torch.ones(())}, "a coefficient is torch.float32 of shape (); as a tensor it is fp32, (2,)"),
        (
            {"a": torch.ones(2, 4, 3).half(), "b": torch.ones(2, 3, 4).half(), "c": torch.ones(2, 4, 4).half()},
            "torch.float16, torch.float16, torch.float16, torch.float32; accepted is one of torch.float16,",
        ),
    ],
    ids=["k", "batch", "c", "dtype", "square", "strides", "out", "fp64", "shape", "wide"],
)
def test_errors(change: dict[str, Any], message: str, launches: list[Launch]) -> None:
    given: dict[str, Any] = {"a": torch.ones(2, 4, 3), "b": torch.ones(2, 3, 4), "c": torch.ones(2, 4, 4)}
    given |= {"alpha": 1.0, "beta": 1.0, "gamma": 1.0, "out": torch.ones(2, 4, 4), "symmetric": False, **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        kernels.product(**given)
    assert not launches


def test_what_the_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.ones(2, 3, 4)
    assert "torch.float64" in kernels.can_use(matrix.double())
    assert "contiguous" in kernels.can_use(matrix[:, :, ::2])
    assert "is on cpu" in kernels.can_use(matrix)
    for capability, usable in (((7, 5), False), ((8, 0), True), ((12, 1), True)):
        monkeypatch.setattr(kernels, "_machine", lambda device, of=capability: (of, 100))
        for x in (matrix.half(), matrix.mT, matrix[:, :, 1:2], matrix[:, 1:2, ::2]):
            held = {name: getattr(x, name) for name in ("dtype", "shape", "stride", "data_ptr")}
            on_gpu = SimpleNamespace(device=torch.device("cuda"), **held)
            assert (kernels.can_use(on_gpu) is None) == usable


# ---- configurations ------------------------------------------------------------------------------------------------

# Bytes of shared memory that a program may have: CUDA C++ Programming Guide, technical specifications by capability.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}


def shared_bytes(listed: Any, element: int = 2, precision: str | None = None, wide: bool = False) -> int:
    """Operands of all turns in flight, or the tile on its way to memory, in fp32 with ``wide``.

    "tf32x3" has a turn less in flight and of b both terms; those of a stay in registers, or in tensor memory.
    """
    turn = (listed.block_m + listed.block_n) * listed.block_k * element
    tile = listed.block_m * listed.block_n * 4 if wide else 0
    if precision == "tf32x3":
        return int(max((listed.stages - 1) * turn + 2 * listed.block_n * listed.block_k * element, tile))
    return int(max(listed.stages * turn, tile))


LISTED = [(name, listed) for name, group in kernels.CONFIGURATIONS.items() for listed in group]
MULTIPROCESSORS = {"sm_80": 108, "sm_86": 128, "sm_90": 132, "sm_100": 148}


@pytest.mark.parametrize("name,listed", LISTED, ids=str)
def test_configurations_fit_into_shared_memory(name: str, listed: Any) -> None:
    assert shared_bytes(listed) <= SHARED_LIMIT[name]
    assert max(listed.block_m, listed.block_n, listed.block_k) <= kernels.LONGEST_SIDE
    assert listed.block_k == kernels.BLOCK_K, "the order of sums is not a matter of the tile"


@pytest.mark.parametrize("name", kernels.CONFIGURATIONS)
def test_which_configuration_is_chosen(name: str) -> None:
    capability, multiprocessors = CAPABILITIES[name], MULTIPROCESSORS[name]

    def chosen(m: int, n: int, batch: int, symmetric: bool, aligned: bool = True) -> Any:
        return kernels.configuration(m, n, 1024, capability, multiprocessors, batch, symmetric, aligned)

    group = kernels.CONFIGURATIONS[name]
    square = [c for c in group if c.block_m == c.block_n]
    assert chosen(8192, 8192, 4, False) == group[0]
    assert chosen(8192, 8192, 4, True) == square[0]
    for symmetric in (True, False):
        assert chosen(64, 64, 1, symmetric) == chosen(1, 1, 1, symmetric) == square[-1]
        assert chosen(8191, 8191, 4, symmetric, aligned=False) == square[-1]
    some = {chosen(m, n, 1, False) for m in range(64, 4096, 64) for n in range(64, 4096, 64)}
    assert some == set(group), "what is never chosen need not be listed"
    assert {chosen(m, m, batch, True) for m in range(64, 4096, 64) for batch in (1, 8)} == set(square)


@pytest.mark.parametrize("name", kernels.CONFIGURATIONS)
@pytest.mark.parametrize("precision", [None, "tf32", "tf32x3"])
def test_configurations_of_results_in_fp32(name: str, precision: Any) -> None:
    """They fit, add up in one order, are chosen for some size, and one of the small ones takes what is not aligned."""
    table = {None: kernels.WIDE, "tf32": kernels.TF32, "tf32x3": kernels.TF32X3}[precision][name]
    element = 2 if precision is None else 4
    assert len({c.block_k for c in table}) == 1
    for c in table:
        assert shared_bytes(c, element, precision, wide=True) <= SHARED_LIMIT[name]

    def chosen(m: int, n: int, batch: int, symmetric: bool, aligned: bool = True) -> Any:
        machine = (CAPABILITIES[name], MULTIPROCESSORS[name])
        return kernels.configuration(m, n, 1024, *machine, batch, symmetric, aligned, precision, precision is None)

    assert {chosen(m, n, 1, False) for m in range(64, 2048, 64) for n in range(64, 2048, 64)} == set(table)
    assert chosen(8192, 8192, 4, True).block_m == max(c.block_m for c in table if c.block_m == c.block_n)
    assert chosen(8191, 8191, 4, True, aligned=False) == table[-1]
    assert kernels.configuration(64, 64, 64, (9, 0), 132, 1, True, True, "ieee") == kernels.FP32


def test_every_device_has_configurations() -> None:
    names = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 7): "sm_80", (8, 9): "sm_86", (9, 0): "sm_90", (10, 0): "sm_100"}
    names |= {(10, 3): "sm_100", (11, 0): "sm_100", (12, 0): "sm_86", (12, 1): "sm_86"}
    assert {capability: kernels.architecture(capability) for capability in names} == names


# ---- code ----------------------------------------------------------------------------------------------------------

#: Tensor core instructions by compute capability: of a warp, of four warps, of the whole program.
PRODUCTS = {80: r"HMMA\.16816\.F32", 89: r"HMMA\.16816\.F32", 90: "HGMMA", 100: "UTCHMMA", 120: r"HMMA\.16816\.F32"}
TF32_PRODUCTS = {80: r"HMMA\.1688\.F32\.TF32", 90: r"HGMMA\.\S*F32\.TF32", 100: "UTCHMMA"}
TYPES = {H: "fp16", B: "bf16", F: "fp32"}


@dataclass(frozen=True)
class Kind:
    """What a compilation depends on apart from the configuration.

    numbers: "none" but alpha, "floats", "tensors", "average" (of the product and c).
    """

    dtype: torch.dtype
    a_along_k: bool
    b_along_k: bool
    symmetric: bool
    numbers: str = "floats"
    aligned: bool = True
    even_k: bool = True
    precision: str = "ieee"
    wide: bool = False  # c and out are fp32
    tma: bool = False


PLAIN = Kind(B, True, False, False, "tensors", even_k=False)  # Q X
GRAM = Kind(H, True, True, True, "none")  # X X^T
TALL_GRAM = Kind(B, False, False, True, "none", even_k=False)  # X^T X
SQUARE = Kind(H, True, False, True)  # Q Z + a Q
TALL = Kind(H, False, True, False)
ODD = Kind(H, True, False, True, "tensors", aligned=False, even_k=False)
# Results in fp32: of square tiles, and of those that are not.
AVERAGE = Kind(B, True, True, True, "average", wide=True)  # L + w (G G^T - L)
FAST = (Kind(F, True, True, False, precision="tf32"), Kind(F, True, False, False, "tensors", precision="tf32"))
EXACT = Kind(F, True, False, False, "tensors", even_k=False, precision="tf32x3")  # P Q
THREE = (kernels.TF32X3, (replace(EXACT, a_along_k=False), EXACT), EXACT)


def compilations() -> Iterator[Any]:
    """Every configuration where it is listed, square ones both ways; each way to lay out operands on every target."""
    for name, listed in LISTED:
        capability = 10 * CAPABILITIES[name][0] + CAPABILITIES[name][1]
        square, small = listed.block_m == listed.block_n, listed == kernels.CONFIGURATIONS[name][-1]
        kinds = [PLAIN]
        if name != "sm_86":
            kinds += [SQUARE if small else GRAM] if square else [TALL] if listed.block_m == 64 else []
            kinds += [TALL_GRAM, ODD] if small else []
        yield from ((capability, listed, kind) for kind in kinds)
    yield 120, kernels.CONFIGURATIONS["sm_86"][0], SQUARE
    yield from ((capability, kernels.FP32, replace(SQUARE, dtype=F)) for capability in (80, 90, 100))
    for table, by_tile, odd in ((kernels.WIDE, (AVERAGE, None), AVERAGE), (kernels.TF32, FAST, FAST[1]), THREE):
        for name, listed in ((each, c) for each in ("sm_80", "sm_90", "sm_100") for c in table[each]):
            capability = 10 * CAPABILITIES[name][0] + CAPABILITIES[name][1]
            square, small = listed.block_m == listed.block_n, listed == table[name][-1]
            kinds = [by_tile[not square], replace(odd, aligned=False, even_k=False) if small else None]
            yield from ((capability, listed, replace(kind, symmetric=square)) for kind in kinds if kind)
    yield from by_tma()


def by_tma() -> Iterator[Any]:
    """Every configuration with TMA; each way to lay out operands."""
    narrow = ((90, 100), (None,), (False, True), ((PLAIN, TALL), (GRAM, TALL_GRAM)))
    exact = ((90,), ("tf32x3",), (False,), ((EXACT, EXACT), (replace(EXACT, symmetric=True, a_along_k=False),) * 2))
    for capability, precision, wide, kinds in (*product(*narrow), *product(*exact)):
        symmetric = kinds[0].symmetric
        for c in kernels.candidates(divmod(capability, 10), symmetric, True, precision, wide):
            if c.tma and (symmetric or c.block_m != c.block_n):
                kind = kinds[c.block_m == 64]
                yield capability, c, replace(kind, wide=wide, numbers="floats" if wide else kind.numbers, tma=True)


def name_of(x: Any) -> str:
    if isinstance(x, Kind):
        return "-".join(str(value).removeprefix("torch.") for value in vars(x).values())
    return f"{x.block_m}x{x.block_n}" if isinstance(x, kernels.Configuration) else f"sm_{x}"


def a_second_each() -> Iterator[Any]:
    """All compilations; only the first for Ampere and the first for Hopper are not slow."""
    quick = {80, 90}
    for capability, listed, kind in compilations():
        yield (pytest.param if capability in quick else slow)(capability, listed, kind)
        quick.discard(capability)


@pytest.mark.parametrize("capability,listed,kind", list(a_second_each()), ids=name_of)
def test_code(capability: int, listed: Any, kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))  # what is read is what was compiled now
    compiled = compile_for(capability, listed, kind)
    without_tensor_cores = kind.dtype == F and kind.precision == "ieee"
    shared = compiled.metadata.shared
    room = shared_bytes(listed, kind.dtype.itemsize, kind.precision, kind.wide or kind.dtype == F)
    assert shared <= room + (128 if kind.tma else 64), "barriers take a few bytes, the tile those of the loop"
    assert shared <= SHARED_LIMIT[kernels.architecture(divmod(capability, 10))]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", dump("--dump-resource-usage", str(cubin)))
    assert usage is not None
    registers, stack, local = map(int, usage.groups())
    code = dump("--dump-sass", str(cubin))
    assert (stack, local) == (0, 0), f"{registers} registers are not enough"
    assert not re.search(r"\b(LDL|STL)\b", code)
    tensor_cores = (TF32_PRODUCTS if kind.dtype == F else PRODUCTS)[capability]
    assert bool(re.search(tensor_cores, code)) != without_tensor_cores
    assert bool(re.search(r"\bUTMALDG\.3D\b", code)) == kind.tma
    if kind.tma:
        assert [len(meta["block_size"]) for meta in compiled.metadata.tensordesc_meta] == [3, 3], "made on the host"
        assert not re.search(r"\bLDGSTS\b", code)
        cubin.write_bytes(compile_for(capability, listed, replace(kind, tma=False)).asm["cubin"])
        products = re.compile(rf"\b{tensor_cores}\S*")
        assert products.findall(code) == products.findall(dump("--dump-sass", str(cubin))), "the same in the same order"
    elif kind.aligned and not without_tensor_cores:
        assert re.search(r"\bLDGSTS\.E\.\S*128\b", code)
        # Tensor cores of sm_90 and later take TF32 along k only: what lies otherwise is turned on its way, by elements.
        turned = kind.precision == "tf32" and capability >= 90 and not (kind.a_along_k and kind.b_along_k)
        assert turned or not re.search(r"\bLDGSTS\.E\b(?!\S*128)", code)
    if kind.aligned and not without_tensor_cores:
        stores = re.findall(r"\bSTG\.E\S*", code)
        assert stores
        assert all(".128" in store for store in stores), stores


def compile_for(capability: int, listed: Any, kind: Kind) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants: dict[str, Any] = {
        "A_ALONG_K": kind.a_along_k,
        "B_ALONG_K": kind.b_along_k,
        "C_ROWS": True,
        "SYMMETRIC": kind.symmetric,
        "ALIGNED": kind.aligned,
        "EVEN_K": kind.even_k,
        "OFFSET": tl.int32,
        "BLOCK_M": listed.block_m,
        "BLOCK_N": listed.block_n,
        "BLOCK_K": listed.block_k,
        "GROUP": kernels.GROUP,
        "PRECISION": kind.precision,
        "TMA": kind.tma,
    }
    if kind.numbers != "tensors":
        constants |= dict.fromkeys(("alpha_stride", "beta_stride", "gamma_stride"))
    if kind.numbers == "none":
        constants |= dict.fromkeys(("c", "gamma"))
    if kind.numbers == "average":
        constants |= dict.fromkeys(("beta", "gamma"))
    types = dict.fromkeys(("a", "b", "c", "out"), f"*{TYPES[kind.dtype]}")
    types |= dict.fromkeys(("c", "out"), "*fp32") if kind.wide else {}
    if kind.tma:
        m, n, k = listed.block_m, listed.block_n, listed.block_k
        types["a"] = f"tensordesc<{TYPES[kind.dtype]}[1, {f'{m}, {k}' if kind.a_along_k else f'{k}, {m}'}]>"
        types["b"] = f"tensordesc<{TYPES[kind.dtype]}[1, {f'{n}, {k}' if kind.b_along_k else f'{k}, {n}'}]>"
    types |= dict.fromkeys(("alpha", "beta", "gamma"), "*fp32" if kind.numbers == "tensors" else "fp32")
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in KERNEL.arg_names}
    options = {"num_warps": listed.warps, "num_stages": listed.stages, "enable_fp_fusion": False}
    source = ASTSource(KERNEL, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def dump(*arguments: str) -> str:
    """What cuobjdump prints, not kept: tests write one file after another to a path."""
    command = [tool("cuobjdump"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


if __name__ == "__main__":
    mend_the_interpreter()
    kernels.GROUP = 2
    kernels._choose = lambda a, n, symmetric, *_: kernels.Configuration(16, 16 if symmetric else 32, 16, 2, 4)
    compare(torch.device("cpu"), F, 48, 40)
    tma_changes_no_bit(torch.device("cpu"), F, 24, 40)
    far_apart(torch.device("cpu"))
    triangle_is_exact(torch.device("cpu"), 2**16)
    every_tile_is_taken_once(torch.device("cpu"), 2**16)
    print("equal")
