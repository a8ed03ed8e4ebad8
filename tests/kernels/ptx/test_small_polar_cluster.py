"""Matrices that a cluster of four blocks takes: rows dealt out, what crosses over, one Q in 16 bits.

That a matrix is split among blocks is all that differs from test_small_polar.py; what does not depend on it is proved
there.
"""

from __future__ import annotations

import math

import pytest
import torch

from ptx.kernels import Guards, Kernels
from ptx.small_polar import LARGEST, SmallPolar, assert_polynomial, exact, in_half_precision
from steepest.linalg import coefficients as tables
from steepest.linalg.chain import chain
from steepest.linalg.coefficients import Schedule
from steepest.linalg.scaling import prescaled
from support.polar_error import polar_error
from support.singular_values import gaussian, with_spectrum

pytestmark = pytest.mark.kernels


@pytest.fixture
def kernel(kernels: Kernels, guards: Guards) -> SmallPolar:
    return SmallPolar(kernels, guards)


# Nine to sixteen tiles of rows, each block with equally many or not; rows that fill the last tile or not.
@pytest.mark.parametrize(
    "shape, preset, names",
    [
        ((129, 140), "auto", ("gaussian", "log", "rank 1")),
        ((400, 136), "exact", ("log", "rank 2")),
        ((160, 161), "turbo", ("spikes", "gaussian")),
        ((192, 192), "auto", ("rank 2",)),
        ((176, 600), "turbo", ("log",)),
        ((201, 200), "exact", ("steep",)),
        ((210, 300), "turbo", ("clusters",)),
        ((240, 225), "auto", ("power",)),
        ((255, 257), "exact", ("gaussian",)),
        ((256, 256), "auto", ("log",)),
        ((321, 256), "turbo", ("flat",)),
    ],
)
def test_it_is_the_polynomial_of_the_singular_values(
    shape: tuple[int, int], preset: str, names: tuple[str, ...], kernel: SmallPolar
) -> None:
    assert_polynomial(kernel, shape, preset, names, off_diagonal=0.015, rounding=0.05)


@pytest.mark.parametrize("name", ["log", "spikes", "rank 2"])
def test_it_agrees_with_the_chain_of_products(name: str, kernel: SmallPolar) -> None:
    """Which takes such matrices elsewhere: in fp16, a new Gram product before every step."""
    schedule, plan = tables.SCHEDULES["auto"], chain(tables.SCHEDULES["auto"], (1, 2, 3))
    given = with_spectrum(136, 176, name).float()[None]
    x = prescaled(given, torch.float16)
    buffers, slack = {"x": x, "y": torch.empty_like(x)}, torch.empty(1)
    constants = [value for row in plan.constants for value in row]
    numbers = (constants, plan.powers, schedule.slacks, True, 1e-7)
    torch.ops.steepest.polar_chain([x], [buffers["y"]], [slack], [], [], [], *plan.packed, *numbers)
    (found,), (own,) = kernel([given], "auto")
    wanted = buffers[plan.result].float()
    assert own.item() == pytest.approx(slack.item(), rel=1e-3)
    assert (found - wanted).norm() < 0.06 * wanted.norm()


@pytest.mark.parametrize("coefficients", [(1.5, -0.5), (2.1875, -2.1875, 1.3125, -0.3125)])
def test_every_degree(coefficients: tuple[float, ...], kernel: SmallPolar) -> None:
    """3 and 7; the presets have 5 and 9."""
    plan = tables.schedule("auto", coefficients, 4)
    x = gaussian(130, 131)
    torch.testing.assert_close(kernel.one(x.float(), plan).double(), exact(x, plan)[0], atol=4e-3, rtol=0)


def test_degree_9_in_every_step(kernel: SmallPolar) -> None:
    plan = Schedule((((2.460938, -3.28125, 2.953125, -1.40625, 0.2734375),) * 3,), norm="tight")
    x = gaussian(131, 130)
    torch.testing.assert_close(kernel.one(x.float(), plan).double(), exact(x, plan)[0], atol=4e-3, rtol=0)


