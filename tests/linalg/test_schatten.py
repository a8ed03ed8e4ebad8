"""`schatten` against the fp64 SVD: the compositions, exact powers, eigenvectors and rank one, and what they cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from steepest.linalg import runner
from steepest.linalg import schatten as module
from steepest.linalg.polar import polar
from steepest.linalg.scaling import prescaled
from steepest.linalg.schatten import SAFETY, STEPS, by_products, compute_dtype, schatten, schatten_work
from steepest.ops import backend
from steepest.ops.symm_gemm import Number, Workspace
from support.singular_values import LAYOUTS, SHAPES, SPECTRA, gaussian, orthogonal, three_shapes, with_spectrum
from support.slow import slow

INF = math.inf
POWERS = (2, 4 / 3, 6 / 5, 8 / 7, 32 / 31)
PRODUCTS = (1, *POWERS, *STEPS, INF)
ALL_SPECTRA = ("gaussian", *SPECTRA)


def exact(x: Tensor, p: float, least: float = 1e-9) -> Tensor:
    """U S^(q-1) V^T / ||S^(q-1)||_p over the singular values above ``least`` times the largest."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s[..., :1]
    f = torch.where(s > least, s ** (1 / (p - 1)), 0)
    return (u * (f / torch.linalg.vector_norm(f, ord=p, dim=-1, keepdim=True))[..., None, :]) @ vh


def composed(p: float, x: Tensor, rounding: float = 0.0, signs: tuple[int, ...] = ()) -> Tensor:
    """What the steps make of the singular values x; step k off by signs[k] times the rounding of its terms."""
    y = x
    for k, (a, b, c, d) in enumerate(STEPS[p]):
        terms = torch.stack([a * y, b * y**3, c * y**5, d * x])
        y = terms.sum(0)
        if k < len(signs):
            y = y + signs[k] * rounding * terms.abs().sum(0)
    return y


