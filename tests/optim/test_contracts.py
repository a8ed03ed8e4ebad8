"""What a step never does: write a gradient, wait for the device, change a setting, spread a NaN, fail half-way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import steepest
from steepest.optimizer import MatrixOptimizer
from support.host_reads import no_host_reads
from support.training import (
    MATRICES,
    OPTIMIZERS,
    VECTORS,
    all_same_bits,
    both_kinds,
    copies,
    give_gradients,
    same_bits,
    same_states,
    state_copies,
    train,
)

# MuAdamSANIA is MuAdam's program with another exponent.
every_optimizer = pytest.mark.parametrize("cls", OPTIMIZERS[:2])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
# Every path through `plan`: the fused update, the parts, stochastic rounding, fused weights, the exact direction.
PATHS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cautious": {"cautious_wd": True},
    "stochastic": {"stochastic_rounding": True},
    "mantissa": {"keep_mantissa": True},
    "capturable": {"capturable": True},
    "parts": {"backend": "torch"},
    "ascent": {"maximize": True},
    "bf16 momentum": {"momentum_dtype": torch.bfloat16},
    "small workspace": {"max_workspace_bytes": 1},
}
every_path = pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)


@every_optimizer
@every_dtype
@every_path
def test_gradients_are_not_written(cls: type[MatrixOptimizer], dtype: torch.dtype, options: dict[str, Any]) -> None:
    optimizer, params = both_kinds(cls, dtype, **options)
    for step in range(2):
        give_gradients(params, step)
        kept, grads = copies(p.grad for p in params), [p.grad for p in params]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))
        assert all_same_bits(kept, grads)


@pytest.mark.parametrize(
    "cls, device, options",  # every path on both devices, by one class here and by the other there
    [
        pytest.param(
            OPTIMIZERS[(i + there) % 2], ("cpu", "meta")[there], options, id=f"{name}-{('cpu', 'meta')[there]}"
        )
        for i, (name, options) in enumerate(PATHS.items())
        for there in (0, 1)
    ],
)
def test_a_step_reads_no_value_of_any_tensor(cls: type[MatrixOptimizer], device: str, options: dict[str, Any]) -> None:
    """Fake and meta tensors have no values: what would wait for the device (`.item()`, `bool()`, `nonzero`) raises.

    A meta tensor is not on the CPU, so it goes the way of a GPU's wherever the choice is made by the device.
    """
    with FakeTensorMode() if device == "cpu" else nullcontext():
        matrices, vectors = (
            [nn.Parameter(torch.empty(shape, device=device, dtype=torch.bfloat16)) for shape in shapes]
            for shapes in (MATRICES, VECTORS)
        )
        optimizer = cls([{"params": matrices}, {"params": vectors, "use_muon": False}], **options)
        for _ in range(2):
            for p in (*matrices, *vectors):
                p.grad = torch.empty_like(p)
            optimizer.step()
        assert all(t.device.type == device for state in optimizer.state.values() for t in state.values())


@every_optimizer
@every_path
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_a_step_does_not_ask_a_tensor_for_its_value(
    cls: type[MatrixOptimizer], tensor: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lr = torch.tensor(0.02) if tensor else 0.02
    optimizer, params = both_kinds(cls, torch.bfloat16, lr=lr, adamw_lr=lr, **options)
    give_gradients(params, 0)
    optimizer.prepare()  # with the plan's self-check, if this process has not had it yet
    for step in range(2):
        give_gradients(params, step)
        with no_host_reads(monkeypatch):
            optimizer.step()


def settings() -> dict[str, Any]:
    return {
        "float32 matmul": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.benchmark,
        ),
        "grad mode": torch.is_grad_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "dynamo": torch._dynamo.config.recompile_limit,
    }


@every_optimizer
@every_path
def test_global_settings_and_generators_are_left_alone(cls: type[MatrixOptimizer], options: dict[str, Any]) -> None:
    before, rng = settings(), torch.get_rng_state()
    optimizer, params = both_kinds(cls, torch.bfloat16, **options)
    train(optimizer, params, range(2))
    assert settings() == before
    assert torch.equal(torch.get_rng_state(), rng)


@every_optimizer
@every_dtype
@every_path
def test_the_same_run_twice_is_the_same_bits(
    cls: type[MatrixOptimizer], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    runs = []
    for _ in range(2):
        optimizer, params = both_kinds(cls, dtype, **options)
        train(optimizer, params, range(4))
        runs.append((params, state_copies(optimizer)))
    assert all_same_bits(runs[0][0], runs[1][0])
    assert same_states(runs[0][1], runs[1][1])


POISON = (math.nan, math.inf, -math.inf)


def poisoned() -> Iterator[Any]:
    """Every optimizer, path, dtype and time, each pair of them with all three values that are not finite."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    for numbers in product(range(2), range(len(PATHS)), range(len(dtypes)), range(2)):
        cls, path, dtype, started = OPTIMIZERS[numbers[0]], list(PATHS)[numbers[1]], dtypes[numbers[2]], numbers[3] > 0
        poison = POISON[sum(numbers) % 3]
        name = f"{cls.__name__}-{path}-{dtype}-{'mid-run' if started else 'first step'}-{poison}"
        yield pytest.param(cls, started, poison, dtype, PATHS[path], id=name)


