"""Triton's products of fp32 in each precision, and moving averages of Gram matrices of 16 bits, against fp64."""

from __future__ import annotations

import torch

from ..products import FAST_TF32
from ..selfcheck import Check
from . import products
from .comparison import Comparison

F, B = torch.float32, torch.bfloat16
# Of the magnitudes of the terms. TF32 cuts off 2^-10 of each factor at most.
UNITS = {"tf32x3": 2.0**-17, "tf32": 2.0**-8, "ieee": 2.0**-17}


def run(backend: str, comparison: Comparison) -> None:
    from ...kernels.symm_gemm import product

    check(product, comparison)


def check(product: products.Product, comparison: Comparison) -> None:
    alpha = comparison.place(comparison.numbers([1.5, -0.25]))
    x = comparison.normal(2, 72, 136)
    for precision, unit in UNITS.items():
        y = comparison.normal(2, 136, 136)
        products.expect(product, comparison, x, y, x, alpha=alpha, beta=0.5, precision=precision, unit=unit)
    unit = UNITS["tf32x3"]
    products.expect(product, comparison, x, x.mT, symmetric=True, precision="tf32x3", unit=unit)
    odd = comparison.normal(2, 37, 101, shift=1)
    products.expect(product, comparison, odd.mT, odd, symmetric=True, precision="tf32x3", unit=unit)
    factor = comparison.normal(2, 72, 72)
    factor.copy_(factor + factor.mT)
    weight = comparison.place(comparison.numbers([0.1, 0.75]))
    for rows in (x.to(B), comparison.normal(2, 136, 72, dtype=B).mT):
        average = {"alpha": weight, "beta": None, "symmetric": True, "precision": "tf32x3", "unit": unit}
        products.expect(product, comparison, rows, rows.mT, factor, **average, out_dtype=F)  # type: ignore[arg-type]


def _static(backend: str, device: torch.device) -> str | None:
    if (why := products.static(backend, device)) is not None:
        return why
    capability = torch.cuda.get_device_capability(device)
    slow = f"TF32 is no faster than fp32 on compute capability {capability[0]}.{capability[1]}"
    return None if capability in FAST_TF32 else slow


CHECK = Check(_static, run)