def expected(x: Tensor, p: float) -> Tensor:
    """The composition of the fp64 singular values, divided by the bound that the eigenvalues of (X X^T)^2 give."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    m, fourth = len(s), s**4
    bound = (fourth.mean() + (m - 1) ** 0.5 * (fourth - fourth.mean()).norm() / m**0.5) ** 0.25
    s = s / (SAFETY * bound)
    f = composed(p, s)
    norm = torch.linalg.vector_norm(f, ord=p) if p % 2 == 0 else (s * f).sum() ** (1 / p)
    return (u * (f / norm)) @ vh


def norm(x: Tensor, p: float) -> Tensor:
    return torch.linalg.vector_norm(torch.linalg.svdvals(x.double()), ord=p, dim=-1)


def dual(p: float) -> float:
    return INF if p == 1 else 1.0 if p == INF else p / (p - 1)


# ---- the compositions -----------------------------------------------------------------------------------------------

# p: largest error of f on [1e-3, 1]; the same where every term of a step is off by 2^-9, bf16's rounding; f(s) / s near
# 0; and the part of ||X||_q by which <X, D> falls short, the worst of eleven spectra and seven shapes
CLAIMS = {
    1.5: (0.00194, 0.0064, 0.08, 0.0008),
    3: (0.0154, 0.0285, 16.3, 0.0008),
    4: (0.0262, 0.0475, 76.5, 0.0022),
    6: (0.0390, 0.0645, 235.5, 0.0047),
    8: (0.0541, 0.090, 362.9, 0.0075),
}


def test_every_composition_has_its_claims() -> None:
    assert set(CLAIMS) == set(STEPS)


@pytest.mark.parametrize("p", CLAIMS)
def test_a_composition_is_near_the_power(p: float) -> None:
    error, rounded, gain, _ = CLAIMS[p]
    x = torch.cat([torch.logspace(-3, 0, 20001), torch.linspace(1e-3, 1, 20001)]).double()
    wanted = x ** (1 / (p - 1))
    assert (composed(p, x) - wanted).abs().max() < error
    for signs in itertools.product((1, -1), repeat=len(STEPS[p]) - 1):
        assert (composed(p, x[::10], 2**-9, signs) - wanted[::10]).abs().max() < rounded
    assert composed(p, torch.tensor([1e-12]).double()).item() == pytest.approx(gain * 1e-12, rel=1e-2)
    below = torch.logspace(-12, -3, 1001).double()
    assert (composed(p, below) > 0).all()
    assert (composed(p, below) < below ** (1 / (p - 1)) + error).all()
    # A bound of the norm that rounding made 1% too small.
    assert (composed(p, torch.linspace(1, 1.01, 1001).double()) - 1).abs().max() < error + 0.02


@pytest.mark.parametrize("p", STEPS)
@pytest.mark.parametrize("spectrum", ALL_SPECTRA)
def test_fp64_is_the_composition_of_the_singular_values(p: float, spectrum: str) -> None:
    for shape in three_shapes(list(STEPS).index(p) + ALL_SPECTRA.index(spectrum)):
        x = with_spectrum(*shape, spectrum)
        torch.testing.assert_close(schatten(x, p, method="matmul"), expected(x, p), atol=1e-8, rtol=0)


@pytest.mark.parametrize("p", STEPS)
@pytest.mark.parametrize("spectrum", ALL_SPECTRA)
def test_the_inner_product_is_nearly_the_dual_norm(p: float, spectrum: str) -> None:
    for shape in SHAPES:
        x = with_spectrum(*shape, spectrum)
        d = schatten(x, p, method="matmul")
        length = norm(d, p).item()
        assert length == pytest.approx(1, abs=1e-12 if p % 2 == 0 else 0.02)
        assert 1 - CLAIMS[p][3] < (x * d).sum() / length / norm(x, dual(p)) < 1 + 1e-12


# ---- exact powers, eigenvectors, rank one, the ends -----------------------------------------------------------------


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("spectrum", ALL_SPECTRA)
def test_whole_powers_are_exact(p: float, spectrum: str) -> None:
    for shape in three_shapes(list(POWERS).index(p) + ALL_SPECTRA.index(spectrum)):
        x = with_spectrum(*shape, spectrum)
        torch.testing.assert_close(schatten(x, p), exact(x, p), atol=1e-11, rtol=0)


EXPONENTS = (1.01, 1.25, 1.5, 2, 3, 4, 5.5, 8, 100, INF)


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("spectrum", ALL_SPECTRA)
def test_eigenvectors_are_exact(p: float, spectrum: str) -> None:
    for shape in three_shapes(EXPONENTS.index(p) + ALL_SPECTRA.index(spectrum)):
        x = with_spectrum(*shape, spectrum)
        torch.testing.assert_close(schatten(x, p, method="eigh"), exact(x, p, 1e-7), atol=3e-9, rtol=0)


@pytest.mark.parametrize("method", ["matmul", "eigh"])
@pytest.mark.parametrize("spectrum", ALL_SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rank_one_reaches_the_largest_singular_value(method: str, spectrum: str, dtype: torch.dtype) -> None:
    for shape in three_shapes(ALL_SPECTRA.index(spectrum)):
        x = with_spectrum(*shape, spectrum)
        d = schatten(x, 1, method=method, dtype=dtype).double()
        s = torch.linalg.svdvals(d)
        assert s.sum().item() == pytest.approx(1, abs=1e-6)
        assert s[1:].sum() < 1e-6
        assert (x * d).sum() > (1 - 2e-3) * torch.linalg.svdvals(x)[0]


def test_equal_largest_singular_values_still_give_rank_one() -> None:
    q = orthogonal(20)
    d = schatten(q, 1)
    assert torch.linalg.svdvals(d)[1] < 1e-12
    assert (q * d).sum().item() == pytest.approx(1, abs=1e-12)


def test_the_ends_are_frobenius_and_polar() -> None:
    x = gaussian(12, 20)
    torch.testing.assert_close(schatten(x, 2), x / x.norm(), atol=1e-15, rtol=0)
    assert torch.equal(schatten(x, INF), polar(x))
    torch.testing.assert_close(schatten(x, INF, method="eigh"), polar(x, "svd"), atol=1e-12, rtol=0)
    gaps = [(schatten(x, p, method="eigh") * min(x.shape) ** (1 / p) - polar(x, "svd")).norm() for p in (8, 64, 512)]
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2]


@pytest.mark.parametrize("p", [1.2, 4 / 3, 1.7, 3, 4, 8])
def test_the_maps_of_p_and_q_undo_each_other(p: float) -> None:
    """unit_q(unit_p(x)) = x / ||x||_q: the power q - 1 of the power p - 1."""
    x = gaussian(9, 14)
    there = schatten(x, p, method="eigh")
    torch.testing.assert_close(schatten(there, dual(p), method="eigh"), x / norm(x, dual(p)), atol=1e-11, rtol=0)


@pytest.mark.parametrize("p", [1, 4 / 3, 1.5, 3, 4, 8, 5.5])
def test_nothing_of_length_one_goes_further(p: float) -> None:
    x = gaussian(6, 9)
    d = schatten(x, p, method="eigh")
    trials = d + 10 ** -torch.linspace(0, 4, 200)[:, None, None] * gaussian(200 * 6, 9, seed=1).reshape(200, 6, 9)
    reach = (x * trials).sum((-2, -1)) / norm(trials, p)
    assert (reach <= (x * d).sum() * (1 + 1e-12)).all()
    assert (x * d).sum().item() == pytest.approx(norm(x, dual(p)).item(), rel=1e-12)


# ---- 16 and 32 bits -------------------------------------------------------------------------------------------------


def off_diagonal(x: Tensor, d: Tensor, p: float) -> float:
    """||U^T (D - expected) V||_F over the norm of what is expected."""
    wanted = expected(x, p) if p in STEPS else exact(x, p)
    return ((d.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("p", STEPS)
@pytest.mark.parametrize("spectrum", ["gaussian", "flat", "log", "power", "root", "spikes", "rank 1"])
def test_fp32_rounds_little(p: float, spectrum: str) -> None:
    for shape in ((96, 96), (96, 384), (384, 96), (37, 101)):
        x = with_spectrum(*shape, spectrum)
        d = schatten(x.float(), p, dtype=torch.float32)
        assert off_diagonal(x, d, p) < 0.02
        assert norm(d, p).item() == pytest.approx(1, abs=1e-5 if p % 2 == 0 else 0.02)


def sixteen(a: Tensor, out: Tensor, symmetric: bool = False) -> Tensor:
    return out.copy_(a.tril() + a.tril(-1).mT if symmetric else a)


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    out: Tensor,
    symmetric: bool = False,
    workspace: Workspace | None = None,
) -> Tensor:
    """A product as a GPU takes it: 16-bit operands, fp32 inside, one rounding."""
    return sixteen(alpha * (a.float() @ b.float()) + (0.0 if c is None else beta * c.float()), out, symmetric)


# The rounding of 16 bits, relative to the direction, the worst of four shapes.
ROUNDING = {
    torch.float16: {1.5: 0.002, 3: 0.005, 4: 0.013, 6: 0.031, 8: 0.046},
    torch.bfloat16: {1.5: 0.006, 3: 0.028, 4: 0.1, 6: 0.22, 8: 0.32},
}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("p", STEPS)
@pytest.mark.parametrize("spectrum", ["gaussian", "log", "power", "clusters", "spikes"])
def test_16_bits_stay_near_the_composition(
    p: float, spectrum: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "gemm", gemm)
    for shape in ((96, 96), (96, 384), (384, 96), (37, 101)):
        x = with_spectrum(*shape, spectrum)
        d = module._by_products(prescaled(x[None], dtype), p)[0]
        assert off_diagonal(x, d, p) < ROUNDING[dtype][p]
        assert norm(d, p).item() == pytest.approx(1, abs=0.02)


def matrices(count: int, m: int, n: int, spectrum: Callable[[torch.Generator], Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(m)
    u = torch.linalg.qr(torch.randn(count, m, m, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(count, n, m, generator=generator, dtype=torch.float64)).Q
    return (u * torch.stack([spectrum(generator) for _ in range(count)]).double()[:, None]) @ v.mT


def furthest_short(x: Tensor, p: float, d: Tensor) -> float:
    short = 1 - (x * d.double()).sum((-2, -1)) / norm(d, p) / norm(x, dual(p))
    return float(short.max())


@pytest.mark.parametrize("p", STEPS)
@pytest.mark.parametrize("m, n", [slow(2, 2), (3, 4), slow(4, 5), slow(8, 10), (20, 64)])
def test_no_small_matrix_goes_astray(p: float, m: int, n: int) -> None:
    """In bf16 one in thousands did: rounding does not average out, and the bound of the norm is sharp."""
    x = matrices(2000 // m, m, n, lambda g: 10 ** -torch.rand(m, generator=g))
    assert furthest_short(x, p, schatten(x.float(), p, dtype=torch.bfloat16)) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("p", STEPS)
def test_a_sharp_bound_of_the_norm_is_borne(p: float, dtype: torch.dtype) -> None:
    """One singular value or a few above equal others: the bound is the norm itself."""

    def spectrum(generator: torch.Generator) -> Tensor:
        s = torch.full((64,), torch.rand(1, generator=generator).item())
        s[: 1 + int(3 * torch.rand(1, generator=generator))] = 1
        return s

    x = matrices(25, 64, 80, spectrum)
    assert furthest_short(x, p, schatten(x.float(), p, dtype=dtype)) < 0.015


# ---- cost -----------------------------------------------------------------------------------------------------------


def flops(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """Multiplications and additions in the products of a call; a symmetric product counts half."""
    counted = [0]

    def counting(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def product(a: Tensor, b: Tensor, *args: Tensor, symmetric: bool = False, **kwargs: Number) -> Tensor:
            counted[0] += 2 * a.numel() * b.shape[-1] // (2 if symmetric else 1)
            return original(a, b, *args, symmetric=symmetric, **kwargs)

        return product

    with monkeypatch.context() as patch:
        patch.setattr(runner, "gemm", counting(runner.gemm))
        patch.setattr(backend, "forced", "torch")  # product by product
        call()
    return counted[0]


# p: products of 2 m^3 operations in the standard form, a = long / short side: (3 a + 1) / 2 a step
PAPER = {
    1.5: lambda a: 2 * (3 * a + 1) / 2,
    3: lambda a: 5 * (3 * a + 1) / 2,
    4: lambda a: 6 * (3 * a + 1) / 2 + a / 2,
    6: lambda a: 6 * (3 * a + 1) / 2 + a / 2 + 0.5,
    8: lambda a: 6 * (3 * a + 1) / 2 + a / 2 + 0.5,
    4 / 3: lambda a: 1.5 * a,
}


@pytest.mark.parametrize("p", PAPER)
@pytest.mark.parametrize("aspect", [1, 2, 4])
def test_the_cost_is_at_most_twice_that_of_the_polar_factor(
    p: float, aspect: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = gaussian(128, 128 * aspect).float()
    polar_flops = flops(lambda: polar(x, dtype=torch.bfloat16), monkeypatch)
    own = flops(lambda: schatten(x, p, dtype=torch.bfloat16), monkeypatch)
    assert own == pytest.approx(PAPER[p](aspect) * 2 * 128**3)
    assert own <= 2 * polar_flops
    in_fp32 = flops(lambda: schatten(x, p, dtype=torch.float32), monkeypatch)
    assert in_fp32 <= min(own, 1.6 * flops(lambda: polar(x, dtype=torch.float32), monkeypatch))
    if aspect > 1 and p in STEPS:
        saved = (len(STEPS[p]) * (3 * aspect + 1) - (5 * len(STEPS[p]) - 5 + 3 * aspect)) / 2
        assert in_fp32 == pytest.approx((PAPER[p](aspect) - saved) * 2 * 128**3)


# ---- the door -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [*PRODUCTS, 5.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_gives_zero(p: float, dtype: torch.dtype) -> None:
    for shape in ((3, 5), (5, 3), (1, 1), (2, 4, 4)):
        zero = torch.zeros(shape, dtype=dtype)
        assert torch.equal(schatten(zero, p), zero)
        assert torch.equal(schatten(zero, p, method="eigh"), zero)


@pytest.mark.parametrize("p", [*PRODUCTS, 5.5])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-5, 1e20, 1e30])
def test_scale_does_not_matter(p: float, scale: float) -> None:
    x = gaussian(24, 40).float()
    wanted = schatten(x, p, dtype=torch.float32)
    torch.testing.assert_close(schatten(x * scale, p, dtype=torch.float32), wanted, atol=2e-4, rtol=0)


@pytest.mark.parametrize("p", [*PRODUCTS, 5.5])
def test_a_transpose_and_a_batch_are_as_they_should_be(p: float) -> None:
    x = gaussian(24, 60)
    torch.testing.assert_close(schatten(x.mT, p), schatten(x, p).mT, atol=1e-9, rtol=0)
    batch = torch.stack([with_spectrum(24, 40, name) for name in ("gaussian", "log", "rank 1", "power")])
    together = schatten(batch.reshape(2, 2, 24, 40), p).reshape(4, 24, 40)
    for one, many in zip(batch, together):
        torch.testing.assert_close(many, schatten(one, p), atol=1e-9, rtol=0)
    for limit in (1, 100_000):
        torch.testing.assert_close(schatten(batch, p, max_workspace_bytes=limit), together, atol=1e-9, rtol=0)


@pytest.mark.parametrize("p", [*PRODUCTS, 5.5])
def test_a_non_finite_matrix_is_nan_and_alone(p: float) -> None:
    x = torch.stack([gaussian(12, 20, seed) for seed in range(3)]).float()
    clean = schatten(x, p)
    x[1, 3, 4] = INF
    found = schatten(x, p)
    assert found[1].isnan().all()
    assert torch.equal(found[0], clean[0])
    assert torch.equal(found[2], clean[2])


@pytest.mark.parametrize("p", [*PRODUCTS, 5.5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter_and_the_input_is_not_written(p: float, layout: str) -> None:
    x = LAYOUTS[layout](gaussian(24, 40))
    before = x.clone()
    torch.testing.assert_close(schatten(x, p), schatten(before.contiguous(), p), atol=1e-9, rtol=0)
    assert torch.equal(x, before)


@pytest.mark.parametrize("p", [*PRODUCTS, 5.5])
def test_dtype_empties_and_repetition(p: float) -> None:
    for shape in ((0, 4), (4, 0), (0, 3, 4), (2, 0, 4)):
        assert schatten(torch.empty(shape), p).shape == shape
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = gaussian(16, 24).to(dtype)
        d = schatten(x, p)
        assert d.dtype == dtype
        assert torch.equal(d, schatten(x.clone(), p))


@pytest.mark.parametrize("p", PRODUCTS)
def test_products_trace_without_data(p: float) -> None:
    with FakeTensorMode():
        assert schatten(torch.empty(2, 30, 40), p).shape == (2, 30, 40)


@pytest.mark.slow
@pytest.mark.parametrize("p", [1, 8])
def test_products_compile_in_one_graph(p: float) -> None:
    compiled = torch.compile(lambda x: schatten(x, p), fullgraph=True, backend="eager")
    x = gaussian(24, 40).float()
    torch.testing.assert_close(compiled(x), schatten(x, p), atol=1e-6, rtol=0)


def test_which_p_have_products_and_in_which_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(by_products(p) and by_products(p, "matmul") for p in (1, *POWERS, INF))
    assert not any(by_products(p) for p in (*STEPS, 1.01, 1.25, 2.5, 5, 7, 16, 34 / 33))
    assert all(by_products(p, "matmul") for p in STEPS)
    assert not any(by_products(p, "matmul") for p in (1.01, 1.25, 2.5, 5, 7, 16, 34 / 33))
    assert not any(by_products(p, "eigh") for p in PRODUCTS)
    for native, narrow in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("steepest.linalg.polar.choice.native_bf16", lambda native=native: native)
        for p in (4, 4 / 3):
            assert compute_dtype(p, torch.float32, "cpu", method="matmul") == torch.float32
            assert compute_dtype(p, torch.bfloat16, "cpu", method="matmul") == narrow
        assert compute_dtype(INF, torch.float32, "cpu") == narrow
    on_gpu = {INF: torch.float16, 4: torch.float16, 4 / 3: torch.bfloat16, 1: torch.bfloat16, 2: torch.float32}
    for p, narrow in on_gpu.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert compute_dtype(p, dtype, "cuda", method="matmul") == narrow
        assert compute_dtype(p, torch.float64, "cuda", method="matmul") == torch.float64
    assert compute_dtype(1, torch.bfloat16, "cpu") == torch.float32
    for x in (gaussian(6, 4), gaussian(4, 6).float(), gaussian(4, 6).bfloat16()):
        assert torch.equal(schatten(x, 4), schatten(x, 4, method="eigh"))
        in_fp32 = schatten(x, 4, dtype=torch.float32)
        assert torch.equal(in_fp32, schatten(x, 4, method="matmul", dtype=torch.float32))
        assert not torch.equal(in_fp32, schatten(x, 4))


# ---- what "auto" promises --------------------------------------------------------------------------------------------

BETWEEN = (1.5, 2.5, 3, 4, 5, 6, 7, 8)
#: Half of the distance of two neighbours at 1: what rounding moves an entry by, relative to it.
HALF_EPS = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def by_numpy(x: Tensor, p: float, least: float = 1e-7) -> np.ndarray:
    """U S^(q-1) V^T / ||S||_q^(q-1), S those above ``least`` of the largest, by numpy's SVD in fp64."""
    u, s, vt = np.linalg.svd(x.double().numpy(), full_matrices=False)
    s, q = np.where(s > least * s[0], s / s[0], 0), p / (p - 1)
    return (u * s ** (q - 1)) @ vt / (s**q).sum() ** ((q - 1) / q)


