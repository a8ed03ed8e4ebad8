"""What a caller has set in torch does not reach what is done beside a step; that no step sees it: test_faults.py."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import Tensor

import steepest
from steepest.optimizer import MatrixOptimizer
from steepest.recipe import CLOCK
from support.modes import MODES, setting
from support.training import both_kinds, copies, give_gradients, parameters

pytestmark = pytest.mark.filterwarnings("ignore:Anomaly Detection")


@pytest.mark.parametrize("mode", MODES)
def test_no_mode_reaches_what_is_done_beside_a_step(mode: str) -> None:
    """State that is made or loaded, weights that are exchanged for their averages."""
    optimizer, params = both_kinds(steepest.SPlus, average_rate=0.9)
    with MODES[mode]():
        optimizer.init_state()
    give_gradients(params, 0)
    optimizer.step()
    saved, weights = copy.deepcopy(optimizer.state_dict()), copies(params)
    with MODES[mode]():
        optimizer.load_state_dict(saved)
        optimizer.prepare()
        optimizer.eval()
    averages = copies(params)
    with MODES[mode]():
        optimizer.train()
    assert all(map(torch.equal, params, weights))
    optimizer.eval()
    assert all(map(torch.equal, params, averages))
    optimizer.train()
    give_gradients(params, 1)
    optimizer.step()
    for state in optimizer.state.values():
        assert all(t.device.type == "cpu" and not t.requires_grad and not t.is_inference() for t in state.values())
        assert state.get(CLOCK, torch.zeros((), dtype=torch.int64)).dtype is torch.int64


@pytest.mark.parametrize("cls", [steepest.Muon, steepest.SOAP])
def test_a_step_is_not_part_of_a_transformed_function(cls: type[MatrixOptimizer]) -> None:
    runs = []
    for inside in (False, True):
        optimizer, params = both_kinds(cls)
        for step in range(3):
            give_gradients(params, step)

            def stepping(x: Tensor, optimizer: MatrixOptimizer = optimizer) -> Tensor:
                optimizer.step()
                return x.sin().sum()

            if inside:
                torch.func.grad(stepping)(torch.ones(2))
            else:
                optimizer.step()
        runs.append(copies(params))
    assert all(map(torch.equal, *runs))


def test_a_closure_runs_in_the_callers_modes() -> None:
    optimizer, params = both_kinds(steepest.SOAP)
    seen = []

    def closure() -> float:
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), torch.get_default_dtype()))
        give_gradients(params, 0)
        return 1.0

    with torch.autocast("cpu", torch.bfloat16), MODES["default dtype fp64"]():
        optimizer.step(closure)
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_default_dtype() is torch.float64
    assert seen == [(True, True, torch.float64)]


def test_parameters_made_in_inference_mode_are_stepped_in_it() -> None:
    with torch.inference_mode():
        optimizer, params = both_kinds(steepest.Muon)
        give_gradients(params, 0)
        before = copies(params)
        optimizer.step()
        assert not any(map(torch.equal, params, before))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_precision_of_products_is_the_users_again(precision: str) -> None:
    places = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    optimizer, params = both_kinds(steepest.SOAP)
    give_gradients(params, 0)
    with setting(torch.set_float32_matmul_precision, precision, "highest"):
        before = [place.fp32_precision for place in places]
        optimizer.step()
        assert [place.fp32_precision for place in places] == before
        assert torch.get_float32_matmul_precision() == precision


@pytest.mark.slow
def test_a_compiled_step_is_not_reached_by_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are fp32, which autocast would make bf16, as they may be anyway on a CPU that has those."""
    monkeypatch.setattr("steepest.linalg.polar.choice.native_bf16", lambda: False)
    runs = []
    for mode in (contextlib.nullcontext, MODES["autocast bf16"]):
        params = parameters([(6, 5), (4,)])
        groups = [{"params": params[:1]}, {"params": params[1:], "use_muon": False}]
        optimizer = steepest.Muon(groups, ns_steps=1)  # two products: every step of the iteration is traced anew
        torch._dynamo.reset()
        compiled = torch.compile(optimizer.step, backend="eager", fullgraph=True)
        for step in range(2):
            give_gradients(params, step)
            with mode():
                compiled()
        runs.append(copies(params))
    assert all(map(torch.equal, *runs))
