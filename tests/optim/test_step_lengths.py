"""Numbers with which weights leave their dtype whatever the gradients are: refused, wherever they come from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import steepest
from steepest.optimizer import MatrixOptimizer
from support.slow import slow
from support.training import EVERY, KINDS, KRONECKER, all_same_bits, both_kinds, copies, give_gradients, name_of, train

every_class = pytest.mark.parametrize("cls", [cls if cls in KINDS else slow(cls) for cls in EVERY], ids=name_of)
#: Methods without a decay of the weight: it is in the direction's input, or there is none.
NO_DECAY = (steepest.OrthogonalSGDM, steepest.Fromage)
GROWS = r"group \d: lr=.* and weight_decay=.* multiply weights by 1 - .*: choose smaller ones"
#: Those whose momentum is of a sum.
SUMS = (steepest.SGD, steepest.OrthogonalSGDM, steepest.Dion2)


@every_class
@pytest.mark.parametrize("lr, weight_decay", [(1e30, 0.1), (1e-3, 1e30), (30.0, 0.1)])
def test_a_decay_that_makes_weights_larger_is_refused(
    cls: type[MatrixOptimizer], lr: float, weight_decay: float
) -> None:
    values = {"lr": lr, "weight_decay": weight_decay, "adamw_lr": lr, "adamw_weight_decay": weight_decay}
    if cls is steepest.SPlus:
        values["lr"] *= 10  # its decay is of the rate times the ratio of the shape, here a tenth at least
    with pytest.raises(ValueError, match=GROWS):
        both_kinds(cls, **values)


@every_class
def test_a_schedule_that_leads_there_is_refused_before_anything_is_written(cls: type[MatrixOptimizer]) -> None:
    optimizer, params = both_kinds(cls, lr=1e-3)
    train(optimizer, params, range(2))
    give_gradients(params, 2)
    before = copies(params)
    optimizer.param_groups[1]["lr"] = 1e30
    with pytest.raises(ValueError, match=f"^{GROWS}"):
        optimizer.step()
    assert all_same_bits(params, before)
    optimizer.param_groups[1]["lr"] = torch.tensor(1e30)
    with pytest.raises(ValueError, match=f"^{GROWS}"):
        optimizer.step()
    optimizer.param_groups[1]["lr"] = 1e-3
    optimizer.step()
    assert not all_same_bits(params, before)


@pytest.mark.parametrize(
    "cls, values, message",
    [
        (steepest.Muon, {"lr": 1e38}, "lr should be at most 2.03e\\+31 but is: 1e\\+38; weights in torch.float32"),
        (steepest.Muon, {"lr": 1e5, "dtype": torch.float16}, "lr should be at most 6.55e\\+04 but is: 100000.0"),
        (steepest.Muon, {"lr": torch.tensor(1e36)}, "lr should be at most"),
        (steepest.SGD, {"weight_decay": 1e35, "weight_decay_method": "l2"}, "weight_decay should be at most 2.03e"),
        (steepest.Muon, {"weight_decay": 3.0, "weight_decay_method": "independent"}, "by 1 - 3 in every step"),
        (steepest.Scion, {"lr": 2.5}, "by 1 - 2.5 in every step"),
        (steepest.SPlus, {"lr": 40.0, "weight_decay": 0.5}, "by 1 - 3.636 in every step"),
    ],
)
def test_limits_of_dtypes_and_methods(cls: type[MatrixOptimizer], values: dict[str, Any], message: str) -> None:
    values = {"weight_decay": 0.0, **values}
    with pytest.raises(ValueError, match=message):
        cls([nn.Parameter(torch.zeros(6, 5, dtype=values.pop("dtype", torch.float32)))], **values)


@pytest.mark.parametrize(
    "cls, values",
    [
        (steepest.Muon, {"lr": 20.0, "weight_decay": 0.1}),
        (steepest.Adam, {"lr": 0.01, "weight_decay": 500.0, "weight_decay_method": "l2"}),
        (steepest.SPlus, {"lr": 20.0, "weight_decay": 0.5}),
        (steepest.Scion, {"lr": 2.5, "constrained": False}),
        (steepest.Fromage, {"lr": 1e3}),
        (steepest.OrthogonalSGDM, {"lr": 10.0, "weight_decay": 1.0}),
        (steepest.Adam, {"lr": 1e30}),
    ],
)
def test_what_ends_is_taken(cls: type[MatrixOptimizer], values: dict[str, Any]) -> None:
    weight = nn.Parameter(torch.ones(6, 5))
    optimizer = cls([weight], **values)
    for _ in range(50):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert weight.isfinite().all()
    assert weight.abs().max() <= 1


def test_a_checkpoint_with_such_numbers_changes_nothing() -> None:
    optimizer, params = both_kinds(steepest.Muon)
    train(optimizer, params, range(1))
    checkpoint = optimizer.state_dict()
    checkpoint["param_groups"][1]["lr"] = 1e30
    with pytest.raises(ValueError, match=r"the checkpoint's group 1: lr=1e\+30 and weight_decay=0.1"):
        optimizer.load_state_dict(checkpoint)
    assert optimizer.param_groups[1]["lr"] == 0.01


# ---- momentum -------------------------------------------------------------------------------------------------------


@every_class
def test_a_momentum_that_only_grows_is_refused(cls: type[MatrixOptimizer]) -> None:
    optimizer, params = both_kinds(cls)
    if "momentum" not in optimizer.defaults:
        pytest.skip("its averages have betas")
    for momentum in (1.5, torch.tensor(1.5)):
        with pytest.raises(ValueError, match="momentum should be in .* but is: .*1.5.*beyond 1 .* only grows"):
            both_kinds(cls, momentum=momentum)
    give_gradients(params, 0)
    optimizer.param_groups[0]["momentum"] = 1.5
    with pytest.raises(ValueError, match="group 0: momentum should be in"):
        optimizer.step()
    if cls in SUMS:
        both_kinds(cls, momentum=1.0)
    else:
        with pytest.raises(ValueError, match=r"momentum should be in \[0, 1\) but is: 1.0; with 1 an average takes"):
            both_kinds(cls, momentum=1.0)


def test_a_sum_of_all_gradients_is_that_of_torch() -> None:
    weights = [nn.Parameter(torch.ones(6, 5, dtype=torch.float64)) for _ in range(2)]
    here, there = steepest.SGD(weights[:1], lr=0.1, momentum=1.0), torch.optim.SGD(weights[1:], lr=0.1, momentum=1.0)
    for step in range(20):
        for p in weights:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        here.step()
        there.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-12, atol=1e-12)


# ---- tensors without values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", KRONECKER, ids=name_of)
def test_fake_tensors_have_state_and_no_step_with_bases(cls: type[MatrixOptimizer]) -> None:
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
        optimizer = cls(model)
        optimizer.init_state()
        assert optimizer.state[model[0].weight]["left"].shape[-1] == 8 or cls is steepest.OneSidedShampoo
        model(torch.randn(5, 6)).sum().backward()
        with pytest.raises(RuntimeError, match=r"does not step fake tensors, .*'0.weight' .* init_state\(\)"):
            optimizer.step()
