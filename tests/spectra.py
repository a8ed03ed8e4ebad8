"""Symmetric matrices with known spectra, averages that drift, and the rounding of tensor cores.   From a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cases import gaussian, orthogonal

# Eigenvalues, largest 1.
EIGENVALUES: dict[str, Callable[[int], Tensor]] = {
    "power": lambda n: 1 / torch.arange(1, n + 1).double(),
    "exponential, condition 2e6": lambda n: torch.logspace(0, -6.3, n, dtype=torch.float64),
    "spikes on a flat floor": lambda n: torch.where(
        torch.arange(n) < n // 16, torch.logspace(0, -1.5, n, dtype=torch.float64), 1e-3
    ),
}


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    """A matrix with these eigenvalues and random eigenvectors, in fp64."""
    U = orthogonal(len(values), seed)
    return (U * values) @ U.mT


def drifting(n: int, spectrum: str, count: int, *, every: int = 1, drift: float = 0.02) -> Iterator[Tensor]:
    """``count`` averages P <- .95 P + .05 G G^T in fp32, ``every`` steps apart.

    G is Gaussian with covariance U S U^T, where U turns by angles of about ``drift`` in n / 2 planes at every step.
    """
    generator = torch.Generator().manual_seed(n)
    left, right = orthogonal(n, 1), orthogonal(n, 2)
    root = EIGENVALUES[spectrum](n).sqrt()
    speed = drift * torch.randn(n // 2, dtype=torch.float64, generator=generator)
    P = (left @ right * root**2) @ (left @ right).mT
    for t in range(1, 21 + every * (count - 1)):
        cos, sin = (speed * t).cos(), (speed * t).sin()
        a, b = left[:, : n // 2], left[:, n // 2 :]
        U = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=1) @ right
        G = (U * root) @ torch.randn(n, n, dtype=torch.float64, generator=generator) / n**0.5
        P = 0.95 * P + 0.05 * G @ G.mT
        if t >= 20 and (t - 20) % every == 0:
            yield P.float()


def spiked(n: int) -> Iterator[Tensor]:
    """Averages of Gaussian gradients, the sixth a thousand times the others."""
    P = torch.eye(n, dtype=torch.float64)
    for t in range(10):
        G = gaussian(n, n // 4, t) * (1000 if t == 5 else 1)
        P = 0.95 * P + 0.05 * G @ G.mT
        yield P.float()


def whitening(P: Tensor, Q: Tensor, floor: float = 0) -> float:
    """||D^-1/2 B D^-1/2 - I||_F / sqrt n in fp64, for B = Q^T P Q and D = max(diag B, floor max diag B)."""
    B = Q.double().mT @ P.double() @ Q.double()
    d = B.diagonal().clamp_min(floor * B.diagonal().max().item())
    W = B / (d[:, None] * d).sqrt()
    return (W.fill_diagonal_(0).norm() / len(d) ** 0.5).item()


def tf32(x: Tensor) -> Tensor:
    """x with 10 bits of mantissa, to nearest and ties away from zero, as a GPU converts."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def cut(x: Tensor) -> Tensor:
    """x with 10 bits of mantissa and the rest left out, as tensor cores take it."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def tf32_product(A: Tensor, B: Tensor) -> Tensor:
    return cut(A) @ cut(B)


def tf32x3_product(A: Tensor, B: Tensor) -> Tensor:
    """Operands split in two; the product of the two small parts is left out."""
    high_a, high_b = tf32(A), tf32(B)
    low_a, low_b = cut(A - high_a), cut(B - high_b)
    return high_a @ high_b + (high_a @ low_b + low_a @ high_b)


def on_tensor_cores(exact: Callable[[Tensor, Tensor], Tensor] = tf32x3_product) -> Callable[..., Tensor]:
    """`steepest.ops.products.product` as a GPU rounds it, or with another way to be exact."""

    def product(
        A: Tensor,
        B: Tensor,
        C: Tensor | None = None,
        *,
        precision: str,
        alpha: float = 1.0,
        beta: float = 1.0,
        symmetric: bool = False,
    ) -> Tensor:
        AB = {"tf32x3": exact, "tf32": tf32_product}[precision](A, B)
        AB = alpha * (AB.tril() + AB.tril(-1).mT if symmetric else AB)
        return AB if C is None else AB + beta * C

    return product
