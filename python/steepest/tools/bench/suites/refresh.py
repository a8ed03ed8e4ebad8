"""Refreshed eigenbases, inverse roots and the products they are made of, beside torch's decompositions.

    refresh        `eigh_refresh` by every method, on a CPU also `tracked`, beside SOAP's refresh by torch.linalg.qr and
                   beside torch.linalg.eigh
    roots p=2, 4   `inverse_root`, beside a coupled Newton iteration in torch and the root by its eigh
    products       `product` in every precision beside torch.bmm
    averages       `syrk_ema` of bf16 beside torch.lerp

A shape is so many symmetric matrices of one size: averages P = .95 Q S Q^T + .05 G G^T that have moved a step away from
the basis Q, with values S from 1 to 1e-4. Errors are taken in fp64 on the first and last matrix. What one matrix says
would take longer than --guard seconds for all of them is skipped, and says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from steepest.linalg.basis import eigh_refresh, tracked
from steepest.linalg.roots import inverse_root, spectral_bound
from steepest.ops.products import PRECISIONS, product, syrk_ema

from ..case import Case, Errors, Job, Row, Settings, Variant, measure
from ..ceilings import Ceilings
from .common import sizes

SHAPES = ("500x100", "1000x128", "64x1024", "16x2048", "4x4096")
QUICK = ("500x100", "64x1024")
CPU = ("2x64", "6x24")
RIDGE = 1e-6
TURN, WEIGHT = 0.02, 0.05  # radians by which the basis moves, and the share of what is new
NEWTON_STEPS, NEWTON_ENDS = 100, 1e-6
# ||Q^T Q - I||_F / sqrt n that a basis may have; ours promise 1e-5.
ORTHONORMAL = {"orthonormality": 2e-5}
# Of a root at a condition of at most 1e4; and relative errors of products, by precision.
RESIDUAL = {"residual": 5e-2}
PRODUCT = {"tf32x3": 2e-6, "tf32": 2e-3, "ieee": 2e-6}

Variants = dict[str, Variant]


def refresh(settings: Settings) -> Iterator[Job]:
    for shape in sizes(settings, SHAPES, QUICK, CPU):
        count, n = _parse(shape)
        for part, of in PARTS.items():
            yield Job("refresh", f"{shape} {part}", "float32", functools.partial(_rows, part, of, count, n, settings))


def _parse(shape: str) -> tuple[int, int]:
    try:
        count, n = (int(number) for number in shape.split("x"))
    except ValueError:
        raise ValueError(f"shape {shape!r} of refresh is not COUNTxSIZE, as 64x1024 is") from None
    return count, n


@torch.no_grad()
def _rows(
    part: str,
    of: Callable[[Tensor, Tensor], Variants],
    count: int,
    n: int,
    settings: Settings,
    ceilings: Ceilings,
) -> list[Row]:
    variants = of(*problem(count, n, settings.device))
    base = next(iter(variants))
    rows = measure(Case("refresh", f"{count}x{n} {part}", "float32", variants, base), settings, ceilings)
    if any(row.get("base") for row in rows):
        return rows
    # Where the baseline took too long the next one is what ratios refer to.
    timed = [row for row in rows if "ms" in row]
    return [
        row | ({"base": timed[0]["variant"], "ratio": round(timed[0]["ms"] / row["ms"], 3)} if "ms" in row else {})
        for row in rows
    ]


def problem(count: int, n: int, device: str) -> tuple[Tensor, Tensor]:
    """P and the basis Q of what it was before, (count, n, n) fp32."""
    generator = torch.Generator(device).manual_seed(n)
    draw = functools.partial(torch.randn, generator=generator, device=device, dtype=torch.float64)
    Q = torch.linalg.qr(draw(n, n)).Q
    values = torch.logspace(0, -4, n, dtype=torch.float64, device=device)
    angle = TURN * draw(n // 2)
    a, b = Q[:, : n // 2], Q[:, n // 2 : n // 2 * 2]
    turned = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos(), Q[:, n // 2 * 2 :]], 1)
    P = torch.empty(count, n, n, device=device)
    for p in P:
        G = (turned * values.sqrt()) @ draw(n, n) / n**0.5
        p.copy_((1 - WEIGHT) * (Q * values) @ Q.mT + WEIGHT * G @ G.mT)
    return P, Q.float().repeat(count, 1, 1)


def ends(count: int) -> list[int]:
    """The matrices that errors are taken of."""
    return sorted({0, count - 1})


# ---- refresh -------------------------------------------------------------------------------------------------------


def sorted_qr(P: Tensor, Q: Tensor) -> Tensor:
    """One step of orthogonal iteration on columns sorted by their values, SOAP's refresh (arXiv:2409.11321)."""
    image = P @ Q
    order = (Q * image).sum(-2).argsort(-1, descending=True)
    return torch.linalg.qr(image.gather(-1, order[:, None, :].expand_as(image))).Q


