"""`polar` against the fp64 SVD: every preset, spectrum, layout and scale, with rounding reported apart."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim._muon import _zeropower_via_newtonschulz

from steepest.linalg import coefficients as tables
from steepest.linalg.newton_schulz import newton_schulz
from steepest.linalg.polar import choice, compute_dtype, default_restarts, polar, polars
from steepest.linalg.scaling import prescaled
from steepest.ops.symm_gemm import Workspace
from support.polar_error import assert_polar, polar_error
from support.singular_values import (
    LAYOUTS,
    SPECTRA,
    gaussian,
    orthogonal,
    polynomial_of,
    three_shapes,
    with_spectrum,
)
from support.slow import slow

PRESETS = (*tables.SCHEDULES, "polar_express", "svd")
#: Those of other packages, by the names they have there.
OTHERS = ("simple", "quintic", "cans", "deepseekv4", "cubic5", "polar_express_safer", "dion")
POLYNOMIAL = [name for name in PRESETS if name != "svd"]


def torch_muon(x: Tensor) -> Tensor:
    return _zeropower_via_newtonschulz(x.float(), tables.JORDAN_STEP, 5, 1e-7)


def expected(x: Tensor, preset: str) -> Tensor:
    """The preset's polynomial applied to the fp64 singular values."""
    if preset == "svd":
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        return (u * (s > 1e-7 * s[0])) @ vh
    return polynomial_of(x, tables.schedule(preset, None, None))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("spectrum", ["gaussian", *SPECTRA])
def test_fp64_is_the_polynomial_of_the_singular_values(preset: str, spectrum: str) -> None:
    for shape in three_shapes(PRESETS.index(preset) + ["gaussian", *SPECTRA].index(spectrum)):
        x = with_spectrum(*shape, spectrum)
        exact = expected(x, preset)
        for form in ("standard", "gram"):
            # Of a rank-deficient matrix, singular values at rounding level (1e-16) are lifted by up to 1e3, and the
            # Gram form squares them first.
            torch.testing.assert_close(polar(x, preset, form=form), exact, atol=2e-9, rtol=0)


# Bounds on the off-diagonal part and on the largest singular value.  bf16 rounds by 2^-9; the coefficients within a
# segment and the lift of small singular values multiply that, so the spectra with many of them set the bounds.
@pytest.mark.parametrize(
    "preset, off_diagonal, largest",
    [
        ("jordan", 0.08, 1.22),
        ("exact", 0.08, 1.22),
        ("auto", 0.14, 1.26),
        ("turbo", 0.1, 1.22),
        ("tight_8e-3", 0.08, 1.1),
    ],
)
@pytest.mark.parametrize("spectrum", ["gaussian", "flat", "log", "power", "root", "spikes"])
def test_bf16_stays_near_the_polynomial(preset: str, off_diagonal: float, largest: float, spectrum: str) -> None:
    for shape in ((96, 96), (96, 384), (384, 96), (37, 101)):
        x = with_spectrum(*shape, spectrum)
        ideal = polar_error(x, expected(x, preset)).relative
        y = polar(x.float(), preset, dtype=torch.bfloat16)
        assert_polar(x, y, relative=ideal + off_diagonal, off_diagonal=off_diagonal, largest=largest)


@pytest.mark.parametrize("preset", ["auto", "turbo"])
@pytest.mark.parametrize("shape", [(128, 128), (128, 512), (512, 128)])
def test_auto_and_turbo_are_at_least_as_accurate_as_torch_on_gaussian_matrices(
    preset: str, shape: tuple[int, int]
) -> None:
    x = gaussian(*shape)
    ours, theirs = polar_error(x, polar(x.float(), preset, dtype=torch.bfloat16)), polar_error(x, torch_muon(x))
    assert ours.relative <= theirs.relative, (ours, theirs)


@pytest.mark.parametrize("shape", [(64, 64), (48, 192), (192, 48)])
@pytest.mark.parametrize("spectrum", ["gaussian", "log", "rank 1"])
def test_jordan_is_torch(shape: tuple[int, int], spectrum: str) -> None:
    x = with_spectrum(*shape, spectrum).float()
    ours = polar(x, "jordan", dtype=torch.bfloat16)
    # bmm and mm may sum in different orders; the results differ by a few roundings at most.
    torch.testing.assert_close(ours, torch_muon(x).float(), atol=2**-6, rtol=0)


