"""Refreshed eigenbases, inverse roots and the products they are made of, beside torch's decompositions.

    python bench/bench_refresh.py [--device cuda] [--parts products refresh roots] [--shapes 64x1024 ...] [--quick]
                                  [--csv FILE]

    refresh    `eigh_refresh` by every method, beside SOAP's refresh by torch.linalg.qr and beside torch.linalg.eigh
    roots      `inverse_root` for p = 2 and 4, beside a coupled Newton iteration in torch and the root by its eigh
    products   `product` in every precision beside torch.bmm, and `syrk_ema` of bf16 beside torch.lerp

Some of them on a GPU a second time as a CUDA graph ("captured"), which leaves the host out.

A shape is so many symmetric matrices of one size: averages P = .95 Q S Q^T + .05 G G^T that have moved a step away from
the basis Q, with values S from 1 to 1e-4. Errors are taken in fp64 on the first and last matrix before anything is
timed; one of ours beyond its bound is WRONG, is not timed and makes the exit status 1. What one matrix says would take
longer than --guard seconds for all of them is skipped, and says so. Ratios are to the first variant that was timed,
which every row names.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from bench_polar import Captured
from timing import header, interleaved, seconds, write_csv
from torch import Tensor

from steepest.linalg.basis import eigh_refresh
from steepest.linalg.roots import inverse_root, spectral_bound
from steepest.ops.products import PRECISIONS, product, syrk_ema

SHAPES = ["500x100", "1000x128", "64x1024", "16x2048", "4x4096"]
QUICK_SHAPES = {"cuda": ["500x100", "64x1024"], "cpu": ["6x24", "2x64"]}
RIDGE = 1e-6
TURN, WEIGHT = 0.02, 0.05  # radians by which the basis moves, and the share of what is new
NEWTON_STEPS, NEWTON_ENDS = 100, 1e-6
# ||Q^T Q - I||_F / sqrt n that a basis may have; ours promise 1e-5.
ORTHONORMAL = 2e-5
# Residuals of a root at a condition of at most 1e4; and relative errors of products, by precision.
RESIDUAL = 5e-2
PRODUCT = {"tf32x3": 2e-6, "tf32": 2e-3, "ieee": 2e-6}

Rows = list[dict[str, object]]


@dataclass(frozen=True)
class Variant:
    """``run`` gives a stack of matrices. one: the same for the first matrix alone, of what may take too long."""

    run: Callable[[], Tensor]
    error: Callable[[Tensor], dict[str, float]]
    wrong: Callable[[dict[str, float]], bool] | None = None  # of ours
    one: Callable[[], Tensor] | None = None
    flop: float | None = None
    captured: bool = False


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


def refresh_variants(P: Tensor, Q: Tensor, options: argparse.Namespace) -> dict[str, Variant]:
    error = functools.partial(basis_errors, P)
    before = error(Q)["whitening"]

    def wrong(found: dict[str, float]) -> bool:
        return not (found["whitening"] <= 1.001 * before and found["orthonormality"] <= ORTHONORMAL)

    def ours(method: str, **settings: bool) -> Variant:
        run = lambda: eigh_refresh(P, Q, method=method, **settings).basis  # type: ignore[arg-type] # noqa: E731
        return Variant(run, error, wrong)

    return {
        "torch sorted QR": Variant(lambda: sorted_qr(P, Q), error, one=lambda: sorted_qr(P[:1], Q[:1])),
        "torch.linalg.eigh": Variant(lambda: eigenbasis(P), error, one=lambda: eigenbasis(P[:1])),
        "no refresh": Variant(lambda: Q, error),
        "jr": replace(ours("jr"), captured=True),
        "qr": replace(ours("qr"), wrong=lambda found: not found["orthonormality"] <= ORTHONORMAL),
        "auto": ours("auto", exact=False),
        "auto, exact": ours("auto", exact=True),
        "eigh": replace(ours("eigh"), one=lambda: eigh_refresh(P[:1], Q[:1], method="eigh").basis),
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


def root_variants(A: Tensor, p: int, options: argparse.Namespace) -> dict[str, Variant]:
    eye = torch.eye(A.shape[-1], device=A.device)
    H = A + RIDGE * spectral_bound(A)[:, None, None] * eye
    error = functools.partial(residual, H, p)

    def wrong(found: dict[str, float]) -> bool:
        return not found["residual"] <= RESIDUAL

    return {
        "coupled Newton": Variant(lambda: coupled_newton(H, p), error, one=lambda: coupled_newton(H[:1], p)),
        "root by torch.linalg.eigh": Variant(lambda: root_by_eigh(H, p), error, one=lambda: root_by_eigh(H[:1], p)),
        "inverse_root": Variant(lambda: inverse_root(A, p, ridge_rel=RIDGE)[0], error, wrong, captured=True),
    }


# ---- products ------------------------------------------------------------------------------------------------------


def relative(exact: Mapping[int, Tensor], found: Tensor) -> dict[str, float]:
    errors = ((found[i].double() - exact[i]).norm() / exact[i].norm() for i in exact)
    return {"relative_error": max(error.item() for error in errors)}


def product_variants(P: Tensor, Q: Tensor, options: argparse.Namespace) -> dict[str, Variant]:
    count, n, _ = P.shape
    error = functools.partial(relative, {i: P[i].double() @ Q[i].double() for i in ends(count)})
    full = 2.0 * count * n**3
    found = {"torch.bmm": Variant(lambda: torch.bmm(P, Q), error, flop=full)}
    for precision in PRECISIONS:
        run = functools.partial(product, P, Q, precision=precision)  # type: ignore[arg-type]
        found[precision] = Variant(run, error, beyond(PRODUCT[precision]), flop=full)
    return found


def average_variants(P: Tensor, Q: Tensor, options: argparse.Namespace) -> dict[str, Variant]:
    """P + w (X X^T - P) with X in bf16; half the work counts as the symmetric one's."""
    x, weight = Q.bfloat16(), torch.full((), WEIGHT, device=P.device)
    wide = {i: x[i].double() @ x[i].double().mT for i in ends(len(P))}
    error = functools.partial(relative, {i: P[i].double() * (1 - WEIGHT) + WEIGHT * y for i, y in wide.items()})
    full = 2.0 * len(P) * P.shape[-1] ** 3

    def by_torch() -> Tensor:
        y = x.float()
        return torch.lerp(P, y @ y.mT, weight)

    return {
        "torch.lerp": Variant(by_torch, error, flop=full),
        "syrk_ema": Variant(lambda: syrk_ema(P, x, weight), error, beyond(PRODUCT["ieee"]), flop=full / 2),
    }


