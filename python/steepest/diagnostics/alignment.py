"""How a step lies to the gradient. g: the gradient; u = W before - W after, so that <g, u> > 0 goes down.

    inner        <g, u>                         what the loss falls by, to first order
    cosine       <g, u> / (|g| |u|)             1 for gradient descent
    dual norm    N*(g) = max <g, d>, N(d) <= 1  what a step of length 1 can fall by, to first order
    steepness    <g, u> / (N*(g) N(u))          at most 1 (Hoelder); 1 exactly for a steepest step in the norm N

                 N(u)            N*(g)
    frobenius    |u|_F           |g|_F                      1 for gradient descent: its steepness is the cosine
    spectral     max sigma(u)    sum sigma(g), nuclear      1 for Muon without momentum, with the exact polar factor
    sign         max |u_ij|      sum |g_ij|                 1 for SignSGD without momentum

A parameter that is several matrices (heads, experts, fused weights) has the largest of their norms and the sum of their
dual norms; a vector is a column. Source: arXiv:2409.20325; the norms are those of `steepest.parts.direction`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..matrices import Piece
from .metric import metric_condition


@dataclass(frozen=True)
class BaseNorm:
    """A norm and its dual: functions of matrices (batch, m, n), of several shapes, to a 0-d fp64 tensor."""

    norm: Callable[[Sequence[Tensor]], Tensor]
    dual: Callable[[Sequence[Tensor]], Tensor]


def _joined(xs: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in xs]).double()


def _singular_values(xs: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.linalg.svdvals(x.to(torch.promote_types(x.dtype, torch.float32))).flatten() for x in xs])


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax() if x.numel() else x.new_zeros(())


def _length(xs: Sequence[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(_joined(xs))


#: What is measured besides Frobenius norms and the cosine, unless told otherwise.
COMMON = ("spectral", "sign")

#: The norms by name.
NORMS = {
    "frobenius": BaseNorm(_length, _length),
    "spectral": BaseNorm(
        lambda xs: _largest(_singular_values(xs).double()), lambda xs: _singular_values(xs).double().sum()
    ),
    "sign": BaseNorm(lambda xs: _largest(_joined(xs)), lambda xs: _joined(xs).abs().sum()),
}


def cosine(update: Tensor, gradient: Tensor) -> Tensor:
    """<g, u> / (|g| |u|) of tensors of one shape: 0-d fp64 in [-1, 1], NaN where one of them is zero."""
    g, u = _checked(update, gradient)
    return ((g / torch.linalg.vector_norm(g)) * (u / torch.linalg.vector_norm(u))).sum().clamp(-1, 1)


def norms_of(
    x: Tensor, norms: Sequence[str] = tuple(NORMS), pieces: Sequence[Piece] | None = None
) -> dict[str, Tensor]:
    """N(x) by name, 0-d fp64; pieces: how x is read as matrices (None: its first dimension by all others)."""
    matrices = _matrices(x, pieces)
    return {name: _norm(name).norm(matrices) for name in norms}


def dual_norms(
    gradient: Tensor, norms: Sequence[str] = tuple(NORMS), pieces: Sequence[Piece] | None = None
) -> dict[str, Tensor]:
    """N*(g) by name, 0-d fp64; pieces as in `norms_of`. Equals `Direction.dual_norm` of `steepest.parts`."""
    matrices = _matrices(gradient, pieces)
    return {name: _norm(name).dual(matrices) for name in norms}


def steepness(
    update: Tensor, gradient: Tensor, norm: str = "spectral", pieces: Sequence[Piece] | None = None
) -> Tensor:
    """<g, u> / (N*(g) N(u)): 0-d fp64 in [-1, 1], 1 for the steepest step in the norm; NaN where one is zero."""
    g, u = _checked(update, gradient)
    return (g * u).sum() / (dual_norms(gradient, [norm], pieces)[norm] * norms_of(update, [norm], pieces)[norm])


def measure(
    update: Tensor,
    gradient: Tensor,
    norms: Sequence[str] = COMMON,
    pieces: Sequence[Piece] | None = None,
) -> dict[str, Tensor]:
    """Everything of this module about one layer: 0-d fp64 tensors by name, on its device.

    update, gradient: of one shape, any floating dtypes. norms: names in `NORMS`; "spectral" costs two singular value
    decompositions, which wait for the device. Names: update_norm and gradient_norm (Frobenius), inner, cosine,
    metric_condition, and for each norm N: N_update = N(u), N_dual = N*(g), N_steepness. ValueError for other names and
    for tensors of different shapes.
    """
    g, u = _checked(update, gradient)
    inner = (g * u).sum()
    measures = {"update_norm": torch.linalg.vector_norm(u), "gradient_norm": torch.linalg.vector_norm(g)}
    measures |= {"inner": inner, "cosine": cosine(u, g), "metric_condition": metric_condition(u, g)}
    lengths, duals = norms_of(update, norms, pieces), dual_norms(gradient, norms, pieces)
    for name in norms:
        measures[f"{name}_update"], measures[f"{name}_dual"] = lengths[name], duals[name]
        measures[f"{name}_steepness"] = inner / (duals[name] * lengths[name])
    return measures


def _norm(name: str) -> BaseNorm:
    if name not in NORMS:
        raise ValueError(f"norm {name!r} is not known; use some of {', '.join(NORMS)}")
    return NORMS[name]


def _checked(update: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """(g, u) in fp64."""
    if update.shape != gradient.shape:
        raise ValueError(
            f"the update has shape {tuple(update.shape)} and the gradient {tuple(gradient.shape)}: give both of one "
            "parameter"
        )
    return gradient.detach().double(), update.detach().double()


def _matrices(x: Tensor, pieces: Sequence[Piece] | None) -> list[Tensor]:
    x = x.detach()
    if pieces is not None:
        return [piece.view(x).reshape(piece.shape) for piece in pieces]
    rows = x.shape[0] if x.ndim else 1
    return [x.reshape(1, rows, x.numel() // rows if rows else 0)]
