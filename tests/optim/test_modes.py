"""What a caller has set in torch does not reach a step: the same bits in every mode, and state in its place."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.optimizer import MatrixOptimizer
from steepest.recipe import CLOCK
from support.training import EVERY, both_kinds, copies, give_gradients, noise

STEPS = 3

pytestmark = pytest.mark.filterwarnings("ignore:Anomaly Detection")


class MuAdamMomo(steepest.Momo, steepest.MuAdam):
    """One whose layers wait for one another."""


CASES: dict[str, tuple[type[MatrixOptimizer], dict[str, Any]]] = {cls.__name__: (cls, {}) for cls in EVERY} | {
    "Muon by svd": (steepest.Muon, {"polar": "svd"}),
    "Muon by torch": (steepest.Muon, {"backend": "torch", "polar": "polar_express"}),
    "SOAP by QR": (steepest.SOAP, {"refresh": "qr", "precondition_frequency": 1}),
    "SOAP by rotations": (steepest.SOAP, {"refresh": "jr", "precondition_frequency": 1}),
    "SOAP, spectral": (steepest.SOAP, {"norm": "spectral"}),
    "Shampoo by roots": (steepest.Shampoo, {"inverse_root": "newton"}),
    "SPlus, bf16 factors": (steepest.SPlus, {"factor_dtype": torch.bfloat16}),
    "TrustRegion, ridge": (steepest.TrustRegion, {"composite": "ridge"}),
    "MuAdam with Momo": (MuAdamMomo, {"lower_bound": 0.0}),
    "MuonMax with Momo": (steepest.MuonMax, {"lower_bound": 0.0}),
    "KFAC": (steepest.KFAC, {}),
}


@contextlib.contextmanager
def setting(set_to: Callable[[Any], object], value: Any, before: Any) -> Iterator[None]:
    set_to(value)
    try:
        yield
    finally:
        set_to(before)


def deterministic(on: bool) -> None:
    torch.use_deterministic_algorithms(on, warn_only=False)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast fp16": lambda: torch.autocast("cpu", torch.float16),
    "default dtype fp64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype bf16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "device as a context": lambda: torch.device("meta"),
    "matmul precision high": lambda: setting(torch.set_float32_matmul_precision, "high", "highest"),
    "matmul precision medium": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "enable_grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "deterministic": lambda: setting(deterministic, True, False),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
}


@contextlib.contextmanager
def together(*names: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(MODES[name]())
        yield


TOGETHER = (
    ("autocast bf16", "default dtype fp64", "default device", "matmul precision medium", "deterministic"),
    ("autocast fp16", "default dtype bf16", "device as a context", "inference mode", "matmul precision high"),
    ("autocast bf16", "enable_grad", "anomaly detection"),
)


def taken(name: str, mode: Callable[[], AbstractContextManager[Any]]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """The weights after every step, and the state after the last; all but the second are taken in the mode."""
    cls, extra = CASES[name]
    weights: list[Tensor] = []
    if cls is steepest.KFAC:
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        params: list[nn.Parameter] = list(model.parameters())
        for i, p in enumerate(params):
            p.data.copy_(noise(p.shape, i))
        optimizer = steepest.KFAC(model, lr=0.01)
    else:
        optimizer, params = both_kinds(cls, **extra)
    for step in range(STEPS):
        if cls is steepest.KFAC:
            optimizer.zero_grad()
            model(noise((8, 5), step)).square().mean().backward()
        else:
            give_gradients(params, step)
        given: dict[str, Any] = {"loss": 1.0} if isinstance(optimizer, steepest.Momo) else {}
        with mode() if step != 1 else contextlib.nullcontext():
            optimizer.step(**given)
        weights += copies(params)
    return weights, [dict(optimizer.state[p]) for p in params]


@pytest.mark.parametrize("name", CASES)
def test_no_mode_reaches_a_step(name: str) -> None:
    """The first step, which makes the state, and a later one."""
    weights, states = taken(name, contextlib.nullcontext)
    modes = [[mode] for mode in MODES] if name in ("Muon", "SOAP", "KFAC") else TOGETHER
    for mode in modes:
        those, theirs = taken(name, lambda mode=mode: together(*mode))
        for wanted, found in zip(weights, those, strict=True):
            assert torch.equal(wanted, found), mode
        for wanted_state, found_state in zip(states, theirs, strict=True):
            assert wanted_state.keys() == found_state.keys()
            for key, value in wanted_state.items():
                found = found_state[key]
                assert (found.dtype, found.device, found.is_inference()) == (value.dtype, value.device, False), mode
                assert torch.equal(found.nan_to_num(), value.nan_to_num()), (mode, key)
                assert not found.requires_grad, (mode, key)


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


def test_a_compiled_step_is_not_reached_by_autocast() -> None:
    runs = []
    for mode in (contextlib.nullcontext, MODES["autocast bf16"]):
        optimizer, params = both_kinds(steepest.Muon, polar="polar_express")
        torch._dynamo.reset()
        compiled = torch.compile(optimizer.step, backend="eager", fullgraph=True)
        for step in range(2):
            give_gradients(params, step)
            with mode():
                compiled()
        runs.append(copies(params))
    assert all(map(torch.equal, *runs))
