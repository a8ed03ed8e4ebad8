"""`inverse_root` against eigenvalues in fp64: accuracy, its own residual, what it promises of any input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from steepest.linalg import roots
from steepest.linalg.coefficients import evaluate
from steepest.linalg.roots import inverse_root, lifting_steps, spectral_bound
from support.eigenvalues import on_tensor_cores, symmetric, tf32_product
from support.remez import best_odd, image
from support.singular_values import gaussian

N = 128


def spectrum(kind: str, condition: float, n: int = N) -> Tensor:
    """Eigenvalues from 1 to 1 / condition."""
    digits = math.log10(condition)
    return {
        "log": torch.logspace(0, -digits, n, dtype=torch.float64),
        "power": torch.arange(1, n + 1).double() ** (-digits / math.log10(n)),
        "spikes": torch.where(
            torch.arange(n) < n // 16, torch.logspace(0, -digits / 2, n, dtype=torch.float64), 1 / condition
        ),
    }[kind]


def with_ridge(A: Tensor, ridge_rel: float) -> Tensor:
    """A + r I in fp64, of the very A that was passed."""
    return A.double() + ridge_rel * spectral_bound(A).double()[..., None, None] * torch.eye(A.shape[-1])


def exact_root(A: Tensor, p: int, ridge_rel: float = 1e-6) -> Tensor:
    values, U = torch.linalg.eigh(with_ridge(A, ridge_rel))
    return (U * values[..., None, :] ** (-1 / p)) @ U.mT


def relative(X: Tensor, exact: Tensor) -> float:
    return ((X.double() - exact).norm() / exact.norm()).item()


def exact_residual(A: Tensor, X: Tensor, p: int, ridge_rel: float = 1e-6) -> Tensor:
    H, X = with_ridge(A, ridge_rel), X.double()
    power = torch.linalg.matrix_power(X, max(1, p // 2))
    whitened = H @ X if p == 1 else power @ H @ power
    return torch.linalg.matrix_norm(whitened - torch.eye(len(A))) / len(A) ** 0.5


# Relative Frobenius error in fp32 for p = 2 on an AMD EPYC; an inverse errs by twice as much, a fourth root by half.
# Processors sum products in different orders: on an Intel Xeon all of them are 1.0 to 1.45 times these.
PROCESSORS = 1.6


@pytest.mark.parametrize(
    "kind, condition, ridge_rel, bound",
    [
        ("log", 1e2, 1e-3, 1.2e-6),
        ("log", 1e4, 1e-6, 3.2e-5),
        ("log", 1e6, 1e-6, 1.4e-3),
        ("log", 1e8, 1e-6, 4.3e-3),
        ("power", 1e6, 1e-6, 9.3e-4),
        ("spikes", 1e6, 1e-6, 5.5e-3),
    ],
)
def test_accuracy_in_fp32(kind: str, condition: float, ridge_rel: float, bound: float) -> None:
    A = symmetric(spectrum(kind, condition, 256)).float()
    for p, factor in ((1, 2.2), (2, 1), (4, 0.8), (8, 0.7)):
        X, _ = inverse_root(A, p, ridge_rel=ridge_rel)
        assert X.dtype == torch.float32
        assert torch.equal(X, X.mT)
        assert relative(X, exact_root(A, p, ridge_rel)) < PROCESSORS * factor * bound


@pytest.mark.parametrize("kind", ["log", "power"])
def test_small_eigenvalues_survive_better_than_by_eigh_in_fp32(kind: str) -> None:
    A = symmetric(spectrum(kind, 1e6)).float()
    values, U = torch.linalg.eigh(A)
    by_eigh = (U * (values.clamp_min(0) + 1e-6 * spectral_bound(A)) ** -0.5) @ U.mT
    exact = exact_root(A, 2)
    assert relative(inverse_root(A, 2)[0], exact) < 0.3 * relative(by_eigh, exact)


@pytest.mark.parametrize("p", roots.ROOT_ORDERS)
@pytest.mark.parametrize("condition", [1, 1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("ridge_rel", [1e-10, 1e-6, 1e-2, 1.0])
def test_fp64(ridge_rel: float, condition: float, p: int) -> None:
    A = symmetric(spectrum("log", condition, 40))
    X, residual = inverse_root(A, p, ridge_rel=ridge_rel)
    effective = min(condition, 1 / ridge_rel)
    assert relative(X, exact_root(A, p, ridge_rel)) < 1e-13 + 1e-14 * effective
    assert residual < 1e-12 + 1e-13 * effective**1.5


@pytest.mark.parametrize("p", roots.ROOT_ORDERS)
@pytest.mark.parametrize("kind, condition", [("log", 1e2), ("log", 1e4), ("log", 1e6), ("power", 1e6), ("spikes", 1e6)])
def test_the_residual_is_that_of_the_result(kind: str, condition: float, p: int) -> None:
    """It is computed in fp32, whose own rounding in H X grows with the condition."""
    A = symmetric(spectrum(kind, condition)).float()
    X, residual = inverse_root(A, p)
    exact = exact_residual(A, X, p)
    rounding = 1e-7 * N**0.5 + 0.1 * exact.item() if p == 1 else 1e-5 + 2e-8 * condition
    assert abs(residual.item() - exact.item()) < rounding
    # A result that is wrong by a tenth is seen to be.
    if condition == 1e2:
        assert exact_residual(A, 1.1 * X, p) > 0.09


def test_a_residual_tells_a_wrong_root(monkeypatch: pytest.MonkeyPatch) -> None:
    A = symmetric(spectrum("log", 1e4)).float()
    monkeypatch.setattr(roots, "lifting_steps", lambda low: roots.LIFTING[-1][-1:])
    for p in roots.ROOT_ORDERS:
        X, residual = inverse_root(A, p)
        assert residual > 0.3
        torch.testing.assert_close(residual.double(), exact_residual(A, X, p), atol=0, rtol=1e-3)


@pytest.mark.parametrize("p", roots.ROOT_ORDERS)
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("kind", ["log", "power", "spikes"])
def test_precision_of_the_products(kind: str, condition: float, p: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 in three terms is as good as fp32; plain TF32 is not, and on a flat floor it is lost."""
    A = symmetric(spectrum(kind, condition)).float()
    exact = exact_root(A, p)
    fp32 = relative(inverse_root(A, p)[0], exact)
    monkeypatch.setattr(roots, "product", on_tensor_cores())
    assert relative(inverse_root(A, p)[0], exact) < 1.5 * fp32
    monkeypatch.setattr(roots, "product", on_tensor_cores(exact=tf32_product))
    low = relative(inverse_root(A, p)[0], exact)
    assert not low < 3 * fp32
    if condition == 1e8 and kind == "spikes":
        assert not low < 1


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64])
def test_the_bound_is_one(n: int) -> None:
    for kind in ("log", "power", "spikes"):
        for seed in range(5):
            A = symmetric(spectrum(kind, 1e3, n) if n > 1 else torch.ones(1).double(), seed).float()
            norm = torch.linalg.matrix_norm(A.double(), 2)
            assert norm <= spectral_bound(A) <= 1.01 * norm * n ** (1 / 8)
            torch.testing.assert_close(spectral_bound(-A * 2.0**90), spectral_bound(A) * 2.0**90)
    special = torch.stack([torch.zeros(n, n), torch.full((n, n), math.nan), torch.ones(n, n)])
    assert spectral_bound(special).tolist() == pytest.approx([0, math.inf, n * roots.BOUND_SAFETY])


