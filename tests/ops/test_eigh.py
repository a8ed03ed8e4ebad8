"""The kernel that refreshes small eigenbases, run on a CPU from its source, against fp64 LAPACK and linalg/basis.py;
the solver of larger ones: how its library is looked for, and what goes to it."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import gaussian, orthogonal
from emulations import ORDERS, shared_library
from spectra import EIGENVALUES, FLOOR, HARD, assert_refreshed, drifting, exact_basis, symmetric, whitening
from steepest.linalg import basis
from steepest.linalg.basis import Refreshed, eigh_refresh, orthonormality
from steepest.ops import backend, eigh

SOURCES = ("csrc/eigh/refresh.cu", "csrc/eigh/plan.cpp", "tests/emulation/eigh.cpp")


class Refresh(ctypes.Structure):
    """`Refresh` in csrc/eigh/params.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("p", "q", "basis", "values", "status", "order")),
        ("count", ctypes.c_int64),
        ("n", ctypes.c_int32),
        ("method", ctypes.c_int32),
        ("sweeps", ctypes.c_int32),
    )


@dataclass
class Kernel:
    library: ctypes.CDLL

    def __call__(
        self, P: Tensor, Q: Tensor, *, method: str = "auto", sweeps: int = 1, capability: int = 90
    ) -> Refreshed:
        """`eigh_refresh` of matrices (..., n, n), all in one launch."""
        n, one = P.shape[-1], P.shape[:-1]
        P, Q = P.contiguous(), Q.contiguous()
        found = Refreshed(
            torch.full(P.shape, torch.nan),
            torch.full(one, torch.nan),
            torch.full(one[:-1], -1, dtype=torch.int32),
            torch.full(one, -1),
        )
        count = found.status.numel()
        pointers = (P.data_ptr(), Q.data_ptr(), *(x.data_ptr() for x in found))
        given = Refresh(*pointers, count, n, eigh.METHODS.index(method), sweeps)
        if self.library.eigh_refresh(ctypes.byref(given), capability):
            raise ValueError(self.library.eigh_message().decode())
        return found


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(shared_library(tmp_path_factory.mktemp("eigh") / "emulated.so", SOURCES)))
    loaded.eigh_message.restype = ctypes.c_char_p
    for name in ("launches", "bytes", "most_rows"):
        getattr(loaded, f"eigh_{name}").restype = ctypes.c_int64
    return loaded


@pytest.fixture(params=["shuffled"])
def kernel(request: pytest.FixtureRequest, library: ctypes.CDLL, capfd: pytest.CaptureFixture[str]) -> Iterator[Kernel]:
    library.eigh_order(ORDERS.index(request.param))
    yield Kernel(library)
    errors = capfd.readouterr().err
    assert "runtime error" not in errors, errors


in_every_order = pytest.mark.parametrize("kernel", ORDERS, indirect=True)


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


@pytest.mark.parametrize("n", [1, 2, 3, 5, 32, 33, 64, 65, 110, 128])
def test_the_exact_solver_against_lapack(n: int, kernel: Kernel) -> None:
    """Nearer than LAPACK in fp32 to the small eigenvalues, and to its basis; as near to the large ones."""
    names = SPECTRA if n < 100 else ("rank 2", "condition 1e8", "clusters")  # the emulation takes its time
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


@pytest.mark.parametrize("name", ["exponential, condition 2e6", "condition 1e8"])
def test_small_eigenvalues_are_those_of_the_matrix(name: str, kernel: Kernel) -> None:
    P = symmetric(spectrum(name, 96)).float()
    refreshed = kernel(P, torch.eye(96), method="eigh")
    fp32 = torch.linalg.eigh(P).eigenvectors
    assert whitening(P, refreshed.basis, FLOOR) < 0.3 * whitening(P, fp32, FLOOR)


