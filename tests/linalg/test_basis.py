"""`eigh_refresh`: against sorted QR on averages that drift, against fp64 on hard ones, and what it promises of any."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from steepest.linalg import basis
from steepest.linalg.basis import eigh_refresh, orthonormality, shifted_cholesky_qr, tracked
from steepest.ops import eigh
from support.eigenvalues import (
    EIGENVALUES,
    FLOOR,
    HARD,
    assert_refreshed,
    drifting,
    exact_basis,
    on_tensor_cores,
    symmetric,
    tf32_product,
    toeplitz,
    whitening,
)
from support.singular_values import gaussian, orthogonal
from support.slow import slow

WAYS: dict[str, dict] = {
    "jr": {"method": "jr"},
    "jr, two sweeps": {"method": "jr", "sweeps": 2},
    "qr": {"method": "qr"},
    "qr_sorted": {"method": "qr_sorted"},
    "eigh": {"method": "eigh"},
    "auto": {},
    "auto without reading": {"exact": False},
}


@pytest.fixture
def in_torch_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orthogonal iteration as without compiled products."""
    monkeypatch.setattr(eigh, "iterates", lambda P: False)


def reference_qr(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """The refresh of SOAP's reference as it is described: sort by diag(Q^T P Q), then QR of P Q; with R_ii > 0."""
    order = (Q * (P @ Q)).sum(0).argsort(descending=True)
    new, R = torch.linalg.qr(P @ Q[:, order])
    return new * R.diagonal().sign(), order


def track(way: dict, matrices: list[Tensor], start: Tensor | None = None) -> list[float]:
    """Whitening errors of the bases as they are refreshed for one matrix after another."""
    Q, errors = exact_basis(matrices[0]) if start is None else start, []
    for P in matrices[1:]:
        Q = eigh_refresh(P, Q, **way).basis
        errors.append(whitening(P, Q))
    return errors


def mean_of_last_half(errors: list[float]) -> float:
    half = errors[len(errors) // 2 :]
    return sum(half) / len(half)


@pytest.mark.parametrize("n, count", [(128, 24), (256, 16), slow(512, 9)])
@pytest.mark.parametrize("spectrum", EIGENVALUES)
def test_jr_at_every_step_whitens_better_than_sorted_qr(spectrum: str, n: int, count: int) -> None:
    matrices = list(drifting(n, spectrum, count))
    jr, qr = (mean_of_last_half(track(WAYS[way], matrices)) for way in ("jr", "qr"))
    assert jr < (0.6 if "flat" not in spectrum else 0.9) * qr, (jr, qr)


@pytest.mark.parametrize("way", ["jr, two sweeps", "auto"])
@pytest.mark.parametrize("spectrum", EIGENVALUES)
def test_after_ten_steps_two_sweeps_or_the_cascade_whiten_better_than_sorted_qr(spectrum: str, way: str) -> None:
    matrices = list(drifting(128, spectrum, 10, every=10))
    ours, qr = (mean_of_last_half(track(WAYS[name], matrices)) for name in (way, "qr"))
    assert ours < qr, (ours, qr)


def test_the_exact_solver_is_in_fp64_on_a_cpu() -> None:
    matrices = list(drifting(128, "exponential, condition 2e6", 4))
    assert max(track(WAYS["eigh"], matrices)) < 1e-4
    fp32 = torch.linalg.eigh(matrices[-1]).eigenvectors
    assert whitening(matrices[-1], fp32) > 1e-3


@pytest.mark.parametrize("spectrum", EIGENVALUES)
def test_precision_of_each_product(spectrum: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """B and Gram matrices in three-term TF32 and the rest in TF32 are as good as fp32; all in TF32 is not."""
    matrices = list(drifting(128, spectrum, 14))
    fp32 = mean_of_last_half(track(WAYS["jr"], matrices))
    monkeypatch.setattr(basis, "product", on_tensor_cores())
    mixed = mean_of_last_half(track(WAYS["jr"], matrices))
    assert mixed < 1.1 * fp32 + 1e-4, (mixed, fp32)
    monkeypatch.setattr(basis, "product", on_tensor_cores(exact=tf32_product))
    low = mean_of_last_half(track(WAYS["jr"], matrices))
    assert low > 3 * fp32 or "exp" not in spectrum, (low, fp32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", HARD)
def test_what_is_promised_of_every_matrix(case: str, way: str) -> None:
    matrices, Q = HARD[case]
    for P in matrices:
        refreshed = eigh_refresh(P, Q, **WAYS[way])
        assert_refreshed(P, Q, refreshed, helps=way not in ("qr", "qr_sorted"))
        Q = refreshed.basis


@pytest.mark.parametrize("case", HARD)
def test_auto_ends_near_the_exact_basis(case: str) -> None:
    """Wherever Jacobi cannot go, the exact solver does: the end is rounding, or the error of tracking what moves."""
    matrices, Q = HARD[case]
    for P in matrices:
        new = eigh_refresh(P, Q)
        assert not new.status & basis.WANTS_EXACT
        Q = new.basis
    if P.any():
        assert whitening(P.double() / P.abs().max(), Q, FLOOR) < 0.1


@pytest.mark.parametrize("case", ["rank 2", "a random basis", "toeplitz", "a spike"])
def test_without_reading_what_needs_the_exact_solver_is_flagged(case: str) -> None:
    matrices, Q = HARD[case]
    P = matrices[-1]
    flagged = eigh_refresh(P, Q, exact=False)
    jacobi = eigh_refresh(P, Q, method="jr")
    assert jacobi.status & basis.WANTS_EXACT
    assert flagged.status & basis.FELL_BACK
    assert whitening(P, flagged.basis, FLOOR) <= whitening(P, jacobi.basis, FLOOR)
    if flagged.status & basis.WANTS_EXACT:
        assert eigh_refresh(P, Q, method="eigh").status == basis.ACCEPTED


@pytest.mark.parametrize("case", ["rank 1", "rank 12", "condition 1e8, warm", "clusters", "toeplitz", "identity"])
def test_a_matrix_that_rests_asks_for_nothing(case: str) -> None:
    matrices, Q = HARD[case]
    Q = eigh_refresh(matrices[-1], Q).basis
    for _ in range(4):
        Q, _, status, _ = eigh_refresh(matrices[-1], Q)
        assert status & ~basis.ACCEPTED == 0


def test_a_random_basis_is_left_for_the_exact_solver_and_a_small_rotation_is_not() -> None:
    n = 64
    P = symmetric(EIGENVALUES["power"](n)).float()
    Q = exact_basis(P)
    skew = 0.002 * gaussian(n, n)
    near = torch.linalg.matrix_exp(skew - skew.mT).float() @ Q
    status = eigh_refresh(torch.stack([P, P]), torch.stack([near, orthogonal(n, 5).float()])).status
    expected = [basis.ACCEPTED, basis.ACCEPTED | basis.FELL_BACK | basis.LARGE_ROTATION]
    assert status.tolist() == expected
    assert status.dtype == torch.int32


@pytest.mark.parametrize("way", ["jr", "auto", "auto without reading"])
def test_columns_keep_slot_and_sign(way: str) -> None:
    matrices = list(drifting(64, "power", 6))
    shuffle = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    Q = exact_basis(matrices[0])[:, shuffle] * (1 - 2 * (shuffle % 2))
    for P in matrices[1:]:
        new, _, status, order = eigh_refresh(P, Q, **WAYS[way])
        assert status == basis.ACCEPTED
        assert torch.equal(order, torch.arange(64))
        assert (Q * new).sum(0).min() > 0.8
        Q = new


def test_the_last_stage_keeps_the_rank_of_every_slot_and_signs() -> None:
    P = symmetric(torch.logspace(0, -5, 32, dtype=torch.float64)).float()
    Q = orthogonal(32, 9).float()
    rank = (Q * (P @ Q)).sum(0).argsort().argsort()
    new, values, status, _ = eigh_refresh(P, Q)
    assert status & basis.LARGE_ROTATION
    assert torch.equal(values.argsort().argsort(), rank)
    # A basis that is exact but for slots and signs keeps both.
    again = eigh_refresh(P, -new.flip(1), method="eigh")
    assert ((-new.flip(1))[:, again.order] * again.basis).sum(0).min() > 0.99
    assert again.values.diff().max() <= 0


@pytest.mark.parametrize("factor", ["compiled", "reflections", "Cholesky"])
def test_qr_is_the_reference(factor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if factor != "compiled":
        monkeypatch.setattr(eigh, "iterates", lambda P: False)
    if factor == "Cholesky":
        monkeypatch.setattr(basis, "_orthonormal_factor", shifted_cholesky_qr)
    for spectrum in EIGENVALUES:
        matrices = list(drifting(64, spectrum, 8))
        ours = theirs = exact_basis(matrices[0])[:, torch.arange(64).flip(0)]
        for P in matrices[1:]:
            refreshed = eigh_refresh(P, ours, method="qr")
            theirs, order = reference_qr(P, theirs)
            assert refreshed.status == basis.ACCEPTED
            assert torch.equal(refreshed.order, order)
            torch.testing.assert_close(refreshed.basis, theirs, atol=2e-5, rtol=0)
            # Second moments permuted by the order go with their columns.
            assert (ours[:, refreshed.order] * refreshed.basis).sum(0).median() > 0.9
            ours = theirs = refreshed.basis


@pytest.mark.parametrize("spectrum", EIGENVALUES)
def test_qr_sorted_sorts_afterwards(spectrum: str) -> None:
    """QR of P Q as it is, then columns by diag(Q'^T P Q'): of columns in reverse not what "qr" makes of them."""
    matrices = [P.double() for P in drifting(64, spectrum, 8)]
    Q = torch.linalg.eigh(matrices[0]).eigenvectors
    first, second = (eigh_refresh(matrices[1], Q, method=method).basis for method in ("qr", "qr_sorted"))  # type: ignore[arg-type]
    assert (first - second).abs().max() > 1e-6
    for P in matrices[1:]:
        refreshed = eigh_refresh(P, Q, method="qr_sorted")
        new, R = torch.linalg.qr(P @ Q)
        order = (new * (P @ new)).sum(0).argsort(descending=True)
        assert refreshed.status == basis.ACCEPTED
        assert torch.equal(refreshed.order, order)
        torch.testing.assert_close(refreshed.basis, (new * R.diagonal().sign())[:, order], atol=1e-9, rtol=0)
        Q = refreshed.basis


@pytest.mark.parametrize("factor", ["compiled", "reflections", "Cholesky"])
def test_qr_of_what_has_zero_columns_is_a_basis(factor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if factor != "compiled":
        monkeypatch.setattr(eigh, "iterates", lambda P: False)
    if factor == "Cholesky":
        monkeypatch.setattr(basis, "_orthonormal_factor", shifted_cholesky_qr)
    P, Q = HARD["zero block"][0][0], HARD["zero block"][1]
    new = eigh_refresh(P, Q, method="qr")
    assert new.status == basis.ACCEPTED
    assert orthonormality(new.basis.double()) < 1e-5


@pytest.mark.parametrize("factor", [lambda Y: 1.001 * torch.linalg.qr(Y).Q, lambda Y: Y * math.nan])
def test_a_factor_that_fails_leaves_the_basis(
    factor: Callable[[Tensor], Tensor], in_torch_ops: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(basis, "_orthonormal_factor", factor)
    P, Q = HARD["toeplitz"][0][0], HARD["toeplitz"][1]
    result = eigh_refresh(P, Q, method="qr")
    assert result.status == basis.WANTS_EXACT
    assert torch.equal(result.basis, Q)
    assert torch.equal(result.order, torch.arange(len(P)))
    assert eigh_refresh(P, Q).values.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [0.01, 0.3, 0.7, 1.0, 1.4])
def test_the_rotation_of_a_generator_is_orthonormal_and_its_residual_bounded(norm: float, dtype: torch.dtype) -> None:
    n = 96
    dense = gaussian(n, n)
    hub = torch.zeros(n, n).double()
    hub[0, 1:] = 1
    block = torch.zeros(n, n).double()
    block[:9, :9] = dense[:9, :9]
    X = torch.stack([A - A.mT for A in (dense, hub, block)])
    X = X * norm / torch.linalg.matrix_norm(X, 2)[:, None, None]
    Q = orthogonal(n, 2)
    Y, residual = basis._orthonormalized((Q + Q @ X).to(dtype))
    assert (orthonormality(Y.double()) <= residual).all()
    assert (residual <= basis.ORTHONORMAL[dtype]).all()
    U, _, Vh = torch.linalg.svd(Q + Q @ X)
    torch.testing.assert_close(Y.double(), U @ Vh, atol=1e-5, rtol=0)


def normalized(Y: Tensor) -> Tensor:
    return Y / Y.norm(dim=-2, keepdim=True)


@pytest.mark.parametrize("n", [1, 2, 17, 128, 256])
@pytest.mark.parametrize("kind", ["well conditioned", "columns of length 1 to 1e-12", "tall", "P times a basis"])
def test_shifted_cholesky_qr_is_qr(kind: str, n: int) -> None:
    Y = {
        "well conditioned": lambda: torch.eye(n).double() + 0.3 * gaussian(n, n) / n**0.5,
        "columns of length 1 to 1e-12": lambda: (
            orthogonal(n) * torch.logspace(0, -12, n).double()
            + 0.1 * torch.logspace(0, -12, n).double() * gaussian(n, n) / n**0.5
        ),
        "tall": lambda: gaussian(3 * n, n),
        "P times a basis": lambda: (
            symmetric(torch.logspace(0, -6, n).double()).float().double()
            @ exact_basis(symmetric(torch.logspace(0, -6, n).double()) + 1e-3 * symmetric(torch.logspace(0, -6, n), 1))
        ),
    }[kind]()
    Q, R = torch.linalg.qr(Y)
    Q = Q * torch.where(R.diagonal() < 0, -1, 1)
    ours = shifted_cholesky_qr(torch.stack([Y, 2 * Y]).float())
    torch.testing.assert_close(ours[0].double(), Q, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[1], ours[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("condition", [1e3, 1e5, 1e7])
def test_shifted_cholesky_qr_of_nearly_dependent_columns(condition: float) -> None:
    """Q itself is then determined up to eps times the condition; as a factor it is as good as Householder's."""
    n = 64
    Y = (orthogonal(n, 1) * torch.logspace(0, -math.log10(condition), n).double()) @ orthogonal(n, 2)
    Q, Y32 = shifted_cholesky_qr(Y.float()), normalized(Y.float().double())
    assert orthonormality(Q.double()) < 1e-6
    R = Q.double().mT @ Y32
    assert (Q.double() @ R.triu() - Y32).norm() / Y32.norm() < 1e-5
    assert R.diagonal().min() > -1e-6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", [1, 2, 3, 17])
def test_small_sizes_and_batch_dimensions(way: str, n: int) -> None:
    P = torch.stack([symmetric(torch.logspace(0, -3, n).double(), seed) for seed in range(6)]).float()
    Q = torch.eye(n).expand(6, n, n).contiguous()
    for _ in range(8):
        Q, values, status, order = eigh_refresh(P.reshape(2, 3, n, n), Q.reshape(2, 3, n, n), **WAYS[way])
    assert (Q.shape, values.shape, order.shape, status.shape) == ((2, 3, n, n), (2, 3, n), (2, 3, n), (2, 3))
    exact = torch.linalg.eigvalsh(P.double()).reshape(2, 3, n)
    if way in ("eigh", "auto"):
        torch.testing.assert_close(values.sort().values.double(), exact, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(values.sum(-1).double(), exact.sum(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(0, 3, 3), (0, 0), (2, 0, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    basis_, values, status, order = eigh_refresh(torch.zeros(shape), torch.zeros(shape))
    assert (basis_.shape, values.shape, order.shape, status.shape) == (shape, shape[:-1], shape[:-1], shape[:-2])


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_is_its_matrices_and_nan_stays_alone(way: str) -> None:
    names = ["rank 2, moving", "condition 1e8", "toeplitz", "condition 1e8, warm", "a random basis", "rank 0"]
    P, Q = (torch.stack([HARD[name][i][0] if i == 0 else HARD[name][1] for name in names]) for i in range(2))
    whole = eigh_refresh(P, Q, **WAYS[way])
    for i, name in enumerate(names):
        one = eigh_refresh(P[i], Q[i], **WAYS[way])
        assert one.status == whole.status[i], name
        torch.testing.assert_close(one.basis, whole.basis[i], atol=1e-6, rtol=0)
        torch.testing.assert_close(one.values, whole.values[i], atol=1e-6, rtol=0)
    for value in (math.nan, math.inf):
        bad = P.clone()
        bad[2, 3, 4] = value
        result = eigh_refresh(bad, Q, **WAYS[way])
        assert result.status[2] == basis.NOT_FINITE
        assert torch.equal(result.basis[2], Q[2])
        assert not result.values[2].any()
        others = [0, 1, 3, 4, 5]
        for clean, seen in zip(whole, result):
            assert torch.equal(clean[others], seen[others])


@pytest.mark.parametrize("way", WAYS)
def test_scale_does_not_matter(way: str) -> None:
    P, Q = HARD["condition 1e8, warm"][0][0], HARD["condition 1e8, warm"][1]
    plain = eigh_refresh(P, Q, **WAYS[way])
    for exponent in (-100, 30, 120):
        scaled = eigh_refresh(P * 2.0**exponent, Q, **WAYS[way])
        # An entry below 2^-26 of the largest may become subnormal.
        torch.testing.assert_close(scaled.basis, plain.basis, atol=1e-6, rtol=0)
        torch.testing.assert_close(scaled.values * 2.0**-exponent, plain.values, atol=1e-10, rtol=1e-5)
        assert scaled.status == plain.status


@pytest.mark.parametrize("way", WAYS)
def test_fp64(way: str) -> None:
    P = symmetric(EIGENVALUES["power"](40))
    skew = 1e-3 * gaussian(40, 40)
    Q = torch.linalg.matrix_exp(skew - skew.mT) @ exact_basis(P)
    new = eigh_refresh(P, Q, **WAYS[way])
    assert new.basis.dtype == new.values.dtype == torch.float64
    assert new.status == basis.ACCEPTED
    assert orthonormality(new.basis) < 1e-11
    assert whitening(P, new.basis) < 0.3 * whitening(P, Q)


@pytest.mark.parametrize("Q", [torch.zeros(8, 8), torch.full((8, 8), math.nan), torch.ones(8, 8)])
def test_what_is_no_basis_counts_as_the_identity(Q: Tensor, in_torch_ops: None) -> None:
    P = symmetric(torch.logspace(0, -3, 8).double()).float()
    for way in WAYS.values():
        ours, identity = eigh_refresh(P, Q, **way), eigh_refresh(P, torch.eye(8), **way)
        assert ours.status == identity.status | basis.NOT_ORTHONORMAL
        assert torch.equal(ours.basis, identity.basis)
    assert torch.equal(eigh_refresh(torch.zeros(8, 8), Q).basis, torch.eye(8))


def test_of_what_is_not_symmetric_the_symmetric_part_is_taken() -> None:
    P = symmetric(torch.logspace(0, -3, 8).double()).float()
    skew = torch.triu(torch.ones(8, 8), 1)
    result, plain = (eigh_refresh(A, torch.eye(8)) for A in (P + skew - skew.mT, P))
    assert result.status == plain.status | basis.NOT_SYMMETRIC
    torch.testing.assert_close(result.values, plain.values)
    assert not eigh_refresh(P + 1e-5 * skew, torch.eye(8)).status & basis.NOT_SYMMETRIC


def test_a_solver_that_fails_leaves_the_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("linalg.eigh: failed to converge")

    P, Q = symmetric(torch.logspace(0, -3, 8).double()).float(), torch.eye(8)
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    result = eigh_refresh(P, Q, method="eigh")
    assert result.status == basis.WANTS_EXACT
    assert torch.equal(result.basis, Q)
    assert eigh_refresh(P, Q).status & basis.WANTS_EXACT


def test_inputs_are_not_written_and_the_same_input_gives_the_same_bits() -> None:
    matrices, Q = HARD["condition 1e8, warm"]
    P, before, kept = matrices[0].clone(), matrices[0].clone(), Q.clone()
    for way in WAYS.values():
        first, second = eigh_refresh(P, Q, **way), eigh_refresh(P, Q, **way)
        assert all(map(torch.equal, first, second))
        assert torch.equal(P, before)
        assert torch.equal(Q, kept)
        assert first.basis.data_ptr() != Q.data_ptr()


@pytest.mark.parametrize("way", ["jr", "jr, two sweeps", "qr", "qr_sorted", "auto without reading"])
def test_nothing_is_read(way: str, in_torch_ops: None) -> None:
    """On tensors without data, to read one raises."""
    with FakeTensorMode():
        P, Q = torch.empty(3, 20, 20), torch.empty(3, 20, 20)
        assert eigh_refresh(P, Q, **WAYS[way]).basis.shape == P.shape
        assert shifted_cholesky_qr(P).shape == P.shape


@pytest.mark.parametrize("way", [slow("jr"), "qr", slow("auto without reading")])
def test_compiles_in_one_graph(way: str, in_torch_ops: None) -> None:
    matrices, Q = HARD["condition 1e8, warm"]
    compiled = torch.compile(lambda P, Q: eigh_refresh(P, Q, **WAYS[way]), fullgraph=True, backend="eager")
    for seen, expected in zip(compiled(matrices[0], Q), eigh_refresh(matrices[0], Q, **WAYS[way])):
        assert torch.equal(seen, expected)


# ---- orthogonal iteration on a CPU ----------------------------------------------------------------------------------

compiled = pytest.mark.skipif(not eigh.iterates(torch.eye(2)), reason="no products are compiled for this processor")


@compiled
@pytest.mark.parametrize("spectrum", EIGENVALUES)
@pytest.mark.parametrize("n", [1, 2, 18, 128, 300])
def test_an_iteration_is_qr_of_the_image_with_its_errors(n: int, spectrum: str) -> None:
    """Against Householder's reflections in fp64; errors are from 8 vectors of signs."""
    matrices = list(drifting(n, spectrum, 3)) if n > 2 else [symmetric(torch.linspace(1, 2, n).double()).float()] * 3
    Q = exact_basis(matrices[0])[:, torch.arange(n).flip(0)].contiguous()
    for P in matrices[1:]:
        P = basis.symmetrize(P)
        made = eigh.iterate(P[None], Q[None])
        assert made.done.all()
        order, image = made.order[0], P.double() @ Q.double()
        values = (Q * image).sum(0)
        assert values[order].diff().amax() <= 1e-6 * values.amax() if n > 1 else order.tolist() == [0]
        wanted, R = torch.linalg.qr(image[:, order])
        wanted = wanted * R.diagonal().sign()
        torch.testing.assert_close(made.basis[0].double(), wanted, atol=2e-4, rtol=0)
        assert orthonormality(made.basis[0].double()) < 5e-6
        if n > 18:
            for found, exact in (
                (made.before, whitening(P, Q, FLOOR)),
                (made.after, whitening(P, made.basis[0], FLOOR)),
            ):
                assert found.item() == pytest.approx(exact, rel=0.15)
        Q = made.basis[0]


@compiled
@pytest.mark.parametrize("count, n", [(3, 60), (2, 530)])
def test_an_iteration_has_the_same_bits_alone_and_on_any_number_of_threads(count: int, n: int) -> None:
    P = torch.stack([basis.symmetrize(symmetric(EIGENVALUES["power"](n), seed).float()) for seed in range(count)])
    Q = torch.stack([orthogonal(n, seed).float() for seed in range(count)])
    together, threads = eigh.iterate(P, Q), torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        for i in range(count):
            alone = eigh.iterate(P[i : i + 1], Q[i : i + 1])
            assert all(torch.equal(all_[i : i + 1], one) for all_, one in zip(together, alone, strict=True))
    finally:
        torch.set_num_threads(threads)


@compiled
def test_an_iteration_leaves_what_it_is_not_for() -> None:
    P, Q = basis.symmetrize(symmetric(torch.logspace(0, -3, 20).double()).float()), torch.eye(20)
    wrong = [P.clone() for _ in range(4)]
    wrong[1][3, 3], wrong[2][4, 5], wrong[3][:] = math.nan, wrong[2][4, 5] + 1, 0
    done = eigh.iterate(torch.stack([*wrong, P]), torch.stack([Q] * 4 + [2 * Q])).done
    assert done.tolist() == [True, False, False, False, False]


@compiled
@pytest.mark.parametrize("spectrum", EIGENVALUES)
def test_what_drifts_is_tracked_by_iteration_and_what_jumps_is_solved(spectrum: str) -> None:
    matrices = [basis.symmetrize(P) for P in drifting(128, spectrum, 6)]
    ours = theirs = exact_basis(matrices[0])
    for P in matrices[1:]:
        new = tracked(P, ours)
        theirs = reference_qr(P, theirs)[0]
        assert new.status == basis.ACCEPTED
        assert whitening(P, new.basis) < 1.02 * whitening(P, theirs) + 1e-4
        torch.testing.assert_close(new.values, (new.basis * (P @ new.basis)).sum(0))
        assert tracked(P, ours, values=False).values.isnan().all()
        ours = new.basis
    settled = exact_basis(toeplitz(64).float())
    jump = tracked(toeplitz(64).float(), torch.eye(64))
    assert jump.status & basis.FELL_BACK or whitening(toeplitz(64), jump.basis) < whitening(toeplitz(64), torch.eye(64))
    assert tracked(toeplitz(64).float(), settled).status & basis.ACCEPTED


@compiled
@pytest.mark.parametrize("case", HARD)
def test_tracked_promises_what_a_refresh_does(case: str) -> None:
    matrices, Q = HARD[case]
    for P in matrices:
        refreshed = tracked(P, Q)
        assert_refreshed(P, Q, refreshed._replace(status=refreshed.status & ~basis.FELL_BACK))
        Q = refreshed.basis


def test_measures() -> None:
    """The measures that accept or refuse a basis; D is not taken below 8 eps max D."""
    P = torch.tensor([[2.0, 0.6], [0.6, 1.0]])
    assert orthonormality(2 * torch.eye(2)).item() == pytest.approx(3)
    assert basis._whitening(P).item() == pytest.approx(0.6 / math.sqrt(2))
    low = torch.tensor([[1.0, 1e-9], [1e-9, 0.0]])
    assert basis._whitening(low).item() == pytest.approx(1e-9 / math.sqrt(8 * torch.finfo(low.dtype).eps))
    assert basis._whitening(torch.zeros(3, 2, 2)).tolist() == [0, 0, 0]
    torch.testing.assert_close(basis._whitening(P * 1e-30), basis._whitening(P))


def test_the_polar_factor_of_the_image_is_the_basis_that_was() -> None:
    """Why it is not a method: orthogonalising P Q by its polar factor gives Q back."""
    P, Q = symmetric(torch.logspace(0, -2, 16).double()), orthogonal(16, 4)
    U, _, Vh = torch.linalg.svd(P @ Q)
    torch.testing.assert_close(U @ Vh, Q)


@pytest.mark.parametrize(
    "P, Q, options, error, message",
    [
        (torch.eye(3).half(), torch.eye(3).half(), {}, TypeError, "takes float32 or float64, got P of torch.float16"),
        (torch.eye(3), torch.eye(3).double(), {}, TypeError, "Q must be of P's dtype and device, torch.float32 on cpu"),
        (torch.ones(3), torch.ones(3), {}, ValueError, r"takes square matrices (..., n, n), got P of shape (3,)"),
        (torch.ones(3, 2), torch.ones(3, 2), {}, ValueError, r"takes square matrices (..., n, n), got P of shape"),
        (torch.eye(3), torch.eye(2), {}, ValueError, r"Q must have P's shape (3, 3), got (2, 2)"),
        (
            torch.eye(3),
            torch.eye(3),
            {"method": "polar"},
            ValueError,
            "method 'polar' is not known; choose one of auto",
        ),
        (torch.eye(3), torch.eye(3), {"sweeps": 0}, ValueError, "sweeps must be at least 1, got 0"),
        (torch.full((2, 2), math.nan), torch.eye(2), {"check": True}, ValueError, "P has an entry that is not finite"),
        (torch.ones(2, 2).triu(), torch.eye(2), {"check": True}, ValueError, r"P is not symmetric; pass symmetrize(P)"),
        (torch.eye(2), torch.ones(2, 2), {"check": True}, ValueError, r"Q is not orthonormal; .* (matrix 0 of 1)"),
    ],
)
def test_messages(P: Tensor, Q: Tensor, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace("(", r"\(").replace(")", r"\)")):
        eigh_refresh(P, Q, **options)
