"""Parameters that change under an optimizer: other memory, strides, dtype or shape between two steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from support.configurations import CONFIGURATIONS, training
from support.slow import slow
from support.training import all_same_bits, copies, give_gradients, parameters

SHAPES = ((8, 5), (5, 8), (6, 6), (7,))
METHODS: dict[str, Any] = {
    "Muon": steepest.Muon,
    "MuAdam": steepest.MuAdam,
    "SOAP": lambda groups: steepest.SOAP(groups, precondition_frequency=1),
    "ProductNormDescent": steepest.ProductNormDescent,
}


def made(method: str) -> tuple[Any, list[nn.Parameter]]:
    params = parameters(SHAPES)
    return METHODS[method]([{"params": params[:3]}, {"params": params[3:], "use_muon": False}]), params


def trained(method: str, change: Callable[[list[nn.Parameter], Any], None], steps: int = 5) -> list[Tensor]:
    """The weights after steps in the middle of which something changes."""
    optimizer, params = made(method)
    for step in range(steps):
        if step == 3:
            change(params, optimizer)
        give_gradients(params, step)
        optimizer.step()
    return copies(params)


def nothing(params: list[nn.Parameter], optimizer: Any) -> None:
    pass


def other_memory(params: list[nn.Parameter], optimizer: Any) -> None:
    for p in params:
        p.data = p.data.clone()


def one_flat_memory(params: list[nn.Parameter], optimizer: Any) -> None:
    """As wrappers that keep all weights in one bucket."""
    flat = torch.cat([p.detach().flatten() for p in params])
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.data = part.view(p.shape)


def other_strides(params: list[nn.Parameter], optimizer: Any) -> None:
    for p in params:
        p.data = p.data.mT.contiguous().mT if p.ndim > 1 else p.data


def every_second_column(params: list[nn.Parameter], optimizer: Any) -> None:
    for p in params[:3]:
        p.data = torch.stack([p.data, torch.full_like(p.data, torch.nan)], dim=-1)[..., 0]


def swapped(params: list[nn.Parameter], optimizer: Any) -> None:
    """As `torch.__future__.set_swap_module_params_on_conversion` does in module.to(...): the objects stay."""
    for p in params:
        p.grad = None
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone()))


CHANGES = (other_memory, one_flat_memory, other_strides, every_second_column, swapped)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", METHODS)
def test_weights_may_move_in_memory(method: str, change: Any) -> None:
    assert all_same_bits(trained(method, change), trained(method, nothing))


def other_shape(params: list[nn.Parameter], optimizer: Any) -> None:
    params[0].data = torch.ones(8, 9)


def swapped_for_another_shape(params: list[nn.Parameter], optimizer: Any) -> None:
    params[0].grad = None
    torch.utils.swap_tensors(params[0], nn.Parameter(torch.ones(8, 9)))


@pytest.mark.parametrize("change", [other_shape, swapped_for_another_shape])
@pytest.mark.parametrize("method", METHODS)
def test_a_weight_of_another_shape_is_named_before_anything_is_written(method: str, change: Any) -> None:
    optimizer, params = made(method)
    give_gradients(params, 0)
    optimizer.step()
    change(params, optimizer)
    before = copies(params)
    give_gradients(params, 1)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"parameter 0 \(group 0, shape \(8, 9\)\) has a state '\w+' of shape \(8, 5\)"
        ):
            optimizer.step()
    assert all_same_bits(before, params)


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_of_another_shape_begins_anew_when_its_state_is_deleted(method: str) -> None:
    optimizer, params = made(method)
    give_gradients(params, 0)
    optimizer.step()
    other_shape(params, optimizer)
    del optimizer.state[params[0]]
    before = copies(params)
    for step in (1, 2):
        give_gradients(params, step)
        optimizer.step()
    assert not torch.equal(before[0], params[0])
    assert all(bool(torch.isfinite(p).all()) for p in params)


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_swapped_with_a_vector_is_an_error_that_says_what_it_is(method: str) -> None:
    optimizer, params = made(method)
    give_gradients(params, 0)
    optimizer.step()
    params[0].grad = None
    torch.utils.swap_tensors(params[0], nn.Parameter(torch.ones(40)))
    give_gradients(params, 1)
    with pytest.raises((RuntimeError, ValueError), match=r"shape \(40,\)"):
        optimizer.step()


@pytest.mark.parametrize("name", [name for name, (cls, _) in CONFIGURATIONS.items() if cls is not steepest.KFAC])
@pytest.mark.parametrize(
    ("before", "after"), [("float32", "float64"), slow("float64", "float32"), ("float32", "bfloat16")]
)
def test_weights_of_another_dtype_go_on(name: str, before: str, after: str) -> None:
    """As by model.double(): the state stays in the dtype it was made in."""
    cls, options = CONFIGURATIONS[name]
    run = training(cls, options, dtype=getattr(torch, before))
    run.step(0)
    for p in run.params.values():
        p.grad, p.data = None, p.data.to(getattr(torch, after))
    start = run.weights()
    for number in range(1, 4):
        run.step(number)
    assert all(w.isfinite().all() for w in run.weights())
    if cls is not steepest.ProdigyMuon:  # whose first steps are too short for bf16
        assert not torch.equal(start[0], run.weights()[0])
