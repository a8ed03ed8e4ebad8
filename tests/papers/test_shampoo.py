"""Shampoo, arXiv:1802.09568 with grafting of arXiv:2309.06497, and with one factor, arXiv:2503.20762 and 2503.10537.

L = L + G G^T;  R = R + G^T G;  M = b1 M + (1 - b1) G;  W = (1 - lr wd) W - lr L^-1/4 M R^-1/4 at Adam's length
one factor     L = b2 L + (1 - b2) G G^T;  W = (1 - lr wd) W - lr (L^1/2 + eps)^-1 M
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steepest import OneSidedShampoo, Shampoo
from support.references import eigenbases_of, eigenbasis, gap, gaussian, gradients, in_basis, trained
from support.slow import slow

SIZES = pytest.mark.parametrize("shape", [(8, 5), slow((5, 8)), (6, 6)], ids=str)
STEPS, EVERY = 50, 7


@SIZES
@pytest.mark.parametrize("graft", ["adam", None])
@pytest.mark.parametrize("beta", [1.0, 0.97])
@pytest.mark.parametrize("parity", [None, "authors"])
def test_shampoo_is_the_published_rule(
    shape: tuple[int, int], beta: float, graft: str | None, parity: str | None
) -> None:
    """L^-1/4 m R^-1/4 with roots of every EVERY steps; without parity only the bases are so old.

    1e-12 and 1e-6 of the largest eigenvalue are added.
    """
    w, lr, wd, b1, b2, eps = gaussian(*shape, seed=9), 0.02, 0.1, 0.9, 0.99, 1e-12
    p, m, v = torch.nn.Parameter(w.clone()), torch.zeros_like(w), torch.zeros_like(w)
    options = {"shampoo_beta": beta, "graft": graft, "betas": (b1, b2), "refresh": "eigh", "parity": parity}
    optimizer = Shampoo([p], lr=lr, weight_decay=wd, precondition_frequency=EVERY, **options)
    factors, roots = [w.new_zeros(n, n) for n in shape], [w.new_zeros(n, n) for n in shape]
    bases: list[Tensor] = []

    def inverse_root(values: Tensor) -> Tensor:
        return (values.clamp(min=0) + eps + 1e-6 * values.max()) ** -0.25

    for t, g in enumerate(gradients(STEPS, *shape), 1):
        p.grad = g
        optimizer.step()
        for i, product in enumerate((g @ g.mT, g.mT @ g)):
            factors[i] = factors[i] + product if beta == 1 else beta * factors[i] + (1 - beta) * product
        corrected = [factor if beta == 1 else factor / (1 - beta**t) for factor in factors]
        if t == 1 or t % EVERY == 0:
            bases = list(map(eigenbasis, corrected)) if parity else eigenbases_of(optimizer.state[p], corrected)
            roots = [in_basis(q, factor, inverse_root) for q, factor in zip(bases, corrected)]
        elif parity is None:
            roots = [in_basis(q, factor, inverse_root) for q, factor in zip(bases, corrected)]
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        u = roots[0] @ m @ roots[1] / (1 - b1**t)
        if graft:
            adam = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps)
            u = u * adam.norm() / u.norm()
        w = (1 - lr * wd) * w - lr * u
    assert gap(p.detach(), w) < 1e-9


@SIZES
@pytest.mark.parametrize("parity", [None, "authors"])
def test_one_sided_shampoo_is_the_published_rule(shape: tuple[int, int], parity: str | None) -> None:
    """The inverse square root of the smaller side's factor; averages are divided by their weights."""
    w, lr, wd, b1, b2, eps = gaussian(*shape, seed=9), 0.02, 0.1, 0.9, 0.95, 1e-8
    start, left = w, shape[0] <= shape[1]
    m, (factor, root, basis) = torch.zeros_like(w), w.new_zeros(3, min(shape), min(shape))
    for t, g in enumerate(gradients(STEPS, *shape), 1):
        factor = b2 * factor + (1 - b2) * (g @ g.mT if left else g.mT @ g)
        due = t == 1 or t % EVERY == 0
        basis = eigenbasis(factor) if due else basis
        if due or parity is None:
            root = in_basis(basis, factor / (1 - b2**t), lambda d: 1 / (d.sqrt() + eps))
        m = b1 * m + (1 - b1) * g
        u = m / (1 - b1**t)
        w = (1 - lr * wd) * w - lr * (root @ u if left else u @ root)
    found = trained(
        OneSidedShampoo,
        gradients(STEPS, *shape),
        start,
        lr=lr,
        weight_decay=wd,
        precondition_frequency=EVERY,
        refresh="eigh",
        parity=parity,
    )
    assert gap(found, w) < 1e-9
