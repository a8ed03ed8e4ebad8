"""Symmetric matrices with known spectra, averages that drift, hard sequences, and the rounding of tensor cores.

From a seed.  `assert_refreshed` is what `eigh_refresh` promises of any matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from steepest.linalg.basis import ACCEPTED, Refreshed, orthonormality
from support.singular_values import gaussian, orthogonal

# 8 eps of fp32: below this, eigenvalues are rounding, and the acceptance of a basis does not look.
FLOOR = 1e-6
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


def off_diagonal(P: Tensor, Q: Tensor) -> Tensor:
    """||B - diag B||_F / ||P||_F for B = Q^T P Q in fp64; 0 for P = 0.   P, Q: (..., n, n) -> (...)."""
    B = Q.double().mT @ P.double() @ Q.double()
    norm = torch.linalg.matrix_norm(P.double())
    rest = B - torch.diag_embed(B.diagonal(dim1=-2, dim2=-1))
    return torch.linalg.matrix_norm(rest) / torch.where(norm == 0, 1, norm)


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


def exact_basis(P: Tensor) -> Tensor:
    return torch.linalg.eigh(P.double()).eigenvectors.flip(-1).to(P.dtype)


def toeplitz(n: int) -> Tensor:
    """All diagonal entries are equal: from the identity, a Jacobi rotation does not know which way to turn."""
    return 0.5 ** (torch.arange(n)[:, None] - torch.arange(n)).abs().double()


def whitening(P: Tensor, Q: Tensor, floor: float = 0) -> float:
    """||D^-1/2 B D^-1/2 - I||_F / sqrt n in fp64, for B = Q^T P Q and D = max(diag B, floor max diag B)."""
    B = Q.double().mT @ P.double() @ Q.double()
    d = B.diagonal().clamp_min(floor * B.diagonal().max().item())
    W = B / (d[:, None] * d).sqrt()
    return (W.fill_diagonal_(0).norm() / len(d) ** 0.5).item()


def hard() -> dict[str, tuple[list[Tensor], Tensor]]:
    """Sequences of matrices, and the basis to begin with."""
    n, eye = 48, torch.eye(48)
    cases: dict[str, tuple[list[Tensor], Tensor]] = {}
    for rank in (0, 1, 2, 12):
        G = gaussian(n, rank, rank)
        cases[f"rank {rank}"] = [(G @ G.mT).float()] * 3, eye
        H = G + 0.05 * gaussian(n, rank, 7)
        cases[f"rank {rank}, moving"] = [(G @ G.mT).float(), (H @ H.mT).float()], orthogonal(n).float()
    cases["first steps"] = [(gaussian(n, 3, t) @ gaussian(n, 3, t).mT).float() for t in range(3)], eye
    cases["a spike"] = list(spiked(n)), eye
    values = torch.logspace(0, -8, n, dtype=torch.float64)
    cases["condition 1e8"] = [symmetric(values).float(), symmetric(values, 1).float()], eye
    near = symmetric(values) + 1e-3 * symmetric(values, 1)
    cases["condition 1e8, warm"] = [near.float()] * 4, exact_basis(symmetric(values).float())
    cases["identity"] = [eye] * 2, orthogonal(n).float()
    cases["clusters"] = [symmetric((torch.arange(n) < 7).double() + 1e-3).float()] * 2, eye
    cases["toeplitz"] = [toeplitz(n).float()] * 2, eye
    cases["zero block"] = [torch.block_diag(toeplitz(30).float(), torch.zeros(18, 18))] * 2, eye
    cases["tiny"] = [symmetric(values).float() * 1e-30] * 2, eye
    cases["huge"] = [symmetric(values).float() * 1e30] * 2, eye
    cases["slightly indefinite"] = [(symmetric(values) - 1e-7 * torch.eye(n)).float()] * 2, eye
    cases["a random basis"] = [symmetric(values).float()] * 3, orthogonal(n, 3).float()
    cases["stored in bf16"] = [near.float()] * 2, exact_basis(near.float()).bfloat16().float()
    return cases


HARD = hard()


def assert_refreshed(P: Tensor, Q: Tensor, refreshed: Refreshed, *, helps: bool = True) -> None:
    """What is promised of every matrix P and basis Q, and where the refresh ``helps``, no greater whitening error."""
    scale = P.abs().max().item() or 1
    unit = P.double() / scale
    new, values, status, order = refreshed
    assert new.isfinite().all()
    assert values.isfinite().all()
    assert values.min() >= 0
    rayleigh = (new.double() * (unit @ new.double())).sum(0).clamp_min(0)
    torch.testing.assert_close(values.double() / scale, rayleigh, atol=1e-5, rtol=1e-5)
    if not status & ACCEPTED:
        assert torch.equal(new, Q)
        assert torch.equal(order, torch.arange(len(P)))
    else:
        assert orthonormality(new.double()) <= 1e-5
    if P.any() and helps:
        # The difference allowed is the rounding of an fp32 whitening error at condition 1e6.
        assert whitening(unit, new, FLOOR) <= 1.02 * whitening(unit, Q, FLOOR) + 0.02


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