def eigenbasis(P: Tensor) -> Tensor:
    return torch.linalg.eigh(P).eigenvectors


def basis_errors(P: Tensor, Q: Tensor) -> dict[str, float]:
    """Whitening error and orthonormality in fp64, the worst of the matrices looked at."""
    whitening, orthonormal = 0.0, 0.0
    for i in ends(len(P)):
        q = Q[i].double()
        eye = torch.eye(len(q), dtype=torch.float64, device=q.device)
        B = q.mT @ P[i].double() @ q
        d = B.diagonal().clamp_min(torch.finfo(torch.float32).eps * B.diagonal().max())
        off = (B - B.diagonal().diag()) / (d[:, None] * d).sqrt()
        whitening = max(whitening, (off.norm() / len(q) ** 0.5).item())
        orthonormal = max(orthonormal, ((q.mT @ q - eye).norm() / len(q) ** 0.5).item())
    return {"whitening": whitening, "orthonormality": orthonormal}


def bases(P: Tensor, Q: Tensor) -> Variants:
    errors = functools.partial(basis_errors, P)
    # A refresh is never worse than none.
    bounds: Errors = {**ORTHONORMAL, "whitening": 1.001 * errors(Q)["whitening"]}

    def ours(method: str, **settings: bool) -> Variant:
        run = lambda: eigh_refresh(P, Q, method=method, **settings).basis  # type: ignore[arg-type] # noqa: E731
        return Variant(run, ours=True, errors=errors, bounds=bounds, bytes=3.0 * P.nbytes)

    def theirs(run: Callable[[Tensor, Tensor], Tensor]) -> Variant:
        return Variant(
            lambda: run(P, Q),
            version=torch.__version__,
            errors=errors,
            one=lambda: run(P[:1], Q[:1]),
            parts=len(P),
            bytes=3.0 * P.nbytes,
        )

    return {
        "torch sorted QR": theirs(sorted_qr),
        "torch.linalg.eigh": theirs(lambda P, Q: eigenbasis(P)),
        "no refresh": Variant(lambda: Q, errors=errors, timed=False),
        "jr": replace(ours("jr"), captured=True),
        "qr": replace(ours("qr"), bounds=ORTHONORMAL),
        "auto": ours("auto", exact=False),
        "auto, exact": ours("auto", exact=True),
        **({} if P.is_cuda else {"tracked": replace(ours("qr"), run=lambda: tracked(P, Q, values=False).basis)}),
        "eigh": replace(ours("eigh"), one=lambda: eigh_refresh(P[:1], Q[:1], method="eigh").basis, parts=len(P)),
    }


# ---- roots ---------------------------------------------------------------------------------------------------------


def coupled_newton(H: Tensor, p: int) -> Tensor:
    """H^(-1/p) by X <- X W, M <- W^p M, W = ((p + 1) I - M) / p, of all matrices until each M is near I.

    B. Iannazzo, "On the Newton method for the matrix pth root", 2006, eq. (3.5): the iteration of Shampoo. It reads the
    device at every step.
    """
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    scale = (1 + p) / (2 * torch.linalg.matrix_norm(H))[:, None, None]
    M, X = H * scale, eye * scale ** (1 / p)
    for _ in range(NEWTON_STEPS):
        W = ((p + 1) * eye - M) / p
        X = X @ W
        M = torch.linalg.matrix_power(W, p) @ M
        off = (M - eye).abs().amax()
        if not off > NEWTON_ENDS:
            break
    return X


