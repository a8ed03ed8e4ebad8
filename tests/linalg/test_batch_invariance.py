"""On a CPU a matrix has the bits that it has alone, whatever else is in its batch and however it lies in memory.

The bits of sharded optimizers rest on it: an owner takes the matrices that are its, and one process all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import steepest
from steepest.linalg.basis import eigh_refresh, tracked
from steepest.linalg.polar import polar, polars
from steepest.linalg.roots import inverse_root, spectral_bound
from steepest.linalg.schatten import schatten
from steepest.ops import matmul as products
from steepest.ops import solvers
from steepest.ops.matmul import matmul
from steepest.ops.power import power
from steepest.ops.products import product, syrk_ema
from steepest.ops.reductions import CHUNK, total, vector_norm
from steepest.ops.symm_gemm import gemm
from steepest.parts import ClipRMS, Columns, Frobenius, Graft, Hyper, Normalize, NormRatio, Rows, Sphere
from support.slow import slow
from support.training import noise, same_bits

FLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float64
#: On both sides of what vectors and tiles of BLAS hold, and of what this package cuts at.
SIZES = (*range(1, 18), 23, 24, 25, 31, 32, 33, 40, 47, 48, 49, 63, 64, 65, 70, 128, 257)
#: What every run looks at; the others all of them.
FEW = (1, 3, 16, 33)
ALL = pytest.mark.parametrize("sizes", [FEW, slow(SIZES)], ids=["few", "many"])
#: Names, and functions of a stack (batch, m, n) that give stacks.
Function = Callable[[Tensor], Tensor | Sequence[Tensor]]


def layouts(x: Tensor) -> Iterator[Tensor]:
    """The same numbers: contiguous, as transposes, beside others, and away from a boundary of memory."""
    yield x.clone()
    yield x.mT.contiguous().mT
    beside = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)
    beside[..., 1:-2] = x
    yield beside[..., 1:-2]
    off = torch.zeros(x.numel() + 1, dtype=x.dtype)
    off[1:] = x.reshape(-1)
    yield off[1:].view(x.shape)


def check(function: Function, x: Tensor, what: str) -> None:
    """Of a stack in every layout, and of one between and the last alone, contiguous and as a transpose."""

    def parts(y: Tensor | Sequence[Tensor]) -> list[Tensor]:
        return [y] if isinstance(y, Tensor) else list(y)

    together = parts(function(x.clone()))
    for number, lies in enumerate(layouts(x)):
        for a, b in zip(together, parts(function(lies)), strict=True):
            assert same_bits(a, b), f"{what} of {tuple(x.shape)}, {x.dtype}, depends on memory ({number})"
    for i in {len(x) // 2, len(x) - 1}:
        for number, lies in enumerate((x[i : i + 1].clone(), x[i : i + 1].mT.contiguous().mT)):
            for a, b in zip(together, parts(function(lies)), strict=True):
                assert same_bits(a[i : i + 1], b), (
                    f"{what} of {tuple(x.shape)}, {x.dtype}: matrix {i} alone is another ({number})"
                )


def batch_of(n: int) -> int:
    """1 to 9."""
    return 1 + n % 9


def definite(x: Tensor) -> Tensor:
    """Symmetric to the bit, and positive definite, from squares."""
    gram = syrk_ema(torch.zeros_like(x), x, None)
    return gram + 0.01 * torch.eye(x.shape[-1], dtype=x.dtype)


def bases(x: Tensor) -> Tensor:
    return solvers.qr(x)[0].contiguous()


def multiplied(x: Tensor, other: int) -> Iterator[tuple[str, Function]]:
    """Products with as many columns as `other`, of x on either side."""
    _, m, n = x.shape
    left, right = noise((1, other, m), 5, x.dtype), noise((1, n, other), 6, x.dtype)
    yield "x @ b", lambda y: matmul(y, right.expand(len(y), n, other))
    yield "a @ x", lambda y: matmul(left.expand(len(y), other, m), y)
    yield "x.mT @ a.mT", lambda y: matmul(y.mT, left.mT.expand(len(y), m, other))
    yield "x @ x.mT", lambda y: product(y, y.mT, precision="tf32x3", symmetric=True)
    added = noise((1, m, other), 7, x.dtype)
    yield (
        "a product",
        lambda y: product(
            y,
            right.expand(len(y), n, other),
            added.expand(len(y), m, other),
            precision="ieee",
            alpha=0.3,
            beta=1.7,
        ),
    )


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("other", [1, 40, slow(257), slow(1000)])
@ALL
def test_products(dtype: torch.dtype, other: int, sizes: Sequence[int]) -> None:
    for n in sizes:
        x = noise((batch_of(n), n, 1 + (7 * n) % 67), n, dtype)
        for name, function in multiplied(x, other):
            check(function, x, name)


@pytest.mark.parametrize("threads", [1, slow(2)])
def test_products_with_long_sums(threads: int) -> None:
    """Which BLAS cuts, and shares out among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for m, n in ((1, 1), (2, 3), (16, 16), (64, 64)):
            for k in (257, 2000):
                for dtype in (FLOAT, DOUBLE):
                    b = noise((1, k, n), 1, dtype)
                    check(
                        lambda y, b=b, k=k, n=n: matmul(y, b.expand(len(y), k, n)), noise((3, m, k), 2, dtype), "x @ b"
                    )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [FLOAT, HALF, DOUBLE], ids=str)
