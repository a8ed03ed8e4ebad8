"""The methods with bases on gradients that are not what one would like, and what they refuse.

Rank-deficient, vanishing, far too large or too small, not finite: nothing leaps, nothing is poisoned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import steepest
from steepest.recipe import CLOCK
from steepest.zoo.kronecker import KroneckerOptimizer
from support.problems import gap, gaussian
from support.training import KRONECKER

Maker = type[KroneckerOptimizer]
every_class = pytest.mark.parametrize("cls", KRONECKER)


def path(cls: Maker, grads: Iterator[Tensor], dtype: torch.dtype = torch.float32, **options: Any) -> list[Tensor]:
    """The weights after every step, from zero."""
    first = next(grads)
    p, seen = torch.nn.Parameter(torch.zeros_like(first, dtype=dtype)), []
    optimizer = cls([p], **{"lr": 0.01, "precondition_frequency": 3, **options})
    for g in (first, *grads):
        p.grad = g.to(dtype)
        optimizer.step()
        seen.append(p.detach().clone())
    return seen


def lengths_of(seen: list[Tensor]) -> list[float]:
    return [float((b - a).norm()) for a, b in zip(seen, seen[1:])]


# The scale of its values is learned, slowly from 0.1: in that time a step is as long as its gradient.
UNSCALED = {cls: cls is not steepest.KLShampoo for cls in KRONECKER}


@every_class
@pytest.mark.parametrize(("rank", "shape"), [(0, (12, 8)), (1, (12, 8)), (1, (8, 12)), (2, (8, 12))], ids=str)
def test_gradients_of_low_rank(cls: Maker, rank: int, shape: tuple[int, int]) -> None:
    grads = (gaussian(shape[0], rank, seed=k) @ gaussian(rank, shape[1], seed=50 + k) for k in range(20))
    seen = path(cls, grads)
    assert all(w.isfinite().all() for w in seen)
    assert seen[-1].abs().max() < 1
    assert bool(seen[-1].any()) == (rank > 0)


@every_class
def test_gradients_that_vanish_for_a_while(cls: Maker) -> None:
    """Zero from the start, and later for longer than any average remembers."""
    live = (0, 1, 2, 45, 46, 47)
    for first in (0, 5):
        grads = (gaussian(8, 6, seed=k) * (k - first in live) for k in range(first + 60))
        seen = path(cls, grads, betas=(0.5, 0.5))
        assert all(w.isfinite().all() for w in seen)
        assert not any(w.any() for w in seen[:first])
        assert seen[-1].any()
        assert seen[-1].abs().max() < (1 if UNSCALED[cls] else 10)


@every_class
def test_a_spike(cls: Maker) -> None:
    """A gradient a thousand times too large makes steps that are finite and, but for KL-Shampoo's, of usual length."""
    grads = (gaussian(8, 6, seed=k) * (1000.0 if k == 20 else 1.0) for k in range(60))
    seen = path(cls, grads)
    assert all(w.isfinite().all() for w in seen)
    lengths = lengths_of(seen)
    assert all(length < 10 * max(lengths[:15]) for length in lengths if UNSCALED[cls])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"parity": "authors"}, {"inverse_root": "newton"}], ids=str)
def test_a_spike_goes_straight_into_kl_shampoos_step_unless_that_is_bounded(options: dict[str, Any]) -> None:
    """Its rule whitens by values from before: about s sqrt(1 - beta1^2) times the usual step, 436 here."""
    ratios = {}
    for most in (None, 1.0):
        grads = (gaussian(8, 6, seed=k) * (1000.0 if k == 300 else 1.0) for k in range(320))
        lengths = lengths_of(path(steepest.KLShampoo, grads, torch.float64, max_update_rms=most, **options))
        ratios[most] = max(lengths[299:]) / max(lengths[200:299])
        assert lengths.index(max(lengths[200:])) == 299
    assert 200 < ratios[None] < 700
    assert ratios[1.0] < 5
    with pytest.raises(ValueError, match="max_update_rms should be > 0 or None but is: 0.0"):
        steepest.KLShampoo([torch.nn.Parameter(torch.zeros(3, 2))], max_update_rms=0.0)


@pytest.mark.parametrize("cls", [steepest.SOAP, steepest.KLSOAP])
def test_after_a_spike_the_second_moment_is_that_of_the_new_bases(cls: Maker) -> None:
    """Left in its slots it made steps of up to thirty times the usual length for tens of steps."""
    for seed in range(12):
        grads = (gaussian(8, 6, seed=100 * seed + k) * (1000.0 if k == 20 else 1.0) for k in range(30))
        lengths = lengths_of(path(cls, grads))
        assert max(lengths[20:]) < max(lengths[:15])


@every_class
@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e15])
def test_the_scale_of_the_gradients(cls: Maker, scale: float) -> None:
    seen = path(cls, (scale * gaussian(8, 6, seed=k) for k in range(20)))
    assert all(w.isfinite().all() for w in seen)
    if UNSCALED[cls]:
        assert seen[-1].abs().max() < 1
    assert scale < 1 or seen[-1].any()


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (steepest.SOAP, {"eps": 0.0}),
        (steepest.SOAP, {"eps": 0.0, "parity": "authors"}),
        (steepest.KLSOAP, {"eps": 0.0}),
        (steepest.Shampoo, {"eps": 0.0}),
        (steepest.SPlus, {}),
    ],
)
@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_a_scale_of_all_gradients_changes_nothing(cls: Maker, options: dict[str, Any], scale: float) -> None:
    """But KL's values, and through them its bases, which do not begin at the gradients' scale."""
    both = ((c * gaussian(6, 6, seed=k) for k in range(20)) for c in (1.0, scale))
    paths = [path(cls, grads, torch.float64, **options) for grads in both]
    found = gap(paths[1][-1], paths[0][-1])
    assert (found < 1e-9) == (cls is not steepest.KLSOAP)