@pytest.mark.parametrize(("cls", "started", "poison", "dtype", "options"), list(poisoned()))
def test_a_bad_gradient_stays_where_it_is(
    cls: type[MatrixOptimizer], started: bool, poison: float, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """A bad entry in a matrix of a shared bucket, one in an AdamW vector: both keep value and state, others move."""
    (hurt, a), (well, b) = both_kinds(cls, dtype, **options), both_kinds(cls, dtype, **options)
    bad = (0, len(MATRICES))
    first = 2 if started else 0
    for optimizer, params in ((hurt, a), (well, b)):
        train(optimizer, params, range(first))
    if not started:
        hurt.init_state()
    values, states = copies(a), state_copies(hurt)

    for optimizer, params in ((hurt, a), (well, b)):
        give_gradients(params, first)
        for i in bad if optimizer is hurt else ():
            params[i].grad.view(-1)[-1] = poison
        optimizer.step()
    after_hurt, after_well = state_copies(hurt), state_copies(well)
    for i, p in enumerate(a):
        assert same_bits(p, values[i] if i in bad else b[i])
        assert same_states([after_hurt[i]], [states[i] if i in bad else after_well[i]])
    assert int(hurt.skipped_updates()[torch.device("cpu")]) == len(bad)
    assert int(well.skipped_updates()[torch.device("cpu")]) == 0

    train(hurt, a, range(first + 1, first + 3))
    assert all(p.isfinite().all() for p in a)


@every_optimizer
def test_a_skipped_step_is_as_if_it_had_not_been(cls: type[MatrixOptimizer]) -> None:
    """All gradients bad in the middle of a run: the run continues like one without that step."""
    (hurt, a), (well, b) = both_kinds(cls), both_kinds(cls)
    for step in range(4):
        if step == 2:
            give_gradients(a, 99)
            for p in a:
                p.grad.fill_(math.nan)
            hurt.step()
        train(hurt, a, range(step, step + 1))
        train(well, b, range(step, step + 1))
    assert all_same_bits(a, b)


def sparse(optimizer: MatrixOptimizer, params: list[nn.Parameter]) -> None:
    params[-1].grad = params[-1].grad.to_sparse()


def complex_parameter(optimizer: MatrixOptimizer, params: list[nn.Parameter]) -> None:
    params[-1].data = params[-1].data.to(torch.complex64)
    params[-1].grad = torch.ones_like(params[-1])


def forced_backend(optimizer: MatrixOptimizer, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[-1]["backend"] = "cuda"


def unknown_backend(optimizer: MatrixOptimizer, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[-1]["backend"] = "abacus"


@every_optimizer
@pytest.mark.parametrize("spoil", [sparse, complex_parameter, forced_backend, unknown_backend])
@pytest.mark.parametrize("started", [True, False], ids=["mid-run", "first step"])
def test_an_error_in_the_last_group_comes_before_the_first_write(
    cls: type[MatrixOptimizer], started: bool, spoil: Callable[[MatrixOptimizer, list[nn.Parameter]], None]
) -> None:
    optimizer, params = both_kinds(cls, torch.bfloat16)
    if started:
        train(optimizer, params, range(2))
    give_gradients(params, 5)
    spoil(optimizer, params)
    values, states, count = copies(params), state_copies(optimizer), len(optimizer.state)
    with pytest.raises((RuntimeError, ValueError)):
        optimizer.step()
    assert all_same_bits(params, values)
    assert same_states(state_copies(optimizer), states)
    assert len(optimizer.state) == count


def test_state_is_no_larger_than_torchs() -> None:
    """One buffer of the gradient's size a matrix, and nothing else."""
    for dtype in (torch.float32, torch.bfloat16):
        optimizer, params = both_kinds(steepest.Muon, dtype)
        train(optimizer, params, range(1))
        for p in params[: len(MATRICES)]:
            held = optimizer.state[p].values()
            assert sum(t.nbytes for t in held) == p.numel() * dtype.itemsize
        storages = {t.untyped_storage() for p in params[: len(MATRICES)] for t in optimizer.state[p].values()}
        padding = 128 * len(MATRICES)
        wanted = sum(p.numel() for p in params[: len(MATRICES)]) * dtype.itemsize
        assert sum(storage.nbytes() for storage in storages) <= wanted + padding