@ALL
def test_averages_of_squares(dtype: torch.dtype, sizes: Sequence[int]) -> None:
    factor_dtype = torch.promote_types(dtype, FLOAT)
    for n in sizes:
        x = noise((batch_of(n), n, 1 + (5 * n) % 71), n).to(dtype)
        for side in ("left", "right"):
            length = n if side == "left" else x.shape[-1]
            factor = torch.eye(length, dtype=factor_dtype)

            def average(y: Tensor, side: str = side, factor: Tensor = factor) -> Tensor:
                return syrk_ema(factor.repeat(len(y), 1, 1), y if side == "left" else y.mT, 0.1)

            check(average, x, f"the {side} factor")


@pytest.mark.parametrize("dtype", [FLOAT, slow(HALF), slow(DOUBLE)], ids=str)
@pytest.mark.parametrize("threads", [slow(1), 2])
@ALL
def test_sums_and_norms(dtype: torch.dtype, threads: int, sizes: Sequence[int]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n in (*sizes, 1000):
            x = noise((batch_of(n), n, 1 + (11 * n) % 73), n).to(dtype)
            for dim in (-1, -2, (-2, -1)):
                check(lambda y, dim=dim: total(y, dim), x, f"the sum over {dim}")
                check(lambda y, dim=dim: vector_norm(y, dim), x, f"the norm over {dim}")
                check(lambda y, dim=dim: vector_norm(y, dim, dtype=DOUBLE), x, f"the norm in fp64 over {dim}")
            check(lambda y: power(y.abs(), 0.3), x, "the power")
        for n in (32768, 32769, 3 * CHUNK * CHUNK // 64 + 5):
            x = noise((3, 2, n), n).to(dtype)
            check(total, x, "the long sum")
            check(lambda y: total(y, -1), x, "the sum of long rows")
            check(vector_norm, x, "the long norm")
    finally:
        torch.set_num_threads(before)


def test_sums_and_norms_are_what_they_say() -> None:
    for shape in ((3, 5, 7), (1, 1, 1), (2, 9, 3 * CHUNK + 5), (2, 0, 3)):
        x = noise(shape, 1, DOUBLE)
        for dim in (-1, -2, (-2, -1)):
            for keep in (False, True):
                torch.testing.assert_close(total(x, dim, keep), x.sum(dim, keepdim=keep))
                torch.testing.assert_close(
                    vector_norm(x, dim, keep), torch.linalg.vector_norm(x, dim=dim, keepdim=keep)
                )
    torch.testing.assert_close(power(x.abs(), 0.3), x.abs() ** 0.3)


@pytest.mark.parametrize("dtype", [FLOAT, slow(DOUBLE)], ids=str)
@pytest.mark.parametrize("method", [slow("jr"), "qr", slow("qr_sorted"), slow("eigh"), "auto", "tracked"])
@ALL
def test_refreshed_bases(method: Any, dtype: torch.dtype, sizes: Sequence[int]) -> None:
    for n in sizes:
        x = noise((batch_of(n), n, n), n, dtype)
        P, Q = definite(x), bases(noise(x.shape, n + 1000, dtype))
        P = P.mul(0.95) + 0.05 * definite(noise(x.shape, n + 2000, dtype))
        near = solvers.eigh(P.double()).to(dtype) if n % 2 else Q

        def refreshed(pair: Tensor, n: int = n) -> Sequence[Tensor]:
            given, basis = pair[..., :n], pair[..., n:]
            return tracked(given, basis) if method == "tracked" else eigh_refresh(given, basis, method=method)

        check(refreshed, torch.cat([P, near], -1), f"the refresh by {method}")


@pytest.mark.parametrize("dtype", [FLOAT, slow(DOUBLE)], ids=str)
@pytest.mark.parametrize("p", [slow(1), 2, slow(4), slow(8)])
@ALL
def test_inverse_roots(p: int, dtype: torch.dtype, sizes: Sequence[int]) -> None:
    for n in sizes:
        P = definite(noise((batch_of(n) if n < 128 else 2, n, n), n, dtype))
        check(lambda y: inverse_root(y, p), P, f"the inverse root {p}")
        check(spectral_bound, P, "the bound")


@pytest.mark.parametrize("dtype", [FLOAT, HALF, DOUBLE], ids=str)
@pytest.mark.parametrize("preset", ["auto", "jordan", "svd"])
@ALL
def test_polar_factors(preset: str, dtype: torch.dtype, sizes: Sequence[int]) -> None:
    for n in sizes:
        x = noise((batch_of(n) if n < 128 else 2, n, 1 + (3 * n) % 83), n).to(dtype)
        check(lambda y: polar(y, preset), x, preset)
        if preset != "svd":
            for compute in (FLOAT, HALF):
                check(lambda y, compute=compute: polar(y, preset, dtype=compute), x, f"{preset} in {compute}")
            check(lambda y: polar(y, preset, form="gram", dtype=DOUBLE), x, f"{preset} in the Gram form")


def test_polar_factors_of_several_stacks() -> None:
    """Large and small ones, which may go different ways."""
    for dtype in (FLOAT, HALF):
        xs = [noise((2, 16, 24), 1), noise((1, 260, 260), 2), noise((3, 16, 24), 3)]
        for x, y in zip(xs, polars(xs, "jordan", dtype=dtype), strict=True):
            assert torch.equal(y, polar(x, "jordan", dtype=dtype))


@pytest.mark.parametrize("dtype", [FLOAT, HALF, DOUBLE], ids=str)
@pytest.mark.parametrize(
    ("p", "method"), [(1, "auto"), (4 / 3, "auto"), (4, "auto"), slow(3, "matmul"), slow(8, "matmul"), slow(2, "auto")]
)
def test_schatten_directions(p: float, method: str, dtype: torch.dtype) -> None:
    for n in FEW:
        x = noise((batch_of(n) if n < 128 else 2, n, 1 + (3 * n) % 83), n).to(dtype)
        check(lambda y: schatten(y, p, method=method), x, f"the direction of p = {p:g}")


@pytest.mark.parametrize("dtype", [FLOAT, slow(HALF), slow(DOUBLE)], ids=str)
@ALL
def test_parts(dtype: torch.dtype, sizes: Sequence[int]) -> None:
    """Directions by lengths, dual norms and transforms of the update."""
    hyper = Hyper(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)
    for n in sizes:
        x = noise((batch_of(n), n, 1 + (13 * n) % 79), n).to(dtype)
        for direction in (Frobenius(), Rows(), Columns()):
            name = type(direction).__name__
            check(direction.unit, x, name)
            check(lambda y, d=direction: d.saturated(y, 0.5), x, f"{name}, saturated")
            check(lambda y, d=direction: d.dual_norm(y, d.unit(y)), x, f"the dual norm of {name}")
        check(lambda y: ClipRMS(0.1).apply({}, y, y, hyper)[0], x, "ClipRMS")
        if dtype != HALF:
            check(Sphere().norms, x, "Sphere")
        for over in ("rows", "elements"):

            def normalized(y: Tensor, over: Any = over) -> Sequence[Tensor]:
                part = Normalize(over=over)
                state = {part.key: torch.full(y.shape[:-1] if part.over == "rows" else y.shape, 0.3)}
                u, fresh = part.apply(state, y, y, hyper)
                return u, fresh[part.key]

            check(normalized, x, f"Normalize over {over}")

        def grafted(y: Tensor) -> Tensor:
            part, step = Graft(), torch.tensor(3.0)
            state = {
                "step": step,
                part.magnitude.key: torch.full(y.shape, 0.2, dtype=torch.promote_types(y.dtype, FLOAT)),
            }
            return part.apply(state, y, 0.5 * y.contiguous(), hyper)[0]

        check(grafted, x, "Graft")

        def by_ratio(y: Tensor) -> Tensor:
            part = NormRatio()
            state = {
                part.key: torch.full(y.shape[:1], 0.2, dtype=torch.promote_types(y.dtype, FLOAT)),
                "step": torch.tensor(3.0),
            }
            return part.apply(state | part.observe_matrices(state, y, hyper), y, y, hyper)[0]

        check(by_ratio, x, "NormRatio")


# ---- whole steps ----------------------------------------------------------------------------------------------------

METHODS: dict[str, tuple[type[steepest.Muon], dict[str, Any]]] = {
    "Muon": (steepest.Muon, {}),
    "NorMuon": (steepest.NorMuon, {}),
    "SOAP": (steepest.SOAP, {"precondition_frequency": 2}),
    "SOAP by qr": (steepest.SOAP, {"precondition_frequency": 2, "refresh": "qr"}),
    "Shampoo": (steepest.Shampoo, {"precondition_frequency": 2}),
    "KLShampoo": (steepest.KLShampoo, {"precondition_frequency": 2}),
    "SPlus": (steepest.SPlus, {"precondition_frequency": 2}),
}


def steps(name: str, x: Tensor, transposed: bool, backend: str = "auto") -> Tensor:
    """Weights after four steps of a parameter (batch, m, n), its gradients as seeds of x say."""
    cls, options = METHODS[name]
    x = x.clone()
    p = torch.nn.Parameter(x.clone().mT.contiguous().mT if transposed else x.clone())
    made = cls(
        [{"params": [p], "batch_dims": 1, "use_muon": True}], lr=0.05, weight_decay=0.1, backend=backend, **options
    )
    for step in range(4):
        g = torch.sin(x.float() * (3 + step) + 0.1 * step).to(x.dtype)  # of each matrix, whatever is beside it
        p.grad = g.mT.contiguous().mT if transposed else g
        made.step()
    return p.detach().clone()


@pytest.mark.parametrize("dtype", [FLOAT, slow(HALF)], ids=str)
@pytest.mark.parametrize(
    "name", ["Muon", "SOAP", "KLShampoo", *map(slow, ("NorMuon", "SOAP by qr", "Shampoo", "SPlus"))]
)
@pytest.mark.parametrize("sizes", [(17,), slow(SIZES[::2])], ids=["few", "many"])
def test_whole_steps(name: str, dtype: torch.dtype, sizes: Sequence[int]) -> None:
    for n in sizes:
        x = noise((batch_of(n) if n < 128 else 2, n, 1 + (5 * n) % 67), n).to(dtype)
        together = steps(name, x, False)
        assert same_bits(together, steps(name, x, True)), f"{name} of {tuple(x.shape)} depends on memory"
        for i in {len(x) // 2, len(x) - 1}:
            for transposed in (False, True):
                alone = steps(name, x[i : i + 1], transposed)
                assert same_bits(together[i : i + 1], alone), f"{name} of {tuple(x.shape)}: matrix {i} alone is another"


# ---- the door -------------------------------------------------------------------------------------------------------


def test_a_blas_that_adds_up_otherwise_multiplies_one_matrix_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    torchs = torch.bmm

    def reversed_sums(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        return torchs(a.flip(-1), b.flip(-2), **options)

    monkeypatch.setattr(torch, "bmm", reversed_sums)
    products._checked.cache_clear()
    try:
        assert not products.at_once(8, 8, 8, FLOAT)
        x = noise((3, 8, 8), 1)
        assert torch.equal(matmul(x, x), torch.stack([one @ one for one in x]))
    finally:
        products._checked.cache_clear()


def test_which_products_are_taken_at_once() -> None:
    there = products._adds_up_in_order()
    for shape, dtype, wanted in (
        ((8, 256, 8), FLOAT, there),
        ((8, 257, 8), FLOAT, False),
        ((1, 8, 8), FLOAT, False),
        ((8, 8, 1), FLOAT, False),
        ((8, 8, 8), DOUBLE, False),
        ((8, 8, 8), HALF, False),
    ):
        assert products.at_once(*shape, dtype) == wanted


def test_products_of_numbers_for_each_matrix() -> None:
    """`gemm` of a Schatten direction, with alpha, beta and C, symmetric or not."""
    for dtype in (FLOAT, HALF, DOUBLE):
        for n in FEW:
            x = noise((batch_of(n), n, n), n).to(dtype)

            def by_gemm(y: Tensor) -> Sequence[Tensor]:
                y = y.contiguous()
                c = (y + y.mT).contiguous()
                square = gemm(y, y.mT, c, alpha=0.5, beta=0.25, out=torch.empty_like(y), symmetric=True)
                return square, gemm(square, y, y, alpha=2.0, beta=0.5, out=torch.empty_like(y))

            check(by_gemm, x, "gemm")
            torch.testing.assert_close(
                by_gemm(x)[0].double(),
                0.5 * x.double() @ x.double().mT + 0.25 * (x + x.mT).double(),
                rtol=0.03 if dtype == HALF else 1e-4,
                atol=0.2 if dtype == HALF else 1e-4,
            )
