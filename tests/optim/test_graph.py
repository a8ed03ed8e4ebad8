"""`steepest.graphed`: what it refuses, what it checks before a replay, and on a GPU that a replay is a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from steepest import graph
from steepest.optimizer import MatrixOptimizer
from support.training import OPTIMIZERS, all_same_bits, both_kinds, give_gradients, noise, parameters

every_optimizer = pytest.mark.parametrize("cls", OPTIMIZERS[:2])


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Graphs on a CPU: a capture runs nothing, a replay runs the step that was captured, as it was captured."""
    events: list[str] = []

    def capture(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
        events.append("capture")
        owner = getattr(step, "__self__", step)  # a scheduler puts a function in the method's place
        seen = {name: getattr(owner, name, None) for name in ("found_inf", "grad_scale")}

        def replay() -> None:
            events.append("replay")
            with graph._Attributes(owner, seen):
                step()

        return replay

    class Stream:
        def __init__(self, device: torch.device) -> None:
            pass

        def __enter__(self) -> None:
            events.append("eager")

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(graph, "_capture", capture)
    monkeypatch.setattr(graph, "_SideStream", Stream)
    monkeypatch.setattr(graph, "_device_of", lambda optimizer: torch.device("cpu"))
    return events


def in_place(params: list[nn.Parameter], step: int) -> None:
    for index, p in enumerate(params):
        g = noise(p.shape, 1000 * (step + 1) + index, p.dtype)
        p.grad = g if p.grad is None else p.grad.copy_(g)


@every_optimizer
def test_every_call_is_one_step(cls: type[MatrixOptimizer], recorded: list[str]) -> None:
    (inner, a), (plain, b) = both_kinds(cls), both_kinds(cls)
    step = steepest.graphed(inner)
    for i in range(5):
        in_place(a, i)
        give_gradients(b, i)
        for group, other in zip(inner.param_groups, plain.param_groups, strict=True):
            other["lr"] = 0.02 / (1 + i)
            group["lr"].fill_(0.02 / (1 + i)) if i % 2 else group.update(lr=0.02 / (1 + i))
        step.step()
        plain.step()
    assert recorded == ["eager", "eager", "capture", "replay", "replay", "replay"]
    assert all_same_bits(a, b)
    assert all(isinstance(group["lr"], torch.Tensor) for group in inner.param_groups)


@pytest.mark.parametrize(
    "values",
    [
        {"average": 0.9},
        {"average": "schedule_free"},
        {"weight_decay_method": "independent"},
        {"weight_decay_method": "l2"},
        {"cautious_update": True},
        {"constraint": "frobenius", "weight_decay": 0.0},
        {"constraint": "spectral", "weight_decay": 0.0},
        {"variance_reduction": 0.025},
    ],
    ids=str,
)
def test_options_of_weights_are_part_of_the_graph(values: dict[str, Any], recorded: list[str]) -> None:
    (inner, a), (plain, b) = both_kinds(steepest.MuAdam, **values), both_kinds(steepest.MuAdam, **values)
    step = steepest.graphed(inner)
    for i in range(5):
        in_place(a, i)
        give_gradients(b, i)
        step.step()
        plain.step()
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
    if "average" in values:
        inner.eval()
        with pytest.raises(RuntimeError, match="call train"):
            step.step()
        inner.train()
        step.step()


def test_schedulers_reach_the_graph(recorded: list[str]) -> None:
    (inner, a), (plain, b) = both_kinds(steepest.MuAdam), both_kinds(steepest.MuAdam)
    step = steepest.graphed(inner)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6) for optimizer in (inner, plain)]
    for i in range(5):
        in_place(a, i)
        give_gradients(b, i)
        step.step()
        plain.step()
        for scheduler in schedulers:
            scheduler.step()
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_grad_scaler_reaches_the_graph(recorded: list[str]) -> None:
    inner, params = both_kinds(steepest.MuAdam)
    plain, others = both_kinds(steepest.MuAdam)
    step = steepest.graphed(inner)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    scaler.scale(torch.zeros(()))
    for i in range(5):
        in_place(params, i)
        for p in params:
            p.grad.mul_(scaler.get_scale())  # type: ignore[union-attr]
        if i == 4:
            params[0].grad[0, 0] = float("inf")  # type: ignore[index]
        scaler.step(step)
        scaler.update()
        give_gradients(others, i)
        if i < 4:
            plain.step()
    assert all_same_bits(params, others)


