"""Inverse roots by Newton iteration against matrix functions and the form in eigenbases, and where it is hard."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import steepest
from steepest.linalg.roots import spectral_bound
from steepest.parts import Diagonal, Frobenius, Graft, Hyper, Momentum, Roots, Rotated, Sides
from steepest.parts.precondition import State, roots
from steepest.recipe import CLOCK, Recipe, step_one
from support.problems import gap, gaussian
from support.training import all_same_bits, both_kinds, same_states, state_copies, train

HYPER = Hyper(0.1, beta1=0.9, beta2=0.9, eps=0.0)
SHAPES = [(2, 5, 4), (1, 4, 6), (3, 4, 4)]
OPTIONS: dict[str, dict[str, Any]] = {"whole": {}, "blocks": {"blocks": True, "max_dim": 3}, "short": {"max_dim": 4}}
CLASSES = {
    "shampoo": partial(steepest.Shampoo, inverse_root="newton"),
    "shampoo, no graft": partial(steepest.Shampoo, inverse_root="newton", graft=None),
    "one-sided": partial(steepest.OneSidedShampoo, inverse_root="newton"),
    "kl-shampoo": partial(steepest.KLShampoo, inverse_root="newton"),
}
every_class = pytest.mark.parametrize("name", CLASSES)


def gradients(steps: int, *shape: int, seed: int = 0) -> Iterator[Tensor]:
    """Noise whose rows and columns have scales of their own."""
    rows, cols = (torch.logspace(0, -1, n, dtype=torch.float64) for n in shape[-2:])
    left, right = (torch.linalg.qr(gaussian(n, n, seed=seed + 7 + n)).Q for n in shape[-2:])
    for step in range(steps):
        yield left @ (rows[:, None] * gaussian(*shape, seed=1000 * seed + step) * cols) @ right


def learned(part: Roots, shape: tuple[int, int, int], steps: int = 6) -> State:
    """After a few gradients, refreshed after the first, the third and the last."""
    state = part.init(torch.zeros(shape, dtype=torch.float64))
    for step in range(steps):
        state |= part.update_factors(state, gaussian(*shape, seed=step), HYPER)
        if step in (0, 2, steps - 1):
            state |= refreshed(part, state)
    return state


def refreshed(part: Roots, state: State) -> State:
    return part.commit({**state, **part.refresh(part.gather([state]), [state])[0]})


def power(factor: Tensor, exponent: float, ridge: float = 1e-6) -> Tensor:
    """(factor + ridge c)^exponent with c the bound on the largest eigenvalue."""
    values, q = torch.linalg.eigh(factor)
    added = values.clamp(min=0) + ridge * spectral_bound(factor)[..., None]
    return q @ torch.diag_embed(added**exponent) @ q.mT


# ---- the part -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("own", [{}, {"scale": "refresh"}, {"exponent": 0.5, "coupling": True}], ids=str)
def test_into_and_back_are_adjoint(shape: tuple[int, int, int], own: dict[str, Any], options: dict[str, Any]) -> None:
    part = Roots(**own, **options)
    state, x = learned(part, shape), gaussian(*shape, seed=20)
    y = part.into(state, x, HYPER, None)
    assert y.shape == part.input_shape(shape)
    d = gaussian(*y.shape, seed=21)
    u = part.unblock(part.back(state, d, HYPER, None), *shape[1:])
    assert gap((y * d).sum(), (x * u).sum()) < 1e-11


@pytest.mark.parametrize("scale", ["present", "refresh"])
@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_a_power_of_the_factors(shape: tuple[int, int, int], exponent: float, scale: Any) -> None:
    """back(into(x)) = (L + r I)^-e x (R + r I)^-e right after a refresh."""
    part = Roots(exponent=exponent, scale=scale)
    state, x = learned(part, shape), gaussian(*shape, seed=20)
    found = part.back(state, part.into(state, x, HYPER, None), HYPER, None)
    wanted = power(state["left"], -exponent) @ x @ power(state["right"], -exponent)
    assert gap(found, wanted) < 1e-9


def test_between_refreshes_the_scale_is_the_mean_of_what_is_whitened() -> None:
    part, shape = Roots(exponent=0.5, side="smaller"), (2, 4, 6)
    state, x = learned(part, shape), gaussian(2, 4, 6, seed=20)
    old = state["left"]
    state |= part.update_factors(state, 30 * gaussian(2, 4, 6, seed=40), HYPER)
    inverse = power(old, -1.0)
    s = [float((inverse[i] @ state["left"][i]).trace() / (inverse[i] @ old[i]).trace()) for i in range(2)]
    assert min(s) > 10
    wanted = power(old, -0.5) @ x / torch.tensor(s, dtype=torch.float64).sqrt()[:, None, None]
    assert gap(part.back(state, part.into(state, x, HYPER, None), HYPER, None), wanted) < 1e-9


@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_gradient_in_its_factor_is_never_long(rank: int, length: float) -> None:
    """||L^(-1/2) g||^2 <= n / w, w its weight in L, though the root may never have seen it."""
    part, hyper = Roots(exponent=0.5, side="smaller", beta=0.9), HYPER
    state = part.init(torch.zeros(1, 4, 6, dtype=torch.float64))
    state |= part.update_factors(state, gaussian(1, 4, 1) @ gaussian(1, 1, 6), hyper)
    state |= refreshed(part, state)
    for step in range(1, 4):
        g = length * gaussian(1, 4, rank, seed=step) @ gaussian(1, rank, 6, seed=9)
        state |= part.update_factors(state, g, hyper)
        weight = 0.1 / (1 - 0.9 ** (step + 1))
        u = part.back(state, part.into(state, g, hyper, None), hyper, None)
        assert u.norm() < (4 / weight) ** 0.5 * (1 + 1e-9)


def test_a_root_that_cannot_be_trusted_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    part = Roots(exponent=0.5)
    state = learned(part, (3, 5, 4))
    kept = {key: t.clone() for key, t in state.items()}
    state |= part.update_factors(state, gaussian(3, 5, 4, seed=9), HYPER)
    solve = roots.inverse_root

    def doubtful(A: Tensor, p: int, **how: Any) -> tuple[Tensor, Tensor]:
        root, residual = solve(A, p, **how)
        bad = torch.tensor([False, True, False])
        return torch.where(bad[:, None, None], torch.nan, root), torch.where(bad, 0.2, residual)

    monkeypatch.setattr(roots, "inverse_root", doubtful)
    found = part.refresh(part.gather([state]), [state])[0]
    state |= part.commit({**state, **found}) | {key: found[key] for key in roots.RESIDUALS}
    for side in ("left", "right"):
        for key in (f"{side}_root", f"{side}_inverse"):
            assert torch.equal(state[key][1], kept[key][1])
            assert not torch.equal(state[key][0], kept[key][0])
        assert (state[f"{side}_residual"] > 0.1).tolist() == [False, True, False]


def test_where_nothing_was_learned_there_is_no_step() -> None:
    for own in ({}, {"exponent": 0.5, "coupling": True}):
        part = Roots(**own)
        state, x = part.init(gaussian(2, 5, 4)), gaussian(2, 5, 4)
        assert not part.into(state, x, HYPER, None).any()
        state |= part.update_factors(state, torch.stack([x[0], torch.zeros(5, 4)]), HYPER)
        state |= refreshed(part, state)
        found = part.into(state, x, HYPER, None)
        assert found[0].any()
        assert not found[1].any()


# ---- the form in eigenbases -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exponent", "side", "shape"),
    [(0.25, "both", (2, 6, 6)), (0.5, "both", (1, 7, 7)), (0.5, "smaller", (2, 8, 5)), (1.0, "both", (1, 6, 6))],
)
def test_it_is_the_form_in_eigenbases(exponent: float, side: Any, shape: tuple[int, ...]) -> None:
    """50 steps in fp64 with a ridge of 1e-12: residuals are below 1e-7, and they bound the difference.

    Of full rank from the first gradient on: in a null space it is the ridge that decides, and the two have their own.
    """
    shared = {"beta": 0.95, "side": side, "every": 7, "update_first": True}
    by_basis = Rotated(Sides(exponent, "refresh", ridge=1e-12), method="eigh", **shared)
    by_roots = Roots(exponent=exponent, ridge=1e-12, scale="refresh", **shared)
    recipe = Recipe(Momentum(), by_basis, Frobenius(), scale="dual", transforms=(Graft(Diagonal(key="graft")),))
    ours, theirs = replace(recipe, precondition=by_roots), recipe
    w = [gaussian(*shape, seed=9)] * 2
    states, hyper, worst = [ours.init(w[0]), theirs.init(w[0])], replace(HYPER, lr=0.02, weight_decay=0.1), 0.0
    for g in gradients(50, *shape):
        for i, each in enumerate((ours, theirs)):
            w[i], states[i] = step_one(each, w[i], g, states[i], hyper)
        worst = max(worst, *(float(states[0][key].max()) for key in roots.RESIDUALS if states[0][key].numel()))
    assert 0 < worst < 1e-7
    assert gap(w[0], w[1]) < 1e-10 + worst


# ---- published rules ------------------------------------------------------------------------------------------------

SIZES = pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)], ids=str)
STEPS, EVERY = 50, 7


@SIZES
@pytest.mark.parametrize("beta", [1.0, 0.97])
def test_shampoo_is_the_published_rule(shape: tuple[int, int], beta: float) -> None:
    """L^-1/4 m R^-1/4 with roots of every EVERY steps."""
    w, lr, wd, b1, b2, eps = gaussian(*shape, seed=9), 0.02, 0.1, 0.9, 0.99, 1e-12
    p, m, v = torch.nn.Parameter(w.clone()), torch.zeros_like(w), torch.zeros_like(w)
    options: dict[str, Any] = {"shampoo_beta": beta, "betas": (b1, b2), "parity": "authors", "inverse_root": "newton"}
    optimizer = steepest.Shampoo([p], lr=lr, weight_decay=wd, precondition_frequency=EVERY, **options)
    factors, made = [w.new_zeros(n, n) for n in shape], [w.new_zeros(n, n) for n in shape]
    for t, g in enumerate(gradients(STEPS, *shape), 1):
        p.grad = g
        optimizer.step()
        for i, x in enumerate((g @ g.mT, g.mT @ g)):
            factors[i] = factors[i] + x if beta == 1 else beta * factors[i] + (1 - beta) * x
        if t == 1 or t % EVERY == 0:
            made = [power(factor / (1 if beta == 1 else 1 - beta**t), -0.25) for factor in factors]
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        u = made[0] @ m @ made[1] / (1 - b1**t)
        adam = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps)
        w = (1 - lr * wd) * w - lr * u * adam.norm() / u.norm()
    assert gap(p.detach(), w) < 1e-8


@SIZES
def test_kl_shampoo_is_the_published_rule(shape: tuple[int, int]) -> None:
    """Both factors from rms(g) I; metrics of the last refresh, their scale that of the factors as they are."""
    w, lr, wd, b1, b2 = gaussian(*shape, seed=9), 0.02, 0.1, 0.9, 0.95
    p, m = torch.nn.Parameter(w.clone()), torch.zeros_like(w)
    options: dict[str, Any] = {"betas": (b1, b2), "precondition_frequency": EVERY, "inverse_root": "newton"}
    optimizer = steepest.KLShampoo([p], lr=lr, weight_decay=wd, **options)
    (rows, cols), factors, made = shape, [], []

    def metrics(exponent: float) -> list[Tensor]:
        inverses = [power(old, -1.0) for old in made]
        scales = [(h @ new).trace() / (h @ old).trace() for h, new, old in zip(inverses, factors, made)]
        return [power(old, exponent) * s**exponent for old, s in zip(made, scales)]

    for t, g in enumerate(gradients(STEPS, *shape), 1):
        p.grad = g
        optimizer.step()
        if t == 1:
            size = g.square().mean().sqrt()
            factors = made = [size * torch.eye(n, dtype=torch.float64) for n in shape]
        m = b1 * m + (1 - b1) * g
        left, right = metrics(-0.5)
        w = (1 - lr * wd) * w - lr * left @ m @ right
        if t > 1:
            left, right = metrics(-1.0)
            terms = g @ right @ g.mT / cols, g.mT @ left @ g / rows
            factors = [b2 * factor + (1 - b2) * term for factor, term in zip(factors, terms)]
        if t % EVERY == 0:
            made = list(factors)
    assert gap(p.detach(), w) < 1e-8


# ---- hard gradients, in fp32 ----------------------------------------------------------------------------------------


def path(name: str, grads: Iterator[Tensor], dtype: torch.dtype = torch.float32, **options: Any) -> list[Tensor]:
    """The weights before and after every step, from zero."""
    first = next(grads)
    p = torch.nn.Parameter(torch.zeros_like(first, dtype=dtype))
    seen, optimizer = [p.detach().clone()], CLASSES[name]([p], lr=0.01, precondition_frequency=5, **options)
    for g in (first, *grads):
        p.grad = g.to(dtype)
        optimizer.step()
        seen.append(p.detach().clone())
        state = optimizer.state[p]
        if all(state[key].amax() > 1e-30 for key in ("left", "right") if state[key].numel() and g.any()):
            assert all((state[key] <= roots.TRUSTED).all() for key in roots.RESIDUALS)
    return seen


def lengths_of(seen: list[Tensor]) -> list[float]:
    return [float((b - a).norm()) for a, b in zip(seen, seen[1:])]


@every_class
@pytest.mark.parametrize(("rank", "shape"), [(0, (12, 8)), (1, (12, 8)), (1, (8, 12)), (2, (8, 12))], ids=str)
def test_gradients_of_low_rank(name: str, rank: int, shape: tuple[int, int]) -> None:
    """New directions every time, of which the root between refreshes knows nothing."""
    grads = (gaussian(shape[0], rank, seed=k) @ gaussian(rank, shape[1], seed=50 + k) for k in range(20))
    lengths = lengths_of(path(name, grads))
    assert max(lengths) < 4 * lengths[0] if rank else max(lengths) == 0


@every_class
def test_condition_1e8(name: str) -> None:
    """Singular values of the gradients over four decades."""
    q, scale = torch.linalg.qr(gaussian(24, 24, seed=1)).Q, torch.logspace(0, -4, 24, dtype=torch.float64)
    lengths = lengths_of(path(name, (q @ (scale[:, None] * gaussian(24, 24, seed=k)) for k in range(30))))
    assert max(lengths) < 4 * lengths[0]


@every_class
def test_a_spike(name: str) -> None:
    """Of usual length where a gradient is in its factor before its step; of KL-Shampoo finite."""
    grads = (gaussian(8, 6, seed=k) * (1000.0 if k == 22 else 1.0) for k in range(60))
    seen = path(name, grads)
    lengths = lengths_of(seen)
    assert all(w.isfinite().all() for w in seen)
    assert name == "kl-shampoo" or max(lengths[22:]) < 2 * max(lengths[:20])


@every_class
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
def test_the_scale_of_the_gradients(name: str, scale: float) -> None:
    """No eps in the roots: nothing changes but the length of ungrafted sums."""
    both = ((c * gaussian(6, 6, seed=k) for k in range(20)) for c in (1.0, scale))
    options = {"eps": 0.0} if name == "shampoo" else {}
    one, other = (path(name, grads, torch.float64, weight_decay=0.0, **options)[-1] for grads in both)
    assert gap(other, one) < 1e-9


@every_class
@pytest.mark.parametrize("scale", [1e-20, 1e-15, 1e-12, 1e15])
def test_very_small_and_very_large_gradients(name: str, scale: float) -> None:
    """In fp32, where the square of the smallest is 0."""
    seen = path(name, (scale * gaussian(8, 6, seed=k) for k in range(20)))
    assert all(w.isfinite().all() for w in seen)
    assert max(lengths_of(seen)) < 1
    assert scale == 1e-20 or seen[-1].any()


@every_class
@pytest.mark.parametrize(("at", "bad"), [(0, float("inf")), (1, float("nan")), (4, float("inf"))])
def test_a_gradient_that_is_not_finite_is_isolated(name: str, bad: float, at: int) -> None:
    """Bit for bit, but for the clock; those refreshed together with it as if nothing had been."""
    worlds = []
    for spoiled in (False, True):
        params = [torch.nn.Parameter(gaussian(8, 5, seed=i).float()) for i in range(3)]
        optimizer = CLASSES[name](params, precondition_frequency=2)
        for step in range(7):
            for i, p in enumerate(params):
                p.grad = gaussian(8, 5, seed=10 * step + i).float()
            if not spoiled or step != at:
                optimizer.step()
                continue
            params[1].grad[2, 3] = bad
            weight = params[1].detach().clone()
            kept = {key: t.clone() for key, t in optimizer.state[params[1]].items()}
            optimizer.step()
            assert torch.equal(params[1], weight)
            now = optimizer.state[params[1]]
            assert all(torch.equal(now[key], t + 1 if key == CLOCK else t) for key, t in kept.items())
        worlds.append((params, optimizer))
    (clean, one), (params, other) = worlds
    for i in (0, 2):
        assert torch.equal(params[i], clean[i])
        assert all(torch.equal(t, other.state[params[i]][key]) for key, t in one.state[clean[i]].items())
    assert params[1].isfinite().all()
    assert not torch.equal(params[1], gaussian(8, 5, seed=1).float())


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_same_to_the_bit(name: str, dtype: torch.dtype) -> None:
    cls = CLASSES[name]
    whole, params = both_kinds(cls.func, dtype, precondition_frequency=3, **cls.keywords)
    train(whole, params, range(4))
    other, copies = both_kinds(cls.func, dtype, precondition_frequency=3, **cls.keywords)
    with torch.no_grad():
        for p, w in zip(copies, params):
            p.copy_(w)
    other.load_state_dict(copy.deepcopy(whole.state_dict()))
    train(whole, params, range(4, 9))
    train(other, copies, range(4, 9))
    assert all_same_bits(copies, params)
    assert same_states(state_copies(other), state_copies(whole))


@pytest.mark.parametrize("norm", ["spectral", "sign"])
@every_class
def test_orthogonal_equivariance_and_other_norms(name: str, norm: str) -> None:
    """Polar factors and inverse roots turn with the gradient; signs do not."""
    n, left, right = 6, torch.linalg.qr(gaussian(6, 6, seed=50)).Q, torch.linalg.qr(gaussian(6, 6, seed=51)).Q
    paths = []
    options: dict[str, Any] = {"graft": None} if name.startswith("shampoo") else {}
    for turn in (lambda t: t, lambda t: left @ t @ right):
        p = torch.nn.Parameter(turn(gaussian(n, n, seed=9)).clone())
        optimizer = CLASSES[name]([p], lr=0.1, precondition_frequency=5, norm=norm, polar="svd", **options)
        for g in gradients(30, n, n):
            p.grad = turn(g)
            optimizer.step()
        paths.append(p.detach())
    assert (gap(left.mT @ paths[1] @ right.mT, paths[0]) < 1e-8) == (norm == "spectral")


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (Roots, {"exponent": 1 / 3}, "exponent should be one of 1, 0.5, 0.25 but is: 0.33"),
    (Roots, {"scale": "past"}, "scale 'past' is not known; use 'present' or 'refresh'"),
    (Roots, {"exponent": 0.25, "coupling": True}, "have the exponent 1/2"),
    (Roots, {"exponent": 0.5, "coupling": True, "beta": 1.0}, "averages .beta, or shampoo_beta, below 1."),
    (Roots, {"dtype": torch.bfloat16}, "moves its small eigenvalues beyond the ridge: use Rotated"),
    (steepest.Shampoo, {"inverse_root": "denman"}, "inverse_root 'denman' is not known; use 'basis' or 'newton'"),
    (steepest.KLShampoo, {"inverse_root": "newton", "shampoo_beta": 1.0}, "shampoo_beta, below 1"),
    (steepest.Shampoo, {"inverse_root": "newton", "factor_dtype": torch.bfloat16}, "use inverse_root='basis' or"),
]


@pytest.mark.parametrize(("cls", "options", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_what_cannot_be(cls: Any, options: dict[str, Any], message: str) -> None:
    given = () if cls is Roots else ([torch.nn.Parameter(gaussian(4, 3))],)
    with pytest.raises(ValueError, match=message):
        cls(*given, **options)