@pytest.mark.parametrize("preset", POLYNOMIAL)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-5, 1e20, 1e30])
def test_scale_does_not_matter(preset: str, scale: float) -> None:
    x = gaussian(24, 40).float()
    exact = polar(x, preset, dtype=torch.float32)
    torch.testing.assert_close(polar(x * scale, preset, dtype=torch.float32), exact, atol=2e-4, rtol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_powers_of_two_do_not_change_a_bit(preset: str) -> None:
    x = gaussian(24, 40).float()
    for exponent in (-90, -7, 60):
        assert torch.equal(polar(x * 2.0**exponent, preset), polar(x, preset))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eps", [1e-7, 0.0])
def test_zero_gives_zero(preset: str, dtype: torch.dtype, eps: float) -> None:
    for shape in ((3, 5), (5, 3), (1, 1), (2, 4, 4)):
        assert torch.equal(polar(torch.zeros(shape, dtype=dtype), preset, eps=eps), torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 4), (2, 0, 4)])
def test_empty(preset: str, shape: tuple[int, ...]) -> None:
    result = polar(torch.empty(shape), preset)
    assert result.shape == shape
    assert result.dtype == torch.float32


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter_and_the_input_is_not_written(preset: str, layout: str) -> None:
    x = LAYOUTS[layout](gaussian(24, 40))
    before = x.clone()
    assert not x.is_contiguous() or x.storage_offset() > 0
    torch.testing.assert_close(polar(x, preset), polar(before.contiguous(), preset), atol=1e-10, rtol=0)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", PRESETS)
def test_dtype_is_kept(preset: str, dtype: torch.dtype) -> None:
    x = gaussian(16, 24).to(dtype)
    before = x.clone()
    result = polar(x, preset)
    assert result.dtype == dtype
    assert torch.equal(x, before)
    assert polar_error(x, result).relative < 0.5


@pytest.mark.parametrize("preset", PRESETS)
def test_transposition(preset: str) -> None:
    x = gaussian(24, 60)
    torch.testing.assert_close(polar(x.mT, preset), polar(x, preset).mT, atol=1e-10, rtol=0)