def ready(recorded: list[str]) -> tuple[graph.GraphedStep, list[nn.Parameter]]:
    inner, params = both_kinds(steepest.MuAdam)
    step = steepest.graphed(inner)
    for i in range(4):
        in_place(params, i)
        step.step()
    return step, params


def drop_gradient(step: graph.GraphedStep, params: list[nn.Parameter]) -> None:
    params[1].grad = None


def move_parameter(step: graph.GraphedStep, params: list[nn.Parameter]) -> None:
    params[0].data = params[0].data.clone()


def change_betas(step: graph.GraphedStep, params: list[nn.Parameter]) -> None:
    step.param_groups[0]["betas"] = (0.5, 0.9)


def add_group(step: graph.GraphedStep, params: list[nn.Parameter]) -> None:
    step.optimizer.add_param_group({"params": parameters([(3, 3)])})


def start_scaling(step: graph.GraphedStep, params: list[nn.Parameter]) -> None:
    step.found_inf = torch.zeros(())  # type: ignore[attr-defined]


def move_gradient(step: graph.GraphedStep, params: list[nn.Parameter]) -> None:
    assert params[2].grad is not None
    params[2].grad.data = params[2].grad.data.clone()


def load_behind(step: graph.GraphedStep, params: list[nn.Parameter]) -> None:
    step.optimizer.load_state_dict(step.optimizer.state_dict())


def step_behind(step: graph.GraphedStep, params: list[nn.Parameter]) -> None:
    kept, params[0].grad = params[0].grad, None
    step.optimizer.param_groups[0]["lr"].zero_()
    step.optimizer.prepare()
    params[0].grad = kept


def other_state(step: graph.GraphedStep, params: list[nn.Parameter]) -> None:
    step.state[params[0]]["exp_avg_sq"] = step.state[params[0]]["exp_avg_sq"].clone()


def longer_group(step: graph.GraphedStep, params: list[nn.Parameter]) -> None:
    step.param_groups[0]["params"].append(parameters([(3, 3)])[0])


def list_in_place(step: graph.GraphedStep, params: list[nn.Parameter]) -> None:
    step.param_groups[0]["num_heads"] = 1


def state_elsewhere(step: graph.GraphedStep, params: list[nn.Parameter]) -> None:
    state = step.state[params[0]]["momentum_buffer"]
    state.data = state.data.clone()


def other_group(step: graph.GraphedStep, params: list[nn.Parameter]) -> None:
    step.param_groups[0] = dict(step.param_groups[0])


def between_groups(step: graph.GraphedStep, params: list[nn.Parameter]) -> None:
    step.param_groups[1]["params"].insert(0, step.param_groups[0]["params"].pop())


def late_hook(step: graph.GraphedStep, params: list[nn.Parameter]) -> None:
    handle = step.optimizer.register_step_pre_hook(lambda *_: None)
    step.reset = lambda own=step.reset: (handle.remove(), own())  # type: ignore[method-assign]


def late_weight_hook(step: graph.GraphedStep, params: list[nn.Parameter]) -> None:
    step.optimizer.register_weight_hook(lambda weights: None)


def tensor_in_betas(step: graph.GraphedStep, params: list[nn.Parameter]) -> None:
    step.param_groups[0]["betas"] = (0.9, torch.tensor(0.999))


def no_number(step: graph.GraphedStep, params: list[nn.Parameter]) -> None:
    step.param_groups[0]["lr"] = 0.7
    step.param_groups[1]["lr"] = -1.0
    own = step.reset
    step.reset = lambda: (step.param_groups[1].update(lr=0.1), own())  # type: ignore[method-assign]


