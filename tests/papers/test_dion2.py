"""Dion2 (arXiv:2512.16928) and Dion3 (NorDion2 of microsoft/dion), which has NorMuon's rows after it, in fp64.

M = M + G;   K = the ceil(f n) rows of the largest sum_j |M_ij|, n the shorter side (columns of a tall matrix);
O = U V^T of M_K;   M_K = mu M_K;   W = (1 - lr wd) W, and W_K = W_K - lr sqrt(rows / cols) O

Dion3: rows of any matrix;   v_i = b2 v_i + (1 - b2) mean_j O_ij^2 for i in K;  H = O / (sqrt v + eps);  O = |O| / |H| H
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from steepest import Dion2, Muon
from support.references import gaussian, polar_by_svd, trajectory, unequal_gradients

SHAPES = ((7, 5), (5, 7), (6, 6), (1, 4), (4, 1), (9, 3))
STEPS = 20
LR, DECAY, MU, BETA2 = 0.02, 0.1, 0.9, 0.8
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def largest_rows(m: Tensor, fraction: float) -> list[int]:
    """Row by row, entry by entry."""
    sums = [sum(abs(float(x)) for x in row) for row in m]
    return sorted(range(len(sums)), key=lambda i: -sums[i])[: max(1, math.ceil(fraction * len(sums)))]


def dion2(w: Tensor, gradients: Sequence[Tensor], fraction: float, rows: bool = False) -> Iterator[Tensor]:
    """rows: Dion3."""
    m, v = torch.zeros_like(w), [0.0] * w.shape[0]
    ratio = math.sqrt(w.shape[0] / w.shape[1])
    turned = w.shape[0] > w.shape[1] and not rows
    for g in gradients:
        m = m + g
        if turned:
            m = m.T
        chosen = largest_rows(m, fraction)
        o = polar_by_svd(torch.stack([m[i] for i in chosen]))
        for i in chosen:
            m[i] = MU * m[i]
        if rows:
            length, scaled = float((o * o).sum()) ** 0.5, []
            for i, row in zip(chosen, o, strict=True):
                v[i] = BETA2 * v[i] + (1 - BETA2) * sum(float(x) ** 2 for x in row) / len(row)
                scaled.append(row / (v[i] ** 0.5 + 1e-8))
            hat = torch.stack(scaled)
            o = hat * length / float((hat * hat).sum()) ** 0.5
        u = torch.zeros_like(m)
        for i, row in zip(chosen, o, strict=True):
            u[i] = row
        if turned:
            m, u = m.T.clone(), u.T
        w = w - LR * DECAY * w - LR * ratio * u
        yield w


def made(shape: Sequence[int], **options: object) -> tuple[Dion2, nn.Parameter]:
    w = nn.Parameter(gaussian(*shape, seed=0))
    values = {"lr": LR, "weight_decay": DECAY, "momentum": MU, "beta2": BETA2, "polar": "svd", **options}
    return Dion2([{"params": [w], "use_muon": True}], **values), w


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("after", [None, "rows"])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75, 1.0])
@every_shape
def test_the_papers_rule(shape: tuple[int, int], fraction: float, after: str | None, backend: str) -> None:
    optimizer, w = made(shape, fraction=fraction, after=after, backend=backend)
    start, of = w.detach().clone(), unequal_gradients(STEPS, shape)
    wanted = dion2(start, of, fraction, rows=after == "rows")
    for now, then in zip(trajectory(optimizer, w, of), wanted, strict=True):
        assert float((now - then).norm() / (then - start).norm()) < 1e-10


@every_shape
def test_all_of_a_matrix_is_muon(shape: tuple[int, int]) -> None:
    """An average and a sum of gradients have one polar factor."""
    (whole, w), of = made(shape, fraction=1.0), unequal_gradients(STEPS, shape)
    v = nn.Parameter(w.detach().clone())
    options = {"nesterov": False, "adjust_lr_fn": "spectral_unclamped", "polar": "svd"}
    muon = Muon([v], lr=LR, weight_decay=DECAY, momentum=MU, **options)
    for now, then in zip(trajectory(whole, w, of), trajectory(muon, v, of), strict=True):
        torch.testing.assert_close(now, then, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("turned", [False, True])
def test_only_what_is_chosen_moves_and_is_damped(turned: bool) -> None:
    shape = (12, 8) if turned else (8, 12)
    optimizer, w = made(shape, weight_decay=0.0)
    momentum = torch.zeros(shape, dtype=torch.float64)
    side = int(turned)
    for g in unequal_gradients(STEPS, shape):
        before = w.detach().clone()
        w.grad = g.clone()
        optimizer.step()
        momentum += g
        chosen = momentum.abs().sum(1 - side).topk(2).indices
        steps = (w.detach() - before).transpose(0, side)
        assert set(steps.any(1).nonzero().flatten().tolist()) == set(chosen.tolist())
        scale = LR * math.sqrt(shape[0] / shape[1])
        torch.testing.assert_close(torch.linalg.svdvals(steps[chosen]) / scale, torch.ones(2, dtype=torch.float64))
        momentum.transpose(0, side)[chosen] *= MU
        assert torch.equal(optimizer.state[w]["momentum_buffer"], momentum)


def test_every_matrix_of_a_weight_chooses_its_own() -> None:
    """Heads, splits and experts step as weights of their own do."""
    layouts: dict[tuple[int, ...], dict[str, object]] = {
        (6, 5): {"num_heads": 2},
        (9, 4): {"split_sizes": (4, 3, 2)},
        (3, 4, 5): {"batch_dims": 1},
        (4, 9): {"split_sizes": (4, 3, 2), "transposed": True},
    }
    cuts = {(6, 5): (3, 3), (9, 4): (4, 3, 2), (3, 4, 5): (1, 1, 1), (4, 9): (4, 3, 2)}
    for (shape, how), after in ((each, after) for each in layouts.items() for after in (None, "rows")):
        values = {"lr": LR, "weight_decay": DECAY, "polar": "svd", "after": after, "fraction": 0.5}
        w = nn.Parameter(gaussian(*shape, seed=0))
        turned, dim = bool(how.get("transposed")), 1 if how.get("transposed") else 0
        parts = [t.reshape(-1, shape[-1]) if not turned else t.T for t in w.detach().split(cuts[shape], dim)]
        alone = [nn.Parameter(part.clone()) for part in parts]
        one = Dion2([{"params": [w], "use_muon": True, **how}], **values)
        many = Dion2([{"params": alone, "use_muon": True}], **values)
        for g in unequal_gradients(STEPS, shape)[:5]:
            w.grad = g.clone()
            for p, part in zip(alone, g.split(cuts[shape], dim), strict=True):
                p.grad = (part.reshape(-1, shape[-1]) if not turned else part.T).clone()
            one.step()
            many.step()
        for p, part in zip(alone, w.detach().split(cuts[shape], dim), strict=True):
            torch.testing.assert_close(p.detach(), part.reshape(-1, shape[-1]) if not turned else part.T)


def test_a_group_has_a_fraction_of_its_own() -> None:
    (first, w), (second, v) = made((8, 8), fraction=0.25), made((8, 8), fraction=0.5)
    a, b = nn.Parameter(gaussian(8, 8, seed=0)), nn.Parameter(gaussian(8, 8, seed=0))
    groups = [{"params": [a], "fraction": 0.25}, {"params": [b], "fraction": 0.5}]
    both = Dion2(groups, lr=LR, weight_decay=DECAY, momentum=MU, polar="svd")
    for g in unequal_gradients(STEPS, (8, 8))[:5]:
        for p in (w, v, a, b):
            p.grad = g.clone()
        for optimizer in (first, second, both):
            optimizer.step()
    assert torch.equal(a, w)
    assert torch.equal(b, v)
    assert not torch.equal(a, b)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_a_fraction_is_above_0_and_at_most_1(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"fraction should be in \(0, 1\] but is"):
        made((4, 4), fraction=fraction)


def test_entries_of_a_submatrix_are_not_normalized() -> None:
    with pytest.raises(ValueError, match="after 'elements' is not known; use 'rows'"):
        made((4, 4), after="elements")
