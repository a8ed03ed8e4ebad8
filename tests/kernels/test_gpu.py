"""On a GPU: the kernels take the host's step, wait for nothing, and can be captured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.optimizer import MatrixOptimizer
from support.training import OPTIMIZERS, all_same_bits, both_kinds, copies, noise, state_copies

pytestmark = pytest.mark.gpu

every_optimizer = pytest.mark.parametrize("cls", OPTIMIZERS)
every_backend = pytest.mark.parametrize("backend", ["cuda", "triton"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cautious": {"cautious_wd": True},
    "independent": {"weight_decay_method": "independent"},
    "stochastic": {"stochastic_rounding": True},
    "mantissa": {"keep_mantissa": True},
    "ascent": {"maximize": True},
    "bf16 momentum": {"momentum_dtype": torch.bfloat16},
    "small workspace": {"max_workspace_bytes": 1},
}


def moved(cls: type[MatrixOptimizer], dtype: torch.dtype, device: str, **options: Any) -> Any:
    """`both_kinds` with its parameters on a device."""
    optimizer, params = both_kinds(cls, dtype, polar="svd", **options)
    for p in params:
        p.data = p.data.to(device)
    return optimizer, params


def give(params: list[nn.Parameter], step: int, poison: int | None = None) -> None:
    """Gradients in place where there are some, as a graph wants them."""
    for index, p in enumerate(params):
        g = noise(p.shape, 1000 * (step + 1) + index, p.dtype).to(p.device)
        if index == poison:
            g.view(-1)[-1] = float("nan")
        p.grad = g if p.grad is None else p.grad.copy_(g)


@every_optimizer
@every_backend
@every_dtype
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_step_is_the_hosts(
    cls: type[MatrixOptimizer], backend: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    (there, a), (here, b) = moved(cls, dtype, "cuda", backend=backend, **options), moved(cls, dtype, "cpu", **options)
    for step in range(4):
        for optimizer, params in ((there, a), (here, b)):
            give(params, step, poison=2 if step == 1 else None)
            optimizer.step()
    bound = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=bound, atol=bound)
    for key, value in there.metrics().items():
        if not key.endswith("slack"):
            torch.testing.assert_close(
                value.cpu(), here.metrics()[key.replace("cuda:0", "cpu")], rtol=bound, atol=bound
            )
    assert int(there.skipped_updates()[torch.device("cuda:0")]) == 1


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_optimizer
@every_backend
def test_a_step_and_its_metrics_do_not_wait(cls: type[MatrixOptimizer], backend: str) -> None:
    optimizer, params = both_kinds(cls, backend=backend)
    for p in params:
        p.data = p.data.cuda()
    for step in range(2):
        give(params, step)
        optimizer.step()
    give(params, 2)
    torch.cuda.synchronize()
    with no_waiting():
        optimizer.step()
        optimizer.metrics()


@every_optimizer
def test_a_replay_is_a_step(cls: type[MatrixOptimizer]) -> None:
    pairs = []
    for graphed in (True, False):
        optimizer, params = both_kinds(cls, polar="auto", capturable=True)
        for p in params:
            p.data = p.data.cuda()
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = group["lr"].cuda(), group["weight_decay"].cuda()
        step = steepest.graphed(optimizer) if graphed else optimizer
        for i in range(6):
            give(params, i, poison=0 if i == 4 else None)
            for group in optimizer.param_groups:
                group["lr"].fill_(0.02 / (1 + i))
            step.step()
        pairs.append((copies(params), state_copies(optimizer)))
    (a, states), (b, others) = pairs
    assert all_same_bits(a, b)
    for own, other in zip(states, others, strict=True):
        assert all(torch.equal(own[key], other[key]) for key in own)


def launches(optimizer: MatrixOptimizer) -> int:
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    return sum("multi_tensor" in event.name and event.device_type.name == "CUDA" for event in profile.events())


def test_the_elementwise_part_is_three_launches() -> None:
    """At 148 parameters of GPT-2's shapes, a tenth as wide."""
    layers = [(231, 77), (77, 77), (308, 77), (77, 308)]
    matrices = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in layers * 12]
    others = [nn.Parameter(torch.randn(77, device="cuda")) for _ in range(100)]
    optimizer = steepest.MuAdam([{"params": matrices}, {"params": others, "use_muon": False}])
    give([*matrices, *others], 0)
    optimizer.step()
    assert launches(optimizer) == 3


@every_backend
def test_on_the_stream_of_the_caller(backend: str) -> None:
    """A step on a side stream waits for what that stream was given before."""
    optimizer, params = moved(steepest.MuAdam, torch.float32, "cuda", backend=backend)
    twin, others = moved(steepest.MuAdam, torch.float32, "cuda", backend=backend)
    give(params, 0)
    give(others, 0)
    optimizer.step()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        for p in others:
            p.grad.mul_(1)
        twin.step()
    side.synchronize()
    assert all_same_bits(params, others)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@every_backend
def test_on_a_device_that_is_not_the_current_one(backend: str) -> None:
    results = []
    for device in ("cuda:0", "cuda:1"):
        optimizer, params = moved(steepest.MuAdam, torch.float32, device, backend=backend)
        give(params, 0)
        optimizer.step()
        results.append([p.detach().cpu() for p in params])
    assert all_same_bits(*results)


def test_a_gradient_left_on_another_device() -> None:
    optimizer, params = both_kinds(steepest.MuAdam)
    give(params, 0)
    for p in params:
        p.data = p.data.cuda()
    with pytest.raises(
        RuntimeError, match=r"parameter 0 \(group 0, shape \(8, 5\)\) is on cuda:0 and its gradient on cpu"
    ):
        optimizer.step()


def peak(count: int, **options: Any) -> int:
    params = [nn.Parameter(torch.randn(512, 512, device="cuda")) for _ in range(count)]
    optimizer = steepest.MuAdam(params, **options)
    give(params, 0)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def test_a_small_workspace_holds_one_matrix() -> None:
    assert peak(16, max_workspace_bytes=1) <= 1.1 * peak(1, max_workspace_bytes=1)


def test_same_bits_run_to_run() -> None:
    def run() -> list[Tensor]:
        optimizer, params = both_kinds(steepest.MuAdam, polar="auto")
        for p in params:
            p.data = p.data.cuda()
        for step in range(3):
            give(params, step)
            optimizer.step()
        return [*copies(params), *optimizer.metrics().values()]

    assert all_same_bits(run(), run())