CHANGES: list[tuple[Any, str]] = [
    (drop_gradient, r"the gradient of parameter 1 of group 0 \(shape \(5, 8\)\) is not the tensor that was"),
    (move_gradient, r"the gradient of parameter 2 of group 0 \(shape \(6, 6\)\) has moved in memory"),
    (move_parameter, r"parameter 0 of group 0 \(shape \(8, 5\)\) has moved in memory since the capture: call reset"),
    (change_betas, r"betas was \(0.9, 0.999\) when the step was captured and is \(0.5, 0.9\): only lr and weight"),
    (list_in_place, "num_heads was None when the step was captured and is 1"),
    (add_group, "parameters were added or removed after the capture"),
    (longer_group, "parameters were added or removed after the capture"),
    (start_scaling, "captured without a GradScaler's found_inf and is called otherwise"),
    (load_behind, "state was loaded or an ordinary step taken since the capture"),
    (step_behind, "state was loaded or an ordinary step taken since the capture"),
    (state_elsewhere, "the state lies elsewhere than at the capture"),
    (other_group, "the parameter groups are others than at the capture"),
    (between_groups, "the parameter groups are others than at the capture"),
    (late_hook, "a graph runs no step hooks"),
    (late_weight_hook, "weight hooks were added or removed after the capture: call reset"),
    (tensor_in_betas, r"betas was \(0.9, 0.999\) when the step was captured and is \(0.9, tensor"),
    (no_number, "group 1: Learning rate should be >= 0 but is: -1.0"),
    (other_state, "the state lies elsewhere than at the capture"),
]


@pytest.mark.parametrize("change,message", CHANGES, ids=[change.__name__ for change, _ in CHANGES])
def test_what_a_replay_would_miss(change: Any, message: str, recorded: list[str]) -> None:
    step, params = ready(recorded)
    before = [p.detach().clone() for p in params]
    lr = step.param_groups[0]["lr"]
    held = lr.clone()
    change(step, params)
    held = lr.clone() if change is step_behind else held
    with pytest.raises((RuntimeError, ValueError), match=message):
        step.step()
    assert all_same_bits(params, before)
    assert torch.equal(lr, held)
    recorded.clear()
    step.reset()
    for _ in range(3):
        step.step()
    assert recorded == ["eager", "eager", "capture", "replay"]


def test_what_is_not_the_steps_may_change(recorded: list[str]) -> None:
    """A scheduler made late adds initial_lr; a user counts epochs."""
    step, _ = ready(recorded)
    torch.optim.lr_scheduler.StepLR(step.optimizer, 5)
    step.param_groups[0]["epoch"] = 3
    step.step()
    assert recorded[-1] == "replay"


def test_groups_that_share_a_tensor_take_one_value(recorded: list[str]) -> None:
    inner, params = both_kinds(steepest.MuAdam)
    lr = torch.tensor(0.02)
    for group in inner.param_groups:
        group["lr"] = lr
    step = steepest.graphed(inner)
    for i in range(4):
        in_place(params, i)
        step.step()
    for group in inner.param_groups:
        group["lr"] = 0.01
    step.step()
    assert torch.equal(lr, torch.tensor(0.01))
    inner.param_groups[0]["lr"] = 0.5
    inner.param_groups[1]["lr"] = 0.1
    with pytest.raises(RuntimeError, match="two groups share one tensor as their lr and were given 0.5 and 0.1: give"):
        step.step()