def test_lifting_steps_are_the_best() -> None:
    goals = [(least * high, high) for (_, high, _), (least, _, _) in zip(roots.LIFTING, roots.LIFTING[1:])]
    goals.append((1 - roots.LIFTED, 1 + roots.LIFTED))
    for (least, _, step), (low, high) in zip(roots.LIFTING, goals):
        best, _ = best_odd(least, 1.0, 5)
        assert step == pytest.approx([v / 1.01 ** (2 * power + 1) for power, v in enumerate(best)], rel=1e-6)
        found = image(step, least, 1.0)
        assert low <= found[0]
        assert found[1] <= high


@pytest.mark.parametrize("low", [1.4e-8, 1e-6, 2e-5, 2.1e-5, 1e-3, 0.03, 0.5, 0.8])
def test_lifting_steps_lift(low: float) -> None:
    table = lifting_steps(low)
    values = [evaluate(table, x) for x in torch.logspace(math.log10(low), 0, 2000, dtype=torch.float64).tolist()]
    assert max(abs(1 - v) for v in values) <= roots.LIFTED
    if low == 1e-3:
        assert len(table) <= 6


@pytest.mark.parametrize("p", roots.ROOT_ORDERS)
def test_hard_matrices(p: int) -> None:
    """Of rank 0, 1, 2 or k, repeated eigenvalues, rounding below zero, one large gradient among small ones."""
    n = 40
    matrices = [gaussian(n, rank, rank) @ gaussian(n, rank, rank).mT for rank in (1, 2, 10)]
    matrices += [torch.eye(n).double(), torch.ones(n, n).double(), symmetric(spectrum("log", 1e8, n)) - 1e-8]
    matrices += [gaussian(n, n) @ gaussian(n, n).mT + 1e6 * gaussian(n, 4, 1) @ gaussian(n, 4, 1).mT]
    A = torch.stack(matrices).float()
    X, residual = inverse_root(A, p)
    for one, root in zip(A, X):
        # Rounding of A moves an eigenvalue at the ridge by 1e-7 of the largest, a tenth.
        assert relative(root, exact_root(one, p)) < (0.06 if p == 1 else 0.03)
    assert residual.isfinite().all()


