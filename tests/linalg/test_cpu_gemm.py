"""fp32 products of our own on a CPU: right at every edge, with the same bits in any call, and where they are taken."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.ops import backend
from steepest.ops import matmul as products
from steepest.ops.matmul import cpu_gemm, has_gemm, matmul, turns_in_order
from steepest.ops.products import product
from steepest.ops.symm_gemm import gemm
from support.training import noise, same_bits

compiled = pytest.mark.skipif(not backend.has_cpu_products(), reason="no products are compiled for this processor")


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor on which they are the faster ones."""
    monkeypatch.setattr(products, "_gemm_is_faster", lambda: True)


def layouts(x: Tensor) -> Iterator[Tensor]:
    yield x
    yield x.mT.contiguous().mT
    beside = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
    beside[..., 1:-2] = x
    yield beside[..., 1:-2]


def bound(a: Tensor, b: Tensor) -> Tensor:
    """Of the error of an entry: a sum of k terms in fp32 and what is made of it, from the sum of their magnitudes."""
    return 2.0**-24 * (a.shape[-1] + 3) * (a.abs().double() @ b.abs().double()) + 1e-30


@compiled
@pytest.mark.parametrize("k", [1, 2, 16, 33, 300])
def test_every_edge_of_a_panel(k: int) -> None:
    for m in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 48, 65):
        for n in (1, 3, 15, 16, 17, 32, 47, 48, 49, 64, 65, 97):
            a, b = noise((2, m, k), m), noise((2, k, n), n)
            out = cpu_gemm(a, b, out=torch.full((2, m, n), torch.nan))
            assert ((out.double() - a.double() @ b.double()).abs() <= bound(a, b)).all(), (m, k, n)


@compiled
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(3, 40, 50, 33), (1, 150, 70, 200), (7, 129, 300, 48)], ids=str)
def test_bits_do_not_depend_on_batch_layout_or_threads(shape: tuple[int, int, int, int], threads: int) -> None:
    batch, m, k, n = shape
    a, b = noise((batch, m, k), 1), noise((batch, k, n), 2)
    wanted = cpu_gemm(a, b, out=torch.empty(batch, m, n))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for left in layouts(a):
            for right in layouts(b):
                assert same_bits(cpu_gemm(left, right, out=torch.empty(batch, m, n)), wanted)
        for i in range(batch):
            alone = cpu_gemm(a[i : i + 1], b[i : i + 1], out=torch.empty(1, m, n))
            assert same_bits(alone, wanted[i : i + 1])
    finally:
        torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("into", ["another", "c", "rows beside others"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_alpha_and_beta_and_c(into: str, symmetric: bool) -> None:
    a = noise((2, 37, 70), 1)
    b = a.mT if symmetric else noise((2, 70, 37), 2)
    c = noise((2, 37, 37), 3)
    c = c + c.mT
    wanted, size = 0.7 * (a.double() @ b.double()) - 1.5 * c.double(), bound(a, b) + 2.0**-22 * c.abs().double()
    out = (
        c
        if into == "c"
        else torch.full((2, 37, 60), torch.nan)[:, :, 7:44]
        if into != "another"
        else c.new_empty(c.shape)
    )
    found = cpu_gemm(a, b, c, alpha=0.7, beta=-1.5, out=out, symmetric=symmetric)
    assert found is out
    assert ((out.double() - wanted).abs() <= size).all()
    assert not symmetric or torch.equal(out, out.mT)


@compiled
def test_what_c_holds_does_not_count_where_beta_is_0() -> None:
    a, c = noise((1, 33, 20), 1), torch.full((1, 33, 33), torch.nan)
    out = cpu_gemm(a, a.mT, c, beta=0.0, out=torch.empty(1, 33, 33))
    assert out.isfinite().all()


@compiled
def test_a_matrix_that_is_not_finite_leaves_the_others_alone() -> None:
    a, b = noise((3, 64, 64), 1), noise((3, 64, 64), 2)
    wanted = cpu_gemm(a, b, out=torch.empty(3, 64, 64))
    a[1, 2, 3] = torch.inf
    found = cpu_gemm(a, b, out=torch.empty(3, 64, 64))
    assert not found[1, 2].isfinite().all()
    assert same_bits(found[[0, 2]], wanted[[0, 2]])
    assert same_bits(found[1, 3:], wanted[1, 3:])


@compiled
@pytest.mark.parametrize(
    ("a", "b", "options", "words"),
    [
        ((2, 40, 30), (3, 30, 40), {}, "stacks of matrices that make products"),
        ((2, 40, 30), (2, 31, 40), {}, "stacks of matrices that make products"),
        ((2, 40, 30), (2, 30, 50), {"symmetric": True}, "square, not 40 x 50"),
        ((2, 40, 30), (2, 30, 50), {"c": torch.zeros(2, 40, 40), "beta": 1.0}, "c must be"),
    ],
    ids=["batch", "k", "square", "c"],
)
def test_what_does_not_fit_is_refused(a: Any, b: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        cpu_gemm(torch.ones(a), torch.ones(b), out=torch.empty(2, a[1], b[2]), **options)


@compiled
def test_which_products_are_taken(faster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(m: int, k: int, n: int, dtype: torch.dtype = torch.float32) -> bool:
        return has_gemm(torch.empty(1, m, k, dtype=dtype), torch.empty(1, k, n, dtype=dtype))

    assert taken(64, 64, 64)
    assert taken(32, 4096, 32)
    assert taken(2048, 2048, 2048)
    assert not taken(64, 63, 64), "a call takes as long"
    assert not taken(31, 512, 512), "packing takes as long"
    assert not taken(512, 512, 1)
    assert not taken(2049, 2048, 64), "fresh memory takes as long"
    assert not taken(512, 0, 512)
    assert not taken(512, 512, 512, torch.float64)
    assert turns_in_order(1, 256)
    assert turns_in_order(32, 2048)
    assert not turns_in_order(31, 257)
    assert not turns_in_order(64, 2049)
    monkeypatch.setattr(backend, "forced", "torch")
    assert not taken(64, 64, 64)


@compiled
def test_elsewhere_only_half_products_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_gemm_is_faster", lambda: False)
    x = torch.empty(1, 64, 64)
    assert not has_gemm(x, x)
    assert has_gemm(x, x, symmetric=True)
    assert not turns_in_order(64, 257)


@compiled
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo")
def test_they_are_the_faster_ones_where_no_processor_of_intel_is() -> None:
    vendors = {
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "vendor_id" in line
    }
    assert platform.machine() == "x86_64"
    assert products._gemm_is_faster() == (vendors != {"GenuineIntel"})


@compiled
def test_the_doors_take_them(faster: None) -> None:
    """`matmul`, `product` and `gemm`, to the bit, and a symmetric one is symmetric."""
    a, b = noise((2, 80, 90), 1), noise((2, 90, 80), 2)
    wanted = cpu_gemm(a, b, out=torch.empty(2, 80, 80))
    assert same_bits(matmul(a, b), wanted)
    assert same_bits(product(a, b, precision="ieee"), wanted)
    assert same_bits(gemm(a, b, out=torch.empty(2, 80, 80)), wanted)
    half = product(a, a.mT, precision="ieee", symmetric=True)
    assert torch.equal(half, half.mT)
    assert same_bits(half, cpu_gemm(a, a.mT, out=torch.empty(2, 80, 80)))
