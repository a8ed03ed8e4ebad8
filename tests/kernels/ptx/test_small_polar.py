"""The kernel for small matrices, a block for each: it is the schedule's polynomial of the singular values.

Compiled, and executed: who holds and multiplies what, the barriers, and the arithmetic of halves with fp32 sums, hence
the stability of the whole iteration.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ptx.kernels import Guards, Kernels
from ptx.small_polar import DTYPES, SmallPolar, assert_polynomial, exact, in_half_precision
from steepest.linalg import coefficients as tables
from steepest.linalg.coefficients import Schedule
from support.polar_error import polar_error
from support.singular_values import SPECTRA, gaussian, with_spectrum

pytestmark = pytest.mark.kernels

PRESETS = ("auto", "turbo", "exact", "you")
SHAPES = ((1, 1), (1, 7), (3, 5), (5, 3), (16, 16), (37, 101), (101, 37), (64, 256), (128, 130))


@pytest.fixture
def kernel(kernels: Kernels, guards: Guards) -> SmallPolar:
    return SmallPolar(kernels, guards)


def rounding(m: int) -> float:
    """What the result may differ by, relative to its norm.

    The first polynomials fold the largest singular values to a quarter, where Z's rounding is 20 times as large beside
    what is left; among a few singular values that is not averaged out, here as in the standard form.
    """
    return 0.2 if m < 16 else 0.06


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_polynomial_of_the_singular_values(preset: str, shape: tuple[int, int], kernel: SmallPolar) -> None:
    names = ("gaussian", *SPECTRA) if min(shape) < 64 else ("gaussian", "flat", "log", "rank 2")
    assert_polynomial(kernel, shape, preset, names, off_diagonal=0.06, rounding=rounding(min(shape)))


@pytest.mark.orders(2)
@pytest.mark.parametrize("preset", ["auto", "polar_express"])
@pytest.mark.parametrize("shape", [(2, 3), (4, 5), (20, 16)])
def test_hundreds_of_log_uniform_matrices_stay_bounded(preset: str, shape: tuple[int, int], kernel: SmallPolar) -> None:
    """With everything in 16 bits one in thousands of 4 x 5 goes to singular values beyond 1e12."""
    count, m = 1000 // max(shape), min(shape)
    generator = torch.Generator().manual_seed(m)
    u = torch.linalg.qr(torch.randn(count, shape[0], m, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(count, shape[1], m, generator=generator))[0]
    x = (u * 10 ** (-4 * torch.rand(count, 1, m, generator=generator))) @ v.mT
    (found,), _ = kernel([x], tables.schedule(preset, None, None))
    assert torch.linalg.matrix_norm(found, 2).max() < 1.26
    wanted = torch.stack(
        [exact(in_half_precision(each.double()), tables.schedule(preset, None, None))[0] for each in x]
    )
    assert (found - wanted).norm(dim=(1, 2)).max() < 0.35


@pytest.mark.parametrize("preset, shape", [("auto", (48, 700)), ("auto", (700, 48)), ("polar_express", (4, 20000))])
def test_sums_that_are_cut_off_do_no_harm(preset: str, shape: tuple[int, int], kernel: SmallPolar) -> None:
    """Tensor cores do not round; one sum over the whole long side takes 4 x 20000 to a singular value of 7."""
    kernel.kernels.truncate()
    plan = tables.schedule(preset, None, None)
    for name in ("log", "rank 2", "flat"):
        x = with_spectrum(*shape, name)
        error = polar_error(in_half_precision(x), y := kernel.one(x.float(), plan))
        wanted, _ = exact(in_half_precision(x), plan)
        assert error.largest < 1.26, error
        assert error.off_diagonal < 0.06, error
        assert (y - wanted).norm() < rounding(min(shape)) * wanted.norm(), error


# Convergent iterations of every degree, of as many steps as there may be.
@pytest.mark.parametrize("coefficients", [(1.5, -0.5), (1.875, -1.25, 0.375), (2.1875, -2.1875, 1.3125, -0.3125)])
def test_every_degree(coefficients: tuple[float, ...], kernel: SmallPolar) -> None:
    x = gaussian(20, 90)
    y = kernel.one(x.float(), tables.schedule("auto", coefficients, 8))
    torch.testing.assert_close(y.double(), exact(x, tables.schedule("auto", coefficients, 8))[0], atol=4e-3, rtol=0)


def test_degree_9_in_every_step(kernel: SmallPolar) -> None:
    plan = Schedule((((2.460938, -3.28125, 2.953125, -1.40625, 0.2734375),) * 6,), norm="tight")
    x = gaussian(90, 20)
    torch.testing.assert_close(kernel.one(x.float(), plan).double(), exact(x, plan)[0], atol=4e-3, rtol=0)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-7, 1e7, 1e30])
def test_scale_does_not_matter(scale: float, kernel: SmallPolar) -> None:
    x = gaussian(24, 40).float()
    atol = 0.1 if scale < 1e-38 else 4e-3  # of 1e-42 fp32 holds 10 bits
    torch.testing.assert_close(kernel.one(x * scale, "auto"), kernel.one(x, "auto"), atol=atol, rtol=0)


def test_powers_of_two_do_not_change_a_bit(kernel: SmallPolar) -> None:
    x = gaussian(24, 40).float()
    for exponent in (-100, -7, 60, 125):
        assert torch.equal(kernel.one(x * 2.0**exponent, "auto"), kernel.one(x, "auto"))


def test_a_tiny_matrix_beside_large_entries(kernel: SmallPolar) -> None:
    """Entries of every size in one matrix: squares over- and underflow in fp32, the range does not."""
    x = torch.diag(torch.tensor([3e38, 1e30, 1e10, 1.0, 1e-30, 1e-44]))
    y = kernel.one(x, "exact")
    assert y.isfinite().all()
    assert 0.6 < y[0, 0] < 1.2
    assert y[2:].abs().max() < 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-7, 0.0])
def test_zero_gives_zero(dtype: torch.dtype, eps: float, kernel: SmallPolar) -> None:
    for shape in ((1, 1), (3, 5), (70, 20)):
        x = torch.zeros(2, *shape, dtype=dtype)
        (y,), (slack,) = kernel([x], "auto", eps=eps)
        assert torch.equal(y, x)
        assert slack.tolist() == [0, 0]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_non_finite_matrix_is_nan_and_alone(poison: float, dtype: torch.dtype, kernel: SmallPolar) -> None:
    x = torch.stack([gaussian(12, 20, seed) for seed in range(3)]).to(dtype)
    (clean,), _ = kernel([x], "auto")
    x[1, 3, 4] = poison
    (y,), (slack,) = kernel([x], "auto")
    assert y[1].isnan().all()
    assert slack.isnan().tolist() == [False, True, False]
    assert torch.equal(y[0], clean[0])
    assert torch.equal(y[2], clean[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24, 40), (9, 77), (77, 9)])
def test_dtypes(dtype: torch.dtype, shape: tuple[int, int], kernel: SmallPolar) -> None:
    """The input's elements count, not their type; the output is rounded once."""
    x = gaussian(*shape).to(dtype)
    wanted = kernel.one(x.float(), "auto")
    for out_dtype in DTYPES:
        (y,), _ = kernel([x[None]], "auto", outs=[torch.empty(1, *shape, dtype=out_dtype)])
        assert torch.equal(y[0], wanted.to(out_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24, 40), (21, 77), (77, 21), (70, 64)])