def root_by_eigh(H: Tensor, p: int) -> Tensor:
    d, Q = torch.linalg.eigh(H)
    return (Q * d.clamp_min(RIDGE * d.amax(-1, keepdim=True))[:, None, :] ** (-1 / p)) @ Q.mT


def residual(H: Tensor, p: int, X: Tensor) -> dict[str, float]:
    """||X^(p/2) H X^(p/2) - I||_F / sqrt n in fp64, the worst of the matrices looked at."""
    worst = 0.0
    for i in ends(len(H)):
        half = torch.linalg.matrix_power(X[i].double(), p // 2)
        off = half @ H[i].double() @ half - torch.eye(len(half), dtype=torch.float64, device=half.device)
        worst = max(worst, (off.norm() / len(half) ** 0.5).item())
    return {"residual": worst}


def roots(A: Tensor, Q: Tensor, *, p: int) -> Variants:
    eye = torch.eye(A.shape[-1], device=A.device)
    H = A + RIDGE * spectral_bound(A)[:, None, None] * eye
    errors = functools.partial(residual, H, p)

    def theirs(run: Callable[[Tensor, int], Tensor]) -> Variant:
        one = functools.partial(run, H[:1], p)
        moved = 2.0 * A.nbytes
        return Variant(lambda: run(H, p), version=torch.__version__, errors=errors, one=one, parts=len(H), bytes=moved)

    return {
        "coupled Newton": theirs(coupled_newton),
        "root by torch.linalg.eigh": theirs(root_by_eigh),
        "inverse_root": Variant(
            lambda: inverse_root(A, p, ridge_rel=RIDGE)[0],
            ours=True,
            errors=errors,
            bounds=RESIDUAL,
            bytes=2.0 * A.nbytes,
            captured=True,
        ),
    }


# ---- products ------------------------------------------------------------------------------------------------------


def relative(exact: Mapping[int, Tensor], results: Tensor) -> dict[str, float]:
    errors = ((results[i].double() - exact[i]).norm() / exact[i].norm() for i in exact)
    return {"relative_error": max(error.item() for error in errors)}


def products(P: Tensor, Q: Tensor) -> Variants:
    errors = functools.partial(relative, {i: P[i].double() @ Q[i].double() for i in ends(len(P))})
    full = 2.0 * len(P) * P.shape[-1] ** 3
    bmm = Variant(lambda: torch.bmm(P, Q), version=torch.__version__, errors=errors, flop=full, bytes=3.0 * P.nbytes)
    variants = {"torch.bmm": bmm}
    for precision in PRECISIONS:
        run = functools.partial(product, P, Q, precision=precision)  # type: ignore[arg-type]
        bounds = {"relative_error": PRODUCT[precision]}
        variants[precision] = replace(bmm, run=run, ours=True, version="", bounds=bounds)
    return variants


def averages(P: Tensor, Q: Tensor) -> Variants:
    """P + w (X X^T - P) with X in bf16; half the work counts as the symmetric one's."""
    x, weight = Q.bfloat16(), torch.full((), WEIGHT, device=P.device)
    wide = {i: x[i].double() @ x[i].double().mT for i in ends(len(P))}
    errors = functools.partial(relative, {i: P[i].double() * (1 - WEIGHT) + WEIGHT * y for i, y in wide.items()})
    full, moved = 2.0 * len(P) * P.shape[-1] ** 3, 2.0 * P.nbytes + x.nbytes

    def by_torch() -> Tensor:
        y = x.float()
        return torch.lerp(P, y @ y.mT, weight)

    return {
        "torch.lerp": Variant(by_torch, version=torch.__version__, errors=errors, flop=full, bytes=moved),
        "syrk_ema": Variant(
            lambda: syrk_ema(P, x, weight),
            ours=True,
            errors=errors,
            bounds={"relative_error": PRODUCT["ieee"]},
            flop=full / 2,
            bytes=moved,
            rate="bfloat16",
        ),
    }


PARTS: Mapping[str, Callable[[Tensor, Tensor], Variants]] = {
    "products": products,
    "averages": averages,
    "refresh": bases,
    "roots p=2": functools.partial(roots, p=2),
    "roots p=4": functools.partial(roots, p=4),
}
