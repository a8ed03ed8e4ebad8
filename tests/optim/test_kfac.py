"""What K-FAC's hooks see, and what it depends on. Its formulas are in tests/papers."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.zoo.kfac import PASSES
from support.kfac import (
    BATCH,
    CLASSES,
    damped_step,
    data,
    linear_network,
    linear_products,
    loss_of,
    outputs_gradients,
    with_weights,
)
from support.references import eigenbases_of, gap, gaussian
from support.training import all_same_bits, copies, same_states, state_copies


def affine(model: nn.Sequential, mix: Tensor, turn: Tensor) -> nn.Module:
    """The same function with other variables: inputs of the second layer through mix, its outputs through turn."""

    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = copy.deepcopy(model[0])
            self.second = copy.deepcopy(model[1])
            self.second.weight.data = torch.linalg.inv(turn) @ model[1].weight.data @ torch.linalg.inv(mix)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) @ mix.mT) @ turn.mT

    return Changed()


@pytest.mark.parametrize(("damping", "least", "most"), [(1e-24, 0.0, 1e-6), (1e-1, 1e-2, 10.0)])
def test_steps_do_not_depend_on_a_layers_variables_but_for_the_damping(
    damping: float, least: float, most: float
) -> None:
    """Inputs and outputs of a layer linearly mixed: the function after each step is the same one, up to rounding."""
    model = nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    with_weights(model)
    mix, turn = (torch.eye(3, dtype=torch.float64) + 0.4 * gaussian(3, 3, seed=s) for s in (31, 32))
    changed, x = affine(model, mix, turn), gaussian(64, 6, seed=33)
    target = gaussian(64, 3, seed=34)
    outputs = []
    for net in (model, changed):
        options = {"damping": damping, "betas": (0.5, 0.5), "precondition_frequency": 1, "refresh": "eigh"}
        optimizer = steepest.KFAC(net, lr=0.05, **options)
        for _ in range(10):
            optimizer.zero_grad()
            (net(x) - target).square().sum(1).mean().backward()
            optimizer.step()
        outputs.append(net(x).detach())
    assert least <= gap(outputs[1], outputs[0]) <= most


# ---- what is collected ----------------------------------------------------------------------------------------------


def backward(model: nn.Module, step: int = 0, scale: float = 1.0) -> None:
    (scale * loss_of(model, *data(step, 5))).backward()


def factors(optimizer: torch.optim.Optimizer, p: Tensor) -> list[Tensor]:
    """After a step with what was collected."""
    optimizer.step()
    return [optimizer.state[p][key].clone() for key in ("left", "right")]


def test_every_step_is_a_term_of_the_average() -> None:
    model = linear_network()
    optimizer = steepest.KFAC(model, lr=0.0, betas=(0.9, 0.8))
    weight, single, averages = model[0].weight, [], []
    for step in range(3):
        other = linear_network()
        watcher = steepest.KFAC(other)
        backward(other, step)
        single.append(factors(watcher, other[0].weight))
        optimizer.zero_grad()
        backward(model, step)
        averages = factors(optimizer, weight)
    weights = torch.tensor([0.64, 0.8, 1.0], dtype=torch.float64)
    for i, found in enumerate(averages):
        wanted = sum(w * each[i] for w, each in zip(weights, single)) / weights.sum()
        assert gap(found, wanted) < 1e-12
    assert optimizer.state[weight][PASSES] == 3


def test_what_hooks_do_not_see() -> None:
    """Evaluation, passes without gradients and after `remove_hooks`."""
    model = linear_network()
    optimizer = steepest.KFAC(model)
    backward(model)
    collected = copy.deepcopy(optimizer._batches)
    model.eval()
    backward(model, 1)
    model.train()
    with torch.no_grad():
        loss_of(model, *data(2, 5))
    optimizer.remove_hooks()
    backward(model, 3)
    for batch, before in zip(optimizer._batches.values(), collected.values(), strict=True):
        assert (batch.rows, batch.uses) == (before.rows, before.uses) == (BATCH, BATCH)
        assert torch.equal(batch.outputs, before.outputs)
        assert torch.equal(batch.inputs, before.inputs)
    assert not model[0]._forward_hooks


def test_a_layer_used_twice_counts_twice() -> None:
    layer = nn.Linear(5, 5, bias=False).double()
    optimizer = steepest.KFAC(nn.Sequential(layer, nn.Tanh(), layer))
    x = gaussian(BATCH, 5, seed=1)
    out = layer(torch.tanh(layer(x)))
    out.square().sum(1).mean().backward()
    middle = torch.tanh(x @ layer.weight.mT).detach()
    wanted = (middle.mT @ middle + x.mT @ x) / 2 / BATCH
    assert gap(factors(optimizer, layer.weight)[1][0], wanted) < 1e-12
    assert optimizer.state[layer.weight][PASSES] == 1


def test_tied_layers_share_a_weight() -> None:
    a, b = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
    b.weight = a.weight
    optimizer = steepest.KFAC(nn.Sequential(a, nn.Tanh(), b))
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
    b(a(torch.ones(3, 5))).sum().backward()
    assert (optimizer._batches[a.weight].rows, optimizer._batches[a.weight].uses) == (3, 6)
    optimizer.step()
    assert optimizer.state[a.weight][PASSES] == 1


def test_an_activation_in_place_and_a_named_input() -> None:
    """The gradient is that of the layer's own output."""

    class Model(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.layer, self.relu = nn.Linear(5, 6).double(), nn.ReLU(inplace=in_place)
            for i, p in enumerate(self.parameters()):
                p.data.copy_(gaussian(*p.shape, seed=i))

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.layer(input=x) if self.relu.inplace else self.layer(x))

    found = []
    for in_place in (False, True):
        model = Model(in_place)
        optimizer = steepest.KFAC(model)
        model(gaussian(BATCH, 5)).sum(1).mean().backward()
        found.append(factors(optimizer, model.layer.weight))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_sequences_are_rows() -> None:
    found = []
    for shape in ((BATCH, 5), (4, BATCH // 4, 5)):
        layer = nn.Linear(5, 3, bias=False).double()
        layer.weight.data.copy_(gaussian(3, 5))
        optimizer = steepest.KFAC(layer)
        layer(gaussian(BATCH, 5).reshape(shape)).square().sum(-1).mean().backward()
        found.append(factors(optimizer, layer.weight))
    assert all(gap(a, b) < 1e-12 for a, b in zip(*found))


def test_a_pass_that_is_not_finite_is_left_out() -> None:
    """Factors, bases, momentum and weights bit for bit; what comes after is as if it never was."""
    (model, twin), optimizers = (linear_network(), linear_network()), []
    for net in (model, twin):
        optimizers.append(steepest.KFAC(net, lr=0.01, precondition_frequency=1))
        backward(net)
        optimizers[-1].step()
        optimizers[-1].zero_grad()
    before, weights = state_copies(optimizers[0]), copies(model.parameters())
    backward(model, 1, scale=float("inf"))
    optimizers[0].step()
    assert all_same_bits(model.parameters(), weights)
    for old, new in zip(before, state_copies(optimizers[0]), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old if key != "clock")
    for net, optimizer in zip((model, twin), optimizers):
        optimizer.zero_grad()
        backward(net, 2)
        optimizer.step()
    assert all_same_bits(model.parameters(), twin.parameters())


def test_a_first_pass_that_is_not_finite() -> None:
    model = linear_network()
    optimizer = steepest.KFAC(model, lr=0.01, precondition_frequency=3)
    start, lengths = copies(model.parameters()), []
    for step in range(6):
        optimizer.zero_grad()
        backward(model, step, scale=float("nan") if step == 0 else 1.0)
        optimizer.step()
        lengths.append(max(gap(p.detach(), s) for p, s in zip(model.parameters(), start)))
    assert lengths[0] == 0
    assert all(0 < length < 1 for length in lengths[1:])


def test_a_layer_without_gradient_is_no_division_by_zero() -> None:
    model = linear_network()
    model[1].weight.data.zero_()
    optimizer = steepest.KFAC(model, lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())


def test_a_long_side_may_have_no_factor() -> None:
    layer = nn.Linear(9, 4, bias=False).double()
    optimizer = steepest.KFAC(layer, max_preconditioner_dim=5, lr=0.01)
    start = layer.weight.detach().clone()
    layer(gaussian(BATCH, 9)).square().sum(1).mean().backward()
    g = layer.weight.grad.clone()
    s = factors(optimizer, layer.weight)[0][0]
    assert optimizer.state[layer.weight]["right"].numel() == 0
    wanted = torch.linalg.inv(s + 1e-3**0.5 * torch.eye(4, dtype=s.dtype)) @ (0.1 * g)
    assert gap(start - layer.weight.detach(), 0.01 * wanted) < 1e-9


@pytest.mark.parametrize("norm", ["spectral", "sign"])
def test_in_other_norms_the_step_has_length_one_in_the_metric(norm: str) -> None:
    """|| S^1/2 (W - W') A^1/2 || = lr in the spectral norm, damping aside; and in the bases for the largest entry."""
    layer = nn.Linear(5, 4, bias=False).double()
    layer.weight.data.copy_(gaussian(4, 5))
    options = {"norm": norm, "polar": "svd", "adjust_lr_fn": "none", "damping": 1e-20, "refresh": "eigh"}
    optimizer = steepest.KFAC(layer, lr=0.01, **options)
    layer(gaussian(64, 5)).tanh().square().sum(1).mean().backward()
    start = layer.weight.detach().clone()
    optimizer.step()
    state = optimizer.state[layer.weight]
    turned = state["left_basis"][0].mT @ (start - layer.weight.detach()) @ state["right_basis"][0]
    turned = state["left_values"][0].sqrt()[:, None] * turned * state["right_values"][0].sqrt()
    length = torch.linalg.matrix_norm(turned, 2) if norm == "spectral" else turned.abs().max()
    assert gap(length, torch.tensor(0.01)) < 1e-6


# ---- as an optimizer ------------------------------------------------------------------------------------------------


def mixed_network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3, groups=2)
    return nn.Sequential(conv, nn.Conv2d(4, 3, 3), nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, CLASSES)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Sequence[int]) -> None:
    for step in steps:
        x, y = data(step, 2, 8, 8)
        optimizer.zero_grad()
        loss_of(model, x.to(next(model.parameters()).dtype), y).backward()
        optimizer.step()


