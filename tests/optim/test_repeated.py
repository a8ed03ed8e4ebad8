"""Steps that are the last one again: that they are one call, and that whatever may change is seen as it was before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.ops import rotated
from steepest.optimizer.repeated import RepeatedStep
from steepest.step import Plan
from support.operations import Operations
from support.training import all_same_bits, copies, give_gradients, parameters, same_states, state_copies, train

SHAPES = ((8, 5), (7,), (3, 4, 2), ())
Change = Callable[[Any, list[nn.Parameter]], Any]


def made(cls: type[Any] = steepest.MuAdam, **options: Any) -> tuple[Any, list[nn.Parameter]]:
    params = parameters(SHAPES)
    groups = [
        {"params": params[:2], "use_muon": False, "lr": 0.01, **options},
        {"params": params[2:], "use_muon": False, "lr": 0.02, "weight_decay": 0.1, **options},
    ]
    return cls(groups), params


def made_in_bases(**options: Any) -> tuple[Any, list[nn.Parameter]]:
    """Matrices that SOAP steps, of which those of a group have new bases in every second step, and vectors of AdamW."""
    params = parameters(SHAPES)
    groups = [
        {"params": params[:1], "lr": 0.01, "precondition_frequency": 2},
        {"params": params[2:3], "lr": 0.02, "weight_decay": 0.1},
        {"params": params[1::2], "use_muon": False, "lr": 0.02},
    ]
    return steepest.SOAP(groups, **options), params


def made_along_polar() -> tuple[Any, list[nn.Parameter]]:
    """Matrices that Muon steps, in two groups, and vectors of AdamW."""
    params = parameters(SHAPES)
    groups = [
        {"params": params[:1], "lr": 0.01},
        {"params": params[2:3], "lr": 0.02, "weight_decay": 0.1, "polar": "auto"},
        {"params": params[1::2], "use_muon": False, "lr": 0.02},
    ]
    return steepest.Muon(groups), params


def made_with_decay_by_rate() -> tuple[Any, list[nn.Parameter]]:
    """Matrices whose learning rate is in another number of theirs too, and vectors of AdamW."""
    params = parameters(SHAPES)
    groups = [
        {"params": params[:1], "lr": 0.01, "radius": 3.0},
        {"params": params[2:3], "lr": 0.02, "constrained": True},
        {"params": params[1::2], "use_muon": False, "lr": 0.02},
    ]
    return steepest.Scion(groups), params


def made_in_exact_bases() -> tuple[Any, list[nn.Parameter]]:
    """Those of `made_in_bases`, whose new bases are made by torch operations."""
    return made_in_bases(refresh="eigh")


needs_products = pytest.mark.skipif(
    not rotated.supports(torch.zeros(1, 2, 2)), reason="no products are compiled for this processor"
)
MAKERS = [
    made,
    *(
        pytest.param(make, marks=needs_products)
        for make in (made_in_bases, made_in_exact_bases, made_along_polar, made_with_decay_by_rate)
    ),
]


def plan_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every step that a plan takes from here on."""
    seen: list[int] = []
    step = Plan.step

    def counted(self: Plan, *args: Any, **kwargs: Any) -> None:
        seen.append(1)
        step(self, *args, **kwargs)

    monkeypatch.setattr(Plan, "step", counted)
    return seen


# ---- what is the same step ------------------------------------------------------------------------------------------


def new_gradients(optimizer: Any, params: list[nn.Parameter]) -> None:
    for p in params:
        assert p.grad is not None
        p.grad = p.grad.clone()


def nothing_finite(optimizer: Any, params: list[nn.Parameter]) -> None:
    assert params[0].grad is not None
    params[0].grad[3, 2] = torch.nan