@every_class
@pytest.mark.parametrize(("at", "bad"), [(1, float("nan")), (4, float("inf"))], ids=["between", "at a refresh"])
def test_a_gradient_that_is_not_finite_is_isolated(cls: Maker, bad: float, at: int) -> None:
    """Bit for bit, but for the clock; the others, refreshed together with it, as if nothing had been."""
    shapes = [(8, 5), (8, 5), (5, 8), (8, 8), (3,)]
    worlds = []
    for spoiled in (False, True):
        params = [torch.nn.Parameter(gaussian(*shape, seed=i).float()) for i, shape in enumerate(shapes)]
        groups = [{"params": params[:4]}, {"params": params[4:], "use_muon": False}]
        optimizer = cls(groups, precondition_frequency=2)
        for step in range(6):
            for i, p in enumerate(params):
                p.grad = gaussian(*p.shape, seed=10 * step + i).float()
            if spoiled and step == at:
                params[1].grad.view(-1)[7] = bad
                weight = params[1].detach().clone()
                kept = {key: t.clone() for key, t in optimizer.state[params[1]].items()}
            optimizer.step()
            if spoiled and step == at:
                assert torch.equal(params[1], weight)
                for key, t in kept.items():
                    assert torch.equal(optimizer.state[params[1]][key], t + 1 if key == CLOCK else t), key
        worlds.append((params, optimizer))
    (clean, one), (params, other) = worlds
    for i in (0, 2, 3, 4):
        assert torch.equal(params[i], clean[i])
        assert all(torch.equal(t, other.state[params[i]][key]) for key, t in one.state[clean[i]].items())
    assert params[1].isfinite().all()
    assert int(other.skipped_updates()[torch.device("cpu")]) == 1


@every_class
@pytest.mark.parametrize("lost", [1, 2])
def test_the_first_gradients_may_not_be_finite(cls: Maker, lost: int) -> None:
    """Loss scaling begins like that. Nothing leaps, and once there has been a refresh it goes on."""
    grads = (gaussian(8, 6, seed=k) / (0.0 if k < lost else 1.0) for k in range(20))
    seen = path(cls, grads, precondition_frequency=4)
    assert not any(w.any() for w in seen[:lost])
    usual = max(lengths_of(path(cls, (gaussian(8, 6, seed=k) for k in range(20)))))
    lengths = lengths_of(seen)
    assert max(lengths) < 3 * usual
    assert all(length > 0 for length in lengths[5:])


@every_class
def test_state_is_fp32_for_bf16_parameters(cls: Maker) -> None:
    p = torch.nn.Parameter(gaussian(8, 6).bfloat16())
    optimizer = cls([p], precondition_frequency=2)
    for step in range(5):
        p.grad = gaussian(8, 6, seed=step).bfloat16()
        optimizer.step()
    other = {"momentum_buffer", "clock", "average_mass", "left_status", "right_status"}
    assert {t.dtype for key, t in optimizer.state[p].items() if key not in other} == {torch.float32}
    assert p.isfinite().all()


@every_class
def test_a_momentum_of_another_dtype(cls: Maker) -> None:
    found = []
    for dtype in (None, torch.float64):
        found.append(path(cls, (gaussian(8, 6, seed=k) for k in range(12)), momentum_dtype=dtype)[-1])
    assert gap(found[1], found[0]) < 1e-2


# ---- what cannot be -------------------------------------------------------------------------------------------------


@every_class
def test_a_graph_is_refused(cls: Maker) -> None:
    optimizer = cls([torch.nn.Parameter(gaussian(4, 3))])
    with pytest.raises(RuntimeError, match="group 0 cannot be captured in a CUDA graph: the host decides when"):
        optimizer.make_capturable()
    assert not optimizer.param_groups[0]["capturable"]


@pytest.mark.parametrize("cls", [steepest.SOAP, steepest.SPlus])
def test_a_step_in_one_compiled_graph_is_refused(cls: Maker) -> None:
    p = torch.nn.Parameter(gaussian(4, 3))
    p.grad = gaussian(4, 3)
    optimizer, start = cls([p]), p.detach().clone()
    torch._dynamo.reset()  # it passes over a frame that some earlier test could not compile
    with pytest.raises(Exception, match=f"{cls.__name__} cannot be traced by torch.compile: the host decides when"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    assert torch.equal(p, start)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (256, 256)])
def test_a_first_step_of_low_rank_is_the_polar_factor_in_fp32(shape: tuple[int, int], rank: int, scale: float) -> None:
    """Without a floor under its eigenvalues rounding errors would be divided by themselves, and be hundreds long."""
    m, n = shape
    g = gaussian(m, rank, seed=1) @ gaussian(rank, n, seed=2)
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = steepest.OneSidedShampoo([p], lr=1.0, weight_decay=0.0)
    p.grad = (scale * g).float()
    optimizer.step()
    u, _, vh = torch.linalg.svd(g)
    assert (p.detach().double() + u[:, :rank] @ vh[:rank]).norm() < 1e-3 * rank**0.5
