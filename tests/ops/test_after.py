"""The fused weight update: formula, layouts, contracts, errors, and both kernels against the reference."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from steepest.ops import backend
from steepest.ops.after import CPU_CHUNK, _pieces, after, reference

NAN = float("nan")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = [(p, u) for p in FLOATS for u in FLOATS] + [(torch.float64, torch.float64), (torch.float64, torch.bfloat16)]

needs_extension = pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# Sizes that are no multiple of any vector width; "permuted" has dimensions that do not merge.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.reshape(-1)[: 7 * 41].reshape(7, 41),
    "transposed": lambda t: t.reshape(-1)[: 7 * 41].reshape(7, 41).t(),
    "channels_last": lambda t: t.reshape(-1)[: 2 * 3 * 5 * 7].reshape(2, 3, 5, 7).to(memory_format=torch.channels_last),
    "row_slice": lambda t: t.reshape(-1)[: 12 * 20].reshape(12, 20)[1:9, 3:16],
    "every_other": lambda t: t.reshape(-1)[:301:2],
    "permuted": lambda t: t.reshape(-1)[: 2 * 6 * 4 * 8].reshape(2, 6, 4, 8)[:, ::2].permute(3, 1, 0, 2),
    "misaligned": lambda t: t.reshape(-1)[1:200],
    "one": lambda t: t.reshape(-1)[:1],
    "empty": lambda t: t.reshape(-1)[:0].reshape(0, 5),
    "scalar": lambda t: t.reshape(-1)[3],
}


def problem(
    p_dtype: torch.dtype, u_dtype: torch.dtype, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Every layout of a parameter against every other layout of its update, each with its own keep and step."""
    generator = torch.Generator().manual_seed(0)
    params, updates = [], []
    for view in LAYOUTS.values():
        p = view(torch.randn(400, generator=generator).to(device, p_dtype))
        same = view(torch.randn(400, generator=generator).to(device, u_dtype))
        other = torch.empty_like(p, dtype=u_dtype, memory_format=torch.contiguous_format)
        other.copy_(torch.randn(p.shape, generator=generator))
        params += [p, p.clone()]
        updates += [same, other]
    factor = torch.float64 if p_dtype is torch.float64 else torch.float32
    keep = torch.linspace(0.5, 1.0, len(params), dtype=factor, device=device)
    step = torch.linspace(-0.3, 0.7, len(params), dtype=factor, device=device)
    return params, updates, keep, step


def expected(params: list[Tensor], updates: list[Tensor], keep: Tensor, step: Tensor) -> list[Tensor]:
    """The formula in fp64, on the numbers as they are given."""
    return [k * p.double() - s * u.double() for p, u, k, s in zip(params, updates, keep.double(), step.double())]


