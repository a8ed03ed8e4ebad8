"""NorMuon (arXiv:2510.05491), AdaMuon (arXiv:2507.11005v3) and NAMO (arXiv:2602.17080), Algorithm 1 of each, in fp64.

M = b1 M + (1 - b1) G  (AdaMuon: M = b M + G);   O = U V^T of M (AdaMuon: of sign M);   and after W -= lr wd W

NorMuon    v_i = b2 v_i + (1 - b2) mean_j O_ij^2;  H_ij = O_ij / (sqrt v_i + eps);  W -= .2 lr sqrt(mn) / |H| H
AdaMuon    V = b V + (1 - b) O o O;                H = O / (sqrt V + eps);          W -= .2 lr sqrt(mn) / |H| H
NAMO       v = b2 v + (1 - b2) |G|^2;              a = sqrt(1 - b2^t) / (1 - b1^t) |M| / (sqrt v + eps);  W -= lr a O
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steepest import NAMO, SOAP, AdaMuon, MuAdam, MuAdamSANIA, Muon, NorMuon, Shampoo
from support.references import gaussian, polar_by_svd, trajectory, unequal_gradients

SHAPES = ((7, 5), (5, 7), (6, 6), (1, 4), (4, 1))
STEPS = 20
LR, DECAY = 0.02, 0.1
Rule = Callable[[Tensor, Sequence[Tensor]], Iterator[Tensor]]
both_backends = pytest.mark.parametrize("backend", ["auto", "torch"])


def normuon(w: Tensor, gradients: Sequence[Tensor]) -> Iterator[Tensor]:
    """Algorithm 1 of arXiv:2510.05491, with beta1 = beta2 = .95 and eps = 1e-8."""
    m, v = torch.zeros_like(w), torch.zeros(w.shape[0], 1, dtype=w.dtype)
    for g in gradients:
        m = 0.95 * m + 0.05 * g
        o = polar_by_svd(m)
        for i in range(len(v)):
            v[i] = 0.95 * v[i] + 0.05 * sum(float(x) ** 2 for x in o[i]) / o.shape[1]
        hat = o / (v**0.5 + 1e-8)
        eta = 0.2 * LR * (hat.numel() ** 0.5) / float((hat * hat).sum()) ** 0.5
        w = w - LR * DECAY * w - eta * hat
        yield w


def adamuon(w: Tensor, gradients: Sequence[Tensor]) -> Iterator[Tensor]:
    """Algorithm 1 of arXiv:2507.11005v3, with beta = .95 and eps = 1e-8."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for g in gradients:
        m = 0.95 * m + g
        o = polar_by_svd(torch.sign(m))
        v = 0.95 * v + 0.05 * o**2
        hat = o / (v**0.5 + 1e-8)
        gamma = 0.2 * (hat.numel() ** 0.5) / float((hat * hat).sum()) ** 0.5
        w = w - LR * (gamma * hat + DECAY * w)
        yield w


def namo(w: Tensor, gradients: Sequence[Tensor]) -> Iterator[Tensor]:
    """Algorithm 1 of arXiv:2602.17080 with mu1 = .95, mu2 = .99 and eps = 1e-8, but for a decay without alpha."""
    m, v = torch.zeros_like(w), 0.0
    for t, g in enumerate(gradients, 1):
        m = 0.95 * m + 0.05 * g
        v = 0.99 * v + 0.01 * float((g * g).sum())
        alpha = (1 - 0.99**t) ** 0.5 / (1 - 0.95**t) * float((m * m).sum()) ** 0.5 / (v**0.5 + 1e-8)
        w = w - LR * alpha * polar_by_svd(m) - LR * DECAY * w
        yield w


RULES: dict[type[Optimizer], Rule] = {NorMuon: normuon, AdaMuon: adamuon, NAMO: namo}
every_rule = pytest.mark.parametrize("cls", RULES, ids=lambda cls: cls.__name__)


def made(cls: type[Optimizer], shape: Sequence[int], **options: object) -> tuple[Optimizer, nn.Parameter]:
    w = nn.Parameter(gaussian(*shape, seed=0))
    group = [{"params": [w], "use_muon": True}]
    return cls(group, **{"lr": LR, "weight_decay": DECAY, "polar": "svd", **options}), w


@both_backends
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_rule
def test_the_papers_algorithm(cls: type[Optimizer], shape: tuple[int, int], backend: str) -> None:
    optimizer, w = made(cls, shape, backend=backend)
    start, of = w.detach().clone(), unequal_gradients(STEPS, shape)
    for now, wanted in zip(trajectory(optimizer, w, of), RULES[cls](start, of), strict=True):
        assert float((now - wanted).norm() / (wanted - start).norm()) < 1e-10


@every_rule
def test_every_matrix_of_a_weight_has_statistics_of_its_own(cls: type[Optimizer]) -> None:
    """Heads, splits and experts step as weights of their own do."""
    layouts: dict[tuple[int, ...], dict[str, object]] = {
        (6, 5): {"num_heads": 2},
        (9, 4): {"split_sizes": (4, 3, 2)},
        (3, 4, 5): {"batch_dims": 1},
    }
    cuts = {(6, 5): (3, 3), (9, 4): (4, 3, 2), (3, 4, 5): (4, 4, 4)}
    for shape, how in layouts.items():
        w = nn.Parameter(gaussian(*shape, seed=0))
        of = unequal_gradients(STEPS, shape)
        optimizer = cls([{"params": [w], "use_muon": True, **how}], lr=LR, weight_decay=DECAY, polar="svd")
        parts = w.detach().clone().reshape(-1, shape[-1]).split(cuts[shape])
        trajectory(optimizer, w, of)
        for i, (part, now) in enumerate(zip(parts, w.detach().reshape(-1, shape[-1]).split(cuts[shape]), strict=True)):
            *_, wanted = RULES[cls](part, [g.reshape(-1, shape[-1]).split(cuts[shape])[i] for g in of])
            assert float((now - wanted).norm() / (wanted - part).norm()) < 1e-10