@pytest.mark.parametrize("p", roots.ROOT_ORDERS)
def test_zero_gives_zero_and_what_is_not_finite_stays_alone(p: int) -> None:
    A = torch.stack([symmetric(spectrum("log", 1e3, 17), seed) for seed in range(5)]).float()
    clean, clean_residual = inverse_root(A, p)
    A[1] = 0
    A[2, 3, 4] = math.nan
    A[3, 0, 0] = math.inf
    X, residual = inverse_root(A, p)
    assert not X[1:4].any()
    assert residual[1:4].tolist() == [0, math.inf, math.inf]
    for i in (0, 4):
        assert torch.equal(X[i], clean[i])
        assert torch.equal(residual[i], clean_residual[i])


@pytest.mark.parametrize("p", roots.ROOT_ORDERS)
@pytest.mark.parametrize("n", [1, 2, 3, 17])
def test_a_batch_is_its_matrices(n: int, p: int) -> None:
    A = torch.stack([symmetric(torch.logspace(0, -k, n).double(), k) for k in range(6)]).float().reshape(2, 3, n, n)
    before = A.clone()
    X, residual = inverse_root(A, p)
    assert X.shape == A.shape
    assert residual.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            one, alone = inverse_root(A[i, j], p)
            torch.testing.assert_close(X[i, j], one, atol=0, rtol=1e-5)
            torch.testing.assert_close(residual[i, j], alone, atol=1e-6, rtol=1e-2)
    assert torch.equal(A, before)
    assert torch.equal(X, inverse_root(A, p)[0])


@pytest.mark.parametrize("p", roots.ROOT_ORDERS)
def test_scale_does_not_matter(p: int) -> None:
    A = symmetric(spectrum("log", 1e5, 20)).float()
    X, residual = inverse_root(A, p)
    for exponent in (-100, -40, 40, 100):
        scaled, same = inverse_root(A * 2.0**exponent, p)
        torch.testing.assert_close(scaled, X * 2.0 ** (-exponent / p), atol=0, rtol=1e-5)
        torch.testing.assert_close(same, residual, atol=1e-6, rtol=1e-2)


@pytest.mark.parametrize("shape", [(0, 3, 3), (0, 0), (2, 0, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    X, residual = inverse_root(torch.zeros(shape), 2)
    assert (X.shape, residual.shape, spectral_bound(X).shape) == (shape, shape[:-2], shape[:-2])


def test_a_preconditioned_gradient_is_white() -> None:
    """L^-1/4 G R^-1/4 with L = G G^T and R = G^T G is the polar factor of G."""
    U, _, Vh = torch.linalg.svd(gaussian(24, 24))
    G = (U * torch.logspace(0, -2, 24).double()) @ Vh
    left, right = inverse_root(G @ G.mT, 4, ridge_rel=1e-12)[0], inverse_root(G.mT @ G, 4, ridge_rel=1e-12)[0]
    torch.testing.assert_close(left @ G @ right, U @ Vh, atol=1e-6, rtol=0)


def test_nothing_is_read() -> None:
    with FakeTensorMode():
        X, residual = inverse_root(torch.empty(3, 20, 20), 4)
    assert (X.shape, residual.shape) == ((3, 20, 20), (3,))


def test_compiles_in_one_graph() -> None:
    A = symmetric(spectrum("log", 1e3, 20)).float()
    compiled = torch.compile(lambda A: inverse_root(A, 4), fullgraph=True, backend="eager")
    for seen, expected in zip(compiled(A), inverse_root(A, 4)):
        # torch 2.10 and 2.11 round otherwise when traced, which the condition of A makes 1e3 times as much of.
        torch.testing.assert_close(seen, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "A, p, options, error, message",
    [
        (torch.eye(3).half(), 2, {}, TypeError, "takes float32 or float64, got torch.float16; convert it first"),
        (torch.ones(3, 2), 2, {}, ValueError, "takes square matrices (..., n, n), got shape (3, 2)"),
        (torch.ones(3), 2, {}, ValueError, "takes square matrices (..., n, n), got shape (3,)"),
        (torch.eye(3), 3, {}, ValueError, "p must be one of 1, 2, 4, 8, got 3; eigh_refresh has a basis for others"),
        (torch.eye(3), 2, {"ridge_rel": 0.0}, ValueError, "ridge_rel must be between 1.2e-07"),
        (torch.eye(3), 2, {"ridge_rel": 2.0}, ValueError, "ridge_rel must be between 1.2e-07"),
    ],
)
def test_messages(A: Tensor, p: int, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace("(", r"\(").replace(")", r"\)")):
        inverse_root(A, p, **options)
