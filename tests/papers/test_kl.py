"""KL-Shampoo and KL-SOAP, arXiv:2509.03378, in the form of the authors' released optimizer.

step 0       S_L = (1 - b2) G G^T / n;  S_R = (1 - b2) G^T G / m;  Q their eigenvectors;  d_L = d_R = .1;  no step
KL-Shampoo   M = b1 M + (1 - b1) G;  W -= lr Q_L ((Q_L^T M Q_R) o J / (1 + eps J)) Q_R^T,   J_ij = s_Li s_Rj
KL-SOAP      M, V average Q_L^T G Q_R and its square;  W -= lr Q_L (M / (sqrt V + eps)) Q_R^T;  no bias correction
then         W -= lr wd W
factors      S_L = b2 S_L + (1 - b2) G (Q_R s_R)(Q_R s_R)^T G^T / n;  S_R = ... G^T (Q_L s_L)(Q_L s_L)^T G / m
values       d_L = b2 d_L + (1 - b2) mean_j (Q_L^T G Q_R)_ij^2 s_Rj^2;  d_R likewise, over i
s            min(1 / sqrt d, max(10, min(len d, 4000))), and what is remembered of d is s^-2
every T      Q = qr(S Q), columns sorted here by Q^T S Q, V and d with them; KL-SOAP's M is turned
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steepest import KLSOAP, KLShampoo
from support.references import eigenbases_of, gap, gaussian, gradients, iterated, trained

STEPS, EVERY = 50, 7
LR, WD, B1, B2, EPS = 0.01, 0.1, 0.9, 0.95, 1e-8
OPTIONS = {"lr": LR, "weight_decay": WD, "betas": (B1, B2), "precondition_frequency": EVERY, "parity": "authors"}


class Curvature:
    """S, Q and d of both sides."""

    def __init__(self, g: Tensor) -> None:
        m, n = g.shape
        self.S = [(1 - B2) * g @ g.mT / n, (1 - B2) * g.mT @ g / m]
        self.Q: list[Tensor] = []
        self.d = [torch.full((k,), 0.1, dtype=torch.float64) for k in (m, n)]

    @property
    def s(self) -> list[Tensor]:
        return [(d**-0.5).clamp(max=max(10, min(len(d), 4000))) for d in self.d]

    def learn(self, g: Tensor) -> None:
        (m, n), s, (left, right) = g.shape, self.s, self.Q
        y, z = g @ right * s[1], g.mT @ left * s[0]
        self.S = [B2 * S + (1 - B2) * term for S, term in zip(self.S, (y @ y.mT / n, z @ z.mT / m))]
        turned = left.mT @ g @ right
        means = (turned * s[1]).square().mean(1), (turned * s[0][:, None]).square().mean(0)
        self.d = [B2 * each**-2 + (1 - B2) * mean for each, mean in zip(s, means)]

    def turn(self) -> list[Tensor]:
        """New bases; the order of the old columns."""
        found = [iterated(S, Q) for S, Q in zip(self.S, self.Q)]
        self.Q = [basis for basis, _ in found]
        self.d = [d[order] for d, (_, order) in zip(self.d, found)]
        return [order for _, order in found]


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6), (3, 24)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.03], ids=["plain", "clamped"])
def test_kl_shampoo(shape: tuple[int, int], scale: float) -> None:
    w = gaussian(*shape, seed=9)
    p, M = torch.nn.Parameter(w.clone()), torch.zeros_like(w)
    optimizer = KLShampoo([p], eps=EPS, **OPTIONS)
    for step, g in enumerate(gradients(STEPS, *shape)):
        p.grad = g = g * scale
        optimizer.step()
        if step == 0:
            of = Curvature(g)
            of.Q = eigenbases_of(optimizer.state[p], of.S)
            assert torch.equal(p, w)
            continue
        M = B1 * M + (1 - B1) * g
        J = of.s[0][:, None] * of.s[1]
        w = (w - LR * of.Q[0] @ ((of.Q[0].mT @ M @ of.Q[1]) * J / (1 + EPS * J)) @ of.Q[1].mT) * (1 - LR * WD)
        of.learn(g)
        if step % EVERY == 0:
            of.turn()
    assert gap(p.detach(), w) < 1e-11


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6), (3, 24)], ids=str)
def test_kl_soap(shape: tuple[int, int]) -> None:
    w = gaussian(*shape, seed=9)
    p, M, V = torch.nn.Parameter(w.clone()), torch.zeros_like(w), torch.zeros_like(w)
    optimizer = KLSOAP([p], eps=EPS, **OPTIONS)
    for step, g in enumerate(gradients(STEPS, *shape)):
        p.grad = g
        optimizer.step()
        if step == 0:
            of = Curvature(g)
            of.Q = eigenbases_of(optimizer.state[p], of.S)
            assert torch.equal(p, w)
            continue
        turned = of.Q[0].mT @ g @ of.Q[1]
        M, V = B1 * M + (1 - B1) * turned, B2 * V + (1 - B2) * turned**2
        w = (w - LR * of.Q[0] @ (M / (V.sqrt() + EPS)) @ of.Q[1].mT) * (1 - LR * WD)
        of.learn(g)
        if step % EVERY == 0:
            M = of.Q[0] @ M @ of.Q[1].mT
            rows, columns = of.turn()
            M, V = of.Q[0].mT @ M @ of.Q[1], V[rows][:, columns]
    assert gap(p.detach(), w) < 1e-11


@pytest.mark.parametrize("cls", [KLShampoo, KLSOAP])
def test_the_defaults_are_the_authors(cls: type[KLShampoo | KLSOAP]) -> None:
    (group,) = cls([torch.nn.Parameter(torch.zeros(3, 2))]).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-4, (0.9, 0.98), 1e-8, 0.01)
    assert group["precondition_frequency"] == 10


@pytest.mark.parametrize("first_step", ["skip", "move"])
def test_the_published_rule_with_inverse_roots(first_step: str) -> None:
    """L = b2 L + (1 - b2) G R^-1 G^T / n, R likewise, both rms(G) I at first; W -= lr L^-1/2 M R^-1/2.

    Here with roots of every step; 1e-6 of a bound on the largest eigenvalue is added, which differs by at most 1.3.
    """
    shape = (5, 8)
    w = gaussian(*shape, seed=9)
    options = {"lr": LR, "weight_decay": WD, "betas": (B1, B2), "precondition_frequency": 1}
    found = trained(KLShampoo, gradients(20, *shape), w, inverse_root="newton", first_step=first_step, **options)
    M, (L, R) = torch.zeros_like(w), (torch.eye(k, dtype=torch.float64) for k in shape)

    def root(S: Tensor) -> Tensor:
        values, Q = torch.linalg.eigh(S)
        return Q @ ((values + 1.1e-6 * values.max()) ** -0.5).diag() @ Q.mT

    for step, g in enumerate(gradients(20, *shape)):
        if step == 0:
            L, R = (S * g.square().mean().sqrt() for S in (L, R))
        if step or first_step == "move":
            M = B1 * M + (1 - B1) * g
            w = (1 - LR * WD) * w - LR * root(L) @ M @ root(R)
        if step:
            y, z = g @ root(R), root(L) @ g
            L, R = B2 * L + (1 - B2) * y @ y.mT / shape[1], B2 * R + (1 - B2) * z.mT @ z / shape[0]
    assert gap(found, w) < 1e-4