def test_normuon_of_rows_that_are_of_one_size_is_muon() -> None:
    """An orthogonal factor with no more rows than columns has rows of length 1."""
    of = unequal_gradients(STEPS, (4, 9))
    optimizer, w = made(NorMuon, (4, 9))
    muon, other = made(Muon, (4, 9), nesterov=False, adjust_lr_fn="match_rms_adamw")
    for a, b in zip(trajectory(optimizer, w, of), trajectory(muon, other, of), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_namo_of_one_gradient_for_ever_is_muon() -> None:
    of = [gaussian(5, 4, seed=3)] * 6
    optimizer, w = made(NAMO, (5, 4))
    muon, other = made(Muon, (5, 4), nesterov=False, adjust_lr_fn="none")
    for a, b in zip(trajectory(optimizer, w, of), trajectory(muon, other, of), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_namo_steps_less_in_noise() -> None:
    """||m|| / sqrt(v) of independent gradients tends to ((1 - b) / (1 + b))^1/2 = .16."""
    w = nn.Parameter(torch.zeros(20, 20, dtype=torch.float64))
    optimizer = NAMO([{"params": [w], "use_muon": True}], lr=1.0, weight_decay=0.0, polar="svd")
    for step in range(300):
        before = w.detach().clone()
        w.grad = gaussian(20, 20, seed=step)
        optimizer.step()
    moved = float(torch.linalg.matrix_norm(w.detach() - before, 2))
    assert moved == pytest.approx((0.05 / 1.95) ** 0.5, rel=0.1)


# ---- the same after other methods ----------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("after", ["rows", "elements"])
@pytest.mark.parametrize("cls", [MuAdam, MuAdamSANIA, SOAP, Shampoo], ids=lambda cls: cls.__name__)
def test_an_update_is_normalized_after_any_method(cls: type[Optimizer], after: str, backend: str) -> None:
    """The plain method's update goes through the rule of rows or entries and keeps its length.

    Both see the same gradients, so that their metrics are the same; with lr = 1 and no decay a step is the update.
    """
    options = {"lr": 1.0, "weight_decay": 0.0, "betas": (0.9, 0.95), "adjust_lr_fn": "none", "backend": backend}
    of = unequal_gradients(STEPS, (6, 4))
    plain, w = made(cls, (6, 4), **options)
    optimizer, x = made(cls, (6, 4), after=after, **options)
    was, is_now = [w.detach().clone()], [x.detach().clone()]
    was += trajectory(plain, w, of)
    is_now += trajectory(optimizer, x, of)
    v = torch.zeros(6, 1 if after == "rows" else 4, dtype=torch.float64)
    for t in range(STEPS):
        u = was[t] - was[t + 1]
        v = 0.95 * v + 0.05 * ((u * u).mean(1, keepdim=True) if after == "rows" else u * u)
        hat = u / (v.sqrt() + 1e-8)
        wanted = hat * (u.norm() / hat.norm()) if u.norm() > 0 else u
        torch.testing.assert_close(is_now[t] - is_now[t + 1], wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("cls", [MuAdam, SOAP], ids=lambda cls: cls.__name__)
def test_what_updates_are_normalized_over_is_named(cls: type[Optimizer]) -> None:
    with pytest.raises(ValueError, match="after 'columns' is not known; use 'rows'"):
        made(cls, (4, 3), after="columns")


def test_a_momentum_that_is_corrected_is_below_one() -> None:
    with pytest.raises(ValueError, match=r"momentum should be in \[0, 1\) but is: 1.0"):
        made(NAMO, (4, 3), momentum=1.0)


def test_adamw_groups_take_the_learning_rate_that_fits_them() -> None:
    """Updates of NorMuon and AdaMuon have AdamW's size, unless another ratio is asked for; NAMO's have not."""
    matrix, vector = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3))
    groups = [{"params": [matrix], "use_muon": True}, {"params": [vector], "use_muon": False}]
    for cls, options, lr in (
        (NorMuon, {}, 2e-3),
        (AdaMuon, {}, 2e-3),
        (NorMuon, {"adjust_lr_fn": "original"}, 3e-4),
        (NorMuon, {"adamw_lr": 1e-4}, 1e-4),
        (NAMO, {}, 3e-4),
    ):
        assert cls([dict(group) for group in groups], lr=2e-3, **options).param_groups[1]["lr"] == lr


def test_an_update_too_large_to_be_squared_leaves_the_state_finite() -> None:
    """Of MuAdam-SANIA without eps, one over the gradient's size; later steps go on as if it had not been."""
    w = nn.Parameter(torch.ones(4, 3))
    optimizer = MuAdamSANIA([w], lr=1e-2, eps=0.0, after="rows")
    for size in (1e-20, 1.0, 1.0):
        before = w.detach().clone()
        w.grad = size * gaussian(4, 3, seed=1).float()
        optimizer.step()
        assert w.isfinite().all()
        assert optimizer.state[w]["update_exp_avg_sq"].isfinite().all()
    assert not torch.equal(w.detach(), before)


@pytest.mark.parametrize("value", [1.0, -0.1])
def test_a_decay_rate_is_below_one(value: float) -> None:
    with pytest.raises(ValueError, match=r"beta2 should be in \[0, 1\) but is"):
        made(NorMuon, (4, 3), beta2=value)
