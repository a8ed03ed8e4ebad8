"""K-FAC, arXiv:1503.05671; convolutions arXiv:1602.01407.

A, S     averages of a a^T and d d^T over samples, divided by 1 - b2^t;  M = b1 M + (1 - b1) G
W = (1 - lr wd) W - lr (S + sqrt(damping) / pi)^-1 M (A + pi sqrt(damping))^-1,  pi^2 = tr A / tr S by sizes
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steepest import KFAC
from support.kfac import NETWORKS, damped_step, data, loss_of, outputs_gradients
from support.references import eigenbases_of, gap


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_kfac_is_the_published_rule(name: str, every: int) -> None:
    """Fifty steps from gradients of single samples; the inverses are in the bases of the last refresh."""
    make, shape, products = NETWORKS[name]
    lr, wd, b1, b2, damping = 0.05, 0.1, 0.9, 0.9, 1e-2
    model, twin = make(), make()
    options = {"damping": damping, "precondition_frequency": every, "refresh": "eigh", "adamw_lr": 0.0}
    optimizer = KFAC(model, lr=lr, weight_decay=wd, betas=(b1, b2), **options)
    moments = {k: torch.zeros_like(twin[k].weight) for k in products}
    averages: dict[int, list[Tensor]] = {}
    bases: dict[int, list[Tensor]] = {}
    for t in range(1, 51 if name == "linear" else 21):
        x, y = data(t, *shape)
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
        grads = dict(zip(products, torch.autograd.grad(loss_of(twin, x, y), [twin[k].weight for k in products])))
        found = {k: products[k](*outputs_gradients(twin, k, x, y), twin[k]) for k in products}
        for k, pair in found.items():
            old = averages.get(k, [torch.zeros_like(f) for f in pair])
            averages[k] = [b2 * f + (1 - b2) * product for f, product in zip(old, pair)]
            corrected = [f / (1 - b2**t) for f in averages[k]]
            if t == 1 or t % every == 0:
                bases[k] = eigenbases_of(optimizer.state[model[k].weight], corrected)
            moments[k] = b1 * moments[k] + (1 - b1) * grads[k]
            u = damped_step(*corrected, bases[k], moments[k].flatten(1), damping).reshape(moments[k].shape)
            weight = twin[k].weight.data
            weight.mul_(1 - lr * wd).sub_(lr * u)
    for k in products:
        assert gap(model[k].weight.detach(), twin[k].weight.detach()) < 1e-9
