"""The iteration in fp16 by torch's own products, whose 65504 is not far: what a GPU without compiled kernels runs.

torch multiplies fp16 on a CPU as on a GPU, in fp32 and rounded once, so that the range is seen here as well. `polar`
refuses fp16 on a CPU; below its door nothing does.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steepest.linalg import schatten as schatten_module
from steepest.linalg.coefficients import SCHEDULES, Schedule, polar_express
from steepest.linalg.newton_schulz import newton_schulz, newton_schulz_plain
from steepest.linalg.polar import default_restarts
from steepest.linalg.scaling import prescaled
from steepest.linalg.schatten import schatten
from steepest.ops.symm_gemm import Workspace, gemm
from steepest.ops.weight_update import weight_update
from support.singular_values import gaussian, polynomial_of
from support.slow import slow

FP16 = torch.float16
PRESETS = SCHEDULES | {"polar_express": Schedule((polar_express(),))}
# With degrees 3 and 7 the presets' 5 and 9 are all that a chain is made of.
ALL = PRESETS | {
    "cubic": Schedule((((1.5, -0.5),) * 5,)),
    "septic": Schedule((((2.0, -2.0, 1.0, -0.2),) * 5,)),
    "degree 9": Schedule((((2.5, -3.2, 2.6, -1.0, 0.15),) * 4,)),
}
RAISED = [("row", 20), ("row", 1000), ("column", 20), ("column", 1000), ("entry", 1000), ("entry", 1e5), ("none", 1)]


def raised(m: int, n: int, what: str, factor: float) -> Tensor:
    """A Gaussian matrix with one row, column or entry so many times larger."""
    x = gaussian(m, n)
    part = {"row": x[m // 2], "column": x[:, n // 3], "entry": x[m // 2, n // 3 : n // 3 + 1], "none": x[:0]}[what]
    part.mul_(factor)
    return x


def run(x: Tensor, schedule: Schedule, restarts: tuple[int, ...]) -> Tensor:
    y = prescaled(x.float()[None], FP16)
    return newton_schulz([y], schedule, restarts, Workspace(), eps=1e-7, slacks=[torch.empty(1)])[0][0].double()


def assert_near_the_polynomial(x: Tensor, y: Tensor, schedule: Schedule, bound: float) -> None:
    wanted = polynomial_of(x, schedule)
    assert y.isfinite().all()
    assert (y - wanted).norm() <= bound * wanted.norm()
    # The composed polynomial is steep at the norm end, and what a product loses by being rounded twice, 2^-11 of it,
    # grows as much: "auto" errs by .03, "polar_express", whose first step has slope 22 there, by .16.
    steep = schedule is PRESETS["polar_express"]
    assert torch.linalg.matrix_norm(y, 2) <= torch.linalg.matrix_norm(wanted, 2) + (0.2 if steep else 0.1)


#: Every schedule in the Gram form, which rounds most; those of other nodes in the standard form too.
FORMS = [(name, "gram") for name in ALL]
FORMS += [(name, "standard") for name in ("auto", "polar_express", "cubic", "septic", "degree 9")]
FORMS += [slow(name, "standard") for name in ALL if (name, "standard") not in FORMS]


@pytest.mark.parametrize("name, form", FORMS)
@pytest.mark.parametrize("m,n", [(160, 200), slow(200, 160), slow(128, 128)])
def test_one_large_row_column_or_entry(name: str, form: str, m: int, n: int) -> None:
    """What rounds is bounded by the Gram form's own rounding, which a column 1000 times larger makes largest."""
    schedule = ALL[name]
    restarts = default_restarts(schedule, form, m, n, FP16)
    for what, factor in RAISED:
        x = raised(m, n, what, factor)
        assert_near_the_polynomial(x, run(x, schedule, restarts), schedule, 0.06 if form == "gram" else 0.02)


@pytest.mark.parametrize("name", [name for name in ALL if ALL[name].steps < 5])
def test_without_a_restart(name: str) -> None:
    """Five steps in a row are more than 16 bits bear, on any backend: the coupled R no longer belongs to Q."""
    for what, factor in RAISED:
        x = raised(160, 200, what, factor)
        y = run(x, ALL[name], ())
        assert y.isfinite().all()
        assert torch.linalg.matrix_norm(y, 2) < 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["auto", "turbo", "polar_express"])
