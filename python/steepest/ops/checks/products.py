"""Triton's products of 16 bits, every tile that may be chosen, against fp32 products of the same numbers.

Tiles that are cut at every edge, both ways that factors lie, coefficients as numbers and as tensors, rows that are not
aligned; a NaN stays in its matrix, and symmetric results are so to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend as _backend
from ..selfcheck import Check
from .comparison import Comparison, rounded

H, B = torch.float16, torch.bfloat16
Product = Callable[..., None]  # `steepest.kernels.symm_gemm.product`


def run(backend: str, comparison: Comparison) -> None:
    from ...kernels.symm_gemm import candidates, product

    capability = torch.cuda.get_device_capability(comparison.device)
    check(product, comparison, {symmetric: candidates(capability, symmetric) for symmetric in (True, False)})


def check(product: Product, comparison: Comparison, configurations: Mapping[bool, Sequence[object]]) -> None:
    """configurations: those of symmetric products and of others; the model's choice is taken as well."""
    x = comparison.normal(3, 136, 264, dtype=H, scale=264**-0.5)
    x[1, -1, -1] = torch.nan
    q = comparison.normal(3, 136, 136, dtype=H, scale=136**-0.5)
    for chosen in configurations[True]:
        expect(product, comparison, x, x.mT, symmetric=True, chosen=chosen, clean=(0, 2))
    for chosen in configurations[False]:
        expect(product, comparison, q, x, x, beta=0.5, chosen=chosen, clean=(0, 2))
    tall = comparison.normal(2, 264, 136, dtype=B, scale=264**-0.5)
    expect(product, comparison, tall.mT, tall, symmetric=True)
    alpha, beta = comparison.place(comparison.numbers([1.5, -0.25])), comparison.place(comparison.numbers([-2.0, 0.75]))
    square = comparison.place((tall.mT.float() @ tall.float()).to(B))
    square = square.copy_(square.tril() + square.tril(-1).mT)
    expect(product, comparison, square, square, square, alpha=alpha, beta=beta, gamma=0.5, symmetric=True)
    odd = comparison.normal(2, 37, 101, dtype=H, scale=0.1, shift=1)
    expect(product, comparison, odd, odd.mT, symmetric=True)
    expect(product, comparison, odd, comparison.normal(2, 101, 67, dtype=H), alpha=alpha)


def expect(
    product: Product,
    comparison: Comparison,
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: Tensor | float = 1.0,
    beta: Tensor | float | None = 0.0,
    gamma: float = 0.0,
    symmetric: bool = False,
    chosen: object = None,
    clean: tuple[int, ...] | None = None,
    out_dtype: torch.dtype | None = None,
    precision: str = "ieee",
    unit: float = 2.0**-17,
) -> None:
    """One product, in whose matrices ``clean`` (None: all) every number is right."""
    out = comparison.empty(len(a), a.shape[1], b.shape[2], dtype=out_dtype or a.dtype)
    extra = {"symmetric": symmetric, "chosen": chosen, "precision": precision}
    product(a, b, c, alpha, beta, gamma, out, **extra)
    some = list(range(len(a)) if clean is None else clean)
    # Products of 16 bits are exact in fp32, and in TF32, which torch may be told to take; others go by fp64.
    wide = torch.float64 if a.dtype == torch.float32 else torch.float32
    x, y = a[some].to(wide), b[some].to(wide)
    exact, terms = x @ y, x.abs() @ y.abs()
    scale = _wide(alpha, some)
    exact, terms = scale * exact, abs(scale) * terms
    if c is not None:
        before, keep = c[some].to(wide), 1 - scale if beta is None else _wide(beta, some)
        exact, terms = exact + keep * before, terms + abs(keep) * before.abs()
    exact.diagonal(dim1=1, dim2=2).add_(gamma)
    m, k, n = a.shape[1], a.shape[2], b.shape[2]
    kind = f"{'symmetric ' if symmetric else ''}{m} x {k} x {n}, {str(a.dtype).removeprefix('torch.')}"
    name = f"product {kind}, {precision}" if a.dtype == torch.float32 else f"product {kind}"
    comparison.expect(name, out[some], exact, rounded(exact, out.dtype, terms + abs(gamma), unit))
    if symmetric:
        comparison.expect(f"symmetry of {name}", out[some], out[some].mT)
    if len(some) < len(a):
        rest = [i for i in range(len(a)) if i not in some]
        comparison.expect(f"NaN of {name}", out[rest].isnan().any(-1).any(-1), 1.0)


def _wide(number: Tensor | float, some: list[int]) -> Any:
    return number[some][:, None, None] if isinstance(number, Tensor) else number


def static(backend: str, device: torch.device) -> str | None:
    """Why Triton's products do not run on a device; None where they do."""
    if (why := _backend.triton_reason()) is not None:
        return why
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"compute capability {capability[0]}.{capability[1]}; needed is 8.0"


CHECK = Check(static, run)