def away(found: np.ndarray | Tensor, wanted: np.ndarray) -> float:
    found = found.double().numpy() if isinstance(found, Tensor) else found
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def of_condition(m: int, n: int, condition: float) -> Tensor:
    k = min(m, n)
    u, v = orthogonal(m)[:, :k], orthogonal(n)[:, :k]
    return (u * torch.logspace(0, -math.log10(condition), k, dtype=torch.float64)) @ v.mT


@pytest.mark.parametrize("p", BETWEEN)
@pytest.mark.parametrize("dtype", HALF_EPS, ids=str)
@pytest.mark.parametrize("native", [False, True])
def test_a_direction_errs_by_one_rounding(
    p: float, dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of 16 bits were off by .014 to .3, and by .8 at rank 3 (p = 8)."""
    monkeypatch.setattr("steepest.linalg.polar.choice.native_bf16", lambda: native)
    for m, n in ((1, 5), (24, 24), (20, 60), (60, 20), (37, 41)):
        for x in (gaussian(m, n), *(of_condition(m, n, c) for c in (10, 1e3, 1e5)), gaussian(m, 1) @ gaussian(1, n)):
            given = x.to(dtype)
            bound = HALF_EPS[dtype] * 1.001 + 1e-13 if dtype != torch.float64 else 5e-12
            s = np.linalg.svd(given.double().numpy(), compute_uv=False)
            if ((s < 1e-5 * s[0]) & (s > 1e-7 * s[0])).any():
                moved = given.double() * (1 + HALF_EPS[dtype] * gaussian(m, n, seed=5).sign())
                bound = max(bound, away(by_numpy(moved, p), by_numpy(given, p)))
            if (abs(s / s[0] / 1e-7 - 1) < 0.3).any():
                continue  # whether it is dropped is a matter of rounding
            assert away(schatten(given, p), by_numpy(given, p)) < bound, (m, n)


@pytest.mark.parametrize("p", [p for p in BETWEEN if p > 2])  # below, small ones count for little
@pytest.mark.parametrize("condition", [1e6, 5e6])
def test_small_singular_values_err_by_less_than_rounding_x(p: float, condition: float) -> None:
    x = of_condition(40, 56, condition).float()
    moved = x.double() * (1 + 2.0**-24 * gaussian(40, 56, seed=5).sign())
    assert away(by_numpy(moved, p), by_numpy(x, p)) > 1e-7
    assert away(schatten(x, p), by_numpy(x, p)) < away(by_numpy(moved, p), by_numpy(x, p))


@pytest.mark.parametrize("p", BETWEEN)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_device_or_dtype_takes_products_that_err_by_more(p: float, device: str) -> None:
    """The choice for a GPU too, where fp32 was taken in fp16: products never, so that its input is gathered in fp32."""
    for dtype in HALF_EPS:
        assert not by_products(p)
        assert compute_dtype(p, dtype, device) == torch.promote_types(dtype, torch.float32)
        assert schatten_work(p, 64, 96, dtype, device).solver > 0
        assert schatten_work(p, 64, 96, dtype, device).narrow == 0


@pytest.mark.parametrize(
    "x, p, options, error, message",
    [
        (torch.zeros(3), 4, {}, ValueError, r"takes matrices \(..., m, n\), got shape \(3,\); add a dimension"),
        (torch.zeros(2, 2, dtype=torch.int64), 4, {}, TypeError, "real floating-point tensor, got torch.int64"),
        (torch.zeros(2, 2), 0.5, {}, ValueError, "p must be at least 1, got 0.5; math.inf is the spectral norm"),
        (torch.zeros(2, 2), math.nan, {}, ValueError, "p must be at least 1, got nan"),
        (torch.zeros(2, 2), 4, {"method": "svd"}, ValueError, "method 'svd' is not known; choose one of auto, matmul"),
        (torch.zeros(2, 2), 5, {"method": "matmul"}, ValueError, "p = 5 has no products: choose one of 1, 1.5, 2, 3"),
        (
            torch.zeros(2, 2),
            4,
            {"dtype": torch.int32},
            TypeError,
            "dtype torch.int32 cannot be computed in; choose one of",
        ),
        (torch.zeros(2, 2), 4, {"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
    ],
)
def test_messages(x: Tensor, p: float, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        schatten(x, p, **options)
