"""What this machine can do: products of large random matrices by torch, cuBLAS on a GPU, and a copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .timing import Call, interleaved

SIDES = {"cuda": 8192, "cpu": 1024}
BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
DTYPES = {"cuda": (torch.float16, torch.bfloat16, torch.float32), "cpu": (torch.bfloat16, torch.float32)}
QUICK_CPU = (256, 1 << 22)  # side and bytes


@dataclass(frozen=True)
class Ceilings:
    """products: floating-point operations a second by dtype; copy: bytes read and written a second, 0 if unknown."""

    products: Mapping[str, float] = field(default_factory=dict)
    copy: float = 0.0

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate / 1e12:.4g} TFLOP/s" for name, rate in self.products.items())
        return f"products {rates}; copy {self.copy / 1e9:.4g} GB/s"


def measure(device: str, quick: bool = False, rounds: int = 7) -> Ceilings:
    """One interleaved run. fp32 products are as torch is set up to make them."""
    kind = "cuda" if device.startswith("cuda") else "cpu"
    side, size = QUICK_CPU if quick and kind == "cpu" else (SIDES[kind], BYTES[kind])
    generator = torch.Generator(device).manual_seed(0)
    wide = torch.randn(side, side, generator=generator, device=device)  # zeros multiply faster than this
    calls: dict[str, Call] = {}
    for dtype in DTYPES[kind]:
        a, b = wide.to(dtype), wide.mT.to(dtype)
        out = torch.empty_like(a)
        calls[str(dtype).removeprefix("torch.")] = Call(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))  # type: ignore[misc]
    source = torch.randn(size // 4, generator=generator, device=device)
    target = torch.empty_like(source)
    timings = interleaved(
        {**calls, "copy": Call(lambda: target.copy_(source))}, rounds=rounds, device=device, hide=True
    )
    products = {name: 2.0 * side**3 / timings[name].median for name in calls}
    return Ceilings(products, 2.0 * source.nbytes / timings["copy"].median)
