"""When a step makes its plan anew: whenever what the plan was made for is another, and not before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import steepest


def optimizer() -> steepest.Muon:
    params = [torch.nn.Parameter(torch.ones(4, 3) * (i + 1)) for i in range(3)]
    other = torch.nn.Parameter(torch.ones(5))
    made = steepest.Muon([{"params": params}, {"params": [other], "use_muon": False}], lr=0.1)
    for p in (*params, other):
        p.grad = torch.ones_like(p)
    made.step()
    return made


def drop_a_gradient(made: steepest.Muon) -> None:
    made.param_groups[0]["params"][2].grad = None


def drop_the_last_parameter(made: steepest.Muon) -> None:
    made.param_groups[1]["params"].pop()


def drop_the_last_group(made: steepest.Muon) -> None:
    made.param_groups.pop()


def add_a_parameter(made: steepest.Muon) -> None:
    p = torch.nn.Parameter(torch.ones(5))
    p.grad = torch.ones_like(p)
    made.param_groups[1]["params"].append(p)


def add_a_group(made: steepest.Muon) -> None:
    p = torch.nn.Parameter(torch.ones(4, 3))
    p.grad = torch.ones_like(p)
    made.add_param_group({"params": [p]})


def transpose_a_gradient(made: steepest.Muon) -> None:
    p = made.param_groups[0]["params"][0]
    p.grad = torch.ones(3, 4).mT


def move_state(made: steepest.Muon) -> None:
    state = made.state[made.param_groups[0]["params"][1]]
    state["momentum_buffer"] = state["momentum_buffer"].clone()


def change_an_option(made: steepest.Muon) -> None:
    made.param_groups[0]["nesterov"] = False


CHANGES = (
    drop_a_gradient,
    drop_the_last_parameter,
    drop_the_last_group,
    add_a_parameter,
    add_a_group,
    transpose_a_gradient,
    move_state,
    change_an_option,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_makes_a_new_plan(change: Callable[[steepest.Muon], None]) -> None:
    made = optimizer()
    before = made._plan
    change(made)
    made.step()
    assert made._plan is not before


def test_new_gradients_and_numbers_and_equal_lists_make_none() -> None:
    made = optimizer()
    before = made._plan
    for group in made.param_groups:
        group["lr"] = 0.01
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    made.param_groups[0]["ns_coefficients"] = list(made.param_groups[0]["ns_coefficients"])
    made.step()
    assert made._plan is before
    made.param_groups[0]["ns_coefficients"][0] -= 0.01
    made.step()
    assert made._plan is not before
