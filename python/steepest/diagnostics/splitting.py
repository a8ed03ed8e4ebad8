"""Would a neuron be better as two? The splitting criterion of linear layers.

A neuron sigma(theta, x) = act(<w, x> + b) with theta = (w, b) is replaced by two of half its weight in what follows, at
theta + e v and theta - e v. With phi' the gradient of the loss by the neuron's output, summed over the rows x,

    S(theta) = sum_x phi'(x) act''(<w, x> + b) (x, 1) (x, 1)^T        splitting matrix, a symmetric one for each neuron
    loss after - loss before = e^2 / 2 <v, S v> + O(e^3)

The splitting index is the least eigenvalue of S, its eigenvector the v that helps most. Where gradient descent has
converged and an index is negative, splitting that neuron goes down where no small step can. ReLU and other piecewise
linear activations have act'' = 0 and nothing to say. Source: arXiv:1910.02366, section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ENTRIES_AT_ONCE = 1 << 24  # in memory, of splitting matrices and of the weighted inputs that they are made from


@dataclass(frozen=True)
class Splitting:
    """index: (neurons,), least eigenvalues; direction: (neurons, inputs [+ 1]), unit eigenvectors, the bias last."""

    index: Tensor
    direction: Tensor


def splitting(loss: Callable[[], Tensor], layer: nn.Linear, activation: nn.Module) -> Splitting:
    """The splitting criterion of a layer followed by an elementwise activation module, for the loss that is given.

    loss: runs the model on a batch and returns the loss, as one calls backward on; layer and activation are used once
    in it, activation right on what the layer returns. The gradients that parameters hold stay as they are. In the
    layer's dtype (fp32 at least). RuntimeError where loss() does not come through both.
    """
    observed: dict[str, Tensor] = {}

    def inputs(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        observed.update(x=arguments[0].detach(), z=output.detach().clone())  # an activation in place would change it

    def outputs(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        observed["a"] = output

    hooks = [layer.register_forward_hook(inputs), activation.register_forward_hook(outputs)]
    try:
        with torch.enable_grad():
            value = loss()
            if not {"x", "a"} <= observed.keys() or observed["a"].shape != observed["z"].shape:
                raise RuntimeError("the loss does not go through this layer and then this activation: name the two")
            (gradient,) = torch.autograd.grad(value, observed["a"])
    finally:
        for hook in hooks:
            hook.remove()
    x, z, phi = _rows(observed["x"], observed["z"], gradient)
    if layer.bias is not None:
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    weights = phi * _second_derivative(activation, z)
    count = max(1, ENTRIES_AT_ONCE // max(1, x.shape[1] * max(x.shape)))
    pairs = [torch.linalg.eigh(_weighted(x, part)) for part in weights.split(count, dim=1)]
    return Splitting(torch.cat([p[0][:, 0] for p in pairs]), torch.cat([p[1][..., 0] for p in pairs]))


def splitting_matrices(x: Tensor, z: Tensor, gradient: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """S for every neuron, (neurons, inputs, inputs), in fp32 at least.

    x: (rows, inputs), with a column of ones where there is a bias; z: (rows, neurons), before the activation; gradient:
    (rows, neurons), of the loss by the activation's outputs. activation is elementwise.
    """
    x, z, gradient = _rows(x, z, gradient)
    return _weighted(x, gradient * _second_derivative(activation, z))


def _rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().flatten(0, -2).to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)


def _weighted(x: Tensor, weights: Tensor) -> Tensor:
    """sum_x weights(x) x x^T for each column of weights."""
    return (weights.mT[:, None, :] * x.mT) @ x


def _second_derivative(activation: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """act'' at z, entry by entry; 0 where autograd knows of none."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        (first,) = torch.autograd.grad(activation(z.clone()).sum(), z, create_graph=True)
        if not first.requires_grad:
            return torch.zeros_like(z)
        (second,) = torch.autograd.grad(first.sum(), z, allow_unused=True)
    return torch.zeros_like(z) if second is None else second.detach()
