"""The best-conditioned metric in which a step is natural gradient descent.

Every u with <g, u> > 0 is u = M^-1 g for some symmetric positive definite M. With psi the angle between u and g, none
is better conditioned than

    kappa = (1 + sin psi) / (1 - sin psi) = ((1 + sin psi) / cos psi)^2

which is attained by (h = bisector of the unit vectors of g and u, k orthogonal to it towards u)

    M^-1 = c (I + sin psi (h k^T + k h^T)),   c = |u| / (|g| cos psi)

It stretches by c (1 + sin psi) along h + k and by c (1 - sin psi) along h - k, by c elsewhere. kappa = 1 is gradient
descent; a large kappa is a step that needs a very uneven geometry to be called one. Source: arXiv:2409.16422.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """The metric M: scale c, cosine and sine of psi and condition kappa are 0-d; h and k have the tensors' shape."""

    scale: Tensor
    cosine: Tensor
    sine: Tensor
    condition: Tensor
    h: Tensor
    k: Tensor

    def inverse(self, x: Tensor) -> Tensor:
        """M^-1 x for x of g's shape; M^-1 g = u."""
        along_h, along_k = (self.h * x).sum(), (self.k * x).sum()
        return self.scale * (x + self.sine * (self.h * along_k + self.k * along_h))

    def times(self, x: Tensor) -> Tensor:
        """M x for x of g's shape; M u = g."""
        along_h, along_k = (self.h * x).sum(), (self.k * x).sum()
        plane = self.sine * (self.h * along_h + self.k * along_k) - (self.h * along_k + self.k * along_h)
        return (x + self.sine / self.cosine.square() * plane) / self.scale


def metric_condition(update: Tensor, gradient: Tensor) -> Tensor:
    """kappa, 0-d fp64 >= 1: infinite where <g, u> <= 0, which no metric explains; NaN where one of them is zero."""
    g, u = _units(update, gradient)
    cos, sin = (g * u).sum(), _sine(g, u)
    return torch.where(cos > 0, ((1 + sin) / cos).square(), torch.where(cos.isnan(), cos, float("inf")))


def best_metric(update: Tensor, gradient: Tensor) -> Metric:
    """The metric of least condition that explains the step, in fp64; reads from the device.

    update = W before - W after and gradient have one shape. ValueError unless <g, u> > 0.
    """
    g, u = _units(update, gradient)
    cos, sin = (g * u).sum(), _sine(g, u)
    if not float(cos) > 0:
        raise ValueError(f"the cosine of update and gradient is {float(cos):.3g}: only a descent step has a metric")
    scale = torch.linalg.vector_norm(update.double()) / (torch.linalg.vector_norm(gradient.double()) * cos)
    h = (g + u) / torch.linalg.vector_norm(g + u)
    across = u - g
    length = torch.linalg.vector_norm(across)
    k = torch.where(length > 0, across / length, 0)  # u along g: the plane is a line, and sin psi = 0
    return Metric(scale, cos, sin, ((1 + sin) / cos).square(), h, k)


def _units(update: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    g, u = gradient.detach().double(), update.detach().double()
    return g / torch.linalg.vector_norm(g), u / torch.linalg.vector_norm(u)


def _sine(g: Tensor, u: Tensor) -> Tensor:
    """The sine of the angle between unit vectors, 2 sin(psi / 2) cos(psi / 2): accurate for small angles too."""
    return (torch.linalg.vector_norm(u - g) * torch.linalg.vector_norm(u + g) / 2).clamp(max=1)
