"""Parameters that are no longer the model's, and an optimizer that nothing gives gradients to."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from support.training import give_gradients


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))


def remade(module: nn.Module) -> None:
    """Other parameters under the same names, as fully_shard makes them."""
    for name, p in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(p.detach().clone()))


def backward(model: nn.Module) -> None:
    model(torch.ones(3, 4)).square().mean().backward()


@pytest.mark.parametrize("cls", [steepest.Muon, steepest.SOAP, steepest.MuonMax, steepest.ProdigyMuon])
def test_a_model_with_other_parameters_is_an_error_in_the_first_step(cls: type[Any]) -> None:
    model = network()
    optimizer = cls(model)
    remade(model[0])
    remade(model[2])
    backward(model)
    names = r"under 4 names \(0.weight, 2.weight, 0.bias, ...\)"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"the model holds other parameters than this {cls.__name__} {names}"):
            optimizer.step()
    assert not optimizer.state


def test_a_step_after_the_first_notices_it_too() -> None:
    model = network()
    optimizer = steepest.Muon(model)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    for layer in (model[0], model[2]):
        remade(layer)
    with pytest.raises(RuntimeError, match="the model holds other parameters than this Muon under 4 names"):
        optimizer.step()


def test_a_layer_that_was_exchanged_is_one_warning_and_the_others_train() -> None:
    model = network()
    optimizer = steepest.Muon(model)
    model[2] = nn.Linear(6, 5)
    backward(model)
    before = model[0].weight.detach().clone()
    with pytest.warns(
        UserWarning, match=r"other parameters than this Muon under 2 names \(2.weight, 2.bias\)"
    ) as caught:
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]
    assert not torch.equal(before, model[0].weight)
    model[0].bias.grad = None  # another plan, no other warning
    optimizer.step()


def test_frozen_shared_and_reparametrized_layers_are_the_models() -> None:
    model = network()
    model[0].bias.requires_grad = False
    model.append(model[2])
    optimizer = steepest.Muon(model)
    torch.nn.utils.parametrizations.orthogonal(model[0])
    model[2].bias.grad = torch.ones(5)
    optimizer.step()


def test_the_model_is_not_kept_alive() -> None:
    model = network()
    optimizer, alive = steepest.Muon(model), weakref.ref(model)
    params = list(model.parameters())
    del model
    gc.collect()
    assert alive() is None
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()


def test_three_steps_without_a_gradient_are_one_warning() -> None:
    model = network()
    optimizer = steepest.Muon(model)
    for _ in range(2):
        optimizer.step()
    with pytest.warns(UserWarning, match="none of the 4 parameters of this Muon") as caught:
        optimizer.step()
    [warning] = caught
    assert warning.filename == __file__
    assert "(0.weight, 2.weight, 0.bias, ...) has had a gradient for 3 steps: it trains nothing" in str(warning.message)
    for _ in range(5):
        optimizer.step()


def test_parameters_without_names_are_numbered() -> None:
    params = [nn.Parameter(torch.ones(3, 3)) for _ in range(2)]
    optimizer = steepest.MuAdam([{"params": params[:1]}, {"params": params[1:], "use_muon": False}])
    optimizer.step()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"the 2 parameters of this MuAdam \(parameter 0, parameter 1\) has had"):
        optimizer.step()


def test_a_gradient_in_between_begins_the_count_anew() -> None:
    model = network()
    optimizer = steepest.Muon(model)
    params = list(model.parameters())
    for steps in (2, 2):
        for _ in range(steps):
            optimizer.step()
        give_gradients(params, 0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_counts_for_itself(copied: Any) -> None:
    optimizer = steepest.Muon(network())
    optimizer.step()
    other = copied(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            other.step()
    assert len(caught) == 1
