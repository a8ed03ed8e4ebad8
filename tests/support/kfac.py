"""K-FAC's factors from the gradients of single samples, and the networks they are of; fp64, nothing of the package."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from support.references import gaussian

BATCH, CLASSES = 16, 4


def linear_network() -> nn.Sequential:
    """Two linear layers and nothing between them."""
    return with_weights(nn.Sequential(nn.Linear(5, 6, bias=False), nn.Linear(6, CLASSES, bias=False)).double())


def convolutional_network() -> nn.Sequential:
    layers = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(27, CLASSES)
    return with_weights(nn.Sequential(*layers).double())


def with_weights(model: nn.Sequential) -> nn.Sequential:
    for i, p in enumerate(model.parameters()):
        p.data.copy_(gaussian(*p.shape, seed=i) / 2)
    return model


def data(step: int, *shape: int) -> tuple[Tensor, Tensor]:
    return gaussian(BATCH, *shape, seed=100 + step), gaussian(BATCH, CLASSES, seed=200 + step).argmax(1)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def outputs_gradients(model: nn.Sequential, layer: int, x: Tensor, y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """For every sample alone: what the layer is given, and the gradient of its loss by what the layer gives."""
    given, gradients = [], []
    for i in range(len(x)):
        a = model[:layer](x[i : i + 1]).detach()
        out = model[layer](a).detach().requires_grad_()
        loss = nn.functional.cross_entropy(model[layer + 1 :](out), y[i : i + 1])
        given.append(a[0])
        gradients.append(torch.autograd.grad(loss, out)[0][0])
    return given, gradients


def linear_products(a: list[Tensor], d: list[Tensor], layer: nn.Module) -> tuple[Tensor, Tensor]:
    return sum(torch.outer(x, x) for x in d) / len(d), sum(torch.outer(x, x) for x in a) / len(a)


def conv_products(a: list[Tensor], d: list[Tensor], layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Patches cut out by hand; A sums over the positions and S averages over them."""
    s, total = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for x, g in zip(a, d):
        padded = nn.functional.pad(x, (1, 1, 1, 1))
        for i in range(g.shape[1]):
            for j in range(g.shape[2]):
                patch = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].reshape(-1)
                total = total + torch.outer(patch, patch) / len(a)
                s = s + torch.outer(g[:, i, j], g[:, i, j]) / len(a) / (g.shape[1] * g.shape[2])
    return s, total


Products = Callable[[list[Tensor], list[Tensor], nn.Module], tuple[Tensor, Tensor]]
NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...], dict[int, Products]]] = {
    "linear": (linear_network, (5,), {0: linear_products, 1: linear_products}),
    "convolution": (convolutional_network, (2, 5, 5), {0: conv_products, 3: linear_products}),
}


def damped_step(s: Tensor, a: Tensor, bases: list[Tensor], m: Tensor, damping: float) -> Tensor:
    """(S + sqrt(damping) / pi)^-1 m (A + pi sqrt(damping))^-1, of S and A what is diagonal in the bases."""
    pi = ((a.trace() / len(a)) / (s.trace() / len(s))).sqrt()
    left = (bases[0].mT @ s @ bases[0]).diagonal() + damping**0.5 / pi
    right = (bases[1].mT @ a @ bases[1]).diagonal() + damping**0.5 * pi
    return bases[0] @ (bases[0].mT @ m @ bases[1] / left[:, None] / right) @ bases[1].mT
