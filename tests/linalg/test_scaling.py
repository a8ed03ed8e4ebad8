"""Matrices of any magnitude, from the least number of their dtype to the largest, in every compute dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from steepest import Muon
from steepest.linalg import polar as polar_module
from steepest.linalg import schatten as schatten_module
from steepest.linalg.basis import eigh_refresh, orthonormality
from steepest.linalg.coefficients import SCHEDULES
from steepest.linalg.newton_schulz import newton_schulz
from steepest.linalg.polar import polar, polars
from steepest.linalg.roots import inverse_root, spectral_bound
from steepest.linalg.scaling import inverse_power_of_two, largest_entry, prescaled
from steepest.linalg.schatten import schatten
from steepest.ops.polar_chain import Update
from steepest.ops.symm_gemm import Workspace
from steepest.tools.bench.counting import Peak
from support.eigenvalues import off_diagonal
from support.singular_values import gaussian, polynomial_of
from support.slow import slow

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
of_every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def least(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def magnitudes(dtype: torch.dtype) -> list[float]:
    """From a few times the least number on, over the border of the subnormal ones, to the largest."""
    info = torch.finfo(dtype)
    small = [least(dtype) * k for k in (4, 100, 1e4)]
    return [*small, info.smallest_normal, info.smallest_normal * 300, 1.0, info.max / 64, info.max / 8]


def stored(x: Tensor, dtype: torch.dtype, magnitude: float) -> tuple[Tensor, Tensor]:
    """x times the magnitude as the dtype holds it, and the same in fp64 with entries of order 1."""
    given = (x * magnitude).to(dtype)
    assert given.isfinite().all()
    return given, given.double() / magnitude


@of_every_dtype
def test_two_numbers_make_the_power_of_two(dtype: torch.dtype) -> None:
    for value in (least(dtype), torch.finfo(dtype).smallest_normal, 0.5, 1.0, 1.5, torch.finfo(dtype).max):
        x = torch.tensor([[[value]]], dtype=dtype)
        scale = inverse_power_of_two(largest_entry(x))
        assert all(factor.isfinite().all() and factor.log2().frac().abs().max() == 0 for factor in scale)
        assert 0.5 <= scale.times(x).item() < 1
        assert scale.divide(scale.times(x)).item() == value
    for value in (torch.inf, -torch.inf, torch.nan):
        x = torch.tensor([[[1.0, value]]], dtype=dtype)
        assert inverse_power_of_two(largest_entry(x)).times(x).isnan().all()
    nothing = inverse_power_of_two(torch.zeros(1, 1, 1, dtype=dtype))
    assert (nothing.first * nothing.second).item() == 1


@of_every_dtype
@pytest.mark.parametrize("work", FLOATS, ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_a_matrix_is_brought_into_range_as_it_is(dtype: torch.dtype, work: torch.dtype, count: int) -> None:
    """All but its scale, to the rounding of the narrower dtype; a zero matrix is zero, one with NaN is NaN."""
    x = gaussian(12, 20).clamp(-3, 3)
    for magnitude in magnitudes(dtype):
        given, wanted = stored(x, dtype, magnitude)
        stack = torch.stack([given, torch.zeros_like(given), given.clone()])[:count]
        if count == 3:
            stack[2, 3, 4] = torch.nan
        kept = stack.clone()
        y = prescaled(stack, work)
        torch.testing.assert_close(stack, kept, rtol=0, atol=0, equal_nan=True)
        assert y.dtype == work
        found = y[0].double()
        ratio = found.abs().max() / wanted.abs().max()
        assert (found / ratio - wanted).abs().max() <= 2 * torch.finfo(work).eps * wanted.abs().max(), magnitude
        if work == torch.float16:
            assert 0.24 <= found.square().sum() / 12 <= 1
        else:
            assert 0.5 <= found.abs().max() <= 1
        if count == 3:
            assert not y[1].any()
            assert y[2].isnan().all()


@of_every_dtype
@pytest.mark.parametrize("preset", ["auto", "jordan", "svd"])
def test_a_polar_factor_of_any_magnitude(dtype: torch.dtype, preset: str) -> None:
    works = {"svd": (torch.float32, torch.float64)}.get(preset, (torch.bfloat16, torch.float32, torch.float64))
    for magnitude in magnitudes(dtype):
        given, same = stored(gaussian(24, 40).clamp(-3, 3), dtype, magnitude)
        for work in works:
            found, wanted = polar(given, preset, dtype=work).double(), polar(same, preset, dtype=torch.float64)
            tolerance = 4 * torch.finfo(dtype).eps + 0.1 * (work == torch.bfloat16) + 1e-3
            assert (found - wanted).norm() <= tolerance * wanted.norm(), (magnitude, work)
    assert not polar(torch.zeros(2, 3, 4, dtype=dtype), preset).any()


@of_every_dtype
def test_the_fp16_iteration_of_any_magnitude(dtype: torch.dtype) -> None:
    """What a GPU runs; entries of 1e-40 gave NaN."""
    for magnitude in magnitudes(dtype):
        given, same = stored(gaussian(128, 160).clamp(-3, 3), dtype, magnitude)
        y = prescaled(given[None], torch.float16)
        (y,) = newton_schulz([y], SCHEDULES["auto"], (2,), Workspace(), eps=1e-7, slacks=[torch.empty(1)])
        wanted = polynomial_of(same, SCHEDULES["auto"])
        assert (y[0].double() - wanted).norm() <= 0.02 * wanted.norm(), magnitude


@pytest.mark.parametrize("p", [1, 4 / 3, 1.5, 4, 5])
def test_a_schatten_direction_of_any_magnitude(p: float) -> None:
    for magnitude in magnitudes(torch.float32):
        given, same = stored(gaussian(12, 20).clamp(-3, 3), torch.float32, magnitude)
        for work in (torch.float16, torch.float32):
            found, wanted = schatten(given, p, dtype=work).double(), schatten(same, p, dtype=torch.float64)
            assert (found - wanted).norm() <= 0.02 * wanted.norm(), (magnitude, work)


def test_roots_and_bases_of_any_magnitude() -> None:
    x = gaussian(8, 30)
    for magnitude in (1e-44, 1e-42, 1e-38, 1e-20, 1.0, 1e36):
        given, same = stored(x @ x.mT, torch.float32, magnitude)
        root, residual = inverse_root(given, 2)
        assert residual < 1e-4
        wanted, _ = inverse_root(same, 2)
        torch.testing.assert_close(root.double() * magnitude**0.5, wanted, rtol=1e-3, atol=1e-4)
        largest = torch.linalg.matrix_norm(same, 2) * magnitude
        # The least fp32 is 2^-149, and the bound is a multiple of it.
        assert largest <= spectral_bound(given).double() + least(torch.float32) <= 1.4 * largest + 2e-45
        refreshed = eigh_refresh(given, torch.eye(8), method="eigh")
        assert orthonormality(refreshed.basis) < 1e-6
        assert off_diagonal(given, refreshed.basis) < 1e-5
        exact = torch.linalg.eigvalsh(same).flip(-1)
        torch.testing.assert_close(refreshed.values.double() / magnitude, exact, rtol=1e-3, atol=2e-45 / magnitude)
    one = torch.full((1, 1), least(torch.float32))
    assert inverse_root(one, 2)[0].item() == pytest.approx(2**74.5, rel=1e-5)
    assert inverse_root(one, 2)[1] < 1e-6


@pytest.mark.parametrize("work", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_step_on_what_is_left_of_a_momentum(work: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter that gets no gradient for thousands of steps: its momentum shrinks to nothing and moves it no less
    far until it does, and never is there anything that is not finite."""
    for module in (polar_module, polar_module.choice):
        monkeypatch.setattr(module, "compute_dtype", lambda *_: work)
    monkeypatch.setattr("steepest.linalg.polar.factors.check", lambda *_: None)  # which refuses fp16 on a CPU
    weight = torch.nn.Parameter(torch.zeros(16, 24))
    optimizer = Muon([weight], lr=1.0, weight_decay=0.0, backend=backend)
    weight.grad = gaussian(16, 24).float()
    optimizer.step()
    length = weight.detach().norm()
    for magnitude in (1e-30, 1e-38, 1e-40, 1e-42, 1e-44, 0.0):
        with torch.no_grad():
            weight.zero_()
            weight.grad.zero_()
            optimizer.state[weight]["momentum_buffer"].copy_(gaussian(16, 24) * magnitude)
        optimizer.step()
        assert weight.isfinite().all()
        if work != torch.bfloat16 or magnitude >= 1e-40 or magnitude == 0:  # bf16 holds no less than 9e-41
            assert abs(weight.detach().norm() - length * (magnitude > 0)) < 0.2 * length, magnitude


