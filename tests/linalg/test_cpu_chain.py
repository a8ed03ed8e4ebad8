"""A chain of products on a CPU in one call: its polynomial, its rounding, its edges; a matrix knows no other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.linalg.chain import plain_chain
from steepest.linalg.coefficients import JORDAN, SCHEDULES
from steepest.linalg.polar import polar, polars
from steepest.ops import backend, cpu_chain
from support.polar_error import polar_error
from support.singular_values import SPECTRA, with_spectrum
from support.slow import slow

FLOAT, HALF = torch.float32, torch.bfloat16
DTYPES = [
    pytest.param(dtype, marks=pytest.mark.skipif(not cpu_chain.compiled(dtype), reason=f"no products of {dtype} here"))
    for dtype in (FLOAT, HALF)
]
on_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = ((1, 1), (1, 9), (9, 1), (5, 7), (16, 16), (17, 33), (48, 49), (33, 200), (200, 33), (130, 131), (96, 400))
PRESETS = ("jordan", "exact", "auto", "turbo", "polar_express")


def noise(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_torch(monkeypatch: pytest.MonkeyPatch, x: Tensor, preset: str, dtype: torch.dtype, **more: Tensor) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(backend, "forced", "torch")
        return polar(x, preset, dtype=dtype, **more)


def called(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of stacks of every call from now on."""
    calls: list[int] = []
    run = cpu_chain.cpu_chain

    def counted(xs: list[Tensor], *arguments: object, **more: object) -> None:
        calls.append(len(xs))
        run(xs, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(cpu_chain, "cpu_chain", counted)
    return calls


def five_steps(x: Tensor) -> Tensor:
    """K. Jordan's iteration as it is printed, in fp64."""
    x = x.double() / x.double().norm()
    if x.shape[0] > x.shape[1]:
        return five_steps(x.T).T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@on_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_jordan_is_the_iteration_as_it_is_printed(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = noise((3, *shape))
    error = 2e-5 if dtype == FLOAT else 0.03
    for given, found in zip(x, polar(x, "jordan", dtype=dtype), strict=True):
        torch.testing.assert_close(found.double(), five_steps(given), rtol=0, atol=error)


@on_dtypes
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("form", ["standard", "gram"])
def test_fp32_is_that_of_torch_and_bf16_within_its_rounding(
    preset: str, form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for m, n in SHAPES if dtype == FLOAT else ((96, 400), (130, 131), (200, 130)):
        x, slack, other = noise((2, m, n)), torch.zeros(2), torch.zeros(2)
        found = polar(x, preset, dtype=dtype, form=form, slack=slack)
        with monkeypatch.context() as patch:
            patch.setattr(backend, "forced", "torch")
            wanted = polar(x, preset, dtype=dtype, form=form, slack=other)
        if dtype == FLOAT:
            torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
            torch.testing.assert_close(slack, other, rtol=1e-4, atol=0)
            continue
        ours, torchs = (polar_error(x[0].double(), y[0]) for y in (found, wanted))
        assert ours.off_diagonal <= 1.2 * torchs.off_diagonal + 1e-3
        assert ours.relative <= torchs.relative + 1e-2
        torch.testing.assert_close(slack, other, rtol=1e-2, atol=0)


@pytest.mark.skipif(not cpu_chain.compiled(FLOAT), reason="no products of fp32 here")
def test_every_edge_of_a_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sides from 1 to 35 on either side of a panel, two and three."""
    for m in (*range(1, 20), 31, 32, 33, 35):
        xs = [noise((1, m, n), m + n) for n in (*range(1, 36, 2), 47, 48, 49, 64, 65)]
        xs += [x.mT.contiguous() for x in xs]
        for x, found in zip(xs, polars(xs, "jordan", dtype=FLOAT), strict=True):
            torch.testing.assert_close(found, by_torch(monkeypatch, x, "jordan", FLOAT), rtol=0, atol=2e-5)


@pytest.mark.skipif(not cpu_chain.compiled(HALF), reason="no products of bf16 here")
def test_every_edge_of_a_panel_in_bf16() -> None:
    for m in (*range(1, 20), 31, 32, 33, 35):
        xs = [noise((1, m, n), m + n) for n in (*range(1, 36, 2), 47, 48, 49, 64, 65)]
        xs += [x.mT.contiguous() for x in xs]
        for x, found in zip(xs, polars(xs, "jordan", dtype=HALF), strict=True):
            torch.testing.assert_close(found[0].double(), five_steps(x[0]), rtol=0, atol=0.1)


@on_dtypes
@pytest.mark.parametrize("preset", ["jordan", "auto"])
def test_a_matrix_has_its_bits_in_any_call_and_on_any_number_of_threads(preset: str, dtype: torch.dtype) -> None:
    """One of the last, alone, is shared out by all threads, product by product; of seven a thread has its own."""
    xs = [noise((3, 40, 70)), noise((2, 70, 40)), noise((5, 9, 9)), noise((7, 300, 900))]
    together = polars(xs, preset, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for x, found, again in zip(xs, together, polars(xs, preset, dtype=dtype), strict=True):
            assert torch.equal(found, again)
            for i in range(len(x)):
                assert torch.equal(polar(x[i], preset, dtype=dtype), found[i])
            assert torch.equal(polar(x, preset, dtype=dtype, max_workspace_bytes=1), found)
    finally:
        torch.set_num_threads(threads)


@on_dtypes
def test_all_stacks_of_a_choice_are_one_call(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = called(monkeypatch)
    polars([noise((3, 8, 12)), noise((2, 12, 8)), noise((1, 8, 10))], "jordan", dtype=dtype)
    assert calls == [3]


@on_dtypes
@pytest.mark.parametrize("preset", ["jordan", "auto"])
def test_what_is_no_ordinary_matrix(preset: str, dtype: torch.dtype) -> None:
    """Zero, not finite, as large and as small as fp32 goes; each leaves the others alone, and x is not written."""
    x = noise((7, 20, 30))
    x[1] = 0
    x[2, 3, 4], x[3, 0, 0] = torch.nan, -torch.inf
    x[4] *= 2.0**120
    x[5] *= 2.0**-130
    x[6] = 0
    x[6, 1, 1] = 2.0**-149
    kept, slack = x.clone(), torch.zeros(7)
    found = polar(x, preset, dtype=dtype, slack=slack)
    assert torch.equal(x.view(torch.int32), kept.view(torch.int32))
    assert found[1].eq(0).all()
    assert found[2:4].isnan().all()
    assert torch.equal(found[0], polar(x[0], preset, dtype=dtype))
    scaled = polar(x[4] * 2.0**-120, preset, dtype=dtype)
    assert torch.equal(found[4], scaled)
    assert (found[5] - polar(x[5] * 2.0**100 * 2.0**30, preset, dtype=dtype)).abs().max() < 1e-3
    assert 0.6 < found[6, 1, 1] < 1.25
    assert found[6].count_nonzero() == 1
    if preset == "jordan" and dtype == HALF:
        assert slack.eq(1).all()
    else:
        assert slack[1] == 0
        assert slack[2:4].isnan().all()


@on_dtypes
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_matrices_of_every_dtype_and_stride(stored: torch.dtype, dtype: torch.dtype) -> None:
    x = noise((2, 24, 40)).to(stored)
    found = polar(x, "exact", dtype=dtype)
    assert found.dtype == stored
    wanted = polar(x.float(), "exact", dtype=dtype)
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0.02 if stored != torch.float64 else 1e-6)
    assert torch.equal(polar(x.mT.contiguous().mT, "exact", dtype=dtype), found)
    assert polar(x[:0], "exact", dtype=dtype).shape == (0, 24, 40)
    assert polar(x[..., :0], "exact", dtype=dtype).shape == (2, 24, 0)


@on_dtypes
@pytest.mark.parametrize("preset", ["exact", "you", "auto", "turbo"])
def test_rounding_on_hard_spectra_is_no_worse_than_that_of_torch(
    preset: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for spectrum in SPECTRA:
        x = with_spectrum(128, 192, spectrum)
        if spectrum.startswith("rank"):  # of which rounding makes what it likes
            continue
        ours = polar_error(x, polar(x.float(), preset, dtype=dtype))
        torchs = polar_error(x, by_torch(monkeypatch, x.float(), preset, dtype))
        assert ours.largest <= max(torchs.largest, 1) + 0.05, spectrum
        assert ours.off_diagonal <= 1.5 * torchs.off_diagonal + 2e-2, spectrum


@on_dtypes
def test_weights_that_are_moved_at_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steepest.linalg.polar.choice.cpu_bf16", "1" if dtype == HALF else "0")
    calls = called(monkeypatch)
    weights = []
    monkeypatch.setattr("steepest.step.plan.steps_along_polar", lambda *arguments: False)
    for fuse in (False, True):
        p = nn.Parameter(noise((24, 40)))
        p.grad = noise((24, 40), 1)
        steepest.Muon([p], lr=0.1, polar="auto", fuse_update=fuse).step()
        weights.append(p.detach())
    assert calls == [1, 1]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-4 if dtype == FLOAT else 2e-3)


def test_who_takes_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    x, table = noise((1, 4, 4)), ((1.0,),)
    for dtype in (torch.float16, torch.float64):
        assert not cpu_chain.supports(x, dtype, table)
    assert cpu_chain.supports(x, FLOAT, table) == cpu_chain.compiled(FLOAT)
    assert not cpu_chain.supports(x, FLOAT, table * 5)
    assert not cpu_chain.supports(x.to("meta"), FLOAT, table)
    monkeypatch.setattr(backend, "forced", "torch")
    assert not cpu_chain.supports(x, FLOAT, table)


ARGUMENTS = ([0] * 7, [0.0] * 3, [], [], [], False, 1e-7)


@pytest.mark.skipif(not cpu_chain.compiled(FLOAT), reason="no products of fp32 here")
def test_the_op_says_what_is_wrong_and_what_it_writes() -> None:
    def call(x: Tensor, out: Tensor, slack: Tensor, result: int = 0, at_once: int = 1) -> None:
        products = plain_chain(JORDAN)
        numbers = (*products.packed, [], [], [], False, 1e-7, result, True, False, at_once)
        torch.ops.steepest.cpu_chain([x], [out], [slack], *numbers)

    x, slack = noise((2, 4, 6)), torch.zeros(2)
    for arguments, words in (
        ((x, x[:1].clone(), slack), "not of the shape"),
        ((x, torch.zeros(2, 4, 6, dtype=torch.float64), slack), "must be float32 or bfloat16"),
        ((x.mT, torch.zeros(2, 6, 4), slack), "contiguous"),
        ((x, torch.zeros_like(x), slack[:1]), "slacks must be a contiguous float32 tensor of 2 elements"),
        ((x, torch.zeros_like(x), slack, 2), "result is buffer 2"),
        ((x, torch.zeros_like(x), slack, 0, 0), "at_once is 0"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call(*arguments)
    products = plain_chain(JORDAN)
    numbers = (*products.packed, [], [], [], False, 1e-7, 1, True, False, 1)
    arguments = ([x], [torch.zeros_like(x)], [slack], *numbers)
    overload = torch.ops.steepest.cpu_chain.default
    torch.library.opcheck(overload, arguments, test_utils=("test_schema", "test_faketensor"))


IN_ANOTHER_PROCESS = """
import sys
import torch
from steepest.linalg.polar import polars
from steepest.ops import cpu_chain
xs, preset, dtype = torch.load(sys.argv[1])
print(int(cpu_chain.compiled(torch.float32)), int(cpu_chain.compiled(torch.bfloat16)))
torch.save(polars(xs, preset, dtype=dtype), sys.argv[1])
"""


def with_capability(
    capability: str, xs: list[Tensor], preset: str, dtype: torch.dtype, file: Path
) -> tuple[list[str], list[Tensor]]:
    """Which products are compiled, fp32's and bf16's, and the polar factors, in a process with narrower vectors."""
    torch.save((xs, preset, dtype), file)
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(file)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return run.stdout.split(), torch.load(file)


@pytest.mark.slow
@pytest.mark.skipif(not cpu_chain.compiled(FLOAT), reason="no products of fp32 here")
@pytest.mark.parametrize("capability", ["default", slow("avx2")])
def test_narrower_vectors(capability: str, tmp_path: Path) -> None:
    """What the other sets of instructions make of the same matrices; none is left with "default"."""
    xs = [noise((2, m, n)) for m, n in ((1, 7), (17, 33), (33, 17), (50, 50), (64, 200), (300, 900))]
    compiled, factors = with_capability(capability, xs, "auto", FLOAT, tmp_path / "factors.pt")
    assert compiled == (["0", "0"] if capability == "default" else ["1", "0"])
    for found, wanted in zip(factors, polars(xs, "auto", dtype=FLOAT), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)


@pytest.mark.skipif(
    not (cpu_chain.compiled(HALF) and torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_amx_tile_supported()),
    reason="no tiles (AMX) beside vectors for bf16 here",
)
@pytest.mark.slow
def test_bf16_without_tiles(tmp_path: Path) -> None:
    """Tiles and vectors round the same sums, taken in another order."""
    xs = [noise((2, m, n)) for m, n in SHAPES]
    compiled, factors = with_capability("avx512", xs, "jordan", HALF, tmp_path / "factors.pt")
    assert compiled == ["1", "1"]
    for x, vectors, tiles in zip(xs, factors, polars(xs, "jordan", dtype=HALF), strict=True):
        exact = torch.stack([five_steps(each) for each in x])
        for found in (vectors, tiles):
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=0.03)


def test_tables_are_quintic() -> None:
    """What the plain chain is made for."""
    assert all(len(step) == 3 for step in SCHEDULES["jordan"].tables[0])
    assert plain_chain(JORDAN).result == "y"
    assert len(plain_chain(JORDAN).nodes) == 14