def test_every_two_columns_meet_once_in_a_sweep(library: ctypes.CDLL) -> None:
    players = (ctypes.c_int * 2)()
    for even in (2, 4, 6, 34, 128):
        met = []
        for round_ in range(even - 1):
            pairs = []
            for k in range(even // 2):
                library.eigh_pair(round_, k, even, players)
                pairs.append(tuple(sorted(players)))
            assert len({column for pair in pairs for column in pair}) == even
            met += pairs
        assert len(set(met)) == len(met) == even * (even - 1) // 2


def test_sweeps_may_begin_with_a_basis_that_is_not_quite_orthonormal(kernel: Kernel) -> None:
    """A basis of bf16 numbers makes Q^T P Q by congruence: the first pass diagonalises another matrix."""
    P = symmetric(torch.logspace(0, -4, 40, dtype=torch.float64)).float()
    Q = exact_basis(P).bfloat16().float()
    assert orthonormality(Q) > 1e-4
    assert whitening(P, kernel(P, Q, method="eigh").basis) < 1e-3


# ---- the rotation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [10, 64, 100])
@pytest.mark.parametrize("sweeps", [1, 2])
def test_the_rotation_is_that_of_basis_py(n: int, sweeps: int, kernel: Kernel) -> None:
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


@pytest.mark.parametrize("method", ["jr", "auto", "eigh"])
@pytest.mark.parametrize("case", HARD)
def test_what_is_promised_of_every_matrix(case: str, method: str, kernel: Kernel) -> None:
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


def test_the_block_goes_on_where_the_rotation_is_not_enough(kernel: Kernel) -> None:
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


def test_sweeps_keep_the_rank_of_every_slot_and_signs(kernel: Kernel) -> None:
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


def test_columns_keep_slot_and_sign(kernel: Kernel) -> None:
    matrices = list(drifting(48, "power", 5))
    shuffle = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    Q = exact_basis(matrices[0])[:, shuffle] * (1 - 2 * (shuffle % 2))
    for P in matrices[1:]:
        new = kernel(P, Q)
        assert new.status == basis.ACCEPTED
        assert (Q * new.basis).sum(0).min() > 0.8
        Q = new.basis


# ---- what comes in -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", eigh.METHODS)
def test_what_is_not_finite_or_zero_stays_alone(method: str, kernel: Kernel) -> None:
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


@in_every_order
def test_the_same_bits_in_every_batch_and_order(kernel: Kernel) -> None:
    P = torch.stack([symmetric(torch.logspace(0, -k, 21).double(), k) for k in range(1, 5)]).float()
    Q = torch.stack([exact_basis(P[0]), torch.eye(21), orthogonal(21).float(), exact_basis(P[3])])
    kept = P.clone(), Q.clone()
    before = kernel.library.eigh_launches()
    whole = kernel(P.view(2, 2, 21, 21), Q.view(2, 2, 21, 21))
    assert kernel.library.eigh_launches() == before + 1
    for i in range(4):
        for all_, one in zip(whole, kernel(P[i], Q[i])):
            assert torch.equal(all_.flatten(0, 1)[i], one)
    assert torch.equal(P, kept[0])
    assert torch.equal(Q, kept[1])
    kernel.library.eigh_order(ORDERS.index("forward"))
    for here, there in zip(whole, kernel(P, Q)):
        assert torch.equal(here.flatten(0, 1), there)


@pytest.mark.parametrize("Q", [torch.zeros(7, 7), torch.full((7, 7), torch.nan), torch.ones(7, 7)])
def test_what_is_no_basis_counts_as_the_identity(Q: Tensor, kernel: Kernel) -> None:
    P = symmetric(torch.logspace(0, -3, 7).double()).float()
    for method in eigh.METHODS:
        ours, identity = kernel(P, Q, method=method), kernel(P, torch.eye(7), method=method)
        assert ours.status == identity.status | basis.NOT_ORTHONORMAL
        assert torch.equal(ours.basis, identity.basis)
    assert torch.equal(kernel(torch.zeros(7, 7), Q).basis, torch.eye(7))


def test_of_what_is_not_symmetric_the_symmetric_part_is_taken(kernel: Kernel) -> None:
    P = symmetric(torch.logspace(0, -3, 8).double()).float()
    skew = torch.triu(torch.ones(8, 8), 1)
    result, plain = (kernel(A, torch.eye(8)) for A in (P + skew - skew.mT, P))
    assert result.status == plain.status | basis.NOT_SYMMETRIC
    torch.testing.assert_close(result.values, plain.values)
    assert not kernel(P + 1e-5 * skew, torch.eye(8)).status & basis.NOT_SYMMETRIC


def test_scale_does_not_matter(kernel: Kernel) -> None:
    P, Q = HARD["condition 1e8, warm"][0][0], HARD["condition 1e8, warm"][1]
    plain = kernel(P, Q)
    for exponent in (-100, 30, 120):
        scaled = kernel(P * 2.0**exponent, Q)
        torch.testing.assert_close(scaled.values * 2.0**-exponent, plain.values, atol=1e-7, rtol=1e-5)
        assert scaled.status == plain.status
    tiny = kernel(torch.eye(3) * 2.0**-140, torch.eye(3))
    assert tiny.values.tolist() == [2.0**-140] * 3


# ---- where it runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability, limit, most", [(80, 163, 128), (86, 99, 110), (90, 227, 128), (120, 99, 110)])
def test_the_largest_matrix_of_each_architecture(
    capability: int, limit: int, most: int, library: ctypes.CDLL, kernel: Kernel
) -> None:
    assert library.eigh_most_rows(capability) == most
    assert library.eigh_bytes(most) + 1024 <= limit * 1024
    assert most == 128 or library.eigh_bytes(most + 1) + 1024 > limit * 1024
    if most < 128:
        with pytest.raises(ValueError, match=f"n must be at most {most} with {limit * 1024} bytes .* got {most + 1}"):
            kernel(torch.eye(most + 1), torch.eye(most + 1), capability=capability)


def test_matrices_below_8_0_are_for_torch(library: ctypes.CDLL) -> None:
    assert library.eigh_most_rows(75) == 0


@pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")
def test_who_takes_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """By device, dtype, size, capability and STEEPEST_BACKEND; what stands in the way is said once."""
    monkeypatch.setattr(backend, "_logged", set())
    with FakeTensorMode():
        P = torch.empty(3, 112, 112, device="cuda")
        assert not eigh.takes(torch.empty(3, 20, 20), "auto")
        with caplog.at_level(logging.INFO, "steepest"):
            assert not any(eigh.takes(P, "auto") for _ in range(2)) or torch.cuda.is_available()
        if not torch.cuda.is_available():
            assert len(caplog.records) == 1
            assert "eigh_refresh runs on torch (cuda: " in caplog.text
        monkeypatch.setattr(backend, "cuda_reason", lambda index=None: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        assert all(eigh.takes(P, method) for method in eigh.METHODS)
        assert not eigh.takes(P, "qr")
        assert not eigh.takes(P.double(), "auto")
        assert not eigh.takes(torch.empty(3, 129, 129, device="cuda"), "auto")
        found = eigh_refresh(P.view(1, 3, 112, 112), P.view(1, 3, 112, 112))
        assert [x.shape for x in found] == [(1, 3, 112, 112), (1, 3, 112), (1, 3), (1, 3, 112)]
        monkeypatch.setattr(backend, "_logged", set())
        caplog.clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
        fits = torch.empty(3, 110, 110, device="cuda")
        assert eigh.takes(fits, "auto")
        assert not eigh.takes(P, "auto")
        assert "shared memory holds matrices of 110 rows, and these have 112" in caplog.text
        for forced, taken in (("cuda", True), ("torch", False), ("triton", False)):
            monkeypatch.setattr(backend, "forced", forced)
            assert eigh.takes(fits, "auto") == taken


# ---- the solver of larger matrices -----------------------------------------------------------------------------------


needs_extension = pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")


@needs_extension
def test_why_cusolver_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load = backend.extension.load_cusolver  # type: ignore[union-attr]
    if sys.platform != "linux" or load([]) is None:
        pytest.skip("cuSOLVER is loaded already, or the loader's words are others")
    assert load([]) == "no library to look for"
    assert "libnone.so.7: cannot open shared object file" in load(["libnone.so.7"])
    reason = load(["libnone.so.7", "libm.so.6"])
    assert reason.endswith("; libm.so.6 has no cusolverDnXsyevBatched, which CUDA 12.6.2 brought")
    (tmp_path / "nvidia" / "cu13" / "lib").mkdir(parents=True)
    (tmp_path / "nvidia" / "cu13" / "lib" / "libcusolver.so.12").touch()
    wheels = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: wheels if name == "nvidia" else None)
    names = eigh._cusolver_names("13.0")
    assert names == [str(tmp_path / "nvidia" / "cu13" / "lib" / "libcusolver.so.12"), "libcusolver.so.12"]
    assert "file too short" in load(names[:1])
    assert eigh._cusolver_names(None) == eigh._cusolver_names("11.8") == []


def test_eigenvectors_without_cusolver(monkeypatch: pytest.MonkeyPatch) -> None:
    P = torch.stack([symmetric(torch.logspace(0, -3, 9).double(), seed) for seed in range(3)])
    assert torch.equal(eigh.eigenvectors(P), torch.linalg.eigh(P).eigenvectors)

    def fail(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("linalg.eigh: failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    assert eigh.eigenvectors(P).isnan().all()


@needs_extension
def test_who_takes_eigenvectors(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backend, "_logged", set())
    monkeypatch.setattr(backend, "cuda_reason", lambda index=None: None)
    monkeypatch.setattr(eigh, "cusolver_reason", lambda: "cuSOLVER does not load: no library to look for")
    with FakeTensorMode():
        P = torch.empty(3, 200, 200, device="cuda")
        assert not eigh._batched(P)
        assert "eigh runs on torch (cuda: cuSOLVER does not load: no library to look for)" in caplog.text
        monkeypatch.setattr(eigh, "cusolver_reason", lambda: None)
        assert eigh._batched(P)
        assert not eigh._batched(torch.empty(1, 200, 200, device="cuda"))
        monkeypatch.setattr(backend, "forced", "torch")
        assert not eigh._batched(P)


# ---- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("method", eigh.METHODS)
@pytest.mark.parametrize("case", HARD)
def test_on_a_gpu(case: str, method: str, kernel: Kernel) -> None:
    """What is promised, and what the same source does on a CPU, up to the rounding of multiply-adds."""
    matrices, Q = HARD[case]
    P = matrices[-1]
    assert eigh.takes(P.cuda(), method)
    found = Refreshed(*(x.cpu() for x in eigh_refresh(P.cuda(), Q.cuda(), method=method)))
    assert_refreshed(P, Q, found)
    # Whether what is exact to rounding is taken once more is up to rounding.
    assert found.status | basis.ACCEPTED == kernel(P, Q, method=method).status | basis.ACCEPTED


@pytest.mark.gpu
def test_a_graph_captures_it() -> None:
    matrices = [P.cuda() for P in drifting(96, "power", 3)]
    P, Q = matrices[0].clone(), exact_basis(matrices[0].cpu()).cuda()
    eigh_refresh(P, Q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = eigh_refresh(P, Q)
    for other in matrices[1:]:
        P.copy_(other)
        graph.replay()
        for seen, wanted in zip(found, eigh_refresh(P, Q)):
            assert torch.equal(seen, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cusolver_on_a_gpu(dtype: torch.dtype) -> None:
    if (reason := eigh.cusolver_reason()) is not None:
        pytest.skip(reason)
    P = torch.stack([symmetric(torch.logspace(0, -3, 200).double(), seed) for seed in range(5)]).to(dtype).cuda()
    assert eigh._batched(P)
    V = eigh.eigenvectors(P)
    values = (V * (P @ V)).sum(-2)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert (orthonormality(V.double()) < tolerance).all()
    torch.testing.assert_close(values, torch.linalg.eigvalsh(P), atol=tolerance, rtol=0)
    assert torch.equal(V, eigh.eigenvectors(P))
