"""Products of fp32 in a chosen precision and averages of Gram matrices: right, symmetric to the bit, rightly routed."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from steepest.ops import backend, products
from steepest.ops.products import PRECISIONS, product, syrk_ema
from support.eigenvalues import tf32_product, tf32x3_product
from support.singular_values import gaussian
from support.triton_interpreter import mend_the_interpreter, run_interpreted

H, B, F, D = torch.float16, torch.bfloat16, torch.float32, torch.float64
NAN = float("nan")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def stack(*shape: int, seed: int = 0, dtype: torch.dtype = F) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D).to(dtype)


def symmetric(batch: int, n: int, seed: int = 0, dtype: torch.dtype = F) -> Tensor:
    x = stack(batch, n, n, seed=seed, dtype=dtype)
    return x + x.mT


def average(factor: Tensor, x: Tensor, weight: Any) -> Tensor:
    """The formula, in fp64."""
    L, y = factor.double(), x.double()
    if weight is None:
        return L + y @ y.mT
    w = weight.double().reshape(-1, 1, 1) if isinstance(weight, Tensor) else weight
    return L + w * (y @ y.mT - L)


# ---- the reference -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 2), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [F, D])
def test_products_are_those_of_fp64(lead: tuple[int, ...], dtype: torch.dtype, precision: Any) -> None:
    A, B_, C = stack(*lead, 20, 30, dtype=dtype), stack(*lead, 30, 7, dtype=dtype), stack(*lead, 20, 7, dtype=dtype)
    held = [x.clone() for x in (A, B_, C)]
    exact = A.double() @ B_.double()
    tolerance = {"atol": 1e-5 if dtype == F else 1e-13, "rtol": 0}
    torch.testing.assert_close(product(A, B_, precision=precision).double(), exact, **tolerance)
    found = product(A, B_, C, precision=precision, alpha=-0.5, beta=3.0)
    assert found.shape == (*lead, 20, 7)
    torch.testing.assert_close(found.double(), 3.0 * C.double() - 0.5 * exact, **tolerance)
    gram = product(A.mT, A, precision=precision, symmetric=True)
    assert torch.equal(gram, gram.mT)
    torch.testing.assert_close(gram.double(), A.double().mT @ A.double(), **tolerance)
    assert all(torch.equal(x, y) for x, y in zip((A, B_, C), held))


def test_numbers_of_their_own() -> None:
    A, C = stack(3, 9, 9), symmetric(3, 9)
    alpha, beta = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 0.0, 3.0])
    wanted = alpha.view(-1, 1, 1) * (A @ A.mT) + beta.view(-1, 1, 1) * C
    for is_symmetric in (True, False):
        found = product(A, A.mT, C, precision="tf32x3", alpha=alpha, beta=beta, symmetric=is_symmetric)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [F, D, H, B])
@pytest.mark.parametrize("given", ["number", "none", "scalar", "each"])
@pytest.mark.parametrize("batch, m, k", [(1, 5, 3), (3, 33, 50), (1, 300, 40), (2, 4, 0)])
def test_averages_of_gram_matrices(batch: int, m: int, k: int, given: str, dtype: torch.dtype) -> None:
    weight = {"number": 0.1, "none": None, "scalar": torch.tensor(0.3), "each": torch.linspace(0, 1, batch)}[given]
    x, factor = stack(batch, m, k, dtype=dtype), symmetric(batch, m, dtype=torch.promote_types(dtype, F))
    held, wanted = factor.clone(), average(factor, x, weight)
    for y in (x, x.mT.contiguous().mT):
        found = syrk_ema(factor, y, weight)
        assert found.dtype == factor.dtype
        assert torch.equal(found, found.mT)
        torch.testing.assert_close(found.double(), wanted, atol=1e-4 if dtype != D else 1e-12, rtol=0)
    assert torch.equal(factor, held)
    if batch == 1:
        torch.testing.assert_close(syrk_ema(factor[0], x[0], weight), found[0])


def test_an_average_is_exact_at_both_ends() -> None:
    x, factor = stack(2, 6, 4), symmetric(2, 6)
    assert torch.equal(syrk_ema(factor, x, torch.zeros(())), factor)
    assert torch.equal(syrk_ema(factor, x, torch.ones(2)), syrk_ema(torch.zeros_like(factor), x, None))


@pytest.mark.parametrize("count, m, k", [(3, 70, 33), (2, 600, 90)])
def test_an_average_has_the_same_bits_alone_and_on_any_number_of_threads(count: int, m: int, k: int) -> None:
    x, factor, threads = stack(count, m, k), symmetric(count, m), torch.get_num_threads()
    found = syrk_ema(factor, x, 0.1)
    try:
        torch.set_num_threads(3 - min(threads, 2))
        for i in range(count):
            assert torch.equal(found[i], syrk_ema(factor[i], x[i], 0.1))
            assert torch.equal(found[i], syrk_ema(factor[i], x[i].mT.contiguous().mT, 0.1))
    finally:
        torch.set_num_threads(threads)


def test_errors() -> None:
    a = torch.ones(2, 4, 4)
    for call, error, message in (
        (lambda: product(a, a, precision="bf16"), ValueError, "precision 'bf16' is not known; use one of tf32x3, tf32"),
        (lambda: product(a.half(), a.half(), precision="tf32"), TypeError, "takes float32 or float64 for all, got"),
        (lambda: product(a, a.double(), precision="tf32"), TypeError, "torch.float32, torch.float64"),
        (lambda: product(a, a[:1], precision="tf32"), ValueError, r"make a product: \(2, 4, 4\), \(1, 4, 4\)"),
        (lambda: product(a, a, a[..., 1:], precision="tf32"), ValueError, "do not make a product"),
        (lambda: syrk_ema(a.half(), a.half(), 0.1), TypeError, "factor must be float32 or float64, got torch.float16"),
        (lambda: syrk_ema(a, a.double(), 0.1), TypeError, "no wider than the factor, torch.float32, got torch.float64"),
        (lambda: syrk_ema(a, a.int(), 0.1), TypeError, "x is floating"),
        (lambda: syrk_ema(a, a[:, 1:], 0.1), ValueError, r"do not fit: \(2, 4, 4\), \(2, 3, 4\)"),
        (lambda: syrk_ema(a, a, torch.ones(3)), ValueError, r"weight must hold 1 number or 2, .* shape \(3,\)"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_traced_and_fake() -> None:
    A, factor = stack(2, 9, 5), symmetric(2, 9)

    def both(A: Tensor, factor: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return product(A.mT, A, precision="tf32x3", symmetric=True), syrk_ema(factor, A, weight)

    weight = torch.tensor(0.25)
    torch.testing.assert_close(
        torch.compile(both, backend="eager", fullgraph=True)(A, factor, weight), both(A, factor, weight)
    )
    with FakeTensorMode() as mode:
        found = both(*(mode.from_tensor(x) for x in (A, factor, weight)))
    assert [tuple(x.shape) for x in found] == [(2, 5, 5), (2, 9, 9)]


# ---- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [32, 512, 4096])
def test_what_tensor_cores_round(k: int) -> None:
    """In three terms products err as fp32 does, also where they nearly cancel; TF32 errs by 2^-9 of a term at most."""
    for seed, cancels in itertools.product(range(3), (False, True)):
        A, B_ = stack(64, k, seed=seed), stack(k, 64, seed=seed + 9)
        if cancels:
            A, B_ = torch.cat([A, A], 1), torch.cat([B_, -B_ * (1 + 1e-4)])
        exact, size = A.double() @ B_.double(), A.double().abs() @ B_.double().abs()
        fp32, three, one = ((f(A, B_) - exact).norm() for f in (torch.matmul, tf32x3_product, tf32_product))
        assert three < 2 * fp32 + 2.0**-23 * size.norm() / k**0.5
        assert 50 * fp32 < one
        assert bool(((tf32_product(A, B_) - exact).abs() <= 2.0**-9 * size).all())


# ---- routes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Tensors pass for those of an H100, and calls of the kernel are kept."""
    calls: list[tuple[Any, ...]] = []

    def launch(a: Tensor, b: Tensor, c: Any, alpha: Any, beta: Any, gamma: Any, out: Tensor, **options: Any) -> None:
        calls.append((a, b, c, alpha, beta, gamma, out, options))

    kernels = types.ModuleType("steepest.kernels.symm_gemm")
    kernels.product = launch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "steepest.kernels.symm_gemm", kernels)
    monkeypatch.setattr(backend, "triton_reason", lambda: None)
    monkeypatch.setattr(backend, "_logged", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return calls


class Cuda(Tensor):
    """Of a GPU that is not there."""

    is_cuda = True


def route(A: Tensor, precision: Any) -> str:
    return products._route(A.as_subclass(Cuda), precision)


def test_routes(on_a_gpu: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    a = torch.ones(2, 4, 4)
    precisions = ("tf32x3", "tf32", "ieee")
    assert products._route(a, "tf32x3") == "torch"
    assert [route(a, p) for p in precisions] == ["triton", "triton", "torch"]
    # Torch would multiply in TF32 then.
    with monkeypatch.context() as patch:
        patch.setattr(products, "_torch_is_exact", lambda: False)
        assert [route(a, p) for p in precisions] == ["triton"] * 3
        patch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
        assert [route(a, p) for p in precisions] == ["triton", "torch", "triton"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    with caplog.at_level(logging.INFO, logger="steepest"):
        assert [route(a, p) for p in (*precisions, *precisions)] == ["torch"] * 6
    assert len(caplog.messages) == 1, "tf32 has been said before"
    assert "TF32 is no faster than fp32 on compute capability 8.9" in caplog.text
    assert products._route(a.as_subclass(Cuda), "tf32x3", narrow=True) == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert route(a, "tf32x3") == "torch"
    assert "torch.float64" in str(products._unsupported_by_triton(a.double(), "tf32x3", False))


def test_whether_torch_is_exact() -> None:
    """The setting is read as it is now. Only this test changes it."""
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert not products._torch_is_exact()
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert products._torch_is_exact()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_what_the_kernel_is_given(on_a_gpu: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_route", lambda A, precision, narrow=False: "triton")
    A, C = stack(2, 2, 6, 5), stack(2, 2, 6, 6)
    assert product(A, A.mT, C, precision="tf32x3", alpha=2.0, beta=0.5, symmetric=True).shape == (2, 2, 6, 6)
    a, b, c, *numbers, out, options = on_a_gpu.pop()
    assert [tuple(x.shape) for x in (a, b, c, out)] == [(4, 6, 5), (4, 5, 6), (4, 6, 6), (4, 6, 6)]
    assert a.data_ptr() == b.data_ptr() == A.data_ptr()
    assert (numbers, options) == ([2.0, 0.5, 0.0], {"symmetric": True, "precision": "tf32x3"})
    product(A[..., ::2], A[..., ::2].mT, precision="tf32")
    a, b, c, *_ = on_a_gpu.pop()
    assert c is None
    assert a.is_contiguous()
    assert b.is_contiguous()
    factor, g, weight = symmetric(3, 6), stack(3, 4, 6, dtype=B), torch.tensor(0.1)
    averaged = syrk_ema(factor, g.mT, weight)
    a, b, c, alpha, beta, _, out, options = on_a_gpu.pop()
    assert a.data_ptr() == b.data_ptr() == g.data_ptr(), "no copy of the gradient"
    assert (a.dtype, tuple(a.shape)) == (B, (3, 6, 4))
    assert (c.data_ptr(), out.data_ptr()) == (factor.data_ptr(), averaged.data_ptr())
    assert alpha.shape == (3,)
    assert alpha.data_ptr() == weight.data_ptr()
    assert beta is None
    assert options == {"symmetric": True, "precision": "tf32x3"}
    syrk_ema(factor, g.mT, None)
    assert on_a_gpu.pop()[3:5] == (1.0, 1.0)


# ---- the kernel ----------------------------------------------------------------------------------------------------


Sizes = list[tuple[int, ...]]


def check_kernel(kernels: Any, device: torch.device, sizes: Sizes, bound: dict[str, float]) -> None:
    """Every precision against fp64: batches, transposes, rows with room between them, averages in place."""
    for turn, ((m, n, k), batch, precision) in enumerate(itertools.product(sizes, (1, 3), PRECISIONS)):
        flips = [bool(turn >> i & 1) for i in range(3)]
        a, b, c = (
            (stack(batch, columns, rows + turn % 3, seed=turn)[..., :rows].mT if flip else stack(batch, rows, columns))
            for flip, (rows, columns) in zip(flips, ((m, k), (k, n), (m, n)))
        )
        a, b, c = (x.to(device) for x in (a, b, c))
        size = a.double().abs() @ b.double().abs() + c.double().abs()
        out = torch.full((batch, m, n), NAN, device=device)
        kernels.product(a, b, c, 0.5, -2.0, 0.0, out, symmetric=False, precision=precision)
        error = (out.double() - (0.5 * (a.double() @ b.double()) - 2 * c.double())).abs()
        assert bool((error <= bound[precision] * size).all()), (m, n, k, batch, precision, (error / size).max())
        again = torch.empty_like(out)
        kernels.product(a, b, c, 0.5, -2.0, 0.0, again, symmetric=False, precision=precision)
        assert torch.equal(again, out)
        factor = symmetric(batch, m).to(device)
        weight = (torch.rand(4, batch, generator=torch.Generator().manual_seed(turn)).to(device))[turn % 4]
        weight[0] = (0.0, 1.0, 0.5, 0.01)[turn % 4]
        wanted, held = average(factor, a, weight), factor.clone()
        kernels.product(a, a.mT, factor, weight, None, 0.0, factor, symmetric=True, precision=precision)
        assert torch.equal(factor, factor.mT), "symmetric to the bit"
        size = a.double().abs() @ a.double().abs().mT + held.double().abs()
        assert bool(((factor.double() - wanted).abs() <= bound[precision] * size).all()), (m, k, batch, precision)
        if turn % 4 == 0:
            assert torch.equal(factor[0], held[0]), "nothing of the product at weight 0"


def check_gradients(kernels: Any, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> None:
    """Of 16 bits, beside a factor in fp32: their products are exact."""
    for m, k in sizes:
        for x in (stack(2, m, k, dtype=dtype), stack(2, k, m, dtype=dtype).mT):
            factor, weight = symmetric(2, m).to(device), torch.tensor([0.1], device=device).expand(2)
            wanted, x = average(factor, x.to(device), weight), x.to(device)
            kernels.product(x, x.mT, factor, weight, None, 0.0, factor, symmetric=True)
            assert torch.equal(factor, factor.mT)
            torch.testing.assert_close(factor.double(), wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@needs_triton
def test_in_the_interpreter() -> None:
    done = run_interpreted(__file__)
    assert done.stdout.strip() == "equal", done.stderr


# Three terms drop products of two small parts (2^-22 of a term) and cut what is left of a small one (2^-21); fp32 sums
# add k / 2 units in the worst case and far less in fact.
ON_A_GPU = {"tf32x3": 2.0**-19, "tf32": 2.0**-9 + 2.0**-18, "ieee": 2.0**-19}


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    kernels = pytest.importorskip("steepest.kernels.symm_gemm")
    sizes: Sizes = [(1, 1, 1), (7, 65, 33), (130, 70, 257), (256, 384, 512), (1000, 200, 520)]
    check_kernel(kernels, torch.device("cuda"), sizes, ON_A_GPU)
    for dtype in (H, B):
        check_gradients(kernels, torch.device("cuda"), dtype, [(7, 50), (130, 70), (512, 256)])


@pytest.mark.gpu
@pytest.mark.parametrize("k", [256, 2048])
def test_errors_on_a_gpu(k: int) -> None:
    """Beside those of fp32, in the norm; and a matrix has the same bits in any batch and any run."""
    kernels = pytest.importorskip("steepest.kernels.symm_gemm")
    a, b = stack(4, 512, k).cuda(), stack(4, k, 512, seed=1).cuda()
    exact, size = a.double() @ b.double(), (a.double().abs() @ b.double().abs()).norm()
    found = {}
    for precision in PRECISIONS:
        out = found[precision] = torch.empty(4, 512, 512, device="cuda")
        for run in (out, torch.empty_like(out)):
            kernels.product(a, b, None, 1.0, 0.0, 0.0, run, symmetric=False, precision=precision)
            assert torch.equal(run, out)
        alone = torch.empty_like(out[:1])
        kernels.product(a[2:3], b[2:3], None, 1.0, 0.0, 0.0, alone, symmetric=False, precision=precision)
        assert torch.equal(alone[0], out[2])
    error = {name: (out.double() - exact).norm() for name, out in found.items()}
    assert error["tf32x3"] <= 2 * error["ieee"]
    assert error["tf32"] <= 2.0**-9 * size


@pytest.mark.gpu
def test_the_ops_on_a_gpu() -> None:
    A, factor = stack(3, 96, 200).cuda(), symmetric(3, 96).cuda()
    weight = torch.tensor(0.05, device="cuda")
    for precision in PRECISIONS:
        found = product(A, A.mT, factor, precision=precision, alpha=0.5, symmetric=True)
        wanted = 0.5 * A.double() @ A.double().mT + factor.double()
        torch.testing.assert_close(found.double(), wanted, atol=0.2 if precision == "tf32" else 2e-4, rtol=0)
    wanted = average(factor, A, weight)
    torch.testing.assert_close(syrk_ema(factor, A, weight).double(), wanted, atol=1e-4, rtol=0)
    bf16 = gaussian(200, 96).to(B).cuda()
    wanted = average(factor[0], bf16.mT, weight)
    torch.testing.assert_close(
        syrk_ema(factor[0], bf16.mT, weight, out=factor[0]).double(), wanted[0], atol=1e-4, rtol=0
    )


if __name__ == "__main__":
    import steepest.kernels.symm_gemm as interpreted

    mend_the_interpreter()
    interpreted.GROUP = 2
    interpreted._choose = lambda a, n, symmetric, *_: interpreted.Configuration(16, 16 if symmetric else 32, 16, 2, 4)
    # Every product there is one of fp32.
    few: Sizes = [(1, 1, 1), (7, 33, 20), (40, 17, 24), (24, 40, 0)]
    check_kernel(interpreted, torch.device("cpu"), few, dict.fromkeys(PRECISIONS, 2.0**-21))
    check_gradients(interpreted, torch.device("cpu"), H, [(20, 35)])
    print("equal")
