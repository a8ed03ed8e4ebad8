"""The kernel that refreshes small eigenbases, against fp64 LAPACK and linalg/basis.py; what goes to cuSOLVER."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptx.build import COMPILER
from ptx.kernels import Guards, Kernels
from steepest.linalg import basis
from steepest.linalg.basis import Refreshed, eigh_refresh, orthonormality
from steepest.ops import backend, eigh
from support.eigenvalues import EIGENVALUES, FLOOR, HARD, assert_refreshed, drifting, exact_basis, symmetric, whitening
from support.singular_values import gaussian, orthogonal

pytestmark = pytest.mark.kernels


class Refresh:
    """Calls of the op on memory between guards."""

    def __init__(self, kernels: Kernels, guards: Guards) -> None:
        self.kernels, self.guards = kernels, guards

    def __call__(
        self, P: Tensor, Q: Tensor, *, method: str = "auto", sweeps: int = 1, capability: int = 90
    ) -> Refreshed:
        """`eigh_refresh` of matrices (..., n, n), all in one launch."""
        n, count = P.shape[-1], P.numel() // P.shape[-1] ** 2
        stacks = [self.guards.twin(x.contiguous().view(count, n, n)) for x in (P, Q)]
        into = (
            torch.full((count, n, n), torch.nan),
            torch.full((count, n), torch.nan),
            torch.full((count,), -1, dtype=torch.int32),
            torch.full((count, n), -1),
        )
        outs = [self.guards.twin(x) for x in into]
        self.kernels.library.ptxsim_capability(capability)
        before = self.kernels.launches()
        self.kernels.ops.eigh_refresh(*stacks, *outs, eigh.METHODS.index(method), sweeps)
        assert self.kernels.launches() == before + 1
        one = P.shape[:-1]
        shapes = (P.shape, one, one[:-1], one)
        return Refreshed(*(out.view(shape) for out, shape in zip(outs, shapes)))


@pytest.fixture
def kernel(kernels: Kernels, guards: Guards) -> Refresh:
    return Refresh(kernels, guards)


# ---- the exact solver ----------------------------------------------------------------------------------------------


def spectrum(name: str, n: int) -> Tensor:
    """Eigenvalues, largest 1 (or 0)."""
    rank = {"rank 0": 0, "rank 1": 1, "rank 2": 2, "rank n / 4": (n + 3) // 4}
    if name in rank:
        return (torch.arange(n) < rank[name]).double()
    return {
        **{key: values(n) for key, values in EIGENVALUES.items()},
        "condition 1e8": torch.logspace(0, -8, n, dtype=torch.float64),
        "clusters": (torch.arange(n) < 7).double() + 1e-3,
    }[name]


SPECTRA = ("rank 0", "rank 1", "rank 2", "rank n / 4", *EIGENVALUES, "condition 1e8", "clusters")


@pytest.mark.orders(2)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 32, 33, 64, 65, 110, 128])
def test_the_exact_solver_against_lapack(n: int, kernel: Refresh) -> None:
    """Nearer than LAPACK in fp32 to the small eigenvalues, and to its basis; as near to the large ones."""
    names = SPECTRA if n < 100 else ("rank 2", "condition 1e8", "clusters")  # the simulator takes its time
    P = torch.stack([symmetric(spectrum(name, n)) for name in names]).float()
    refreshed = kernel(P, torch.eye(n).expand_as(P), method="eigh")
    assert not (refreshed.status & ~basis.ACCEPTED).any()
    exact, fp32 = torch.linalg.eigvalsh(P.double()).flip(-1), torch.linalg.eigh(P)
    for i, name in enumerate(names):
        Q, d, wide = refreshed.basis[i].double(), refreshed.values[i].double(), P[i].double()
        assert orthonormality(Q) <= 1e-6, name
        assert (wide @ Q - Q * d).norm() <= 1e-5, name
        torch.testing.assert_close(d, exact[i].clamp_min(0), atol=1e-6, rtol=2e-6, msg=name)
        if refreshed.status[i] & basis.ACCEPTED:
            assert (d.diff() <= 0).all(), name
        if P[i].any():
            ours, theirs = (whitening(wide, V, FLOOR) for V in (refreshed.basis[i], fp32.eigenvectors[i]))
            assert ours <= 2 * theirs + 1e-2, (name, ours, theirs)


@pytest.mark.orders(2)
@pytest.mark.parametrize("name", ["exponential, condition 2e6", "condition 1e8"])
def test_small_eigenvalues_are_those_of_the_matrix(name: str, kernel: Refresh) -> None:
    P = symmetric(spectrum(name, 96)).float()
    refreshed = kernel(P, torch.eye(96), method="eigh")
    fp32 = torch.linalg.eigh(P).eigenvectors
    assert whitening(P, refreshed.basis, FLOOR) < 0.3 * whitening(P, fp32, FLOOR)


def test_sweeps_may_begin_with_a_basis_that_is_not_quite_orthonormal(kernel: Refresh) -> None:
    """A basis of bf16 numbers makes Q^T P Q by congruence: the first pass diagonalises another matrix."""
    P = symmetric(torch.logspace(0, -4, 40, dtype=torch.float64)).float()
    Q = exact_basis(P).bfloat16().float()
    assert orthonormality(Q) > 1e-4
    assert whitening(P, kernel(P, Q, method="eigh").basis) < 1e-3


# ---- the rotation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [10, 64, 100])
@pytest.mark.parametrize("sweeps", [1, 2])
def test_the_rotation_is_that_of_basis_py(n: int, sweeps: int, kernel: Refresh) -> None:
    for name in EIGENVALUES:
        if n // 16 == 0 and "spikes" in name:
            continue
        matrices = list(drifting(n, name, 3))
        Q = exact_basis(matrices[0])
        for P in matrices[1:]:
            ours, wanted = (run(P, Q, method="jr", sweeps=sweeps) for run in (kernel, eigh_refresh))
            assert ours.status == wanted.status
            assert torch.equal(ours.order, wanted.order)
            scale = P.abs().max()
            torch.testing.assert_close(ours.values / scale, wanted.values / scale, atol=1e-6, rtol=1e-4)
            errors = [whitening(P, found.basis) for found in (ours, wanted)]
            assert errors[0] == pytest.approx(errors[1], rel=2e-2, abs=1e-4)
            torch.testing.assert_close(ours.basis, wanted.basis, atol=1e-3, rtol=0)
            Q = wanted.basis


@pytest.mark.orders(2)
@pytest.mark.parametrize("method", ["jr", "auto", "eigh"])
@pytest.mark.parametrize("case", HARD)
def test_what_is_promised_of_every_matrix(case: str, method: str, kernel: Refresh) -> None:
    matrices, Q = HARD[case]
    for P in matrices:
        refreshed = kernel(P, Q, method=method)
        assert_refreshed(P, Q, refreshed)
        if method == "jr":
            assert refreshed.status & ~basis.ACCEPTED == eigh_refresh(P, Q, method="jr").status & ~basis.ACCEPTED
        else:
            assert not refreshed.status & basis.WANTS_EXACT
        Q = refreshed.basis
    if P.any() and method != "jr":
        assert whitening(P.double() / P.abs().max(), Q, FLOOR) < 0.1


# ---- the cascade ---------------------------------------------------------------------------------------------------


def test_the_block_goes_on_where_the_rotation_is_not_enough(kernel: Refresh) -> None:
    n = 64
    P = symmetric(EIGENVALUES["power"](n)).float()
    Q = exact_basis(P)
    skew = 0.002 * gaussian(n, n)
    near = torch.linalg.matrix_exp(skew - skew.mT).float() @ Q
    found = kernel(torch.stack([P, P]), torch.stack([near, orthogonal(n, 5).float()]))
    expected = [basis.ACCEPTED, basis.ACCEPTED | basis.FELL_BACK | basis.LARGE_ROTATION]
    assert found.status.tolist() == expected
    assert (near * found.basis[0]).sum(0).min() > 0.9
    assert whitening(P, found.basis[1]) < 1e-3


def test_sweeps_keep_the_rank_of_every_slot_and_signs(kernel: Refresh) -> None:
    P = symmetric(torch.logspace(0, -5, 32, dtype=torch.float64)).float()
    Q = orthogonal(32, 9).float()
    rank = (Q * (P @ Q)).sum(0).argsort().argsort()
    new, values, status, order = kernel(P, Q)
    assert status & basis.LARGE_ROTATION
    assert torch.equal(values.argsort().argsort(), rank)
    assert torch.equal(order, torch.arange(32))
    assert (Q * new).sum(0).min() > -1e-6
    again = kernel(P, -new.flip(1), method="eigh")
    assert ((-new.flip(1))[:, again.order] * again.basis).sum(0).min() > 0.99
    assert again.values.diff().max() <= 0


def test_columns_keep_slot_and_sign(kernel: Refresh) -> None:
    matrices = list(drifting(48, "power", 5))
    shuffle = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    Q = exact_basis(matrices[0])[:, shuffle] * (1 - 2 * (shuffle % 2))
    for P in matrices[1:]:
        new = kernel(P, Q)
        assert new.status == basis.ACCEPTED
        assert (Q * new.basis).sum(0).min() > 0.8
        Q = new.basis


# ---- what comes in -------------------------------------------------------------------------------------------------


@pytest.mark.orders(2)
@pytest.mark.parametrize("method", eigh.METHODS)
def test_what_is_not_finite_or_zero_stays_alone(method: str, kernel: Refresh) -> None:
    names = ["rank 2, moving", "condition 1e8", "toeplitz", "a random basis", "rank 0"]
    P, Q = (torch.stack([HARD[name][i][0] if i == 0 else HARD[name][1] for name in names]) for i in range(2))
    whole = kernel(P, Q, method=method)
    assert not whole.values[4].any()
    assert torch.equal(whole.basis[4], Q[4])
    for value in (torch.nan, torch.inf):
        bad = P.clone()
        bad[2, 3, 4] = value
        result = kernel(bad, Q, method=method)
        assert result.status[2] == basis.NOT_FINITE
        assert torch.equal(result.basis[2], Q[2])
        assert torch.equal(result.order[2], torch.arange(48))
        assert not result.values[2].any()
        others = [0, 1, 3, 4]
        for clean, seen in zip(whole, result):
            assert torch.equal(clean[others], seen[others])


def test_the_same_bits_in_every_batch_and_order(kernel: Refresh) -> None:
    P = torch.stack([symmetric(torch.logspace(0, -k, 21).double(), k) for k in range(1, 5)]).float()
    Q = torch.stack([exact_basis(P[0]), torch.eye(21), orthogonal(21).float(), exact_basis(P[3])])
    kept = P.clone(), Q.clone()
    whole = kernel(P.view(2, 2, 21, 21), Q.view(2, 2, 21, 21))
    for i in range(4):
        for all_, one in zip(whole, kernel(P[i], Q[i])):
            assert torch.equal(all_.flatten(0, 1)[i], one)
    assert torch.equal(P, kept[0])
    assert torch.equal(Q, kept[1])
    kernel.kernels.seed(7)
    for here, there in zip(whole, kernel(P, Q)):
        assert torch.equal(here.flatten(0, 1), there)


@pytest.mark.parametrize("Q", [torch.zeros(7, 7), torch.full((7, 7), torch.nan), torch.ones(7, 7)])
def test_what_is_no_basis_counts_as_the_identity(Q: Tensor, kernel: Refresh) -> None:
    P = symmetric(torch.logspace(0, -3, 7).double()).float()
    for method in eigh.METHODS:
        ours, identity = kernel(P, Q, method=method), kernel(P, torch.eye(7), method=method)
        assert ours.status == identity.status | basis.NOT_ORTHONORMAL
        assert torch.equal(ours.basis, identity.basis)
    assert torch.equal(kernel(torch.zeros(7, 7), Q).basis, torch.eye(7))


def test_of_what_is_not_symmetric_the_symmetric_part_is_taken(kernel: Refresh) -> None:
    P = symmetric(torch.logspace(0, -3, 8).double()).float()
    skew = torch.triu(torch.ones(8, 8), 1)
    result, plain = (kernel(A, torch.eye(8)) for A in (P + skew - skew.mT, P))
    assert result.status == plain.status | basis.NOT_SYMMETRIC
    torch.testing.assert_close(result.values, plain.values)
    assert not kernel(P + 1e-5 * skew, torch.eye(8)).status & basis.NOT_SYMMETRIC


def test_scale_does_not_matter(kernel: Refresh) -> None:
    P, Q = HARD["condition 1e8, warm"][0][0], HARD["condition 1e8, warm"][1]
    plain = kernel(P, Q)
    for exponent in (-100, 30, 120):
        scaled = kernel(P * 2.0**exponent, Q)
        torch.testing.assert_close(scaled.values * 2.0**-exponent, plain.values, atol=1e-7, rtol=1e-5)
        assert scaled.status == plain.status
    tiny = kernel(torch.eye(3) * 2.0**-140, torch.eye(3))
    assert tiny.values.tolist() == [2.0**-140] * 3


# ---- where it runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability, most", [(80, 128), (86, 110), (90, 128), (120, 110)])
def test_the_largest_matrix_of_each_architecture(capability: int, most: int, kernel: Refresh) -> None:
    """The runtime allows what it asks for, and it does not ask for more than is said."""
    assert backend.extension is not None
    assert backend.extension.eigh_rows(capability) == most
    P = torch.diag(torch.linspace(1, 2, most))
    assert_refreshed(P, torch.eye(most), kernel(P, torch.eye(most), method="jr", capability=capability))
    with pytest.raises(ValueError, match=f"n must be at most {most} with .* got {most + 1}"):
        kernel(torch.eye(most + 1), torch.eye(most + 1), capability=capability)


# ---- the door --------------------------------------------------------------------------------------------------------


@pytest.mark.orders(1)
def test_errors(kernels: Kernels) -> None:
    P = torch.zeros(2, 20, 20)
    into = torch.empty(2, 20, 20), torch.empty(2, 20), torch.empty(2, dtype=torch.int32), torch.empty(2, 20).long()
    with pytest.raises(RuntimeError, match="basis must be a contiguous tensor of Float with 800 elements"):
        kernels.ops.eigh_refresh(P, P, into[0].double(), *into[1:], 0, 1)


@pytest.mark.orders(1)
def test_the_batched_solver(kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of cuSOLVER, of a library with its names: it refuses arguments and a workspace that are wrong."""
    P = torch.stack([symmetric(torch.logspace(0, -2, 7).double(), seed) for seed in range(3)])
    stand_in, source = tmp_path / "libcusolver.so", Path(__file__).with_name("cusolver.cpp")
    subprocess.run([COMPILER, "-std=c++17", "-O1", "-fPIC", "-shared", str(source), "-o", str(stand_in)], check=True)
    assert kernels.library.door_load_cusolver(str(stand_in).encode()) == b""
    monkeypatch.setattr(eigh, "_batched", lambda P: True)
    monkeypatch.setattr(torch.ops.steepest, "eigh_batched", kernels.ops.eigh_batched)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        given = P.to(dtype)
        given[1, 2, 2] = math.nan
        kept, V = given.clone(), eigh.eigenvectors(given)
        assert V[1].isnan().all()
        torch.testing.assert_close(given, kept, rtol=0, atol=0, equal_nan=True)
        for i in (0, 2):
            values = torch.logspace(0, -2, 7).double().flip(0).to(dtype)
            torch.testing.assert_close(given[i] @ V[i], V[i] * values, atol=tolerance, rtol=0)
            assert orthonormality(V[i]) < tolerance