def test_what_goes_where() -> None:
    model = mixed_network()
    optimizer = steepest.KFAC(model, adamw_weight_decay=0.1)
    groups = [(group["use_muon"], group["param_names"], group["weight_decay"]) for group in optimizer.param_groups]
    assert groups == [
        (True, ["1.weight", "4.weight"], 0.0),
        (False, ["0.weight"], 0.1),
        (False, ["0.bias", "1.bias", "3.weight", "3.bias", "4.bias"], 0.0),
    ]
    start = copies(model.parameters())
    train(model, optimizer, range(2))
    assert not any(torch.equal(p, s) for p, s in zip(model.parameters(), start))
    assert "KFAC" in optimizer.describe()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_run(dtype: torch.dtype) -> None:
    model, other = mixed_network(dtype), mixed_network(dtype)
    options = {"precondition_frequency": 2, "lr": 1e-3}
    optimizer, resumed = steepest.KFAC(model, **options), steepest.KFAC(other, **options)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert same_states(state_copies(optimizer), state_copies(resumed))
    assert optimizer.state[model[4].weight]["left"].dtype == torch.float32
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert all_same_bits(model.parameters(), other.parameters())


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_model_and_optimizer_collects_for_itself(clone: Any) -> None:
    model = mixed_network()
    optimizer = steepest.KFAC(model, lr=1e-3)
    train(model, optimizer, range(2))
    other, second = clone((model, optimizer))
    kept, states = copies(model.parameters()), state_copies(optimizer)
    train(other, second, range(2, 4))
    assert all_same_bits(model.parameters(), kept)
    assert same_states(state_copies(optimizer), states)
    train(model, optimizer, range(2, 4))
    assert all_same_bits(model.parameters(), other.parameters())
    second.remove_hooks()
    assert not other[4]._forward_hooks
    assert model[4]._forward_hooks