# ---- memory --------------------------------------------------------------------------------------------------------


class NoWideCopies(TorchDispatchMode):
    """Fails where a norm is asked for in a dtype that CUDA reads its input into by a copy: all but fp32 of 16 bits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtype = (kwargs or {}).get("dtype")
        if "norm" in str(func) and dtype not in (None, args[0].dtype):
            assert (args[0].dtype.itemsize, dtype) == (2, torch.float32)
        return func(*args, **(kwargs or {}))


def peak_of(call: Callable[[], object]) -> int:
    """Of what a GPU allocates: on "meta" the same operations in torch, which cast as they read and write."""
    with NoWideCopies(), Peak() as peak:
        call()
    return peak.peak


@of_every_dtype
@pytest.mark.parametrize("work", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_prescaling_takes_one_copy(dtype: torch.dtype, work: torch.dtype) -> None:
    """In the compute dtype; of fp64, whose range is not that of any other, one in fp32 as well."""
    x = torch.empty(4, 512, 1024, dtype=dtype, device="meta")
    bytes_each = work.itemsize + (4 if dtype == torch.float64 else 0)
    assert peak_of(lambda: prescaled(x, work)) <= 1.01 * bytes_each * x.numel()


@pytest.mark.parametrize(
    "work, m, n",  # what is allocated goes by the size of an entry: fp16 on one shape
    [slow(torch.float16, 512, 1024)]
    + [(torch.bfloat16, m, n) for m, n in ((512, 512), (512, 1024), (4096, 512))]
    + [slow(torch.float32, 512, 512), (torch.float32, 512, 1024), slow(torch.float32, 4096, 512)],
)
@pytest.mark.parametrize("form", ["standard", "gram"])
def test_the_workspace_of_the_iteration(work: torch.dtype, m: int, n: int, form: str) -> None:
    """workspace_bytes bounds what is allocated, and by not much more than half as much again."""
    x = torch.empty(4, m, n, dtype=work, device="meta")
    for preset in ("auto", "turbo", "exact", "polar_express"):
        used = peak_of(lambda preset=preset: polar(x, preset, dtype=work, form=form))
        bound = len(x) * polar_module.workspace_bytes(m, n, work)
        assert 0.55 * bound <= used <= bound, preset
        used = peak_of(lambda preset=preset: polar(x.double(), preset, dtype=work, form=form))
        assert used <= bound + 2 * 8 * x.numel(), f"{preset}: beside x.double() and the result"
    weights = [torch.empty(m, n, dtype=torch.bfloat16, device="meta") for _ in x]
    numbers = torch.empty(len(x), device="meta")
    update = Update(weights, numbers, numbers)
    used = peak_of(lambda: polars([x], "auto", dtype=work, form=form, updates=[update]))
    assert used <= len(x) * polar_module.workspace_bytes(m, n, work) + 2 * 4 * m * n  # two of one weight in fp32


@pytest.mark.parametrize("work", [slow(torch.float16), torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("p", [1, slow(4 / 3), 1.5, 2, 3, slow(4), 8])
def test_the_workspace_of_a_schatten_direction(p: float, work: torch.dtype) -> None:
    for m, n in ((512, 512), (512, 1024), (4096, 512)):
        x = torch.empty(4, m, n, dtype=work, device="meta")
        result = x.numel() * work.itemsize
        used = peak_of(lambda x=x: schatten(x, p, dtype=work)) - result
        assert used <= len(x) * schatten_module.workspace_bytes(p, m, n, work)