def lower_rate(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["lr"] *= 0.5


def higher_rate(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[1]["lr"] *= 1.5


def other_betas(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[1]["betas"] = [0.5, 0.9]


def betas_in_place(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["betas"] = betas = [0.5, 0.9]
    optimizer.step()
    betas[0] = 0.7


def rate_in_a_tensor(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["lr"] = rate = torch.tensor(0.05)
    optimizer.step()
    rate.fill_(0.03)
    optimizer.step()
    rate.data.mul_(0.5)  # which no version counts


def rates_that_rise(optimizer: Any, params: list[nn.Parameter]) -> None:
    for _ in range(9):
        for group in optimizer.param_groups:
            group["lr"] *= 1.3
        optimizer.step()


def a_tensor_beside_a_number(optimizer: Any, params: list[nn.Parameter]) -> None:
    with torch.inference_mode():
        uncounted = torch.tensor(0.01)
    for rate in (torch.tensor(0.05), torch.tensor([0.05], dtype=torch.float64), uncounted):
        optimizer.param_groups[0]["lr"] = rate
        for factor in (1.5, 0.2, 7.0):
            optimizer.param_groups[1]["lr"] *= 1.1
            with torch.inference_mode(rate is uncounted):
                rate.mul_(factor)
            optimizer.step()


def somebody_elses_value(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["initial_lr"] = 0.5


def weights_elsewhere(optimizer: Any, params: list[nn.Parameter]) -> None:
    params[1].data = params[1].detach() * 2


def under(mode: Callable[[], Any]) -> Change:
    def change(optimizer: Any, params: list[nn.Parameter]) -> Any:
        return mode()

    change.__name__ = getattr(mode, "__name__", str(mode))
    return change


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


REPEATED: tuple[Change, ...] = (
    new_gradients,
    nothing_finite,
    lower_rate,
    higher_rate,
    other_betas,
    betas_in_place,
    rate_in_a_tensor,
    rates_that_rise,
    a_tensor_beside_a_number,
    somebody_elses_value,
    weights_elsewhere,
    under(autocast),
    under(torch.enable_grad),
    under(torch.inference_mode),
)

# ---- what is another one --------------------------------------------------------------------------------------------


class Tagged(Tensor):
    pass


def lost_gradient(optimizer: Any, params: list[nn.Parameter]) -> None:
    params[2].grad = None


def no_gradients(optimizer: Any, params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = None


def turned_gradient(optimizer: Any, params: list[nn.Parameter]) -> None:
    assert params[0].grad is not None
    params[0].grad = params[0].grad.mT.contiguous().mT


def sign_to_be_turned(optimizer: Any, params: list[nn.Parameter]) -> None:
    assert params[0].grad is not None
    params[0].grad = torch._neg_view(-params[0].grad)


def gradient_of_a_class(optimizer: Any, params: list[nn.Parameter]) -> None:
    assert params[3].grad is not None
    params[3].grad = params[3].grad.as_subclass(Tagged)


def other_state(optimizer: Any, params: list[nn.Parameter]) -> None:
    state = optimizer.state[params[1]]
    state["exp_avg"] = state["exp_avg"] * 3


def state_in_other_memory(optimizer: Any, params: list[nn.Parameter]) -> None:
    average = optimizer.state[params[1]]["exp_avg"]
    average.set_((average * 3).untyped_storage(), average.storage_offset() * 0, average.shape)


def no_state(optimizer: Any, params: list[nn.Parameter]) -> None:
    del optimizer.state[params[0]]


def state_of_a_checkpoint(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.state[params[1]]["step"] += 5


def another_group(optimizer: Any, params: list[nn.Parameter]) -> None:
    params.append(nn.Parameter(torch.ones(3)))
    params[-1].grad = torch.ones(3)
    optimizer.add_param_group({"params": params[-1:], "use_muon": False, "lr": 0.1})


def one_group_less(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.param_groups.pop()


def a_parameter_more(optimizer: Any, params: list[nn.Parameter]) -> None:
    params.append(nn.Parameter(torch.ones(3, 2)))
    params[-1].grad = torch.ones(3, 2)
    optimizer.param_groups[0]["params"].append(params[-1])


def another_option(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["maximize"] = True


def a_hook(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.register_weight_hook(lambda weights: weights.store(params[0], weights.value(params[0]) * 0.5))


def a_scaler(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), torch.tensor(4.0)


def an_overflow(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(4.0)


class Counted(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


OTHERS: tuple[Change, ...] = (
    lost_gradient,
    no_gradients,
    turned_gradient,
    sign_to_be_turned,
    gradient_of_a_class,
    other_state,
    state_in_other_memory,
    no_state,
    state_of_a_checkpoint,
    another_group,
    one_group_less,
    a_parameter_more,
    another_option,
    a_hook,
    a_scaler,
    an_overflow,
    under(Operations),
    under(Counted),
)


def after(
    make: Callable[[], tuple[Any, list[nn.Parameter]]], change: Change, seen: list[int] | None = None
) -> tuple[list[Tensor], list[dict[str, Tensor]], int]:
    """Weights, state and the count of steps not taken, after three steps, a change, and two steps more."""
    optimizer, params = make()
    train(optimizer, params, range(3))
    give_gradients(params, 3)
    mode = change(optimizer, params)
    if seen is not None:
        seen.clear()
    with contextlib.nullcontext() if mode is None else mode:
        optimizer.step()
        optimizer.step()
    skipped = sum(int(count) for count in optimizer.skipped_updates().values())
    return copies(params), state_copies(optimizer), skipped


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("change", REPEATED + OTHERS, ids=lambda change: change.__name__)
def test_a_step_is_what_a_plan_makes_of_it(
    make: Callable[[], tuple[Any, list[nn.Parameter]]], change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = plan_steps(monkeypatch)
    weights, state, skipped = after(make, change, seen)
    assert len(seen) == 0 if change in REPEATED else len(seen) >= 1
    monkeypatch.setattr(RepeatedStep, "of", lambda *_: None)
    others, their_state, their_count = after(make, change, seen)
    assert len(seen) == 2
    assert all_same_bits(weights, others)
    assert same_states(state, their_state)
    assert skipped == their_count


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "much", 1e39])
def test_a_number_that_is_refused_is_refused_before_anything_moves(value: Any) -> None:
    optimizer, params = made()
    train(optimizer, params, range(3))
    before = copies(params)
    optimizer.param_groups[1]["lr"] = value
    with pytest.raises((TypeError, ValueError), match="group 1: .*lr"):
        optimizer.step()
    assert all_same_bits(copies(params), before)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e38, 25.0])
@pytest.mark.parametrize("in_a_tensor", [False, True])
def test_a_rate_is_refused_after_steps_with_others(value: float, in_a_tensor: bool) -> None:
    """25 beside a weight decay of .1 is more than twice a weight, which 15 is not."""
    optimizer, params = made()
    group = optimizer.param_groups[1]
    tensor = torch.tensor(0.02, dtype=torch.float64)
    for rate in (0.02, 0.03, 15.0):
        group["lr"] = tensor.fill_(rate) if in_a_tensor else rate
        train(optimizer, params, range(2))
    before = copies(params)
    group["lr"] = tensor.fill_(value) if in_a_tensor else value
    for _ in range(2):
        with pytest.raises(ValueError, match="group 1: .*(lr|Learning rate)"):
            optimizer.step()
        assert all_same_bits(copies(params), before)
    group["lr"] = tensor.fill_(0.0) if in_a_tensor else 0.0
    optimizer.step()
    assert all_same_bits(copies(params[2:]), before[2:])
    assert not all_same_bits(copies(params), before)


@pytest.mark.parametrize("in_a_tensor", [False, True])
def test_a_rate_that_rises_is_not_checked_in_every_step(in_a_tensor: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = made()
    rate = torch.tensor(0.02)
    if in_a_tensor:
        optimizer.param_groups[1]["lr"] = rate
    train(optimizer, params, range(3))
    checks: list[int] = []
    check = type(optimizer).check_numbers
    monkeypatch.setattr(RepeatedStep, "of", lambda *_: pytest.fail("another plan"))
    monkeypatch.setattr(optimizer, "check_numbers", lambda: (checks.append(1), check(optimizer)))
    for i in range(50):
        optimizer.param_groups[1]["lr"] = rate.fill_(0.02 * (1 + i / 10)) if in_a_tensor else 0.02 * (1 + i / 10)
        optimizer.step()
    assert 1 <= len(checks) <= 3  # as often as it has doubled


def test_a_method_that_adds_to_a_step_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watching(steepest.MuAdam):
        seen = 0

        def take_step(self, scaling: Any, loss: Any) -> None:
            self.seen += 1
            super().take_step(scaling, loss)

    optimizer, params = made(Watching)
    train(optimizer, params, range(4))
    assert optimizer.seen == 4


def test_a_closure_comes_before_what_it_changes_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = made()
    twin, twins = made()
    train(optimizer, params, range(3))
    train(twin, twins, range(3))
    seen = plan_steps(monkeypatch)

    def loss() -> float:
        assert torch.is_grad_enabled()
        give_gradients(params, 3)
        return 2.5

    assert optimizer.step(loss) == 2.5
    train(twin, twins, range(3, 4))
    assert not seen
    assert all_same_bits(copies(params), copies(twins))


def test_autograd_sees_that_weights_have_changed() -> None:
    optimizer, params = made()
    train(optimizer, params, range(3))
    square = (params[0] * params[0]).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_what_a_step_measured_is_of_the_last_one() -> None:
    optimizer, params = made()
    train(optimizer, params, range(3))
    metrics = optimizer.metrics()
    for number, some in enumerate((params[:2], params[2:])):
        square = sum((p.grad.double().square().sum() for p in some if p.grad is not None), torch.zeros(()))
        torch.testing.assert_close(metrics[f"{number}/grad_norm"], square.double().sqrt(), rtol=1e-6, atol=0)


# ---- hooks and profiles ---------------------------------------------------------------------------------------------


def test_a_profile_names_steps() -> None:
    optimizer, params = made()
    train(optimizer, params, range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert "Optimizer.step#MuAdam.step" in [event.key for event in profile.key_averages()]


def test_hooks_run_once_where_a_subclass_has_a_step_of_its_own() -> None:
    class Talking(steepest.MuAdam):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    optimizer, params = made(Talking)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(optimizer, params, range(2))
    assert seen == ["before", "after"] * 2


def test_a_hook_that_is_registered_later_is_run() -> None:
    optimizer, params = made()
    train(optimizer, params, range(2))
    seen: list[int] = []
    handle = optimizer.register_step_post_hook(lambda *_: seen.append(1))
    train(optimizer, params, range(2, 4))
    handle.remove()
    train(optimizer, params, range(4, 6))
    assert len(seen) == 2