@pytest.mark.parametrize("padding", [(0, 8), (3, 5), (8, 8)])
def test_rows_with_gaps(
    dtype: torch.dtype, shape: tuple[int, int], padding: tuple[int, int], kernel: SmallPolar
) -> None:
    """Between them nothing is read or written."""
    before, after = padding
    x = torch.stack([gaussian(*shape), gaussian(*shape, 1)]).to(dtype)
    (wanted,), _ = kernel([x], "auto")
    room = torch.nn.functional.pad(x, (before, after, 1, 2), value=torch.nan)
    out = torch.full_like(room, 7.0)
    inside = (slice(None), slice(1, -2), slice(before, before + shape[1]))
    (y,), _ = kernel([room[inside]], "auto", outs=[out[inside]])
    assert torch.equal(y, wanted)
    out[inside] = 7
    assert (out == 7).all()


def assorted() -> list[Tensor]:
    """126 matrices of 42 shapes and three element types, as a small network has them."""
    sides = (1, 3, 4, 8, 10, 16, 17)
    shapes = [(a, b) for a in sides for b in (1, 2, 9, 16, 30, 48)]
    return [gaussian(*shape, i).to(DTYPES[i % 3])[None] for i in range(3) for shape in shapes]


def test_126_small_matrices_in_one_launch(kernel: SmallPolar) -> None:
    xs = assorted()
    assert len(xs) == 126
    before = kernel.launches()
    together, slacks = kernel(xs, "auto")
    assert kernel.launches() - before == 1
    for x, y, slack in zip(xs, together, slacks):
        (alone,), (alone_slack,) = kernel([x], "auto")
        assert torch.equal(y, alone)
        assert torch.equal(slack, alone_slack)


@pytest.mark.orders(2)
def test_more_matrices_than_a_launch_takes(kernel: SmallPolar) -> None:
    xs = [gaussian(2, 3, i).float()[None] for i in range(400)]
    before = kernel.launches()
    together, _ = kernel(xs, "turbo")
    assert kernel.launches() - before == 2
    (batch,), _ = kernel([torch.cat(xs)], "turbo")
    assert torch.equal(torch.cat(together), batch)