def assert_rounded_once(params: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    """Half a unit in the last place for the store; the arithmetic adds a few of fp32 (of fp64 for fp64 parameters)."""
    arithmetic = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    for p, w in zip(params, wanted):
        bound = (torch.finfo(dtype).eps / 2 + 2 * arithmetic) * w.abs() + 4 * arithmetic
        assert bool(((p.double() - w).abs() <= bound).all())


@pytest.mark.parametrize("p_dtype,u_dtype", PAIRS, ids=str)
def test_formula(p_dtype: torch.dtype, u_dtype: torch.dtype) -> None:
    params, updates, keep, step = problem(p_dtype, u_dtype)
    wanted, before = expected(params, updates, keep, step), [u.clone() for u in updates]
    after(params, updates, keep, step)
    assert_rounded_once(params, wanted, p_dtype)
    assert all(torch.equal(u, b) for u, b in zip(updates, before)), "an update was mutated"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_in_pieces(dtype: torch.dtype) -> None:
    """A parameter above CPU_CHUNK goes piece by piece: contiguous ones by elements, a transposed one by rows."""
    rows = [torch.randn(1001, 700), torch.randn(1, CPU_CHUNK + 3), torch.randn(700, 501).t()]
    params = [r.to(dtype) for r in rows]
    updates = [torch.randn_like(r) for r in rows]
    keep, step = torch.full((3,), 0.9), torch.full((3,), 0.1)
    wanted = expected(params, updates, keep, step)
    after(params, updates, keep, step)
    assert_rounded_once(params, wanted, dtype)


def test_sizes_of_pieces() -> None:
    wide, tall = torch.empty(3, CPU_CHUNK - 1), torch.empty(3, CPU_CHUNK // 2).t()
    assert [p.numel() for p, _ in _pieces(wide, wide)] == [CPU_CHUNK, CPU_CHUNK, CPU_CHUNK - 3]
    fit = CPU_CHUNK // 3
    assert [tuple(p.shape) for p, _ in _pieces(tall, tall)] == [(fit, 3), (CPU_CHUNK // 2 - fit, 3)]
    strided = torch.empty(3, CPU_CHUNK)[:, 1:]
    assert [tuple(p.shape) for p, _ in _pieces(strided, wide)] == [(1, CPU_CHUNK - 1)] * 3


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_one_and_zero_leave_every_bit(dtype: torch.dtype) -> None:
    p = torch.tensor([-0.0, 0.0, 1e-45, 3.0, float("inf"), -float("inf"), 1e-7]).to(dtype)
    factor = torch.float64 if dtype is torch.float64 else torch.float32
    before = p.clone()
    after([p], [torch.full_like(p, NAN)], torch.ones(1, dtype=factor), torch.zeros(1, dtype=factor))
    assert torch.equal(p.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_update_is_not_read_where_step_is_zero(bad: float) -> None:
    p, q = torch.ones(5), torch.ones(5)
    after([p, q], [torch.full((5,), bad), torch.ones(5)], torch.tensor([0.5, 0.5]), torch.tensor([0.0, 0.25]))
    assert torch.equal(p, torch.full((5,), 0.5))
    assert torch.equal(q, torch.full((5,), 0.25))


def test_parameters_that_require_grad() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    after([p], [torch.ones(3)], torch.ones(1), torch.ones(1))
    assert torch.equal(p.detach(), torch.zeros(3))
    assert p.is_leaf


def test_autograd_sees_the_change() -> None:
    p = torch.ones(3)
    version = p._version
    after([p], [torch.ones(3)], torch.ones(1), torch.ones(1), backend="torch")
    assert p._version > version


@needs_triton
def test_autograd_sees_what_a_kernel_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel writes through addresses, so `after` counts the version; here the kernel does nothing at all."""
    kernels = pytest.importorskip("steepest.kernels.after", reason="steepest.kernels is not importable")
    monkeypatch.setattr(kernels, "after", lambda *arguments: None)
    monkeypatch.setattr(sys.modules["steepest.ops.after"], "route", lambda *arguments: "triton")
    x = torch.ones(3, requires_grad=True)
    p = torch.ones(3)
    with torch.inference_mode():
        versionless = torch.ones(3)
    y = (x * p).sum()
    after([p, versionless], [torch.ones(3)] * 2, torch.ones(2), torch.ones(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_no_tensors() -> None:
    after([], [], torch.empty(0), torch.empty(0))


def test_traces_without_a_host_read() -> None:
    with FakeTensorMode():
        params, updates = [torch.empty(3, 4), torch.empty(5, dtype=torch.bfloat16)], [torch.empty(3, 4), torch.empty(5)]
        after(params, updates, torch.empty(2), torch.empty(2))
        assert [p.shape for p in params] == [(3, 4), (5,)]


def test_compiles_whole() -> None:
    params, updates, keep, step = problem(torch.float32, torch.bfloat16)
    twins = [p.clone() for p in params]
    wanted = expected(params, updates, keep, step)
    torch.compile(after, fullgraph=True, backend="aot_eager")(twins, updates, keep, step)
    assert_rounded_once(twins, wanted, torch.float32)


@needs_extension
def test_op_is_the_reference_on_cpu() -> None:
    params, updates, keep, step = problem(torch.bfloat16, torch.float32)
    twins = [p.clone() for p in params]
    torch.ops.steepest.after(twins, updates, keep, step)
    reference(params, updates, keep, step)
    assert all(torch.equal(p, t) for p, t in zip(params, twins))


@needs_extension
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    params, updates = [torch.randn(4, 3).to(dtype), torch.randn(7).to(dtype)], [torch.randn(4, 3), torch.randn(7)]
    torch.library.opcheck(torch.ops.steepest.after.default, (params, updates, torch.rand(2), torch.rand(2)))


def two() -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    return [torch.ones(2, 3), torch.ones(4)], [torch.ones(2, 3), torch.ones(4)], torch.ones(2), torch.ones(2)


def changed(at: int, value: object, item: int | None = None) -> tuple[object, ...]:
    """The arguments of `two` with one of them (or one tensor in a list) replaced."""
    arguments = list(two())
    if item is None:
        arguments[at] = value  # type: ignore[call-overload]
    else:
        arguments[at][item] = value  # type: ignore[call-overload]
    return tuple(arguments)


ERRORS = {
    "lengths": (changed(1, [torch.ones(2, 3)]), ValueError, "2 params and 1 updates; they are taken in pairs"),
    "shape": (
        changed(1, torch.ones(3, 2), 0),
        ValueError,
        "params[0] is (2, 3) and updates[0] (3, 2); shapes must be equal",
    ),
    "keep_shape": (
        changed(2, torch.ones(3)),
        ValueError,
        "keep has shape (3,); it holds one number per parameter: (2,)",
    ),
    "step_shape": (
        changed(3, torch.ones(())),
        ValueError,
        "step has shape (); it holds one number per parameter: (2,)",
    ),
    "keep_dtype": (
        changed(2, torch.ones(2).half()),
        TypeError,
        "keep is torch.float16; with these params it must be torch.float32",
    ),
    "fp64": (
        changed(0, torch.ones(4).double(), 1),
        TypeError,
        "keep is torch.float32; with these params it must be torch.float64",
    ),
    "complex": (
        changed(1, torch.ones(4) + 0j, 1),
        TypeError,
        "updates[1] is torch.complex64; accepted are torch.float32",
    ),
    "integer": (
        changed(0, torch.ones(4, dtype=torch.int32), 1),
        TypeError,
        "params[1] is torch.int32; accepted are torch.float32",
    ),
    "device": (
        changed(0, torch.ones(4, device="meta"), 1),
        ValueError,
        "params[1] is on meta and keep on cpu; call once per device",
    ),
    "step_device": (
        changed(3, torch.ones(2, device="meta")),
        ValueError,
        "step is on meta and keep on cpu; call once per device",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    arguments, kind, message = ERRORS[case]
    with pytest.raises(kind, match=re.escape(message)):
        after(*arguments)  # type: ignore[arg-type]


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend='rocm' is not a backend; use 'auto', 'cuda', 'triton' or 'torch'"):
        after(*two(), backend="rocm")


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_forced_backend_says_why_it_cannot_run(name: str) -> None:
    with pytest.raises(RuntimeError, match=f"after: backend='{name}' cannot run: the tensors are on cpu"):
        after(*two(), backend=name)


def test_environment_forces_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "forced", "cuda")
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run"):
        after(*two())
    after(*two(), backend="torch")
    monkeypatch.setattr(backend, "forced", "gpu")
    with pytest.raises(ValueError, match="STEEPEST_BACKEND='gpu' is not a backend"):
        after(*two())


def test_fallback_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backend, "_logged", set())
    with caplog.at_level(logging.INFO, logger="steepest"):
        after(*two())
        after(*two())
    assert [record.message for record in caplog.records] == [
        "after runs on torch (cuda: the tensors are on cpu; triton: the tensors are on cpu)"
    ]


def test_each_fallback_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backend, "_logged", set())
    with caplog.at_level(logging.INFO, logger="steepest"):
        for triton in (None, "one pair is strided", None):
            backend.choose("op", "auto", {"cuda": "not built", "triton": triton}, torch.device("cpu"))
    assert [record.message for record in caplog.records] == [
        "op runs on triton (cuda: not built)",
        "op runs on torch (cuda: not built; triton: one pair is strided)",
    ]


# In its own process: Triton reads TRITON_INTERPRET when it decorates a kernel.
INTERPRETED = """
import torch
from steepest.kernels.after import after, can_use
from steepest.ops.after import reference
torch.manual_seed(0)
shapes = [(5, 7), (16,), (), (0, 3), (3001,), (1025,), (2, 3, 4)]
params = [torch.randn(s) for s in shapes] + [torch.randn(30, 40).t()]
updates = [torch.randn(s) for s in shapes] + [torch.randn(30, 40).t()]
updates[0].fill_(float("nan"))
keep, step = torch.rand(len(params)), torch.rand(len(params))
step[0] = 0
twins = [torch.empty_strided(p.shape, p.stride()).copy_(p) for p in params]
assert can_use(params, updates) is None
after(params, updates, keep, step)
reference(twins, updates, keep, step)
for p, twin in zip(params, twins):
    torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-6)
assert "equal strides" in can_use([torch.ones(3, 4)], [torch.ones(4, 3).t()])
assert "equal strides" in can_use([torch.ones(8)[::2]], [torch.ones(8)[::2]])
assert "torch.float64" in can_use([torch.ones(3).double()], [torch.ones(3)])
print("equal")
"""


@needs_triton
def test_triton_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("p_dtype,u_dtype", PAIRS[:9], ids=str)
def test_kernels(name: str, p_dtype: torch.dtype, u_dtype: torch.dtype) -> None:
    params, updates, keep, step = problem(p_dtype, u_dtype, device="cuda")
    if name == "triton":  # takes one flat range of memory; the other layouts have their reason tested above
        from steepest.kernels.after import can_use

        kept = [i for i, pair in enumerate(zip(params, updates)) if can_use([pair[0]], [pair[1]]) is None]
        params, updates = [params[i] for i in kept], [updates[i] for i in kept]
        keep, step = keep[kept], step[kept]
    step[0], updates[0] = 0.0, torch.full_like(updates[0], NAN)
    wanted = expected(params[1:], updates[1:], keep[1:], step[1:])
    first = keep[0] * params[0].double()
    after(params, updates, keep, step, backend=name)
    assert_rounded_once(params, [first, *wanted], p_dtype)


@pytest.mark.gpu
def test_cuda_takes_more_tensors_than_one_launch_holds() -> None:
    params = [torch.randn(i % 37, 5, device="cuda") for i in range(500)]
    updates = [torch.randn_like(p) for p in params]
    keep, step = torch.rand(500, device="cuda"), torch.rand(500, device="cuda")
    wanted = expected(params, updates, keep, step)
    after(params, updates, keep, step, backend="cuda")
    assert_rounded_once(params, wanted, torch.float32)


def ones(device: str) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Large enough that a launch on the wrong device or stream shows; p = 1 becomes 0.5 - 0.25."""
    p, u = (torch.ones(1 << 20, device=device) for _ in range(2))
    return [p], [u], torch.full((1,), 0.5, device=device), torch.full((1,), 0.25, device=device)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_kernels_count_versions(name: str) -> None:
    params, updates, keep, step = ones("cuda")
    version = params[0]._version
    after(params, updates, keep, step, backend=name)
    assert params[0]._version > version


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_kernels_on_a_device_that_is_not_current(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than two CUDA devices")
    params, updates, keep, step = ones("cuda:1")
    with torch.cuda.device(0):
        after(params, updates, keep, step, backend=name)
        assert torch.cuda.current_device() == 0
    assert bool((params[0] == 0.25).all())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_kernels_run_on_the_current_stream(name: str) -> None:
    """The parameter gets its value late on a side stream: a launch on another stream would read it too early."""
    params, updates, keep, step = ones("cuda")
    after(params, updates, keep, step, backend=name)  # compiled before, so that nothing else waits
    params[0].zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        params[0].fill_(1.0)
        after(params, updates, keep, step, backend=name)
    torch.cuda.synchronize()
    assert bool((params[0] == 0.25).all())


@pytest.mark.gpu
def test_cuda_in_a_captured_graph() -> None:
    """A replay reads parameters, updates and factors anew; Triton's table of addresses declines the capture."""
    params, updates, keep, step = ones("cuda")
    after(params, updates, keep, step, backend="cuda")  # loads the kernel, which a capture may not
    params[0].fill_(1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        after(params, updates, keep, step, backend="cuda")
        with pytest.raises(RuntimeError, match="cannot be replayed by a CUDA graph"):
            after(params, updates, keep, step, backend="triton")
    assert bool((params[0] == 1.0).all()), "a capture runs nothing"
    graph.replay()
    assert bool((params[0] == 0.25).all())
    step.zero_()
    graph.replay()
    assert bool((params[0] == 0.125).all())
