"""Which models `infinite_descent` takes, and what it says to the others and to bad data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.zoo.aion import exponents, poles
from support.references import gap, gaussian

X, Y = gaussian(40, 4), gaussian(40, 1, seed=1)
GRID = torch.linspace(0, 3, 40, dtype=torch.float64)
WAVE = torch.exp(-GRID) * torch.cos(4 * GRID)


class Of(nn.Module):
    """A layer whose output is any function of a linear map."""

    def __init__(self, function: Callable[[Tensor], Tensor], outputs: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(4, outputs)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


def row(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)


CLOSED: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 1),
    "frozen ReLU before": lambda: nn.Sequential(
        nn.Linear(4, 6).requires_grad_(False), nn.ReLU(inplace=True), nn.Linear(6, 1)
    ),
    "frozen recurrence before": lambda: Recurrent(),
    "frozen attention before": lambda: nn.Sequential(Attention().requires_grad_(False), nn.Linear(4, 1)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(2, 1)
    ),
    "dropout that is off": lambda: nn.Sequential(nn.Linear(4, 1), nn.Dropout()).eval(),
    "products of entries": lambda: nn.Sequential(nn.Flatten(), Of(lambda h: row(h * h.roll(1, -1)))),
    "square": lambda: Of(lambda h: row(h**2 + h.square() * 0.5 - h / 3)),
    "residual": lambda: Of(lambda h: row(torch.cat([h, h * h], -1))),
    "where": lambda: Of(lambda h: row(torch.where(torch.arange(3) > 0, h, 0.0))),
    "matrix products": lambda: Of(lambda h: torch.einsum("ni,nj->nij", h, h).mean((1, 2))[:, None]),
    "exp": lambda: Of(lambda h: row(torch.exp(-0.1 * h) * h)),
    "sin": lambda: Of(lambda h: row(torch.sin(h) + torch.cos(h) * h)),
    "linear, then AION": lambda: nn.Sequential(nn.Linear(4, 1), steepest.AION(1)),
    "AION, then linear": lambda: nn.Sequential(steepest.AION(1, 4, 2), nn.Linear(2, 1)),
}


class Recurrent(nn.Module):
    """A frozen LSTM and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(1, 5, batch_first=True).requires_grad_(False)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x[..., None])[0][:, -1])