def test_frozen_then_unfrozen() -> None:
    model = linear_network()
    model[0].weight.requires_grad_(False)
    optimizer, start = steepest.KFAC(model, lr=0.01), copies(model.parameters())
    for frozen in (True, False):
        model[0].weight.requires_grad_(not frozen)
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        assert torch.equal(model[0].weight, start[0]) == frozen
        assert (model[0].weight in optimizer.state) != frozen


def test_a_closure() -> None:
    model, twin = linear_network(), linear_network()
    optimizer, second = steepest.KFAC(model, lr=0.01), steepest.KFAC(twin, lr=0.01)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, *data(0, 5))
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss is not None
    backward(twin)
    second.step()
    assert all_same_bits(model.parameters(), twin.parameters())


def micro_batches(model: nn.Module, sizes: Sequence[int], step: int, scale: float = 1.0, total: bool = False) -> None:
    """Backward passes of parts of the batch, whose losses add up to its mean (total: to its sum) times the scale."""
    x, y = data(step, 5)
    for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
        share = float(len(a)) if total else len(a) / len(x)
        (scale * share * loss_of(model, a, b)).backward()


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "two micro-batches": ({}, {"sizes": (8, 8)}, 1.0),
    "eight micro-batches": ({}, {"sizes": (2,) * 8}, 1.0),
    "unequal micro-batches": ({}, {"sizes": (3, 9, 4)}, 1.0),
    "a sum": ({"loss_scale": "sum"}, {"sizes": (BATCH,), "total": True}, float(BATCH)),
    "sums of micro-batches": ({"loss_scale": "sum"}, {"sizes": (4, 12), "total": True}, float(BATCH)),
    "a scale": ({"loss_scale": 32.0}, {"sizes": (8, 8), "scale": 32.0}, 32.0),
    "a scale on the device": ({"loss_scale": torch.tensor(32.0)}, {"sizes": (BATCH,), "scale": 32.0}, 32.0),
}


