"""The average of the iterates that SPlus keeps: put in place of the weights and back, saved, and left alone."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import Tensor

import steepest
from support.problems import gap
from support.training import all_same_bits, both_kinds, copies, give_gradients, same_states, state_copies, train

RATE = 0.8


def averaged(start: int = 3, dtype: torch.dtype = torch.float64) -> tuple[steepest.SPlus, list[torch.nn.Parameter]]:
    optimizer, params = both_kinds(steepest.SPlus, dtype, average_rate=RATE, precondition_frequency=2)
    train(optimizer, params, range(start))
    return optimizer, params


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_eval_shows_the_average_of_every_parameter_and_train_the_weights(dtype: torch.dtype) -> None:
    optimizer, params = averaged(0, dtype)
    wanted = [torch.zeros_like(p, dtype=torch.float64) for p in params]
    for step in range(5):
        train(optimizer, params, range(step, step + 1))
        wanted = [RATE * a + (1 - RATE) * p.detach() for a, p in zip(wanted, params)]
    weights = copies(params)
    optimizer.eval()
    optimizer.eval()  # no more than once
    for p, a in zip(params, wanted):
        assert gap(p.detach(), a / (1 - RATE**5)) < (1e-12 if dtype == torch.float64 else 5e-3)
    optimizer.train()
    assert all_same_bits(params, weights)
    optimizer.train()
    assert all_same_bits(params, weights)


def test_a_look_at_the_average_changes_nothing() -> None:
    (looked, a), (plain, b) = averaged(), averaged()
    looked.eval()
    looked.train()
    for optimizer, params in ((looked, a), (plain, b)):
        train(optimizer, params, range(3, 6))
    assert all_same_bits(a, b)
    assert same_states(state_copies(looked), state_copies(plain))


def test_a_step_of_averages_is_refused() -> None:
    optimizer, params = averaged()
    optimizer.eval()
    before, states = copies(params), state_copies(optimizer)
    give_gradients(params, 9)
    with pytest.raises(RuntimeError, match=r"the weights are averages since eval\(\); call train\(\) before the next"):
        optimizer.step()
    assert all_same_bits(params, before)
    assert same_states(state_copies(optimizer), states)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_checkpoint_may_be_made_of_averages(dtype: torch.dtype) -> None:
    """What the model saves are the averages, and the optimizer the weights beside them."""
    (optimizer, params), (second, others) = averaged(3, dtype), averaged(0, dtype)
    weights = copies(params)
    optimizer.eval()
    file = io.BytesIO()
    torch.save(([p.data for p in params], optimizer.state_dict()), file)
    file.seek(0)
    saved, state = torch.load(file, weights_only=True)
    for p, value in zip(others, saved, strict=True):
        p.data.copy_(value)
    second.load_state_dict(state)
    with pytest.raises(RuntimeError, match="call train"):
        second.step()
    for each in (optimizer, second):
        each.train()
    assert all_same_bits(others, weights)
    train(optimizer, params, range(3, 6))
    train(second, others, range(3, 6))
    assert all_same_bits(params, others)
    assert same_states(state_copies(optimizer), state_copies(second))


def test_a_parameter_that_was_not_stepped_keeps_its_average() -> None:
    """No gradient, or one that is not finite."""
    optimizer, params = averaged()
    before = state_copies(optimizer)
    give_gradients(params, 3)
    params[0].grad = None
    for i, p in enumerate(params[1:]):
        p.grad.view(-1)[i] = float("nan")  # type: ignore[union-attr]
    optimizer.step()
    for old, new in zip(before, state_copies(optimizer), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old if key != "clock")


def test_an_average_of_no_iterate_is_the_weight() -> None:
    optimizer, params = averaged(0)
    optimizer.init_state()
    start = copies(params)
    give_gradients(params, 0)
    params[0].grad.fill_(float("inf"))  # type: ignore[union-attr]
    params[-1].grad.fill_(float("inf"))  # type: ignore[union-attr]
    optimizer.step()
    optimizer.eval()
    assert torch.equal(params[0], start[0])
    assert torch.equal(params[-1], start[-1])
    assert gap(params[1].detach(), optimizer.state[params[1]]["weights"]) < 1e-12  # of one iterate


def test_without_an_average() -> None:
    optimizer, params = both_kinds(steepest.SPlus, average_rate=0.0)
    train(optimizer, params, range(2))
    weights = copies(params)
    assert not any("average" in state for state in optimizer.state.values())
    optimizer.eval()
    assert all_same_bits(params, weights)
    train(optimizer, params, range(2, 3))


def test_the_average_of_bf16_weights_is_fp32_and_sees_their_kept_bits() -> None:
    p = torch.nn.Parameter(torch.ones(6, 4, dtype=torch.bfloat16))
    optimizer = steepest.SPlus([p], lr=1e-4, keep_mantissa=True, average_rate=RATE)
    wanted, value = torch.zeros(6, 4), Tensor()
    for step in range(4):
        give_gradients([p], step)
        optimizer.step()
        bits = p.detach().float().view(torch.int32) + optimizer.state[p]["mantissa"].int()
        value = bits.view(torch.float32)
        wanted = RATE * wanted + (1 - RATE) * value
    assert optimizer.state[p]["average"].dtype == torch.float32
    assert gap(optimizer.state[p]["average"], wanted) < 1e-6
    assert gap(p.detach().float(), value) > 1e-6


def test_a_scheduler_of_torch_takes_it() -> None:
    optimizer, params = averaged()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            train(optimizer, params, range(step, step + 1))
            scheduler.step()