class Attention(nn.Module):
    """Rows that look at one another, with dropout of 0."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x[None, None]
        return nn.functional.scaled_dot_product_attention(heads, heads, heads)[0, 0]


@pytest.mark.parametrize("name", CLOSED)
def test_a_closed_model_is_solved(name: str) -> None:
    torch.manual_seed(0)
    model = CLOSED[name]().double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loss = float((model(X) - Y).square().mean().detach())
    root = steepest.infinite_descent(model, X, Y, max_iterations=8)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    root.apply(model)
    assert float((model(X) - Y).square().mean().detach()) < loss
    found = torch.autograd.grad((model(X) - Y).square().mean(), [p for p in model.parameters() if p.requires_grad])
    norm = float(torch.cat([g.flatten() for g in found]).norm())
    assert norm == pytest.approx(root.gradient_norm, rel=1e-6, abs=1e-12)


def in_place(h: Tensor) -> Tensor:
    h += 1
    return row(h)


OPEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "relu": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)),
        r"layer '1' \(ReLU\) is not closed: .* through its relu\. Accepted are .* Freeze the parameters before it",
    ),
    "nested": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 1)),
        r"layer '1\.1' \(Tanh\) .* its tanh",
    ),
    "a function": (lambda: Of(lambda h: row(nn.functional.relu(h))), r"the model \(Of\) .* its relu"),
    "softmax": (lambda: nn.Sequential(nn.Linear(4, 1), nn.Softmax(-1)), r"layer '1' \(Softmax\) .* its _softmax"),
    "norm": (lambda: nn.Sequential(nn.Linear(4, 1), nn.LayerNorm(1)), r"layer '1' \(LayerNorm\) .* native_layer_norm"),
    "division": (lambda: Of(lambda h: row(1 / h)), "its (reciprocal|div)"),
    "a root": (lambda: Of(lambda h: row(h**0.5)), "its pow"),
    "a negative power": (lambda: Of(lambda h: row(h**-1)), "its (pow|reciprocal)"),
    "exp of exp": (lambda: Of(lambda h: row(h.exp().exp())), "its exp"),
    "two AIONs": (lambda: nn.Sequential(steepest.AION(1, 4), steepest.AION(1)), r"layer '1' \(AION\) .* its exp"),
    "detach": (lambda: Of(lambda h: row(h.detach())), "its detach"),
    "item": (lambda: Of(lambda h: row(h) * h.sum().item()), "its _local_scalar_dense"),
    "floor": (lambda: Of(lambda h: row(torch.div(h, 2, rounding_mode="floor"))), "its div"),
    "whole numbers": (lambda: Of(lambda h: row(h) + h.long().sum()), "its _to_copy"),
    "fp32": (lambda: Of(lambda h: row(h).float()), r"rounds what depends on free parameters \(_to_copy\): leave it"),
    "in place": (lambda: Of(in_place), r"the model \(Of\) changes a tensor in place \(add_\)"),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(4, 1), nn.Dropout()),
        r"layer '1' \(Dropout\) is random .* call model\.eval\(\)",
    ),
    "dropout of constants": (lambda: nn.Sequential(nn.Dropout(), nn.Linear(4, 1)), r"layer '0' \(Dropout\) is random"),
}


@pytest.mark.parametrize("name", OPEN)
def test_a_model_that_is_not_closed_is_refused_with_its_layer(name: str) -> None:
    make, text = OPEN[name]
    torch.manual_seed(0)
    model = make().double()
    state, before = torch.get_rng_state(), {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=text):
        steepest.infinite_descent(model, X, Y)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def with_nan() -> nn.Module:
    model = steepest.AION(1)
    with torch.no_grad():
        model.omega.fill_(torch.nan)
    return model


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nan in y": ({"y": torch.where(GRID > 2, torch.nan, WAVE)}, "y should be finite but 13 of its entries are not"),
    "inf in x": ({"x": torch.where(GRID > 2, torch.inf, GRID)}, "x should be finite but 13 of its entries are not"),
    "shape": ({"y": WAVE[:-1]}, r"y should have the output's shape \(40, 1\) but has: \(39,\)"),
    "columns": ({"y": WAVE[:, None].expand(40, 2)}, r"but has: \(40, 2\)"),
    "empty": ({"x": GRID[:0], "y": WAVE[:0]}, r"there should be data but y has shape: \(0,\)"),
    "too few": (
        {"model": steepest.AION(3), "x": GRID[:11], "y": WAVE[:11]},
        r"11 values at different x do not determine 12 free parameters of AION\(units=3",
    ),
    "one x": ({"x": torch.ones(40)}, "1 values at different x do not determine 4 free parameters"),
    "complex x": ({"x": GRID + 0j}, "x should be real but is: torch.complex128"),
    "complex y": ({"y": WAVE + 0j}, "should be real but are: torch.complex128"),
    "a list for x": ({"x": [1.0, 2.0]}, "x should be a tensor, or a tuple of tensors, but has: list"),
    "a list for y": ({"y": [1.0, 2.0]}, "y should be a tensor but is: list"),
    "huge y": ({"y": WAVE * 1e200}, "the squares of y should fit fp64 but their mean is inf: rescale y"),
    "tiny y": ({"y": WAVE * 1e-200}, "the squares of y should fit fp64 but their mean is 0e[+]00: rescale y"),
    "no steps": ({"max_iterations": 0}, "max_iterations should be at least 1 but is: 0"),
    "frozen": ({"model": steepest.AION(1).requires_grad_(False)}, "no parameter that requires a gradient"),
    "nan in a parameter": ({"model": with_nan()}, "should be real and finite, but 'omega' is not: torch.float32"),
    "TorchScript": ({"model": torch.jit.script(nn.Linear(4, 1))}, "RecursiveScriptModule at '' is a wrapper: give"),
    "DataParallel": ({"model": nn.DataParallel(steepest.AION(1))}, "DataParallel at '' is a wrapper: give the module"),
    "inputs": ({"x": X}, r"x should have shape \(\.\.\., 1\) but has: \(40, 4\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_named(name: str) -> None:
    changed, text = BAD[name]
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=text):
        steepest.infinite_descent(**{"model": steepest.AION(1), "x": GRID, "y": WAVE, **changed})


def test_a_loss_that_is_not_finite_is_named() -> None:
    model = steepest.AION(1, inputs=4).double()
    with torch.no_grad():
        model.alpha.fill_(1e4)
    with pytest.raises(ValueError, match=r"the loss at the model's parameters is not finite: bring x, or AION's alpha"):
        steepest.infinite_descent(model, X, Y)


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 0, 1), (1, 1, -2)])
def test_counts_of_an_aion_are_positive(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="units, inputs and outputs should be at least 1 but are: "):
        steepest.AION(*counts)


def test_gradients_may_be_off_where_it_is_called() -> None:
    with torch.inference_mode():
        model = steepest.AION(1)
        assert steepest.infinite_descent(model, GRID, WAVE).iterations == 1
    with torch.no_grad():
        assert steepest.infinite_descent(nn.Linear(4, 1), X, Y).iterations == 1


def test_what_was_not_reached_shows() -> None:
    """One step from each start leaves a gradient, which the answer has."""
    noise = WAVE + 0.1 * gaussian(40)
    torch.manual_seed(0)
    short = steepest.infinite_descent(steepest.AION(2).double(), GRID, noise, max_iterations=1)
    torch.manual_seed(0)
    whole = steepest.infinite_descent(steepest.AION(2).double(), GRID, noise)
    assert whole.gradient_norm < 1e-10 < 1e-4 < short.gradient_norm
    assert (whole.definite, short.definite) == (True, None)


@pytest.mark.parametrize("dtype, within", [(torch.float32, 1e-6), (torch.bfloat16, 0.1)])
def test_other_dtypes_are_solved_in_fp64_and_moved_in_theirs(dtype: torch.dtype, within: float) -> None:
    torch.manual_seed(0)
    model = steepest.AION(1, dtype=dtype)
    root = steepest.infinite_descent(model, GRID, WAVE)
    assert root.iterations == 1
    assert {step.dtype for step in root.delta.values()} == {torch.float64}
    root.apply(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert float((model(GRID[:, None])[:, 0] - WAVE).detach().abs().max()) < within


def test_whole_numbers_are_data_too() -> None:
    torch.manual_seed(0)
    x = torch.arange(30)
    root = steepest.infinite_descent(steepest.AION(1), x, torch.cos(0.7 * x.double()))
    assert root.iterations == 1


def test_a_shared_parameter_is_one_parameter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 1)).double()
    model[1].weight = model[0].weight
    root = steepest.infinite_descent(model, X, Y)
    assert root.delta.keys() == {"0.weight", "2.weight", "2.bias"}
    root.apply(model)
    ones = torch.cat([X, torch.ones(40, 1, dtype=torch.float64)], 1)
    assert gap(model(X).detach(), ones @ torch.linalg.lstsq(ones, Y).solution) < 1e-8


def test_poles_are_the_powers_of_a_recurrence() -> None:
    """Fibonacci's numbers, and in conjugate pairs those of a damped wave; fewer where there are fewer."""
    values = [1.0, 1.0]
    while len(values) < 20:
        values.append(values[-1] + values[-2])
    (found,) = poles(torch.tensor(values, dtype=torch.float64)[:, None], [2])
    assert sorted(found.real.tolist()) == pytest.approx([(1 - 5**0.5) / 2, (1 + 5**0.5) / 2], abs=1e-10)
    for z in exponents(GRID, WAVE[:, None], [2, 4]):
        assert len(z) == 1
        assert z[0].item() == pytest.approx(-1 + 4j, abs=1e-10)
