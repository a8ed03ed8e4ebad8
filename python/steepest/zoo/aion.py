"""AION: a layer of damped sinusoids, and what its exponents are on data without noise.

    f(x) = Re sum_j c_j exp(<z_j, x>),   c = cosine - i sine,   z = alpha + i omega
         = sum_j exp(<alpha_j, x>) (cosine_j cos <omega_j, x> + sine_j sin <omega_j, x>)

Moving z by d multiplies the unit: exp((z + d) x) = exp(z x) exp(d x). So the infinite Taylor series of a unit in d is
the number exp(d x), and that of any derivative of f is such units times polynomials in x. Amplitude and phase are those
of c: A e^(i phi) = c, which is smooth in cosine and sine and is not in A and phi where A = 0.

Values of k units at x = x_0 + n h are sums of 2k powers, y_n = sum_j a_j rho_j^n with rho = exp(z h) and its conjugate.
The windows (y_n, ..., y_(n + L)) span what the vectors (1, rho, ..., rho^L) span; a basis V of that space has, for some
invertible T, V without its first row = (V without its last row) T diag(rho) T^-1. So the rho are the eigenvalues of one
small matrix, exactly where there is no noise.

Source of the unit: arXiv:2510.05489 (Batley and Saha), whose abstract and figure name AION and its alpha, omega, A and
phi. By a summary its network for several inputs is a sum of products, over the inputs, of sums of such exponentials;
multiplied out these are the f above with exponents that share parts, which here are free. The pencil is Prony's method
(1795) as Hua and Sarkar have it (1990).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

MOST_WINDOWED = 256  # the longest window, so that the SVD of windows is linear in the number of points
RANK = 1e-12  # singular values below this part of the largest are rounding


class AION(nn.Module):
    """Damped sinusoids of the input: (..., inputs) to (..., outputs), in the dtype of its parameters.

    units: k, of one alpha and one omega for each input, (k, inputs); cosine and sine: (outputs, k). A new one neither
    grows nor decays: alpha is 0, the rest is Gaussian. Parameters that are frozen make it another layer: with omega and
    sine 0 a sum of exponentials, with alpha 0 a sum of sinusoids. ValueError for counts below 1.
    """

    def __init__(
        self,
        units: int,
        inputs: int = 1,
        outputs: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(units, inputs, outputs) < 1:
            raise ValueError(f"units, inputs and outputs should be at least 1 but are: {units}, {inputs}, {outputs}")
        self.units, self.inputs, self.outputs = units, inputs, outputs
        self.alpha = nn.Parameter(torch.empty(units, inputs, device=device, dtype=dtype))
        self.omega = nn.Parameter(torch.empty(units, inputs, device=device, dtype=dtype))
        self.cosine = nn.Parameter(torch.empty(outputs, units, device=device, dtype=dtype))
        self.sine = nn.Parameter(torch.empty(outputs, units, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.alpha)
        nn.init.normal_(self.omega)
        nn.init.normal_(self.cosine, std=self.units**-0.5)
        nn.init.normal_(self.sine, std=self.units**-0.5)

    @property
    def z(self) -> Tensor:
        """alpha + i omega, (units, inputs)."""
        return torch.complex(self.alpha, self.omega)

    @property
    def c(self) -> Tensor:
        """cosine - i sine, (outputs, units): its absolute value is the amplitude, its angle the phase."""
        return torch.complex(self.cosine, -self.sine)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[-1] != self.inputs:
            raise ValueError(f"x should have shape (..., {self.inputs}) but has: {tuple(x.shape)}")
        x = x.to(self.alpha.dtype)
        growth, angle = (x @ self.alpha.mT).exp(), x @ self.omega.mT
        return (growth * angle.cos()) @ self.cosine.mT + (growth * angle.sin()) @ self.sine.mT

    def extra_repr(self) -> str:
        return f"units={self.units}, inputs={self.inputs}, outputs={self.outputs}"


def poles(values: Tensor, orders: Sequence[int]) -> list[Tensor]:
    """The rho of values[n] = sum_j a_j rho_j^n: at most so many of them, complex128, with conjugates, for each order.

    values: (n, outputs), fp64, equidistant, of at least twice the least order. Exact up to rounding where there are so
    many powers in them, of a least-squares kind otherwise. Fewer than the order where the values have a lower rank.
    """
    length = min(len(values) // 2, max(MOST_WINDOWED, *orders))
    windows = values.unfold(0, length + 1, 1).flatten(0, 1)
    _, sizes, basis = torch.linalg.svd(torch.linalg.qr(windows, mode="r").R, full_matrices=False)
    rank = min(length, int((sizes > RANK * sizes[0]).sum()))
    bases = [basis[: min(order, rank)].mT for order in orders]
    return [torch.linalg.eigvals(torch.linalg.pinv(v[:-1]) @ v[1:]) for v in bases]


def exponents(x: Tensor, values: Tensor, orders: Sequence[int]) -> list[Tensor]:
    """z = alpha + i omega with omega >= 0, one of each conjugate pair, complex128, from so many poles for each order.

    x: (n,), values: (n, outputs), fp64, in any order. Values at the same x are averaged, and those at an x that is not
    equidistant are interpolated linearly, which makes the answer a guess. omega is at most pi / h. Empty where there
    are fewer than two x, or only zeros.
    """
    x, values = _distinct(x, values)
    if len(x) < 2 or not values.any():
        return [x.new_zeros(0, dtype=torch.complex128) for _ in orders]
    spacing = grid_spacing(x)
    if spacing is None:
        spacing = float(x[-1] - x[0]) / (len(x) - 1)
        values = _interpolated(x, values, _grid(x))
    guesses = [rho.log() / spacing for rho in poles(values / values.abs().max(), orders)]
    return [z[torch.isfinite(z.real) & (z.imag > -1e-9 * math.pi / spacing)] for z in guesses]


def grid_spacing(x: Tensor) -> float | None:
    """h where the numbers of x, (n,), in any order, are x_0 + n h, each of them once at least; None otherwise."""
    x = torch.unique(x)
    spacing = float(x[-1] - x[0]) / max(len(x) - 1, 1)
    far = float((x - _grid(x)).abs().max())
    return spacing if spacing > 0 and far <= 1e-9 * spacing + 1e-14 * float(x.abs().max()) else None


def _grid(x: Tensor) -> Tensor:
    """Equidistant numbers, as many as x, between its first and its last."""
    return x[0] + (x[-1] - x[0]) / max(len(x) - 1, 1) * torch.arange(len(x), dtype=x.dtype, device=x.device)


def _distinct(x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """x in order and each once, with the mean of its values."""
    unique, which, counts = torch.unique(x, return_inverse=True, return_counts=True)
    sums = values.new_zeros(len(unique), values.shape[1]).index_add_(0, which, values)
    return unique, sums / counts[:, None]


def _interpolated(x: Tensor, values: Tensor, at: Tensor) -> Tensor:
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    part = ((at - x[right - 1]) / (x[right] - x[right - 1]))[:, None]
    return torch.lerp(values[right - 1], values[right], part)
