"""Prodigy without averages, arXiv:2306.06101 and 2409.20325, in the norm of the largest layer.

eta = max(eta, <G, W_0 - W> / sum of dual norms);  W_l = W_l - eta dz_l(G_l)
dz = U V^T and sum of singular values for matrices, sign and sum of magnitudes for all else
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest import ProdigyMuon
from support.references import gap, gaussian, polar_by_svd


def goal() -> tuple[list[Tensor], list[Tensor]]:
    """Of sum c_ij |W_ij - W*_ij|, convex with subgradients c sign: (W*, c)."""
    return [gaussian(5, 3, seed=1), gaussian(6, seed=2)], [gaussian(5, 3, seed=3).abs(), gaussian(6, seed=4).abs()]


def prodigy(params: list[nn.Parameter], **options: Any) -> ProdigyMuon:
    return ProdigyMuon([{"params": params[:1]}, {"params": params[1:], "use_muon": False}], polar="svd", **options)


@pytest.mark.parametrize("norm", ["spectral", "sign"])
def test_prodigy(norm: Any) -> None:
    ends, bend = goal()
    params = [nn.Parameter(torch.zeros_like(w)) for w in ends]
    optimizer = prodigy(params, norm=norm, initial_step=1e-4)
    W, eta, etas = [torch.zeros_like(w) for w in ends], 1e-4, []
    for _ in range(40):
        G = [c * (w - x).sign() for c, w, x in zip(bend, W, ends)]
        for p, w, c in zip(params, ends, bend):
            p.grad = c * (p.detach() - w).sign()
        dual = (G[0].abs().sum() if norm == "sign" else torch.linalg.svdvals(G[0]).sum()) + G[1].abs().sum()
        eta = max(eta, -float(sum((g * w).sum() for g, w in zip(G, W)) / dual))
        etas.append(eta)
        W = [W[0] - eta * (G[0].sign() if norm == "sign" else polar_by_svd(G[0])), W[1] - eta * G[1].sign()]
        optimizer.step()
        assert gap(optimizer.state[params[0]]["step_size"], torch.tensor(eta, dtype=torch.float64)) < 1e-11
    assert max(gap(p.detach(), w) for p, w in zip(params, W)) < 1e-10
    length = max(float(torch.linalg.matrix_norm(ends[0], 2)) if norm == "spectral" else 0.0, float(ends[1].abs().max()))
    length = max(length, float(ends[0].abs().max()) if norm == "sign" else 0.0)
    assert 100 * 1e-4 < etas[-1] <= length  # it grew, and never beyond the distance to the minimizer
    assert sorted(etas) == etas


#: The estimate reads weights as they are rounded, whatever the norm is of: every pair of norm, dtype and rounding.
ROUNDED = [
    *(("spectral", torch.bfloat16, {}), ("sign", torch.float16, {}), ("sign", torch.bfloat16, {"keep_mantissa": True})),
    *(
        ("spectral", torch.float16, {"keep_mantissa": True}),
        ("spectral", torch.bfloat16, {"stochastic_rounding": True}),
    ),
    ("sign", torch.float16, {"stochastic_rounding": True}),
]


@pytest.mark.parametrize("norm, dtype, kept", ROUNDED, ids=str)
def test_weights_of_16_bits_find_the_step_of_fp32(norm: Any, dtype: torch.dtype, kept: dict[str, bool]) -> None:
    """Though the first step, 1e-6, is below their rounding."""
    steps = []
    for d, options in ((torch.float32, {}), (dtype, kept)):
        ends, bend = goal()
        params = [nn.Parameter(gaussian(*w.shape, seed=9).to(d)) for w in ends]
        optimizer = prodigy(params, norm=norm, **options)
        for _ in range(120):
            for p, w, c in zip(params, ends, bend):
                p.grad = (c * (p.detach().double() - w).sign()).to(d)
            optimizer.step()
        steps.append(float(optimizer.state[params[0]]["step_size"]))
    assert abs(steps[1] / steps[0] - 1) < 0.3


def test_what_is_measured_of_16_bits_is_kept_in_fp32() -> None:
    """The start, and what rounding has dropped since: at most a unit in the last place, and none of it in a skip."""
    p = nn.Parameter(gaussian(5, 3).bfloat16())
    optimizer, start = prodigy([p]), p.detach().float()
    for step in range(30):
        p.grad = gaussian(5, 3, seed=step).bfloat16()
        optimizer.step()
    state = optimizer.state[p]
    assert state["start"].dtype == state["dropped"].dtype == torch.float32
    assert torch.equal(state["start"], start)
    assert state["dropped"].any()
    assert bool((state["dropped"].abs() <= 2.0**-7 * p.detach().float().abs()).all())
    before = state["dropped"].clone()
    p.grad[0, 0] = float("nan")
    optimizer.step()
    assert torch.equal(state["dropped"], before)
