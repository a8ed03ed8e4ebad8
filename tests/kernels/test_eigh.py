"""Who takes the refresh of an eigenbasis and the eigenvectors of many matrices; how cuSOLVER is looked for.

tests/kernels/ptx runs the kernel itself.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from steepest.linalg import basis
from steepest.linalg.basis import Refreshed, eigh_refresh, orthonormality
from steepest.ops import backend, eigh
from support.eigenvalues import HARD, assert_refreshed, drifting, exact_basis, symmetric

needs_extension = pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")


@needs_extension
@pytest.mark.parametrize("capability, most", [(75, 0), (80, 128), (86, 110), (90, 128), (120, 110)])
def test_the_largest_matrix_of_each_architecture(capability: int, most: int) -> None:
    assert backend.extension is not None
    assert backend.extension.eigh_rows(capability) == most


# ---- where it runs -------------------------------------------------------------------------------------------------


@needs_extension
def test_who_takes_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """By device, dtype, size, capability and STEEPEST_BACKEND; what stands in the way is said once."""
    monkeypatch.setattr(backend, "_logged", set())
    with FakeTensorMode():
        P = torch.empty(3, 112, 112, device="cuda")
        assert not eigh.supports(torch.empty(3, 20, 20), "auto")
        with caplog.at_level(logging.INFO, "steepest"):
            assert not any(eigh.supports(P, "auto") for _ in range(2)) or torch.cuda.is_available()
        if not torch.cuda.is_available():
            assert len(caplog.records) == 1
            assert "eigh_refresh runs on torch (cuda: " in caplog.text
        monkeypatch.setattr(backend, "cuda_reason", lambda index=None: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        assert all(eigh.supports(P, method) for method in eigh.METHODS)
        assert not eigh.supports(P, "qr")
        assert not eigh.supports(P.double(), "auto")
        assert not eigh.supports(torch.empty(3, 129, 129, device="cuda"), "auto")
        found = eigh_refresh(P.view(1, 3, 112, 112), P.view(1, 3, 112, 112))
        assert [x.shape for x in found] == [(1, 3, 112, 112), (1, 3, 112), (1, 3), (1, 3, 112)]
        monkeypatch.setattr(backend, "_logged", set())
        caplog.clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
        fits = torch.empty(3, 110, 110, device="cuda")
        assert eigh.supports(fits, "auto")
        assert not eigh.supports(P, "auto")
        assert "shared memory holds matrices of 110 rows, and these have 112" in caplog.text
        for forced, taken in (("cuda", True), ("torch", False), ("triton", False)):
            monkeypatch.setattr(backend, "forced", forced)
            assert eigh.supports(fits, "auto") == taken


# ---- the solver of larger matrices -----------------------------------------------------------------------------------


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
    values = torch.logspace(-3, 0, 9, dtype=torch.float64)
    P = torch.stack([symmetric(values, seed) for seed in range(3)])
    V = eigh.eigenvectors(P)
    torch.testing.assert_close(P @ V, V * values, rtol=0, atol=1e-14)
    torch.testing.assert_close(V.mT @ V, torch.eye(9, dtype=torch.float64).expand(3, 9, 9), rtol=0, atol=1e-14)

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
def test_on_a_gpu(case: str, method: str) -> None:
    """What is promised, and what the reference says of it."""
    matrices, Q = HARD[case]
    P = matrices[-1]
    assert eigh.supports(P.cuda(), method)
    found = Refreshed(*(x.cpu() for x in eigh_refresh(P.cuda(), Q.cuda(), method=method)))
    assert_refreshed(P, Q, found)
    # Whether what is exact to rounding is taken once more is up to rounding.
    if method == "jr":
        assert found.status | basis.ACCEPTED == eigh_refresh(P, Q, method="jr").status | basis.ACCEPTED


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