@pytest.mark.parametrize("way", WAYS)
def test_factors_are_those_of_the_mean_over_the_whole_batch(way: str) -> None:
    """The published formula, from gradients of single samples in fp64; the gradient is what it was called with."""
    options, passes, factor = WAYS[way]
    model, b2, damping = linear_network(), 0.9, 1e-2
    shared = {"damping": damping, "precondition_frequency": 1, "refresh": "eigh", "adamw_lr": 0.0}
    optimizer = steepest.KFAC(model, lr=1e-3, betas=(0.0, b2), **shared, **options)
    averages: dict[int, list[Tensor]] = {}
    for t in range(1, 5):
        x, y = data(t, 5)
        optimizer.zero_grad()
        twin = copy.deepcopy(model)
        grads = torch.autograd.grad(loss_of(twin, x, y), list(twin.parameters()))
        micro_batches(model, step=t, **passes)
        optimizer.step()
        for k in range(2):
            pair = linear_products(*outputs_gradients(twin, k, x, y), twin[k])
            old = averages.get(k, [torch.zeros_like(f) for f in pair])
            averages[k] = [b2 * f + (1 - b2) * product for f, product in zip(old, pair)]
            corrected = [f / (1 - b2**t) for f in averages[k]]
            for key, wanted in zip(("left", "right"), corrected):
                assert gap(optimizer.state[model[k].weight][key][0], wanted) < 1e-12
            bases = eigenbases_of(optimizer.state[model[k].weight], corrected)
            u = damped_step(*corrected, bases, grads[k] * factor, damping)
            assert gap(model[k].weight.detach(), twin[k].weight.detach() - 1e-3 * u) < 1e-10