def beyond(most: float) -> Callable[[dict[str, float]], bool]:
    return lambda found: not found["relative_error"] <= most


# ---- rows ----------------------------------------------------------------------------------------------------------


def gate(
    variants: Mapping[str, Variant], count: int, options: argparse.Namespace
) -> dict[str, tuple[str, dict[str, float]]]:
    """For each variant its status ("ok", or what is wrong) and its errors."""
    answers: dict[str, tuple[str, dict[str, float]]] = {}
    for name, variant in variants.items():
        try:
            if variant.one is not None:
                variant.one()
                whole = count * seconds(variant.one, options.device)
                if whole > options.guard:
                    answers[name] = (f"skipped: about {whole:.1f} s, more than --guard {options.guard:g}", {})
                    continue
            found = variant.error(variant.run())
            status = "WRONG" if variant.wrong is not None and variant.wrong(found) else "ok"
            answers[name] = (status, found)
        except Exception as error:  # one variant that fails leaves the others their row
            answers[name] = (f"failed: {type(error).__name__}: {str(error)[:200]}", {})
    return answers


def measure(part: str, shape: str, variants: dict[str, Variant], options: argparse.Namespace) -> Rows:
    """A row for every variant; times of those that are right."""
    if options.device.startswith("cuda"):
        captured = {
            f"{name}, captured": replace(v, run=Captured(v.run))  # type: ignore[arg-type]
            for name, v in variants.items()
            if v.captured
        }
        variants = variants | captured
    answers = gate(variants, int(shape.split("x")[0]), options)
    runs = {name: v.run for name, v in variants.items() if answers[name][0] == "ok" and name != "no refresh"}
    once = sum(seconds(run, options.device) for run in runs.values())
    rounds = max(3, min(options.rounds, int(options.seconds / max(once, 1e-9))))
    timings = interleaved(runs, rounds=rounds, warmup=1, device=options.device, flush=True) if runs else {}
    base = next(iter(timings), None)
    rows: Rows = []
    for name, (status, errors) in answers.items():
        row: dict[str, object] = {"part": part, "shape": shape, "variant": name, "status": status}
        if name in timings and base is not None:
            time, flop = timings[name], variants[name].flop
            row |= {"ms": round(time.median * 1e3, 4), "spread_ms": round(time.spread * 1e3, 4), "rounds": rounds}
            row |= {"base": base, "ratio": round(timings[base].median / time.median, 3)}
            if flop is not None:
                row["tflop_per_s"] = round(flop / time.median / 1e12, 4)
        row |= {key: float(f"{value:.3g}") for key, value in errors.items()}
        rows.append(row | {"ours": variants[name].wrong is not None})
    return rows


