"""Factors and bases in 16 bits: how far from those in 32, that averages move, that training does not mind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import steepest
from steepest.linalg.basis import orthonormality
from steepest.parts import Hyper, Rotated, Sides
from steepest.recipe import CLOCK
from steepest.zoo.kronecker import KroneckerOptimizer
from support.problems import gap, gaussian
from support.training import all_same_bits, both_kinds, relative, same_states, state_copies, train

BF16 = torch.bfloat16
METHODS: dict[str, tuple[type[KroneckerOptimizer], dict[str, Any]]] = {
    "shampoo": (steepest.Shampoo, {"shampoo_beta": 0.95}),
    "one-sided": (steepest.OneSidedShampoo, {}),
    "kl-shampoo": (steepest.KLShampoo, {"lr": 0.02}),
    "soap": (steepest.SOAP, {}),
    "soap, rotations": (steepest.SOAP, {"refresh": "jr", "precondition_frequency": 1}),
    "soap, delayed": (steepest.SOAP, {"refresh_delay": 2}),
    "kl-soap": (steepest.KLSOAP, {}),
    "splus": (steepest.SPlus, {"lr": 0.2}),
}
every_method = pytest.mark.parametrize("name", METHODS)


def averages(beta: float, steps: int, dtype: torch.dtype | None, seed: int = 0) -> Tensor:
    """The left factor after so many gradients of eight columns."""
    part, hyper = Rotated(beta=beta, side="smaller", dtype=dtype), Hyper(0.1)
    state = part.init(torch.zeros(1, 6, 8))
    for step in range(steps):
        state |= part.update_factors(state, gaussian(1, 6, 8, seed=1000 * seed + step).float(), hyper)
    return state["left"]


@pytest.mark.parametrize(("beta", "steps"), [(0.5, 40), (0.95, 200), (0.99, 600), (0.999, 1500)])
def test_what_rounding_adds_to_an_average(beta: float, steps: int) -> None:
    found, exact = averages(beta, steps, BF16), averages(beta, steps, None)
    assert found.dtype == BF16
    assert torch.equal(found, found.mT)
    bound = 2.0**-8 / (1 - beta**2) ** 0.5
    assert 0.1 * bound < relative(found, exact) < bound


@pytest.mark.slow
def test_an_average_does_not_stand_still() -> None:
    """With beta = .999 a step moves an entry that is to grow by half by an eighth of a unit in the last place."""
    part, hyper, g = Rotated(beta=0.999, side="smaller", dtype=BF16), Hyper(0.1), torch.eye(4)[None] * 1.5**0.5
    state = part.init(torch.zeros(1, 4, 4))
    state |= {"left": torch.eye(4, dtype=BF16)[None], "learned": torch.tensor(1e6)}
    nearest = state["left"]
    for _ in range(3000):
        state |= part.update_factors(state, g, hyper)
        nearest = torch.lerp(nearest.float(), g @ g.mT, 0.001).to(BF16)
    wanted = 1.5 - 0.5 * 0.999**3000
    assert torch.equal(nearest, torch.eye(4, dtype=BF16)[None])
    diagonal = state["left"][0].diagonal().float()
    assert diagonal.mean() == pytest.approx(wanted, rel=0.05)
    assert len(diagonal.unique()) > 1  # entries have random bits of their own
    assert not (state["left"][0] - diagonal.diag().to(BF16)).any()


def test_the_random_bits_are_of_the_step_and_of_the_side() -> None:
    part, hyper, g = Rotated(beta=0.5, dtype=BF16), Hyper(0.1), gaussian(1, 6, 6).float()
    g = g + g.mT  # both factors are one matrix
    state = part.init(g)
    one = part.update_factors({**state, "learned": torch.tensor(7.0)}, g, hyper)
    same = part.update_factors({**state, "learned": torch.tensor(7.0)}, g, hyper)
    other = part.update_factors({**state, "learned": torch.tensor(8.0)}, g, hyper)
    assert torch.equal(one["left"], same["left"])
    assert not torch.equal(one["left"], other["left"])
    assert not torch.equal(one["left"], one["right"])


def test_what_is_rotated_there_and_back() -> None:
    """Bases rounded to nearest are orthonormal to 2^-8, and so near is what they do to a gradient."""
    narrow, wide = Rotated(Sides(0.5), beta=0.9, dtype=BF16), Rotated(Sides(0.5), beta=0.9)
    hyper, x = Hyper(0.1, eps=1e-2), gaussian(2, 12, 8, seed=50).float()
    state = wide.init(x)
    for step in range(10):
        state |= wide.update_factors(state, gaussian(2, 12, 8, seed=step).float(), hyper)
    state |= wide.commit({**state, **wide.refresh(wide.gather([state], exact=True), [state])[0]})
    rounded = {key: t.to(BF16) if key.endswith(("left", "right", "basis")) else t for key, t in state.items()}
    assert orthonormality(rounded["left_basis"].float()).max() < 2.0**-8
    found, wanted = (p.back(s, p.into(s, x, hyper, None), hyper, None) for p, s in ((narrow, rounded), (wide, state)))
    assert found.dtype == torch.float32
    assert 1e-4 < relative(found, wanted) < 2.0**-7


@pytest.mark.slow
@every_method
def test_training_descends_as_with_fp32(name: str) -> None:
    """A noisy quadratic with curvatures over two decades on both sides."""
    cls, options = METHODS[name]
    left, right = (torch.linalg.qr(gaussian(n, n, seed=n)).Q.float() for n in (12, 8))
    rows, cols = torch.logspace(0, -1, 12)[:, None], torch.logspace(0, -1, 8)
    losses = []
    for dtype in (None, BF16):
        p = torch.nn.Parameter(gaussian(12, 8).float())
        optimizer = cls([p], **{"lr": 0.05, "weight_decay": 0.0, "factor_dtype": dtype, **options})
        for step in range(100):
            turned = left @ p.detach() @ right
            noise = 0.1 * gaussian(12, 8, seed=step).float()
            p.grad = left.mT @ (rows * (turned + noise) * cols) @ right.mT
            optimizer.step()
        losses.append(float((rows.sqrt() * (left @ p.detach() @ right) * cols.sqrt()).norm() ** 2))
    start = float((rows.sqrt() * (left @ gaussian(12, 8).float() @ right) * cols.sqrt()).norm() ** 2)
    assert losses[0] < 0.5 * start
    assert losses[1] < losses[0] + 0.1 * start


@pytest.mark.parametrize("parity", [None, "authors"])
def test_values_below_the_rounding_of_the_largest(parity: str | None) -> None:
    """Of a gradient of rank one: nothing is divided by what is left of a null space."""
    p = torch.nn.Parameter(torch.zeros(8, 6))
    optimizer = steepest.OneSidedShampoo([p], lr=1.0, factor_dtype=BF16, parity=parity, precondition_frequency=2)
    for step in range(10):
        before = p.detach().clone()
        p.grad = (gaussian(8, 1, seed=step) @ gaussian(1, 6, seed=1)).float()
        optimizer.step()
        values = optimizer.state[p]["right_values"]
        assert values.min() >= 2.0**-7 * values.max() * (1 - 1e-6) > 0
        assert (p.detach() - before).norm() < 20


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_what_is_narrow(name: str, dtype: torch.dtype) -> None:
    """Factors, bases and what is to become of them, in checkpoints too; everything else is as wide as ever."""
    cls, options = METHODS[name]
    optimizer, params = both_kinds(cls, dtype, factor_dtype=BF16, **options)
    train(optimizer, params, range(3))
    other, copies = both_kinds(cls, dtype, factor_dtype=BF16, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    narrow = {f"{side}{what}" for side in ("left", "right") for what in ("", "_basis", "_next")}
    if dtype is BF16 and cls not in (steepest.SOAP, steepest.KLSOAP):  # whose momentum is divided by next to nothing
        narrow.add("momentum_buffer")
    for p in (params[0], copies[0]):
        for key, t in (optimizer if p is params[0] else other).state[p].items():
            wanted = BF16 if key in narrow else torch.float32
            assert t.dtype == wanted or not t.is_floating_point() or key == "average_mass", key


@every_method
def test_a_resumed_run_is_the_same_to_the_bit(name: str) -> None:
    cls, options = METHODS[name]
    options = {"precondition_frequency": 3, "factor_dtype": BF16, **options}
    whole, params = both_kinds(cls, **options)
    train(whole, params, range(4))
    other, copies = both_kinds(cls, **options)
    with torch.no_grad():
        for p, w in zip(copies, params):
            p.copy_(w)
    other.load_state_dict(copy.deepcopy(whole.state_dict()))
    train(whole, params, range(4, 9))
    train(other, copies, range(4, 9))
    assert all_same_bits(copies, params)
    assert same_states(state_copies(other), state_copies(whole))


@every_method
def test_a_gradient_that_is_not_finite_leaves_everything(name: str) -> None:
    cls, options = METHODS[name]
    p = torch.nn.Parameter(gaussian(8, 6).float())
    optimizer = cls([p], **{"precondition_frequency": 2, "factor_dtype": BF16, **options})
    for step in range(5):
        p.grad = gaussian(8, 6, seed=step).float() * (float("nan") if step == 3 else 1)
        before = [p.detach().clone(), {key: t.clone() for key, t in optimizer.state[p].items()}]
        optimizer.step()
        if step == 3:
            assert torch.equal(p, before[0])
            assert all(torch.equal(optimizer.state[p][k], t + 1 if k == CLOCK else t) for k, t in before[1].items())
    assert p.isfinite().all()


@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_the_scale_of_the_gradients(scale: float) -> None:
    paths = []
    for c in (1.0, scale):
        p = torch.nn.Parameter(torch.zeros(8, 6))
        optimizer = steepest.SPlus([p], factor_dtype=BF16, precondition_frequency=3)
        for step in range(10):
            p.grad = (c * gaussian(8, 6, seed=step)).float()
            optimizer.step()
        paths.append(p.detach())
    assert paths[1].isfinite().all()
    assert paths[1].norm() == pytest.approx(float(paths[0].norm()), rel=0.3)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (steepest.SOAP, {"factor_dtype": torch.float16}, "factor_dtype should be None .fp32. or torch.bfloat16 but is"),
        (steepest.Shampoo, {"factor_dtype": BF16}, "a sum .* of bf16 factors drowns .*: choose a beta below 1"),
        (Rotated, {"dtype": torch.float16}, "factors are fp32 .dtype=None. or torch.bfloat16, but dtype is"),
        (Rotated, {"dtype": BF16, "external": True}, "factors that are given are not rounded here"),
    ],
)
def test_what_cannot_be(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(*(() if cls is Rotated else ([torch.nn.Parameter(gaussian(4, 3))],)), **options)
    if cls is steepest.SOAP:
        with pytest.raises(TypeError, match="KFAC does not take factor_dtype"):
            steepest.KFAC(torch.nn.Linear(3, 2), factor_dtype=BF16)


def test_narrow_state_is_half_as_large() -> None:
    sizes = []
    for dtype in (None, BF16):
        optimizer, _ = both_kinds(steepest.SOAP, factor_dtype=dtype)
        optimizer.init_state()
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        sizes.append(sum(state[key].nbytes for key in ("left", "right", "left_basis", "right_basis")))
    assert sizes[0] == 2 * sizes[1]
    assert gap(torch.tensor(sizes[0]), torch.tensor(4 * 2 * (8 * 8 + 5 * 5))) == 0
