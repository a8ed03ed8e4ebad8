"""Momo's truncation: what it minimizes, and what the optimizer shell owes it. The paper's rule is in tests/papers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.parts import Spectral
from steepest.parts.product_norm import truncation
from steepest.zoo.momo import Momo
from steepest.zoo.product import MuonAdam, MuonMax, ProductNormDescent, ProductNormOptimizer
from support.problems import minibatches, mushrooms
from support.references import gap, gaussian
from support.regression import loss_of, start, trained
from support.training import all_same_bits, both_kinds, give_gradients

# ---- the truncation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "above, decrease, wanted",
    [(1.0, 4.0, 0.25), (4.0, 1.0, 1.0), (-1.0, 4.0, 0.0), (0.0, 4.0, 0.0), (math.inf, 4.0, 1.0), (1.0, 0.0, 1.0)],
)
def test_the_share_of_a_step(above: float, decrease: float, wanted: float) -> None:
    assert float(truncation(torch.tensor(above), torch.tensor(decrease))) == wanted


class MuonMomo(Momo, steepest.Muon):
    pass


class MuAdamMomo(Momo, steepest.MuAdam):
    pass


class SPlusMomo(Momo, steepest.SPlus):
    pass


FRESH = {"polar": "svd", "stale_dual": False}
#: method, its options, weights c of the gradients in the momentum that a step follows after t of them
METHODS: dict[str, tuple[Any, dict[str, Any], Callable[[int], list[float]]]] = {
    "Muon": (MuonMomo, FRESH, lambda t: nesterov(0.95, t)),
    "MuAdam": (MuAdamMomo, {**FRESH, "adamw_betas": (0.9, 0.95)}, lambda t: corrected(0.9, t)),
    "SPlus": (SPlusMomo, {"precondition_frequency": 3}, lambda t: average(0.9, t)),
    "MuonMax": (MuonMax, FRESH, lambda t: first(0.95, t)),
    "MuonAdam": (MuonAdam, FRESH, lambda t: first(0.95, t)),
}
#: AdamW beside them averages otherwise: matrices only.
ALONE = ("Muon", "SPlus")


def average(beta: float, t: int) -> list[float]:
    return [(1 - beta) * beta ** (t - 1 - j) for j in range(t)]


def corrected(beta: float, t: int) -> list[float]:
    return [c / (1 - beta**t) for c in average(beta, t)]


def first(beta: float, t: int) -> list[float]:
    return [beta ** (t - 1), *average(beta, t)[1:]]


def nesterov(beta: float, t: int) -> list[float]:
    return [beta * c + (1 - beta) * (j == t - 1) for j, c in enumerate(average(beta, t))]


@pytest.mark.parametrize("name", METHODS)
def test_a_truncated_step_ends_where_the_model_meets_the_bound(name: str) -> None:
    """The model sum_j c_j (loss_j + <G_j, X - W_j>), from all past tangents, is c lb at the new weights, c = sum c_j;
    where the step is whole the model stays above, and where it was below before nothing moves."""
    cls, options, weights_of = METHODS[name]
    kept = 3 if name in ALONE else 5
    free = [nn.Parameter(w) for w in start()[:kept]]
    fixed = start()[kept:]
    groups: list[dict[str, Any]] = [{"params": free[:3]}, {"params": free[3:], "use_muon": False}]
    lower_bound = 0.7
    lr = {"MuonMax": 0.002, "SPlus": 0.2}.get(name, 0.03)
    own = {} if isinstance(cls, type) and issubclass(cls, ProductNormOptimizer) else {"adamw_lr": 0.1}
    optimizer = cls(groups[: 1 if kept == 3 else 2], lr=lr, weight_decay=0.0, lower_bound=lower_bound, **own, **options)
    past: list[tuple[Tensor, list[Tensor], list[Tensor]]] = []
    counts = {"met": 0, "whole": 0, "still": 0}
    for step in range(30):
        optimizer.zero_grad()
        loss = loss_of([*free, *fixed], step)
        loss.backward()
        before = [p.detach().clone() for p in free]
        past.append((loss.detach(), before, [p.grad.clone() for p in free if p.grad is not None]))
        optimizer.step(loss=loss)
        c = weights_of(step + 1)

        def model(x: list[Tensor], c: list[float] = c) -> float:
            tangents = (f + sum((g * (a - b)).sum() for a, b, g in zip(x, w, gs)) for f, w, gs in past)
            return float(sum(weight * value for weight, value in zip(c, tangents)))

        bound, value = lower_bound * sum(c), model([p.detach() for p in free])
        if model(before) < bound:
            counts["still"] += 1
            assert all(torch.equal(p, w) for p, w in zip(free, before))
        elif abs(value - bound) < 1e-11:
            counts["met"] += 1
        else:
            counts["whole"] += 1
            assert value > bound
    assert counts["met"] > 2
    assert counts["whole"] > 2 or name == "MuonMax"


@pytest.mark.parametrize("scale", ["lmo", "dual"])
@pytest.mark.parametrize("product", ["max", "l2", "hybrid"])
def test_a_truncated_step_minimizes_the_truncated_model(product: str, scale: str) -> None:
    """max(f(X), lb) in the ball of radius lr, or max(f(X), lb) + psi(X - W)^2 / (2 lr): no random point does better."""
    lr, lower_bound, s = 0.3, 0.5, 4.0
    W, G = (
        [gaussian(4, 3, seed=1), gaussian(3, 3, seed=2), gaussian(4, seed=3)],
        [
            gaussian(4, 3, seed=4),
            gaussian(3, 3, seed=5),
            gaussian(4, seed=6),
        ],
    )

    def psi(x: list[Tensor]) -> Tensor:
        spectral = torch.stack([torch.linalg.matrix_norm(y, 2) for y in x[:2]])
        if product == "hybrid":
            return (spectral.max() ** 2 / s + x[2].norm() ** 2).sqrt()
        every = torch.cat([spectral, x[2].norm()[None]])
        return every.max() if product == "max" else every.norm()

    def value(x: list[Tensor], loss: float) -> Tensor:
        inside = (loss + sum((g * y).sum() for g, y in zip(G, x))).clamp(min=lower_bound)
        return inside if scale == "lmo" else inside + psi(x) ** 2 / (2 * lr)

    active = 0
    for loss in (0.6, 0.8, 40.0):
        params = [nn.Parameter(w.clone()) for w in W]
        rule: dict[str, Any] = {"product": product, "scale": scale, "others": "euclidean", "matrix_scale": s}
        optimizer = ProductNormDescent(
            [{"params": params[:2]}, {"params": params[2:], "use_muon": False}],
            lr=lr,
            weight_decay=0.0,
            lower_bound=lower_bound,
            polar="svd",
            **rule,
        )
        for p, g in zip(params, G):
            p.grad = g.clone()
        optimizer.step(loss=loss)
        best = [p.detach() - w for p, w in zip(params, W)]
        least = value(best, loss)
        active += bool(least < lower_bound + 1e-9) or scale == "dual"
        assert scale == "dual" or psi(best) <= lr * (1 + 1e-12)
        for trial in range(300):
            other = [gaussian(*w.shape, seed=10 * trial + i) for i, w in enumerate(W)]
            other = [b + 10.0 ** -(trial % 5) * lr * o for b, o in zip(best, other)]
            if scale == "lmo":
                other = [o * min(1.0, lr / float(psi(other))) for o in other]
            assert value(other, loss) >= least * (1 - 1e-12)
    assert active


@pytest.mark.parametrize("stale", [True, False])
@pytest.mark.parametrize("cls", [MuonMax, MuonAdam])
def test_far_from_the_bound_it_is_the_base_method(cls: Any, stale: bool) -> None:
    options: dict[str, Any] = {"lr": 0.01, "polar": "svd", "stale_dual": stale}
    plain = trained(lambda params: cls(params, **options))
    for lower_bound in (-1e12, -math.inf, torch.tensor(-1e12)):
        options["lower_bound"] = lower_bound
        momo = trained(lambda params: cls(params, **options))
        assert max(map(gap, momo, plain)) < 1e-14


@pytest.mark.parametrize(
    "name, base", [("Muon", steepest.Muon), ("MuAdam", steepest.MuAdam), ("SPlus", steepest.SPlus)]
)
def test_far_from_the_bound_any_method_is_itself(name: str, base: Any) -> None:
    cls, options = METHODS[name][0], {k: v for k, v in METHODS[name][1].items() if k != "stale_dual"}
    plain = [nn.Parameter(w) for w in start()]
    optimizer = base([{"params": plain[:3]}, {"params": plain[3:], "use_muon": False}], lr=0.01, **options)
    for step in range(20):
        optimizer.zero_grad()
        loss_of(plain, step).backward()
        optimizer.step()
    momo = trained(lambda params: cls(params, lr=0.01, lower_bound=-1e12, **options))
    assert max(gap(a, b.detach()) for a, b in zip(momo, plain)) < 1e-12


def test_below_the_bound_weights_only_decay() -> None:
    found = trained(lambda params: MuonMax(params, lr=0.1, weight_decay=0.2, lower_bound=1e6), steps=3)
    assert max(gap(w, 0.98**3 * before) for w, before in zip(found, start())) < 1e-13


def test_losses_that_are_not_finite_leave_the_averages_as_they_were() -> None:
    weights = [nn.Parameter(w) for w in start()]
    optimizer = MuonMax(
        [{"params": weights[:3]}, {"params": weights[3:], "use_muon": False}], lr=0.01, lower_bound=0.0, polar="svd"
    )
    average = None
    for step, poison in enumerate((math.nan, 0.0, math.inf, 0.0, 0.0)):
        optimizer.zero_grad()
        loss = loss_of(weights, step)
        loss.backward()
        optimizer.step(loss=loss.detach() + poison)
        held = optimizer.state[weights[0]].get("loss_average")
        assert held is not None
        assert held.isfinite().all()
        if poison:
            assert average is None or torch.equal(held, average)
        average = held.clone()
    assert all(w.isfinite().all() for w in weights)


def test_a_lower_bound_may_come_late() -> None:
    """What the averages missed is taken to have been a tangent at the weights of now: the model is the loss there."""
    runs, promised = [], 0.0
    for lower_bound in (None, 1.9):
        weights = [nn.Parameter(w) for w in start()]
        groups = [{"params": weights[:3]}, {"params": weights[3:], "use_muon": False}]
        optimizer = MuonMax(groups, lr=0.01, weight_decay=0.0, polar="svd", stale_dual=False)
        for step in range(4):
            before = [p.detach().clone() for p in weights]
            for i, p in enumerate(weights):
                p.grad = gaussian(*p.shape, seed=10 * step + i)
            optimizer.lower_bound = lower_bound if step == 3 else None
            optimizer.step(loss=2.0)
        runs.append([p.detach() - w for p, w in zip(weights, before)])
        buffers = [optimizer.state[p]["momentum_buffer"] for p in weights]
        promised = promised or -float(sum((m * d).sum() for m, d in zip(buffers, runs[0])))
    share = 0.1 / promised
    assert share < 1
    assert max(gap(b, share * a) for a, b in zip(*runs)) < 1e-10


def test_updates_that_do_not_follow_the_momentum_are_refused() -> None:
    class ShampooMomo(Momo, steepest.Shampoo):
        pass

    class Dion2Momo(Momo, steepest.Dion2):
        pass

    for cls in (ShampooMomo, Dion2Momo):
        message = f"{cls.__name__} couples steps along a direction of the momentum, and grafts"
        with pytest.raises(ValueError, match=message):
            cls([{"params": [nn.Parameter(torch.zeros(3, 2))], "use_muon": True}])


@pytest.mark.parametrize("stale", [True, False])
def test_a_step_makes_every_direction_once(stale: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    polars = Spectral._polars
    monkeypatch.setattr(
        Spectral, "_polars", lambda self, xs, *more: (calls.extend(map(len, xs)), polars(self, xs, *more))[1]
    )
    trained(lambda params: MuonMax(params, lr=0.01, lower_bound=0.0, stale_dual=stale), steps=4)
    assert len(calls) == 4 * 3


# ---- what it is for: a learning rate need not be known ---------------------------------------------------------------

LRS = (0.01, 0.1, 1.0)  # Muon's best is among them or beside the second


def fitted(
    loss_of: Callable[[nn.Module, int], Tensor], shapes: tuple[int, int, int], steps: int
) -> tuple[list[float], list[float]]:
    """Final losses of Muon (with AdamW at the same lr beside it) and of MuonMax-Momo on a two-layer network."""

    def final(make: Callable[[list[dict[str, Any]]], Any], momo: bool) -> float:
        torch.manual_seed(0)
        inputs, hidden, outputs = shapes
        model = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))
        matrices, vectors = ([p for p in model.parameters() if (p.ndim == 2) == yes] for yes in (True, False))
        optimizer = make([{"params": matrices}, {"params": vectors, "use_muon": False}])
        for step in range(steps):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            optimizer.step(loss=loss) if momo else optimizer.step()
        with torch.no_grad():
            return float(loss_of(model, -1))

    muon = [final(lambda g, lr=lr: steepest.Muon(g, lr=lr, weight_decay=0.0, adamw_lr=lr), False) for lr in LRS]
    momo = [final(lambda g, lr=lr: MuonMax(g, lr=lr, weight_decay=0.0, lower_bound=0.0), True) for lr in LRS]
    print("final losses of Muon and of MuonMax-Momo at", LRS, muon, momo)
    return muon, momo


def test_a_regression_does_not_care_for_the_learning_rate() -> None:
    mixing = gaussian(8, 12, seed=3, dtype=torch.float32)

    def loss(model: nn.Module, step: int) -> Tensor:
        x = gaussian(512 if step < 0 else 32, 12, seed=1000 + step, dtype=torch.float32)
        return (model(x) - torch.sin(x @ mixing.mT / 3)).square().mean()

    muon, momo = fitted(loss, (12, 24, 8), 100)
    assert max(momo) < 3 * min(momo)
    assert max(muon) > 10 * min(muon)
    assert max(momo) < 2 * min(muon)


@pytest.mark.slow
def test_mushrooms_do_not_care_for_the_learning_rate() -> None:
    x, labels = mushrooms()
    x = x.float()
    batches = list(minibatches(len(x), 64, 100))

    def loss(model: nn.Module, step: int) -> Tensor:
        chosen = batches[step] if step >= 0 else slice(None)
        return nn.functional.cross_entropy(model(x[chosen]), labels[chosen])

    muon, momo = fitted(loss, (112, 32, 2), 100)
    assert max(momo) < 3 * min(momo)
    assert max(muon) > 100 * min(muon)


def test_hooks_run_once_whatever_was_made_before() -> None:
    """torch puts hooks around the `step` of every class that has been made, that of a base too."""
    both_kinds(steepest.MuAdam)
    optimizer, params = both_kinds(MuAdamMomo, lower_bound=0.0)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    give_gradients(params, 0)
    optimizer.step(loss=1.0)
    assert seen == ["before", "after"]


@pytest.mark.parametrize("lower_bound", [None, 0.0])
def test_a_state_that_is_cleared_begins_anew(lower_bound: float | None) -> None:
    """Dual norms of the step before are in it."""
    (ours, params), (other, others) = (both_kinds(steepest.MuonMax, lower_bound=lower_bound) for _ in range(2))
    for step in range(2):
        give_gradients(params, step)
        ours.step(loss=1.0)
    for p, q in zip(params, others):
        q.data.copy_(p.data)
    ours.state.clear()
    for optimizer, of in ((ours, params), (other, others)):
        give_gradients(of, 2)
        optimizer.step(loss=1.0)
    assert all_same_bits(params, others)


# ---- a layer whose weights are gone ----


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "make",
    [
        lambda params: MuAdamMomo(params, lr=0.02, lower_bound=0.0),
        lambda params: MuonMax(params, lr=0.02, lower_bound=0.0, backend="torch"),
        lambda params: steepest.ProdigyMuon(params, initial_step=0.1),
    ],
    ids=["Momo", "MuonMax", "Prodigy"],
)
def test_weights_that_are_not_finite_leave_the_other_layers_alone(make: Any, value: float) -> None:
    """As a layer without a gradient does: it is left out of the model, and its step is counted."""
    runs = []
    for spoilt in (True, False):
        params = [nn.Parameter(gaussian(5, 4, seed=i).float()) for i in range(3)]
        optimizer = make(params)
        for step in range(5):
            give_gradients(params, step)
            if step == 1 and spoilt:
                with torch.no_grad():
                    params[1][2, 3] = value
            if step >= 1 and not spoilt:
                params[1].grad = None
            optimizer.step(loss=1.0)
        runs.append((optimizer, params))
    (optimizer, params), (_, others) = runs
    assert all_same_bits(params[::2], others[::2])
    assert sum(optimizer.skipped_updates().values()) == 4
    assert all(t.isfinite().all() for state in optimizer.state.values() for t in state.values())


def test_a_product_with_the_weights_that_is_beyond_fp32_is_not_stored() -> None:
    """Both are finite; <W, G> is not."""
    params = [nn.Parameter(torch.full((4, 3), size)) for size in (1.0, 1e25)]
    optimizer = MuonMomo(params, lr=0.02, lower_bound=0.0)
    for scale in (1.0, 1e20, 1.0):
        for p in params:
            p.grad = torch.linspace(-1, 2, 12).view(4, 3) * scale
        optimizer.step(loss=1.0)
    assert sum(optimizer.skipped_updates().values()) == 1
    assert all(p.isfinite().all() for p in params)
    assert all(t.isfinite().all() for state in optimizer.state.values() for t in state.values())