COLUMNS = (
    *("part", "shape", "variant", "ours", "status", "ms", "spread_ms", "rounds", "base", "ratio"),
    *("tflop_per_s", "whitening", "orthonormality", "residual", "relative_error"),
)


@torch.no_grad()
def run(part: str, shape: str, options: argparse.Namespace) -> Rows:
    count, n = map(int, shape.split("x"))
    P, Q = problem(count, n, options.device)
    if part == "refresh":
        return measure(part, shape, refresh_variants(P, Q, options), options)
    if part == "products":
        averages = measure("averages", shape, average_variants(P, Q, options), options)
        return measure(part, shape, product_variants(P, Q, options), options) + averages
    return [row for p in (2, 4) for row in measure(f"roots p={p}", shape, root_variants(P, p, options), options)]


def show(rows: Sequence[Mapping[str, object]]) -> None:
    for row in rows:
        text = f"  {row['part']:<10} {row.get('variant', ''):<26}"
        text += f" {row['ms']:>10} ms +- {row['spread_ms']:<8} {row['ratio']:>7} times" if "ms" in row else ""
        text += "" if row["status"] == "ok" else f" {row['status']}"
        print(text + "".join(f"  {key} {row[key]}" for key in COLUMNS[-5:] if key in row))


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", nargs="+", choices=["products", "refresh", "roots"])
    parser.add_argument("--shapes", nargs="+", help="COUNTxSIZE")
    parser.add_argument("--rounds", type=int, default=15, help="at most, and at least 3")
    parser.add_argument("--seconds", type=float, default=3.0, help="of the rounds of one shape, all variants together")
    parser.add_argument("--guard", type=float, default=1.0, help="seconds that a call of a baseline may take")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller shapes, 3 rounds")
    parser.add_argument("--csv", help="write the rows to this file, after every shape")
    options = parser.parse_args(arguments)
    quick = QUICK_SHAPES["cuda" if options.device.startswith("cuda") else "cpu"]
    options.parts = options.parts or ["products", "refresh", "roots"]
    options.shapes = options.shapes or (quick if options.quick else SHAPES)
    if options.quick:
        options.rounds = 3
    for shape in options.shapes:
        if len(shape.split("x")) != 2 or not shape.replace("x", "").isdigit():
            parser.error(f"shape {shape!r} is not COUNTxSIZE, as 64x1024 is")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(arguments)
    print(header(options.device))
    everything: Rows = []
    for shape in options.shapes:
        for part in options.parts:
            print(f"\n{part} {shape}", flush=True)
            try:
                rows = run(part, shape, options)
            except Exception as error:  # out of memory at one shape is a row, not the end of the table
                status = f"failed: {type(error).__name__}: {str(error)[:200]}"
                rows = [{"part": part, "shape": shape, "status": status, "ours": True}]
            show(rows)
            everything += rows
            if options.device.startswith("cuda"):
                torch.cuda.empty_cache()
            if options.csv:
                table = [{key: row.get(key, "") for key in COLUMNS} for row in everything]
                write_csv(options.csv, table, options.device)
    bad = [row for row in everything if row["ours"] and row["status"] != "ok" and "skipped" not in str(row["status"])]
    if bad:
        lines = (f"{row['part']} {row['shape']} {row.get('variant', '')}: {row['status']}" for row in bad)
        raise SystemExit("wrong or failed:\n  " + "\n  ".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