def test_a_momentum_written_between_replays_is_noticed(recorded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its largest entry bounds the 16-bit input."""
    step, _ = ready(recorded)
    plan = step.optimizer._plan
    assert plan is not None
    noticed: list[str] = []
    monkeypatch.setattr(type(plan), "notice_changes", lambda self: noticed.append(recorded[-1]))
    recorded.append("a write")
    step.step()
    assert noticed == ["a write"]
    assert recorded[-1] == "replay"


def test_a_step_that_raises_is_no_warm_up(recorded: list[str]) -> None:
    inner, params = both_kinds(steepest.MuAdam)
    step = steepest.graphed(inner)
    in_place(params, 0)
    params[0].grad = params[0].grad.to_sparse()  # type: ignore[union-attr]
    for _ in range(3):
        with pytest.raises(RuntimeError, match="sparse"):
            step.step()
    params[0].grad = None
    in_place(params, 0)
    recorded.clear()
    for _ in range(3):
        step.step()
    assert recorded == ["eager", "eager", "capture", "replay"]


def test_gradients_are_zeroed_where_they_are(recorded: list[str]) -> None:
    step, params = ready(recorded)
    grads = [p.grad for p in params]
    step.zero_grad()
    assert all(p.grad is g and not g.any() for p, g in zip(params, grads, strict=True))
    step.step()


def test_loading_captures_anew(recorded: list[str]) -> None:
    step, _ = ready(recorded)
    saved = step.state_dict()
    recorded.clear()
    step.load_state_dict(saved)
    step.step()
    assert recorded == ["eager"]
    assert all(isinstance(group["lr"], torch.Tensor) for group in step.param_groups)


def test_refusals() -> None:
    optimizer, params = both_kinds(steepest.MuAdam)
    with pytest.raises(TypeError, match="takes an optimizer of steepest but got AdamW"):
        steepest.graphed(torch.optim.AdamW(params))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="of one CUDA device and the parameters are on cpu: use optimizer.step"):
        steepest.graphed(optimizer)
    exact, _ = both_kinds(steepest.Muon, polar="svd")
    with pytest.raises(RuntimeError, match=r"group 0 cannot be captured .* choose products: polar='auto'"):
        exact.make_capturable()


def test_step_hooks_are_refused() -> None:
    optimizer, _ = both_kinds(steepest.MuAdam)
    optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="a graph runs no step hooks"):
        steepest.graphed(optimizer)


def test_numbers_elsewhere_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta stands for a GPU, and is refused for what it is before that."""
    optimizer, _ = both_kinds(steepest.MuAdam)
    optimizer.param_groups[1]["betas"] = (torch.tensor(0.9, device="meta"), 0.95)
    with pytest.raises(ValueError, match="group 1: betas should be .* but is on the meta device"):
        optimizer.make_capturable()
    monkeypatch.setattr(optimizer, "check_numbers", lambda: None)
    text = "group 1 cannot be captured .* betas is a tensor on another device than cpu"
    with pytest.raises(RuntimeError, match=text):
        optimizer.make_capturable()


def test_triton_is_refused(recorded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    inner, params = both_kinds(steepest.MuAdam)
    step = steepest.graphed(inner)
    monkeypatch.setattr("steepest.step.plan.Plan.backends", {"triton"})
    for i in range(2):
        in_place(params, i)
        step.step()
    in_place(params, 2)
    with pytest.raises(RuntimeError, match="the Triton kernels read addresses from a table"):
        step.step()


def test_a_new_plan_is_not_made_inside_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = both_kinds(steepest.MuAdam, capturable=True)
    give_gradients(params, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="what it steps has changed since the last step: take one with these"):
        optimizer.step()
    assert not optimizer.state


def test_a_closure_is_refused(recorded: list[str]) -> None:
    step, _ = ready(recorded)
    with pytest.raises(RuntimeError, match="takes no closure: run the model and backward"):
        step.step(lambda: 0.0)  # type: ignore[arg-type]


def test_capturing_without_capturable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = both_kinds(steepest.MuAdam)
    give_gradients(params, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="make the optimizer with capturable=True, or use steepest.graphed"):
        optimizer.step()


def test_capturable_numbers_are_tensors_where_the_parameters_are() -> None:
    optimizer, params = both_kinds(steepest.MuAdam, capturable=True, lr=torch.tensor([0.02]))
    for group in optimizer.param_groups:
        assert all(group[key].shape == () and group[key].device == params[0].device for key in graph.ON_DEVICE)
    optimizer.param_groups[0]["lr"] = 0.5
    give_gradients(params, 0)
    optimizer.step()
    assert float(optimizer.param_groups[0]["lr"]) == 0.5
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)


def test_logits_are_clipped_in_a_graph(recorded: list[str]) -> None:
    """The maxima of every step reach the graph, which was captured with others."""
    pairs = [both_kinds(steepest.MuAdam) for _ in range(2)]
    clips = []
    for optimizer, params in pairs:
        layer = steepest.attention.AttentionLayer.separate(params[0], params[3], num_heads=4)
        clips.append(steepest.QKClip(optimizer, {"a": layer}, threshold=1.0))
    (inner, a), (plain, b) = pairs
    step = steepest.graphed(inner)
    for i in range(6):
        in_place(a, i)
        give_gradients(b, i)
        for clip in clips if i != 4 else ():
            clip.observe("a", torch.tensor([0.5, 2.0, 3.0, 4.0]).roll(i))
        step.step()
        plain.step()
    assert recorded.count("replay") == 4
    assert all_same_bits(a, b)
