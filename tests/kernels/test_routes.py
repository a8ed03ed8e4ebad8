"""Which calls go to the compiled kernels of a GPU: none that is traced, none that they would refuse, none on ROCm.

The GPU is said to be there; the tensors are on the CPU, or nowhere.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.linalg.coefficients import SCHEDULES
from steepest.linalg.newton_schulz import newton_schulz
from steepest.linalg.polar import polar
from steepest.ops import (
    backend,
    chain_numbers,
    cpu_chain,
    eigh,
    polar_chain,
    products,
    small_polar,
    symm_gemm,
    weight_update,
)
from steepest.ops.polar_chain import Update
from steepest.ops.symm_gemm import Workspace
from support.host_libraries import shared_library
from support.operations import Operations

AUTO = SCHEDULES["auto"]
H, F = torch.float16, torch.float32


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor says that it is on a GPU of compute capability 9.0 for which everything but Triton is built."""
    info = {"architectures": ["sm_90a"], "hopper": True, "cuda": "13.0"}
    extension = SimpleNamespace(
        build_info=lambda: info,
        small_polar_rows=lambda capability: 256,
        small_polar_refusal=lambda tables, least: None,
        eigh_rows=lambda capability: 128,
    )
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(backend, "extension", extension)
    monkeypatch.setattr(backend, "cuda_reason", lambda *_: None)
    monkeypatch.setattr(backend, "triton_reason", lambda: "not asked here")
    monkeypatch.setattr(backend, "log_once", lambda *_: None)
    monkeypatch.setattr(eigh, "cusolver_reason", lambda: None)
    monkeypatch.setattr(polar_chain, "hopper_reason", lambda x: None)
    monkeypatch.setattr(weight_update, "hopper_reason", lambda x: None)
    monkeypatch.setattr(small_polar, "_capability", lambda index: (9, 0))
    for module, cached in ((small_polar, "_refusal"), (eigh, "_most_rows")):  # of another extension
        monkeypatch.setattr(module, cached, getattr(module, cached).__wrapped__)


def asked() -> dict[str, bool]:
    """By op: whether the compiled version is to take a call that it can take."""
    x, square, numbers = torch.ones(2, 64, 64, dtype=H), torch.eye(64).expand(2, 64, 64).contiguous(), torch.ones(2)
    weights = [torch.ones(64, 64), torch.ones(64, 64)]
    constants = ((1.0, 2.0),)
    return {
        "chain_numbers": chain_numbers._route(x, constants) == "cuda",
        "polar_chain": polar_chain.supports(x, constants),
        "polar_chain into weights": polar_chain.supports(x, constants, Update(weights, numbers, numbers)),
        "small_polar": small_polar.supports([x], AUTO.tables, AUTO.slacks),
        "weight_update": weight_update._route(x, x, weights, numbers, numbers) == "cuda",
        "eigh_refresh": eigh.supports(square, "auto"),
        "eigh": eigh._batched(square),
    }


