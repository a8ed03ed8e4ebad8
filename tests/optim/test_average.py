"""`average`: of the iterates of every optimizer, evaluated in their place and saved; and the point between the two."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.optimizer import MatrixOptimizer
from support.configurations import MuAdamMomo
from support.problems import gap, polar_by_svd
from support.training import (
    EVERY,
    all_same_bits,
    both_backends,
    both_kinds,
    build,
    check_compiled_step,
    copies,
    give_gradients,
    made,
    name_of,
    noise,
    on_backends,
    parameters,
    same_states,
    state_copies,
    train,
)

RATE = 0.8
SCHEDULE_FREE: dict[str, Any] = {"average": "schedule_free"}
EMA: dict[str, Any] = {"average": RATE}
#: Those that take both, all but a few of the shared list.
AVERAGING = [cls for cls in EVERY if cls not in (steepest.SPlus, steepest.NIGT)]
FREE = [
    cls
    for cls in AVERAGING
    if cls not in (steepest.TrustRegion, steepest.Fromage, steepest.ProdigyMuon, steepest.Scion)
]
SOME = [steepest.Muon, steepest.MuAdam, steepest.SOAP, steepest.MuonMax]
either = pytest.mark.parametrize("values", [EMA, SCHEDULE_FREE], ids=["ema", "schedule_free"])


def gradient(w: Tensor, step: int) -> Tensor:
    """Of a quadratic with noise, at w: where it is taken matters."""
    return w - 1 + noise(w.shape, 77 + step, w.dtype)


def run(optimizer: MatrixOptimizer, p: nn.Parameter, steps: range, lrs: Sequence[float] | None = None) -> None:
    for step in steps:
        p.grad = gradient(p.detach(), step)
        for group in optimizer.param_groups if lrs is not None else ():
            group["lr"] = lrs[step]  # type: ignore[index]
        optimizer.step()


# ---- the equations --------------------------------------------------------------------------------------------------


def schedule_free_adamw(
    w: Tensor, lrs: Sequence[float], beta: float, beta2: float, eps: float, decay: float
) -> tuple[Tensor, Tensor]:
    """(y, x) of Algorithm 1 of arXiv:2405.15682, element by element."""
    ys, xs = [], []
    for i, start in enumerate(w.flatten().tolist()):
        z = x = y = start
        v = total = 0.0
        for t, lr in enumerate(lrs, 1):
            noisy = noise(w.shape, 77 + t - 1, w.dtype).flatten().tolist()[i]
            y = (1 - beta) * z + beta * x
            g = y - 1 + noisy
            v = beta2 * v + (1 - beta2) * g * g
            z = z - lr * g / ((v / (1 - beta2**t)) ** 0.5 + eps) - lr * decay * y
            total += lr * lr
            c = lr * lr / total
            x = (1 - c) * x + c * z
        ys.append((1 - beta) * z + beta * x)
        xs.append(x)
    return torch.tensor(ys, dtype=w.dtype).view(w.shape), torch.tensor(xs, dtype=w.dtype).view(w.shape)


@both_backends
@pytest.mark.parametrize("lrs", [[0.05] * 20, [0.01 * min(t, 5) for t in range(1, 21)]], ids=["constant", "warm-up"])
@pytest.mark.parametrize("use_muon", [True, False])
def test_schedule_free_adamw_is_algorithm_1(use_muon: bool, lrs: list[float], backend: str) -> None:
    """As a matrix of `Adam` and as an AdamW group of `Muon`; of a rising lr the terms count by its square."""
    p = nn.Parameter(noise((4, 3), 1, torch.float64))
    start = p.detach().clone()
    numbers = {"betas": (0.0, 0.99), "eps": 1e-6, "weight_decay": 0.1, "schedule_free_beta": 0.85, **SCHEDULE_FREE}
    groups = [{"params": [p], "use_muon": use_muon, **numbers}]
    optimizer = (steepest.Adam if use_muon else steepest.Muon)(groups, backend=backend)
    run(optimizer, p, range(20), lrs)
    y, x = schedule_free_adamw(start, lrs, 0.85, 0.99, 1e-6, 0.1)
    assert gap(p.detach(), y) < 1e-10
    optimizer.eval()
    assert gap(p.detach(), x) < 1e-10
    optimizer.train()
    assert gap(p.detach(), y) < 1e-10


@both_backends
def test_schedule_free_muon(backend: str) -> None:
    """z moves along the polar factor of the momentum of gradients at y."""
    p = nn.Parameter(noise((5, 4), 2, torch.float64))
    z = x = y = p.detach().clone()
    options: dict[str, Any] = {"lr": 0.03, "weight_decay": 0.2, "momentum": 0.5, "nesterov": False, "polar": "svd"}
    optimizer = steepest.Muon([p], adjust_lr_fn="none", backend=backend, **options, **SCHEDULE_FREE)
    m = torch.zeros_like(z)
    for t in range(1, 21):
        g = gradient(y, t - 1)
        p.grad = gradient(p.detach(), t - 1)
        optimizer.step()
        m = 0.5 * m + 0.5 * g
        z = z - 0.03 * 0.2 * y - 0.03 * polar_by_svd(m)
        x = x + (z - x) / t
        y = 0.1 * z + 0.9 * x
        assert gap(p.detach(), y) < 1e-10
    optimizer.eval()
    assert gap(p.detach(), x) < 1e-10


@on_backends(AVERAGING)
def test_ema_of_every_parameter(cls: type[MatrixOptimizer], backend: str) -> None:
    optimizer, params = both_kinds(cls, torch.float64, average=RATE, backend=backend)
    plain, others = both_kinds(cls, torch.float64, backend=backend)
    wanted = [torch.zeros_like(p) for p in params]
    for step in range(4):
        train(optimizer, params, range(step, step + 1))
        train(plain, others, range(step, step + 1))
        wanted = [RATE * a + (1 - RATE) * p.detach() for a, p in zip(wanted, params)]
    assert all_same_bits(params, others)  # which the average leaves alone
    optimizer.eval()
    for p, a in zip(params, wanted):
        assert gap(p.detach(), a / (1 - RATE**4)) < 1e-12
    optimizer.train()
    assert all_same_bits(params, others)


@on_backends(FREE)
def test_schedule_free_of_every_recipe(cls: type[MatrixOptimizer], backend: str) -> None:
    """A step of the plain optimizer from y, with its state, is how z moves."""
    optimizer, params = both_kinds(cls, torch.float64, backend=backend, **SCHEDULE_FREE)
    z = x = copies(params)
    total = [0.0] * len(params)
    for step in range(5):
        plain, others = both_kinds(cls, torch.float64, backend=backend)
        before = optimizer.state_dict()
        state = {i: {k: v for k, v in s.items() if k not in OWN} for i, s in before["state"].items()}
        groups = [{**group, "average": None} for group in before["param_groups"]]
        plain.load_state_dict({**before, "state": state, "param_groups": groups})
        y = copies(params)
        for p, q in zip(others, y, strict=True):
            p.data.copy_(q)
        train(optimizer, params, range(step, step + 1))
        train(plain, others, range(step, step + 1))
        lrs = [group["lr"] for group in optimizer.param_groups for _ in group["params"]]
        z = [a + (p.detach() - b) for a, p, b in zip(z, others, y)]
        total = [s + lr * lr for s, lr in zip(total, lrs)]
        x = [a + lr * lr / s * (b - a) for a, b, lr, s in zip(x, z, lrs, total)]
        for p, a, b in zip(params, z, x, strict=True):
            assert gap(p.detach(), 0.1 * a + 0.9 * b) < 1e-11


OWN = ("average", "average_mass", "iterate")


def test_beta_0_is_the_method_itself() -> None:
    optimizer, params = both_kinds(steepest.MuAdam, torch.float64, schedule_free_beta=0.0, **SCHEDULE_FREE)
    plain, others = both_kinds(steepest.MuAdam, torch.float64)
    train(optimizer, params, range(5))
    train(plain, others, range(5))
    for p, q in zip(params, others, strict=True):
        assert gap(p.detach(), q.detach()) < 1e-13


# ---- what every option must do ---------------------------------------------------------------------------------------


@either
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", SOME, ids=name_of)
def test_resume_is_exact(cls: type[MatrixOptimizer], dtype: torch.dtype, values: dict[str, Any]) -> None:
    """Of averages too: what the model saves are the averages then, and the optimizer the weights beside them."""
    (optimizer, params), (second, others) = (both_kinds(cls, dtype, **values) for _ in range(2))
    train(optimizer, params, range(3))
    optimizer.eval()
    file = io.BytesIO()
    torch.save(([p.data for p in params], optimizer.state_dict()), file)
    file.seek(0)
    saved, state = torch.load(file, weights_only=True)
    for p, value in zip(others, saved, strict=True):
        p.data.copy_(value)
    second.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"the weights are averages since eval\(\); call train\(\)"):
        second.step(**({"loss": 1.0} if issubclass(cls, steepest.Momo) else {}))
    for each, some in ((optimizer, params), (second, others)):
        each.train()
        train(each, some, range(3, 6))
    assert all_same_bits(params, others)
    assert same_states(state_copies(optimizer), state_copies(second))


@either
@both_backends
@pytest.mark.parametrize("options", [{}, {"keep_mantissa": True}, {"stochastic_rounding": True}], ids=str)
def test_bf16_weights(options: dict[str, Any], backend: str, values: dict[str, Any]) -> None:
    """The average is fp32, and with kept bits the trajectory is that of fp32 weights."""
    optimizer, params = both_kinds(steepest.MuAdam, torch.bfloat16, backend=backend, **options, **values)
    wide, others = both_kinds(steepest.MuAdam, torch.float32, grad_dtype=torch.bfloat16, backend=backend, **values)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    train(optimizer, params, range(5), torch.bfloat16)
    train(wide, others, range(5), torch.bfloat16)
    for p, q in zip(params, others, strict=True):
        state, exact = optimizer.state[p], wide.state[q]
        assert {state[key].dtype for key in ("average", "iterate") if key in state} == {torch.float32}
        tolerance = 1e-5 if options.get("keep_mantissa") else 0.02
        assert gap(state["average"], exact["average"]) < tolerance
        value = optimizer._recipe(optimizer.param_groups[0]).rounding.value(p.detach(), state)
        assert gap(value, q.detach()) < tolerance
    before, states = copies(params), state_copies(optimizer)
    optimizer.eval()
    for p in params:
        assert p.dtype is torch.bfloat16
    optimizer.train()
    assert all_same_bits(params, before)
    assert same_states(state_copies(optimizer), states)


@either
@both_backends
@pytest.mark.parametrize("cls", SOME, ids=name_of)
def test_a_bad_gradient_leaves_all_as_it_was(cls: type[MatrixOptimizer], backend: str, values: dict[str, Any]) -> None:
    optimizer, params = both_kinds(cls, backend=backend, **values)
    train(optimizer, params, range(3))
    before, states = copies(params), state_copies(optimizer)
    give_gradients(params, 3)
    params[0].grad = None
    for p in params[1:]:
        p.grad.view(-1)[0] = float("nan")  # type: ignore[union-attr]
    optimizer.step()
    assert all_same_bits(params, before)
    for old, new in zip(states, state_copies(optimizer), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old if key != "clock")


@either
def test_before_the_first_step_the_weight_is_shown(values: dict[str, Any]) -> None:
    optimizer, params = both_kinds(steepest.Muon, **values)
    start = copies(params)
    optimizer.eval()
    optimizer.init_state()
    optimizer.eval()
    optimizer.train()
    assert all_same_bits(params, start)
    give_gradients(params, 0)
    params[0].grad.fill_(float("inf"))  # type: ignore[union-attr]
    optimizer.step()
    optimizer.eval()
    assert torch.equal(params[0], start[0])
    assert not torch.equal(params[1], start[1])


def test_weights_that_are_loaded_before_the_first_step_begin_the_average() -> None:
    optimizer, params = both_kinds(steepest.Muon, **SCHEDULE_FREE)
    optimizer.init_state()
    for p in params:
        p.data.mul_(3)
    plain, others = both_kinds(steepest.Muon)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    train(optimizer, params, range(1))
    train(plain, others, range(1))
    for p, q in zip(params, others, strict=True):
        assert gap(p.detach(), q.detach()) < 1e-6  # the first iterate is its own average


@either
def test_a_group_says_its_own(values: dict[str, Any]) -> None:
    params = parameters([(6, 4), (6, 4), (5,)])
    groups = [{"params": params[:1], **values}, {"params": params[1:2]}, {"params": params[2:], "use_muon": False}]
    optimizer, weights = steepest.Muon(groups, lr=0.1), []
    train(optimizer, params, range(3))
    weights = copies(params)
    assert ["average" in optimizer.state[p] for p in params] == [True, False, False]
    optimizer.eval()
    assert [torch.equal(p, w) for p, w in zip(params, weights, strict=True)] == [False, True, True]
    optimizer.train()
    assert all_same_bits(params, weights)


def test_a_checkpoint_without_averages_begins_them() -> None:
    optimizer, params = both_kinds(steepest.Muon)
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:  # as an older version wrote it
        del group["average"], group["schedule_free_beta"]
    second, others = both_kinds(steepest.Muon, average=RATE)
    with pytest.warns(
        UserWarning, match="does not have begins anew: average of parameter 0, parameter 1, .*, average_mass of"
    ):
        second.load_state_dict(saved)
    train(second, others, range(2, 4))
    assert float(second.state[others[0]]["average_mass"]) == pytest.approx(1 - RATE**2)


def test_a_checkpoint_of_splus_from_before_goes_on() -> None:
    """Its words for the average are what they were."""
    optimizer, params = both_kinds(steepest.SPlus, average_rate=RATE)
    train(optimizer, params, range(3))
    saved = optimizer.state_dict()
    assert {"average", "average_mass"} <= saved["state"][0].keys()
    for group in saved["param_groups"]:
        assert group["average_rate"] == RATE
        for key in ("average", "schedule_free_beta"):
            del group[key]
    second, others = both_kinds(steepest.SPlus, average_rate=RATE)
    second.load_state_dict(saved)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    train(optimizer, params, range(3, 5))
    train(second, others, range(3, 5))
    assert same_states(state_copies(optimizer), state_copies(second))
    by_rate, same = both_kinds(steepest.SPlus, average_rate=0.0, average=RATE)
    train(by_rate, same, range(5))
    assert same_states(state_copies(by_rate), state_copies(optimizer))


@pytest.mark.slow
@either
@pytest.mark.parametrize("cls", [steepest.Muon, steepest.MuAdam], ids=name_of)
def test_a_compiled_step_averages(cls: type[MatrixOptimizer], values: dict[str, Any]) -> None:
    optimizer, eager, step = check_compiled_step(lambda: both_kinds(cls, **values))
    before = copies(optimizer.state)
    optimizer.eval()
    with pytest.raises(RuntimeError, match="call train"):
        step()
    optimizer.train()
    assert all_same_bits(optimizer.state, before)
    for found, wanted in zip(state_copies(optimizer), state_copies(eager), strict=True):
        torch.testing.assert_close(found["average"], wanted["average"], rtol=1e-3, atol=1e-4)


def test_a_hook_comes_before_the_average() -> None:
    optimizer, params = both_kinds(steepest.Muon, torch.float64, average=0.5)
    optimizer.register_weight_hook(lambda weights: weights.store(params[0], weights.value(params[0]) * 0))
    train(optimizer, params, range(2))
    assert not optimizer.state[params[0]]["average"].any()
    assert optimizer.state[params[1]]["average"].any()


# ---- what is refused -------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a rate of 1": (lambda: build(steepest.Muon, average=1.0), r"average should be a number in \(0, 1\), .* is: 1.0"),
    "a rate of 0": (lambda: build(steepest.Muon, average=0.0), r"average should be a number in \(0, 1\), .* is: 0.0"),
    "a name": (lambda: build(steepest.Muon, average="ema"), r"average should be .* 'schedule_free' .* is: 'ema'"),
    "a beta of 1": (lambda: build(steepest.Muon, schedule_free_beta=1.0), r"schedule_free_beta should be in \[0, 1\)"),
    "both of SPlus": (lambda: build(steepest.SPlus, average=0.9), "two answers to one question.*average_rate=0"),
    "NIGT": (lambda: build(steepest.NIGT, average=0.9), r"NIGT has eval\(\) and train\(\) of its own"),
    "Momo": (lambda: build(MuAdamMomo, **SCHEDULE_FREE), "Momo's model of the loss .*: use a number"),
    "MuonMax with Momo": (lambda: build(steepest.MuonMax, lower_bound=0.0, **SCHEDULE_FREE), "Momo's model"),
    "Prodigy": (lambda: build(steepest.ProdigyMuon, **SCHEDULE_FREE), "how far the weights themselves are"),
    "TrustRegion": (lambda: build(steepest.TrustRegion, **SCHEDULE_FREE), "the trust region is around the weights"),
    "Fromage": (lambda: build(steepest.Fromage, **SCHEDULE_FREE), "as long as the weights themselves"),
    "Scion": (lambda: build(steepest.Scion, **SCHEDULE_FREE), "Scion's ball: constrained=False"),
    "an AdamW group": (
        lambda: made(MuAdamMomo, [{"params": parameters([(3,)]), "use_muon": False, **SCHEDULE_FREE}]),
        "Momo's model",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_averaged_says_why(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_scion_without_its_ball_takes_it() -> None:
    build(steepest.Scion, constrained=False, **SCHEDULE_FREE)