@pytest.mark.parametrize("form", ["standard", "gram"])
def test_a_large_matrix(name: str, form: str) -> None:
    """Where the square of R's norm is beyond fp16 four times over."""
    schedule = ALL[name]
    restarts = default_restarts(schedule, form, 512, 640, FP16)
    for what, factor in (("row", 20), ("entry", 1e5)):
        x = raised(512, 640, what, factor)
        assert_near_the_polynomial(x, run(x, schedule, restarts), schedule, 0.06)


@pytest.mark.parametrize("preset", ["jordan", "you"])
def test_the_iteration_as_it_is_printed(preset: str) -> None:
    for what, factor in RAISED:
        x = raised(160, 200, what, factor)
        y = newton_schulz_plain(prescaled(x.float()[None], FP16), SCHEDULES[preset].tables[0], eps=1e-7)[0].double()
        assert_near_the_polynomial(x, y, SCHEDULES[preset], 0.02)


@pytest.mark.parametrize("p", [1, 8 / 7, 6 / 5, 4 / 3, 1.5, 2, 3, 4, 6, 8])
def test_schatten(p: float) -> None:
    """As near to the exact direction as in fp32."""
    for what, factor in RAISED:
        x = raised(96, 128, what, factor).float()
        exact = schatten(x.double(), p, method="eigh")
        errors = [
            (schatten(x, p, dtype=dtype).double() - exact).norm() / exact.norm() for dtype in (torch.float32, FP16)
        ]
        assert errors[1] <= errors[0] + 0.01, (what, factor)


def test_schatten_refuses_powers_that_fp16_does_not_hold() -> None:
    """A Gaussian matrix to the power 31 of its Gram matrix is below fp16's least number: D was zero."""
    with pytest.raises(ValueError, match=r"float16 does not hold the powers that p = 1.03226 takes; choose torch.bfl"):
        schatten(torch.ones(4, 4), 32 / 31, dtype=FP16)
    assert schatten_module.MOST_FP16_POWER == 3
    assert schatten(gaussian(64, 96).float(), 32 / 31, dtype=torch.bfloat16).norm() > 0.5


def test_a_product_is_scaled_before_it_is_stored() -> None:
    """alpha from 2^-40 to 2^10, factors of the size that it brings to order 1: no entry over- or underflows."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1, 64, 64, generator=generator)
    a = a + a.mT
    for exponent in range(-30, 11, 2):
        size = min(2.0 ** (-exponent / 2), 2000.0)
        factor = (a * size / 16).half()
        alpha = torch.tensor([1.3 * 2.0**exponent])
        out = gemm(
            factor, factor, factor, alpha=alpha, beta=1 / (16 * alpha), out=torch.empty_like(factor), symmetric=True
        )
        exact = alpha * (factor.double() @ factor.double()) + factor.double() / (16 * alpha)
        if exact.abs().max() < 60000:
            assert (out - exact).norm() <= 2e-3 * exact.norm(), exponent
    large = torch.full((1, 8, 8), 60000.0).half()
    for value in (0.0, -0.0):
        out = gemm(large, large, alpha=torch.tensor([value]), out=torch.empty_like(large), symmetric=True)
        assert not out.any()
        try:  # where subnormal numbers count as zero, as on a CPU that is told so
            torch.set_flush_denormal(True)
            out = gemm(large, large, alpha=torch.tensor([value]), out=torch.empty_like(large), symmetric=True)
        finally:
            torch.set_flush_denormal(False)
        assert not out.any()
    out = gemm(large, large, alpha=torch.tensor([torch.nan]), out=torch.empty_like(large), symmetric=True)
    assert out.isnan().all()


def test_an_update_of_weights_holds_the_last_product() -> None:
    """Q X is at most the norm that X is divided by times 1.3: sqrt(m), which needs no scaling."""
    x = raised(160, 200, "row", 1000)
    y = prescaled(x.float()[None], FP16)
    weights = torch.zeros(160, 200)
    q = torch.eye(160).half()[None] * 500
    weight_update(q, y, [weights], alpha=torch.tensor([1e-6]), beta=torch.tensor([1.0]))
    assert weights.isfinite().all()
    torch.testing.assert_close(weights, 5e-4 * y[0].float(), rtol=2e-3, atol=1e-7)