def test_the_refresh_of_a_batch_does_not_depend_on_its_parts() -> None:
    """In fp32 with the default refresh, which takes a factor by whether it is symmetric to the bit."""
    trained = []
    for parts in (1, 2, 4):
        model = with_weights(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))
        optimizer = steepest.KFAC(model, precondition_frequency=1)
        for t in range(8):
            x = gaussian(8, 6, seed=t).float()
            optimizer.zero_grad()
            for part in x.chunk(parts):
                (model(part).square().mean() / parts).backward()
            optimizer.step()
            for layer in (model[0], model[2]):
                assert all(torch.equal(P, P.mT) for P in factors(optimizer, layer.weight))
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert max(gap(trained[0], other) for other in trained[1:]) < 1e-5


def test_a_pass_without_a_step_is_forgotten_with_its_gradients() -> None:
    forget: list[Callable[[nn.Module, torch.optim.Optimizer], None]] = [
        lambda model, optimizer: optimizer.zero_grad(),
        lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
        lambda model, optimizer: model.zero_grad(),
    ]
    runs = []
    for each in [None, *forget]:
        model = linear_network()
        optimizer = steepest.KFAC(model, lr=0.01)
        for step in range(3):
            if each is not None:
                backward(model, 50 + step)
                each(model, optimizer)
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        runs.append((copies(model.parameters()), state_copies(optimizer)))
    for weights, states in runs[1:]:
        assert all_same_bits(weights, runs[0][0])
        assert same_states(states, runs[0][1])