def test_what_is_traced_is_torchs_own(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(asked().values())
    monkeypatch.setattr(backend, "triton_reason", lambda: None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not any(asked().values())
    x = torch.ones(2, 64, 64)
    assert symm_gemm._route(x.half(), x.half()) == products._route(x, "tf32x3") == "torch"


@pytest.mark.parametrize("forced", ["auto", "torch"])
def test_a_traced_iteration_calls_no_op_of_ours(forced: str, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The custom ops mutate what they are given, which a compiler cannot fuse, and lay no graph of torch's own open.

    But for the one call of a CPU, which leaves nothing to fuse and is faster than what a compiler makes of products.
    """
    monkeypatch.setattr(backend, "forced", forced)
    monkeypatch.setattr(cpu_chain, "compiled", lambda dtype: False)

    def run() -> set[str]:
        with Operations() as called:
            for form in ("standard", "gram"):
                polar(torch.ones(2, 160, 200), dtype=torch.bfloat16, form=form)
            x, slack = torch.ones(2, 160, 200, dtype=H), torch.empty(2)
            newton_schulz([x], AUTO, (2,), Workspace(), eps=1e-7, slacks=[slack])
        return {name.partition(".")[0] for name in called.names}

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert run() <= {"aten", "prim", "prims"}


# ---- what the door refuses is not sent to it -----------------------------------------------------------------------


REFUSAL = """
#include <string>

#include "symm_gemm/plan.h"

using namespace steepest::symm_gemm;

// at: batch, m, n, k, majors, rows and matrices of A and of B; the product goes into contiguous weights.
extern "C" const char* refusal_of(const int64_t* at) {
  static std::string text;
  const Shape shape{at[0], at[1], at[2], at[3], static_cast<Majors>(at[4]), false, {at[5], at[6]}, {at[7], at[8]},
                    {}, {at[2], at[1] * at[2]}, false};
  return (text = refusal(shape)).c_str();
}
"""
KK, MNMN, KMN = 0, 1, 2  # Majors


@pytest.fixture(scope="module")
def refusal(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tensor, Tensor], str]:
    """What csrc/symm_gemm/plan.cpp says of a product, described as csrc/ops/products.h does."""
    folder = tmp_path_factory.mktemp("refusal")
    (folder / "door.cpp").write_text(REFUSAL)
    loaded = ctypes.CDLL(str(shared_library(folder / "r.so", ["csrc/symm_gemm/plan.cpp", str(folder / "door.cpp")])))
    loaded.refusal_of.restype = ctypes.c_char_p

    def of(a: Tensor, b: Tensor) -> str:
        a_by_rows, b_by_rows = a.stride(2) == 1, b.stride(2) == 1
        strides = (a.stride(1 if a_by_rows else 2), a.stride(0), b.stride(1 if b_by_rows else 2), b.stride(0))
        majors = MNMN if not a_by_rows else KMN if b_by_rows else KK
        numbers = (len(a), a.shape[1], b.shape[2], a.shape[2], majors, *strides)
        return str(loaded.refusal_of((ctypes.c_int64 * 9)(*numbers)).decode())

    return of


def factors() -> Iterator[tuple[Tensor, Tensor]]:
    """Stacks in every layout that torch makes: contiguous, transposed, padded, expanded, with rows that overlap."""

    def layouts(batch: int, rows: int, columns: int) -> Iterator[Tensor]:
        def view(*strides: int) -> Tensor:
            return torch.empty(1, dtype=H, device="meta").as_strided((batch, rows, columns), strides)

        plain = columns * rows
        yield view(plain, columns, 1)
        yield view(plain, 1, rows)
        yield view((columns + 8) * rows, columns + 8, 1)
        yield view((columns + 3) * rows, columns + 3, 1)
        yield view(0, columns, 1)
        yield view(8, columns, 1)
        yield view(plain + 4, columns, 1)
        yield view(plain, 8, 1)
        yield view(plain, 0, 1)
        yield view(plain, 1, 8)
        yield view(plain, columns, 2)
        yield view(2**39, columns, 1)
        yield view(plain, 2**39, 1)

    for batch, m, n, k in ((1, 16, 24, 32), (3, 16, 24, 32), (3, 16, 20, 32), (3, 5, 8, 8), (2, 16, 24, 20)):
        yield from itertools.product(layouts(batch, m, k), layouts(batch, k, n))


@pytest.mark.slow
def test_a_product_that_is_sent_is_not_refused(refusal: Callable[[Tensor, Tensor], str]) -> None:
    sent = 0
    for (a, b), by_columns in itertools.product(factors(), (False, True)):
        why = weight_update.factors_reason(a, b, by_columns=by_columns)
        by_rows = a.stride(2) == 1 and 1 in b.stride()[1:]
        if not by_rows and not (by_columns and a.stride(1) == b.stride(2) == 1):
            assert why is not None
            continue
        assert (why is None) == (refusal(a, b) == ""), (a.shape, a.stride(), b.shape, b.stride(), why, refusal(a, b))
        sent += why is None
    assert sent > 40


def test_numbers_of_a_chain_are_fp32_whatever_the_default_is(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op takes no others."""
    given: list[Tensor] = []
    monkeypatch.setattr(chain_numbers, "_route", lambda *_: "cuda")
    monkeypatch.setattr(torch.ops.steepest, "chain_numbers", lambda *a: given.extend(a[1:3]), raising=False)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        slack = torch.empty(2, dtype=F)
        chain_numbers.chain_numbers(torch.ones(2, 8, 8, dtype=H), ((1.0,),), (1,), (), tight=True, eps=0.0, slack=slack)
    finally:
        torch.set_default_dtype(default)
    assert [t.dtype for t in given] == [F, F]


@pytest.mark.parametrize(
    "name, change",
    [
        ("expanded batch", lambda a, b, w, n: (a[:1].expand_as(a), b, w, n, n)),
        ("expanded second factor", lambda a, b, w, n: (a, b[:1].expand_as(b), w, n, n)),
        ("overlapping rows", lambda a, b, w, n: (a.as_strided(a.shape, (64 * 64, 8, 1)), b, w, n, n)),
        ("numbers in fp64", lambda a, b, w, n: (a, b, w, n.double(), n)),
        ("factors of two types", lambda a, b, w, n: (a, b.to(torch.bfloat16), w, n, n)),
        ("weights of two types", lambda a, b, w, n: (a, b, [w[0], w[1].half()], n, n)),
        (
            "an offset of 2 bytes",
            lambda a, b, w, n: (torch.ones(2 * 64 * 64 + 1).half()[1:].view(2, 64, 64), b, w, n, n),
        ),
    ],
)
def test_a_weight_update_falls_back(name: str, change: Callable[..., Any], gpu: None) -> None:
    a, numbers = torch.ones(2, 64, 64, dtype=H), torch.ones(2)
    weights = [torch.ones(64, 64), torch.ones(64, 64)]
    assert weight_update._reason(a, a, weights, numbers, numbers) is None
    assert weight_update._reason(*change(a, a, weights, numbers)) is not None, name


def test_what_else_a_door_refuses(gpu: None) -> None:
    x, constants = torch.ones(2, 64, 64, dtype=H), ((1.0, 2.0),)
    assert chain_numbers._route(x[:, :, ::2][:, ::2], constants) == "torch"
    assert not polar_chain.supports(x.mT[..., :32], constants)
    many = torch.empty(1, device="meta").expand(2**31, 1, 1)
    assert not eigh.supports(many, "auto")
    assert not eigh._batched(torch.empty(1, dtype=F, device="meta").expand(2, 46341, 46341))
    assert eigh._batched(torch.empty(1, dtype=F, device="meta").expand(2, 46340, 46340))


# ---- which devices -------------------------------------------------------------------------------------------------


def test_rocm_is_not_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """To torch its devices are "cuda", and gfx942 is of capability 9.4."""
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 4))
    for reason in (backend._cuda_reason.__wrapped__(0), backend._triton_reason.__wrapped__()):
        assert reason is not None
        assert f"torch {torch.__version__} is a build for ROCm 6.4.43482, and the kernels are for NVIDIA GPUs" in reason


@pytest.mark.parametrize(
    "capability, clusters, taken",
    [((9, 0), True, (9, 0)), ((9, 0), False, (8, 9)), ((12, 0), False, (8, 9)), ((8, 0), False, (8, 0))],
)
def test_clusters_are_asked_for(
    capability: tuple[int, int], clusters: bool, taken: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not taken from the capability's number: a device that has none gets what one without them gets."""
    info = {"architectures": ["sm_80", "sm_90", "compute_90"]}
    monkeypatch.setattr(backend, "extension", SimpleNamespace(build_info=lambda: info))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.ops.steepest, "cluster_launch", lambda index: clusters, raising=False)
    assert small_polar._capability.__wrapped__(0) == taken