def test_svd_is_equivariant_under_orthogonal_changes_of_basis() -> None:
    x, q, p = gaussian(20, 33), orthogonal(20, 1), orthogonal(33, 2)
    torch.testing.assert_close(polar(q @ x @ p, "svd"), q @ polar(x, "svd") @ p, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_svd_is_the_truth_whatever_the_dtype(dtype: torch.dtype) -> None:
    """At a condition number of 1e5, where an fp32 decomposition is off, up to the rounding of the result."""
    u, v, s = orthogonal(40, 1), orthogonal(50, 2)[:, :40], torch.logspace(0, -5, 40, dtype=torch.float64)
    x = ((u * s) @ v.mT).to(dtype)
    found, wanted = polar(x, "svd"), polar(x.double(), "svd")
    assert (found.double() - wanted).abs().max() <= torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("rows, cols", [(16, 16), (64, 64), (200, 120)])
def test_svd_of_fp32_is_orthogonal_at_condition_1e6(rows: int, cols: int) -> None:
    u, v = (torch.linalg.qr(gaussian(n, cols)).Q for n in (rows, cols))
    x = (u * torch.logspace(0, -5.9, cols, dtype=torch.float64)) @ v.mT
    q = polar(x.float(), "svd").double()
    assert float((q.mT @ q - torch.eye(cols)).abs().max()) < 1e-5


@pytest.mark.parametrize("rank", [1, 4, 30])
def test_svd_of_fp32_keeps_no_rounding_of_a_low_rank(rank: int) -> None:
    """Of a product in fp32, whose singular values beyond the rank are rounding."""
    x = gaussian(64, rank).float() @ gaussian(rank, 48).float()
    q = polar(x, "svd").double()
    assert float(torch.linalg.svdvals(q)[rank:].abs().max()) < 1e-5
    assert int((torch.linalg.svdvals(q) > 0.99).sum()) == rank


def test_svd_drops_what_is_below_eps() -> None:
    x = torch.diag(torch.tensor([1.0, 1e-3, 1e-6], dtype=torch.float64))
    assert polar(x, "svd").diagonal().tolist() == pytest.approx([1, 1, 1])
    assert polar(x, "svd", eps=1e-4).diagonal().tolist() == pytest.approx([1, 1, 0])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_batch_is_its_matrices(preset: str) -> None:
    x = torch.stack([with_spectrum(24, 40, name) for name in ("gaussian", "log", "rank 1", "power")])
    together = polar(x.reshape(2, 2, 24, 40), preset).reshape(4, 24, 40)
    for one, many in zip(x, together):
        torch.testing.assert_close(many, polar(one, preset), atol=1e-9, rtol=0)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_non_finite_matrix_is_nan_and_alone(preset: str, poison: float) -> None:
    x = torch.stack([gaussian(12, 20, seed) for seed in range(3)]).float()
    clean = polar(x, preset)
    x[1, 3, 4] = poison
    result = polar(x, preset)
    assert result[1].isnan().all()
    assert torch.equal(result[0], clean[0])
    assert torch.equal(result[2], clean[2])


@pytest.mark.parametrize("preset", ["auto", "turbo", "jordan"])
def test_chunks_do_not_change_the_result(preset: str) -> None:
    x = gaussian(5 * 24, 40).reshape(5, 24, 40)
    whole = polar(x, preset)
    for limit in (1, 100_000):
        torch.testing.assert_close(polar(x, preset, max_workspace_bytes=limit), whole, atol=1e-9, rtol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_same_input_same_bits(preset: str) -> None:
    x = gaussian(300, 420).float()
    assert torch.equal(polar(x, preset), polar(x.clone(), preset))


@pytest.mark.parametrize("coefficients", [(1, 2, 3), (0.9, 0.9), [(1.5, -0.5)] * 4 + [(3.0, 98.0)]])
def test_own_coefficients_that_diverge_are_refused(coefficients: Any) -> None:
    with pytest.raises(ValueError, match="coefficients take a singular value of .* the result is not finite"):
        polar(torch.eye(4), coefficients=coefficients)


@pytest.mark.parametrize("coefficients", [(1.5, -0.5), (1.875, -1.25, 0.375), (2.1875, -2.1875, 1.3125, -0.3125)])
def test_own_coefficients_of_any_degree_converge(coefficients: tuple[float, ...]) -> None:
    x = gaussian(20, 30)
    assert_polar(x, polar(x, coefficients=coefficients, steps=30), relative=1e-9, off_diagonal=1e-9)


@pytest.mark.parametrize("restarts", [(), (2,), (1, 3), (1, 2, 3)])
def test_restarts_do_not_change_the_mathematics(restarts: tuple[int, ...]) -> None:
    for x in (gaussian(20, 50), gaussian(50, 20), gaussian(20, 20)):
        exact = polar(x, "auto", form="standard")
        torch.testing.assert_close(polar(x, "auto", restarts=restarts), exact, atol=1e-9, rtol=0)


def test_default_restarts() -> None:
    bf16, fp16 = torch.bfloat16, torch.float16
    auto, exact, turbo = (tables.SCHEDULES[name] for name in ("auto", "exact", "turbo"))
    assert default_restarts(auto, "standard", 128, 512, bf16) == (1, 2, 3)
    assert default_restarts(auto, "auto", 512, 512, bf16) == (1, 2, 3)
    assert default_restarts(auto, "auto", 512, 128, bf16) == (2, 3)
    assert default_restarts(auto, "auto", 512, 128, fp16) == (2,)
    assert default_restarts(turbo, "auto", 512, 128, bf16) == (2,)
    assert default_restarts(turbo, "auto", 512, 128, fp16) == ()
    assert default_restarts(exact, "auto", 512, 128, bf16) == (1, 2, 3, 4)
    assert default_restarts(exact, "gram", 512, 512, bf16) == (2, 4)
    assert default_restarts(exact, "auto", 512, 128, fp16) == (3,)
    for short_16_bit in (bf16, fp16):
        assert default_restarts(auto, "auto", 512, 127, short_16_bit) == (1, 2, 3)
    assert default_restarts(auto, "auto", 20, 16, torch.float32) == (2,)


@pytest.mark.parametrize("preset", ["auto", "turbo", "exact"])
@pytest.mark.parametrize("m,n", [(3, 4), (4, 5), (8, 10), (16, 20), (32, 40), (20, 64)])
def test_small_matrices_stay_bounded_in_bf16(preset: str, m: int, n: int) -> None:
    """The Gram form of these matrices sends one in thousands to singular values of 1e12."""
    generator = torch.Generator().manual_seed(m)
    count = 20000 // m
    u = torch.linalg.qr(torch.randn(count, m, m, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(count, n, m, generator=generator))[0]
    s = 10 ** (-4 * torch.rand(count, m, generator=generator))
    found = polar((u * s[:, None]) @ v.mT, preset, dtype=torch.bfloat16)
    assert torch.linalg.matrix_norm(found, 2).max() < 1.4


def test_compute_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compute_dtype("auto", torch.float64, "cpu") == torch.float64
    assert compute_dtype("auto", torch.float16, "cuda") == torch.float16
    assert compute_dtype("jordan", torch.float32, "cuda") == torch.bfloat16
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("steepest.linalg.polar.choice.native_bf16", lambda native=native: native)
        assert compute_dtype("auto", torch.float16, "cpu") == dtype
    assert compute_dtype("svd", torch.bfloat16, "cpu") == torch.float32


@pytest.mark.parametrize(("switch", "dtype"), [("0", torch.float32), ("1", torch.bfloat16)])
def test_a_cpu_counts_as_the_environment_says(switch: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for detected in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda detected=detected: detected)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(choice, "cpu_bf16", switch)
        assert compute_dtype("auto", torch.float32, "cpu") == dtype
        monkeypatch.setattr(choice, "cpu_bf16", "")
        assert compute_dtype("auto", torch.float32, "cpu") == (torch.bfloat16 if detected else torch.float32)


@pytest.mark.slow
def test_what_the_environment_may_say_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    command = "from steepest.linalg import polar; print(repr(polar.cpu_bf16))"
    environment = {**os.environ, "STEEPEST_CPU_BF16": "no"}
    said = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=120)
    assert said.stdout == "'no'\n", said.stderr
    monkeypatch.setattr(choice, "cpu_bf16", "no")
    message = "STEEPEST_CPU_BF16='no' is neither '0' (this CPU has no native bf16 products) nor '1' (it has them)"
    with pytest.raises(ValueError, match=re.escape(message)):
        polar(torch.eye(3))


@pytest.mark.parametrize("spectrum", ["gaussian", "flat", "log", "rank 1"])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e30])
def test_the_fp16_path_keeps_its_range(spectrum: str, scale: float) -> None:
    """What a GPU runs, on a small matrix here: neither overflow nor loss to subnormals at any scale.

    The bound is for rank 1, where rounding in the null space is lifted 500 times beside a single singular value.
    """
    x = with_spectrum(24, 64, spectrum)[None]
    plan = tables.SCHEDULES["auto"]
    y = prescaled((scale * x).float(), torch.float16)
    (y,) = newton_schulz([y], plan, (2,), Workspace(), eps=1e-7, slacks=[torch.empty(len(x))])
    assert y.isfinite().all()
    assert (y[0].double() - expected(x[0], "auto")).norm() / max(1, expected(x[0], "auto").norm()) < 0.3