@pytest.mark.orders(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_stack_of_more_blocks_than_a_grid_has(dtype: torch.dtype, kernel: SmallPolar) -> None:
    """Is cut, wherever the launch is full, and nothing that follows is left out; here a grid has 10 blocks."""
    rows = torch.full((7, 6, 12), torch.nan, dtype=dtype)[:, :, 2:11]
    rows.copy_(torch.stack([gaussian(6, 9, i) for i in range(7)]))
    xs = [rows, gaussian(130, 140)[None].expand(3, -1, -1).to(dtype), torch.stack([gaussian(9, 4)] * 25).to(dtype)]
    xs[1] = xs[1] * torch.tensor([1.0, 2.0, -1.0], dtype=dtype)[:, None, None]
    kernel.kernels.library.door_most_blocks(10)
    before = kernel.launches()
    cut, cut_slacks = kernel(xs, "turbo")
    assert kernel.launches() - before == 4 + 2  # 32 blocks, and 3 clusters of 4
    kernel.kernels.library.door_most_blocks(2**31 - 1)
    whole, slacks = kernel(xs, "turbo")
    assert all(torch.equal(a, b) for a, b in zip([*cut, *cut_slacks], [*whole, *slacks], strict=True))
    assert all(y.isfinite().all() for y in cut)


@pytest.mark.parametrize("shape", [(33, 70), (90, 100)])
def test_a_batch_is_its_matrices_in_company_of_any_size(shape: tuple[int, int], kernel: SmallPolar) -> None:
    x = torch.stack([with_spectrum(*shape, name) for name in ("gaussian", "log", "rank 1")]).float()
    (together, *_), _ = kernel([x, gaussian(128, 5).float()[None], gaussian(128, 128).float()[None]], "auto")
    for one, many in zip(x, together):
        assert torch.equal(many, kernel.one(one, "auto"))


def test_a_tall_matrix_is_its_transpose(kernel: SmallPolar) -> None:
    for shape in ((5, 9), (37, 101), (80, 150)):
        x = gaussian(*shape).float()
        assert torch.equal(kernel.one(x.mT.contiguous(), "auto"), kernel.one(x, "auto").mT)


def test_the_order_of_warps_does_not_matter(kernel: SmallPolar) -> None:
    """Where a barrier is missing some order reads what is not there yet, or no longer."""
    for shape in ((24, 200), (130, 56), (120, 70)):
        x = gaussian(*shape).float()
        wanted, _ = exact(in_half_precision(x.double()), tables.SCHEDULES["auto"])
        y = kernel.one(x, "auto")
        assert (y - wanted).norm() < 0.02 * wanted.norm()
        kernel.kernels.seed(7)
        assert torch.equal(kernel.one(x, "auto"), y)


def test_norms_are_not_taken_below_eps(kernel: SmallPolar) -> None:
    """The mean eigenvalue of the prescaled X X^T lies in [1/4, 1): an eps of 2 is above every norm of one row."""
    x = torch.full((1, 4), 1.0)
    assert kernel.one(x, "exact").norm() == pytest.approx(0.696, abs=0.01)
    assert kernel.one(x, "exact", eps=64.0).norm() == pytest.approx(tables.evaluate(tables.JORDAN, 0.5 / 64), rel=0.02)


@pytest.mark.parametrize("shape", [(24, 200), (200, 24)])
def test_in_place(shape: tuple[int, int], kernel: SmallPolar) -> None:
    x = gaussian(*shape).float()[None]
    (wanted,), _ = kernel([x], "auto")
    kernel([x], "auto", outs=[x])
    assert torch.equal(x, wanted)


@pytest.mark.orders(1)
def test_nothing_to_do(kernel: SmallPolar) -> None:
    before = kernel.launches()
    for shape in ((0, 3, 4), (2, 0, 4), (2, 4, 0)):
        kernel([torch.empty(shape)], "auto")
    assert kernel.launches() == before


@pytest.mark.orders(1)
@pytest.mark.parametrize(
    "shape, plan, capability, message",
    [
        ((257, 300), "auto", 90, "shorter side must be at most 256 with 232448 bytes of shared memory, got 257"),
        ((97, 99), "auto", 86, "must be at most 96 with 101376 bytes of shared memory and no clusters, got 97"),
        ((150, 145), "auto", 120, "must be at most 144 with 101376 bytes of shared memory, got 145"),
        ((4, 5), tables.schedule("polar_express", None, 8), 90, "first coefficients must be at most 1024, got"),
        ((4, 5), Schedule((((1.0, -5000.0),),)), 90, "must be at most 4096, got -5000"),
        ((4, 5), Schedule((((1.0, 2.0, -3.0, 1.0, 1e-5),),)), 90, "ratios to that of degree 9, must be at most 4096"),
        ((4, 5), tables.schedule("jordan", None, 9), 90, "must have the same 1 to 8 steps, got 9"),
    ],
)
def test_messages(
    shape: tuple[int, int], plan: Schedule | str, capability: int, message: str, kernel: SmallPolar
) -> None:
    with pytest.raises(ValueError, match=message):
        kernel([torch.ones(1, *shape)], plan, capability=capability)