def test_sums_that_are_cut_off_do_no_harm(kernel: SmallPolar) -> None:
    kernel.kernels.truncate()
    x = with_spectrum(130, 500, "log")
    wanted, _ = exact(half := in_half_precision(x), tables.SCHEDULES["turbo"])
    error = polar_error(half, y := kernel.one(x.float(), "turbo"))
    assert error.largest < LARGEST["turbo"], error
    assert (y - wanted).norm() < 0.05 * wanted.norm(), error


def test_a_batch_is_its_matrices_in_any_company(kernel: SmallPolar) -> None:
    """Blocks of two launches, clusters of two sizes: not a bit differs, nor in a second run."""
    x = torch.stack([with_spectrum(130, 150, name) for name in ("gaussian", "rank 1")]).float()
    before = kernel.launches()
    together, slacks = kernel([gaussian(3, 5).float()[None], x, gaussian(176, 200).float()[None]], "turbo")
    assert kernel.launches() == before + 2
    for one, many, slack in zip(x, together[1], slacks[1]):
        (alone,), (alone_slack,) = kernel([one[None]], "turbo")
        assert torch.equal(many, alone[0])
        assert torch.equal(slack, alone_slack[0])


def test_a_tall_matrix_is_its_transpose(kernel: SmallPolar) -> None:
    x = gaussian(150, 210).float()
    assert torch.equal(kernel.one(x.mT.contiguous(), "turbo"), kernel.one(x, "turbo").mT)


def test_the_order_of_warps_does_not_matter(kernel: SmallPolar) -> None:
    """Of all four blocks: where a barrier is missing some order reads what is not there yet, or no longer."""
    for shape in ((145, 200), (300, 230)):
        x = gaussian(*shape).float()
        wanted, _ = exact(in_half_precision(x.double()), tables.SCHEDULES["turbo"])
        y = kernel.one(x, "turbo")
        assert (y - wanted).norm() < 0.02 * wanted.norm()
        kernel.kernels.seed(7)
        assert torch.equal(kernel.one(x, "turbo"), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_and_not_finite_are_alone(dtype: torch.dtype, kernel: SmallPolar) -> None:
    x = torch.stack([gaussian(131, 133), gaussian(131, 133), torch.zeros(131, 133)]).to(dtype)
    wanted = kernel.one(x[0], "turbo")
    x[1, 130, 132] = math.nan if dtype == torch.float32 else -math.inf
    (y,), (slack,) = kernel([x], "turbo")
    assert torch.equal(y[0], wanted)
    assert y[1].isnan().all()
    assert not y[2].any()
    assert slack.isnan().tolist() == [False, True, False]
    assert slack[2] == 0


@pytest.mark.parametrize(
    "dtype, shape, padding",
    [
        (torch.bfloat16, (135, 141), (3, 5)),
        (torch.float16, (141, 135), (0, 8)),
        (torch.float32, (176, 136), (8, 8)),
        (torch.float32, (136, 176), (1, 0)),
    ],
)
def test_rows_with_gaps(
    dtype: torch.dtype, shape: tuple[int, int], padding: tuple[int, int], kernel: SmallPolar
) -> None:
    """Between them nothing is read or written; in place as well as apart."""
    before, after = padding
    x = gaussian(*shape).to(dtype)[None]
    (wanted,), _ = kernel([x], "turbo")
    room = torch.nn.functional.pad(x, (before, after, 1, 2), value=7.0)
    inside = (slice(None), slice(1, -2), slice(before, before + shape[1]))
    kernel([room[inside]], "turbo", outs=[room[inside]])
    assert torch.equal(room[inside], wanted)
    room[inside] = 7
    assert (room == 7).all()


@pytest.mark.parametrize("shape", [(100, 120), (150, 144)])
def test_less_shared_memory(shape: tuple[int, int], kernel: SmallPolar) -> None:
    """99 KB: four blocks take what is too long for one."""
    x = gaussian(*shape)
    wanted, _ = exact(in_half_precision(x), tables.SCHEDULES["auto"])
    y = kernel.one(x.float(), "auto", capability=120)
    assert (y - wanted).norm() < 0.01 * wanted.norm()