@pytest.mark.parametrize("preset", PRESETS)
def test_traces_without_data(preset: str) -> None:
    with FakeTensorMode():
        result = polar(torch.empty(2, 300, 40), preset)
    assert result.shape == (2, 300, 40)


@pytest.mark.parametrize("preset", ["auto", *map(slow, ("turbo", "jordan", "exact"))])
def test_compiles_in_one_graph(preset: str) -> None:
    compiled = torch.compile(lambda x: polar(x, preset), fullgraph=True, backend="eager")
    for x in (gaussian(300, 420).float(), gaussian(8, 6).float()):
        assert torch.equal(compiled(x), polar(x, preset))


@pytest.mark.parametrize(
    "x, options, error, message",
    [
        (torch.zeros(3), {}, ValueError, r"takes matrices \(..., m, n\), got shape \(3,\); add a dimension"),
        (torch.zeros(2, 2, dtype=torch.int64), {}, TypeError, "real floating-point tensor, got torch.int64"),
        (torch.zeros(2, 2, dtype=torch.complex64), {}, TypeError, "real floating-point tensor, got torch.complex64"),
        (torch.zeros(2, 2), {"preset": "fast"}, ValueError, "preset 'fast' is not known; choose one of jordan, exact"),
        (torch.zeros(2, 2), {"form": "square"}, ValueError, "form 'square' is not known; choose one of auto, standard"),
        (torch.zeros(2, 2), {"dtype": torch.int32}, TypeError, "dtype torch.int32 cannot be computed in"),
        (torch.zeros(2, 2), {"dtype": torch.float16}, ValueError, "torch.float16 is not used on a CPU"),
        (torch.zeros(2, 2), {"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
        (torch.zeros(2, 2), {"restarts": (4,)}, ValueError, r"restarts must lie in 1 .. 3 for 4 steps, got \(4,\)"),
        (torch.zeros(2, 2), {"max_workspace_bytes": 0}, ValueError, "max_workspace_bytes must be positive or None"),
        (torch.zeros(2, 2), {"preset": "jordan", "steps": 100}, ValueError, "Number of steps must be less than 100"),
    ],
)
def test_messages(x: Tensor, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        polar(x, **options)


@pytest.mark.parametrize("exponent", [-900, -400, 400, 900])
@pytest.mark.parametrize("preset", ["exact", "jordan", "auto", "svd"])
def test_scale_does_not_matter_in_the_whole_range_of_fp64(preset: str, exponent: int) -> None:
    x = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(polar(x * 2.0**exponent, preset), polar(x, preset))


@pytest.mark.parametrize("preset", ["auto", "turbo", "tight_8e-3"])
def test_nearly_equal_singular_values_stay_within_the_bound(preset: str) -> None:
    """The spread of the eigenvalues is then the difference of two nearly equal numbers; in bf16 it was once lost."""
    for m in (2, 3, 16, 128):
        for seed in range(10):
            generator = torch.Generator().manual_seed(seed)
            q = torch.linalg.qr(torch.randn(3 * m, m, generator=generator)).Q.mT
            s = 1 + 0.1 * torch.rand(m, 1, generator=generator)
            s[0] = 1.3
            largest = torch.linalg.matrix_norm(polar(s * q, preset), 2)
            assert largest < 1.3, (m, seed, largest)


def test_a_parameter_is_taken_as_it_is() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 8))
    assert not polar(weight).requires_grad


@pytest.mark.parametrize("preset", ["auto", "turbo", "jordan", "svd"])
def test_several_stacks_equal_each_alone(preset: str) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 12, 40), (150, 130), (0, 3, 4), (2, 2, 7, 7)]
    xs = [torch.randn(*shape, generator=generator) for shape in shapes]
    slacks = [torch.empty(size) for size in (3, 1, 0, 4)]
    alone = [torch.empty_like(slack) for slack in slacks]
    together = polars(xs, preset, slacks=slacks, max_workspace_bytes=1 << 16)
    for x, out, slack, own in zip(xs, together, slacks, alone, strict=True):
        assert torch.equal(out, polar(x, preset, slack=own, max_workspace_bytes=1 << 16))
        assert torch.equal(slack.nan_to_num(-1), own.nan_to_num(-1))


