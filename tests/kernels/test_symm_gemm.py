"""Symmetric products: right, symmetric to the bit, and writing nothing but their output."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor

from steepest.linalg.polar import polar
from steepest.ops import symm_gemm
from steepest.ops.symm_gemm import Number, block_edges, gemm


@pytest.mark.parametrize("m", [1, 5, 100, 300, 801])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_product_with_its_transpose(m: int, batch: int, dtype: torch.dtype) -> None:
    a = torch.randn(batch, m, 40, dtype=dtype, generator=torch.Generator().manual_seed(m))
    c = a @ a.mT + 1
    c = c.tril() + c.tril(-1).mT
    held = c.clone()
    result = gemm(a, a.mT, c, alpha=0.5, beta=2.0, out=torch.empty_like(c), symmetric=True)
    assert torch.equal(result, result.mT)
    assert torch.equal(c, held)
    torch.testing.assert_close(result, torch.baddbmm(c, a, a.mT, alpha=0.5, beta=2.0))


@pytest.mark.parametrize("m", [7, 300])
def test_commuting_factors_and_output_in_place(m: int) -> None:
    a = torch.randn(1, m, m, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
    a = a + a.mT
    b = a @ a
    out = a.clone()
    assert gemm(a, b, out, beta=-1.0, out=out, symmetric=True) is out
    torch.testing.assert_close(out, a @ b - a, atol=1e-8, rtol=1e-10)
    assert torch.equal(out, out.mT)


def test_the_output_may_hold_anything_before() -> None:
    a = torch.randn(1, 300, 20)
    out = torch.full((1, 300, 300), torch.nan)
    torch.testing.assert_close(gemm(a, a.mT, out=out, symmetric=True), a @ a.mT)


@pytest.mark.parametrize("m", [1, 100, 256, 300, 768, 1000, 4096])
def test_block_edges_cover_the_matrix_in_rising_order(m: int) -> None:
    edges = block_edges(m)
    assert edges[0] == 0
    assert edges[-1] == m
    assert all(low < high for low, high in zip(edges[:-1], edges[1:], strict=True))
    assert len(edges) <= 6


@pytest.mark.parametrize("preset", ["auto", "turbo", "exact"])
@pytest.mark.parametrize("shape", [(3, 40, 60), (2, 60, 40), (1, 200, 300)])
def test_what_a_kernel_is_given(preset: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """With products by a kernel's signature, `polar` is what it is with torch's own."""

    def product(
        a: Tensor,
        b: Tensor,
        c: Tensor | None,
        alpha: Number,
        beta: Number,
        gamma: Number,
        out: Tensor,
        *,
        symmetric: bool,
    ) -> None:
        def wide(x: Number) -> Number:
            return x[:, None, None] if isinstance(x, Tensor) else x

        assert gamma == 0
        d = wide(alpha) * (a @ b) + (0.0 if c is None else wide(beta) * c)
        out.copy_(d.tril() + d.tril(-1).mT if symmetric else d)

    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = polar(x, preset, form="gram")
    kernels = types.ModuleType("steepest.kernels.symm_gemm")
    kernels.product = product  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "steepest.kernels.symm_gemm", kernels)
    monkeypatch.setattr(symm_gemm, "_route", lambda a, b: "triton")
    torch.testing.assert_close(polar(x, preset, form="gram"), wanted, atol=1e-9, rtol=0)