def test_a_gradient_scaler() -> None:
    """Factors are those of the unscaled loss, and a step that is not taken leaves them alone."""
    model, twin = linear_network(), linear_network()
    optimizer, plain = steepest.KFAC(model, lr=0.01), steepest.KFAC(twin, lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        optimizer.zero_grad()
        plain.zero_grad()
        before = state_copies(optimizer)
        loss = loss_of(model, *data(step, 5))
        scaler.scale(loss * float("inf") if step == 1 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step == 1:
            kept = [{key: t for key, t in state.items() if key != "clock"} for state in state_copies(optimizer)]
            assert same_states(kept, [{key: t for key, t in state.items() if key != "clock"} for state in before])
        else:
            backward(twin, step)
            plain.step()
    for p, q in zip(model.parameters(), twin.parameters()):
        assert gap(*(factors[0] for factors in ([optimizer.state[p]["left"]], [plain.state[q]["left"]]))) < 1e-6


NO_SCALES: tuple[Any, ...] = (
    *(0, 0.0, -1.0, float("nan"), float("inf"), "mean", None, True, [1.0], 10**400),
    *(
        torch.tensor(0.0),
        torch.tensor(-1.0),
        torch.tensor(float("nan")),
        torch.tensor(float("inf")),
        torch.tensor(True),
    ),
)


@pytest.mark.parametrize("value", NO_SCALES, ids=str)
def test_what_is_no_loss_scale_is_refused_by_name(value: Any) -> None:
    """In the constructor, and in a group before a step writes anything."""
    model = nn.Linear(3, 2)
    with pytest.raises((TypeError, ValueError), match=r"^loss_scale should be .* but is: "):
        steepest.KFAC(model, loss_scale=value)
    optimizer = steepest.KFAC(model)
    for _ in range(2):
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()
    weights, state = copies(model.parameters()), state_copies(optimizer)
    optimizer.param_groups[0]["loss_scale"] = value
    with pytest.raises((TypeError, ValueError), match=r"^group 0: loss_scale should be .* but is: "):
        optimizer.step()
    assert all_same_bits(weights, model.parameters())
    assert same_states(state, state_copies(optimizer))


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_loss_scale_of_its_own_beside_a_scaler(unscaled: bool) -> None:
    """A loss that the user multiplies by 8 and a scaler by 1024 has the factors of the loss itself."""
    factors = []
    for loss_scale, scale in ((1.0, None), (8.0, 1024.0)):
        model = linear_network()
        optimizer = steepest.KFAC(model, loss_scale=loss_scale)
        loss = loss_of(model, *data(0, 5)) * loss_scale
        if scale is None:
            loss.backward()
            optimizer.step()
        else:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            scaler.scale(loss).backward()
            if unscaled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
        factors.append([optimizer.state[p]["left"] for p in model.parameters()])
    assert all(gap(found, wanted) < 1e-6 for found, wanted in zip(factors[1], factors[0], strict=True))


@pytest.mark.parametrize("told", [False, True])
def test_gradients_that_were_unscaled_before_the_step(told: bool) -> None:
    """What a hook saw is divided by the scale of the scaler that asks, unless the groups have the scale already."""
    model = linear_network()
    optimizer = steepest.KFAC(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model, *data(0, 5))).backward()
    scaler.unscale_(optimizer)
    for group in optimizer.param_groups if told else ():
        group["loss_scale"] = scaler.get_scale()
    scaler.step(optimizer)
    twin = linear_network()
    plain = steepest.KFAC(twin)
    backward(twin)
    plain.step()
    assert all(gap(p.detach(), q.detach()) < 1e-12 for p, q in zip(model.parameters(), twin.parameters()))


def test_a_gradient_that_went_past_the_hooks() -> None:
    model = linear_network()
    optimizer, start = steepest.KFAC(model), copies(model.parameters())
    x, y = data(0, 5)
    nn.functional.cross_entropy(x @ model[0].weight.mT @ model[1].weight.mT, y).backward()
    with pytest.raises(RuntimeError, match=r"shape \(6, 5\) has a gradient and no factors: no backward pass went"):
        optimizer.step()
    assert all_same_bits(model.parameters(), start)


def test_a_weight_that_was_replaced() -> None:
    model = linear_network()
    steepest.KFAC(model)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    with pytest.raises(RuntimeError, match="weight of Linear.* is not among the optimizer's parameters any more"):
        backward(model)


# what is built, the error, its text
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "parameters": (
        lambda: steepest.KFAC(nn.Linear(2, 2).parameters()),  # type: ignore[arg-type]
        TypeError,
        "KFAC takes a module, whose layers it watches, but is given: generator",
    ),
    "no layers": (lambda: steepest.KFAC(nn.LayerNorm(3)), ValueError, "KFAC found no Linear or Conv2d"),
    "damping": (lambda: steepest.KFAC(nn.Linear(2, 2), damping=0.0), ValueError, "damping should be > 0 but is: 0.0"),
    "lr": (lambda: steepest.KFAC(nn.Linear(2, 2), lr=-1.0), ValueError, "Learning rate should be >= 0 but is: -1.0"),
    "betas": (lambda: steepest.KFAC(nn.Linear(2, 2), betas=(0.9, 1.0)), ValueError, "betas should be two numbers in"),
    "shampoo_beta": (
        lambda: steepest.KFAC(nn.Linear(2, 2), shampoo_beta=0.9),
        TypeError,
        r"KFAC does not take shampoo_beta: the decay rate of its factors is betas\[1\]",
    ),
    "blocks": (
        lambda: steepest.KFAC(nn.Linear(2, 2), block_preconditioner=True),
        TypeError,
        "KFAC does not take block_preconditioner",
    ),
    "heads": (
        lambda: steepest.KFAC(nn.Linear(2, 2), num_heads=2),
        TypeError,
        "KFAC does not take num_heads: its factors are those of whole layers",
    ),
    "transposed": (lambda: steepest.KFAC(nn.Linear(2, 2), transposed=True), TypeError, "KFAC does not take transposed"),
    "parity": (lambda: steepest.KFAC(nn.Linear(2, 2), parity="authors"), ValueError, "parity 'authors' is not known"),
    "eps": (
        lambda: steepest.KFAC(nn.Linear(2, 2), eps=1.0),
        TypeError,
        "unexpected argument 'eps'; it takes .*damping",
    ),  # type: ignore[call-arg]
}


@pytest.mark.parametrize(("build", "error", "text"), WRONG.values(), ids=WRONG)
def test_construction(build: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build()


def test_a_group_that_cuts_its_layers_later_is_refused() -> None:
    optimizer = steepest.KFAC(nn.Linear(2, 2))
    optimizer.param_groups[0]["num_heads"] = 2
    with pytest.raises(ValueError, match="KFAC does not take num_heads=2: its factors are those of whole layers"):
        optimizer.step()