# ---- names of other packages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, gain, smallest, low, high",
    [
        ("cans", 1008, 1e-3, 0.862, 1.114),
        ("deepseekv4", 79262, 1e-3, 0.9999, 1.001),
        ("cubic5", 119, 7e-3, 0.774, 1.300),
        ("quintic", 492, 1e-2, 0.977, 1.032),
        ("simple", 484, 1e-2, 0.681, 1.135),
        ("polar_express_safer", 970, 1e-3, 0.846, 1.142),
        ("dion", 970, 1e-3, 0.846, 1.142),
    ],
)
def test_tables_of_others_land_where_the_docstring_says(
    preset: str, gain: int, smallest: float, low: float, high: float
) -> None:
    """And a diagonal matrix, whose singular values are its entries, is sent there."""
    values = torch.logspace(math.log10(smallest), 0, 4000, dtype=torch.float64)
    table = tables.schedule(preset, None, None).tables[0]
    landed = torch.tensor([tables.evaluate(table, float(v)) for v in values], dtype=torch.float64)
    assert low <= landed.min()
    assert landed.max() <= high
    assert gain == int(tables.gain(table))
    x = torch.diag(values[::500])
    norm = float(torch.linalg.vector_norm(x))
    wanted = torch.tensor([tables.evaluate(table, float(v) / norm) for v in x.diagonal()], dtype=torch.float64)
    torch.testing.assert_close(polar(x, preset).diagonal(), wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("preset", OTHERS)
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (16, 8), (8, 32), (32, 32)], ids=str)
def test_rounding_does_not_carry_tables_of_others_away(preset: str, shape: tuple[int, int]) -> None:
    """In bf16, of full rank and of rank 1, whose singular value is the norm itself."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        u, v = (torch.randn(n, generator=generator) for n in shape)
        for x in (torch.randn(*shape, generator=generator), torch.outer(u, v)):
            y = polar(x, preset, dtype=torch.bfloat16)
            assert torch.linalg.matrix_norm(y.double(), 2) < 1.5


@pytest.mark.parametrize("preset", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tables_of_others_near_the_polynomial(preset: str, dtype: torch.dtype) -> None:
    x = gaussian(48, 80)
    y = polar(x.float(), preset, dtype=dtype).double()
    wanted = expected(x, preset)
    assert float((y - wanted).norm() / wanted.norm()) < (1e-4 if dtype == torch.float32 else 0.15)


def test_a_table_that_turns_matrices_round_is_refused() -> None:
    with pytest.raises(ValueError, match="'aol' sends singular values above .884"):
        polar(gaussian(4, 4), "aol")
    steps = [(4.0098, -7.0585, 2.4635), (3.4585, -5.5479, 2.5959), (2.7573, -3.2939, 1.4254), (2.7215, -3.0494, 1.3169)]
    x = torch.outer(gaussian(1, 5)[0], gaussian(1, 7)[0])
    assert float((polar(x, coefficients=steps) * x).sum()) < 0
