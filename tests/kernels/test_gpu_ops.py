"""Ops by themselves and beside one another: large and small launches in a graph and in two threads, on a side stream,
again and again. What needs no GPU of it runs on a CPU as well."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.linalg.basis import eigh_refresh
from steepest.linalg.chain import chain
from steepest.linalg.coefficients import SCHEDULES
from steepest.linalg.polar import polar, polars
from steepest.linalg.scaling import prescaled
from steepest.ops import backend
from steepest.ops.chain_numbers import SCRATCH
from steepest.ops.grouped_gemm import grouped_gemm
from steepest.ops.weight_update import weight_update
from support.chain_numbers import given, grams
from support.eigenvalues import EIGENVALUES, exact_basis, symmetric
from support.singular_values import SPECTRA, gaussian, with_spectrum
from support.training import all_same_bits, noise

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
H = torch.float16
Call = Callable[[], Sequence[Tensor]]


def matrices(count: int, m: int, n: int, device: str) -> Tensor:
    names = ("gaussian", *SPECTRA)
    return torch.stack([with_spectrum(m, n, names[i % len(names)]) for i in range(count)]).float().to(device)


def of_polar(*shapes: tuple[int, int, int]) -> Callable[[str], Call]:
    def make(device: str) -> Call:
        xs = [matrices(*shape, device) for shape in shapes]
        return lambda: polars(xs)

    return make


def of_eigh(n: int, method: Any) -> Callable[[str], Call]:
    def make(device: str) -> Call:
        values = EIGENVALUES["power"](n)
        P = torch.stack([symmetric(values, seed) + 1e-3 * symmetric(values, seed + 9) for seed in range(3)]).float()
        Q = torch.stack([exact_basis(symmetric(values, seed).float()) for seed in range(3)])
        P, Q = P.to(device), Q.to(device)
        return lambda: tuple(eigh_refresh(P, Q, method=method, exact=False))

    return make


def of_products(*sizes: tuple[int, int, int]) -> Callable[[str], Call]:
    def make(device: str) -> Call:
        xs = [noise(size, i, H).to(device) / size[-1] ** 0.5 for i, size in enumerate(sizes)]

        def run() -> list[Tensor]:
            outs = [torch.empty(len(x), x.shape[1], x.shape[1], dtype=H, device=device) for x in xs]
            grouped_gemm(xs, [x.mT for x in xs], out=outs, symmetric=True)
            return outs

        return run

    return make


def of_updates(batch: int, m: int, k: int, n: int) -> Callable[[str], Call]:
    def make(device: str) -> Call:
        a, b = (noise(size, i, H).to(device) for i, size in enumerate(((batch, m, k), (batch, k, n))))
        weights, alpha = noise((batch, m, n), 2).to(device), torch.full((batch,), 0.1, device=device)

        def run() -> list[Tensor]:
            moved = [w.clone() for w in weights]
            weight_update(a, b, moved, alpha=alpha, beta=1 - alpha)
            return moved

        return run

    return make


#: A large launch and a small one of each family of kernels.
FAMILIES: dict[str, tuple[Callable[[str], Call], Callable[[str], Call]]] = {
    "small polar": (of_polar((5, 128, 140)), of_polar((7, 80, 96), (2, 9, 5))),
    "small polar in clusters": (of_polar((3, 256, 256)), of_polar((3, 136, 140))),
    "chain": (of_polar((1, 520, 648), (1, 328, 264)), of_polar((2, 264, 328))),
    "rotation": (of_eigh(127, "jr"), of_eigh(33, "jr")),
    "exact basis": (of_eigh(128, "eigh"), of_eigh(31, "eigh")),
    "products": (of_products((1, 2048, 512), (3, 264, 136)), of_products((2, 136, 72))),
    "updates": (of_updates(2, 264, 136, 520), of_updates(3, 72, 64, 136)),
}
families = pytest.mark.parametrize("family", FAMILIES)
on_devices = pytest.mark.parametrize("device", DEVICES)


def pair(family: str, device: str) -> tuple[Call, Call, list[Tensor], list[Tensor]]:
    """Both calls of a family, and what each gives alone."""
    large, small = (make(device) for make in FAMILIES[family])
    return large, small, [x.clone() for x in large()], [x.clone() for x in small()]


@on_devices
@families
def test_tiny_launches(family: str, device: str) -> None:
    """The small ones, once: what a sanitizer is to see."""
    _, make = FAMILIES[family]
    assert all(bool(x.isfinite().all()) for x in make(device)())


@on_devices
@pytest.mark.parametrize("backend_", ["auto", "triton"])
def test_tiny_steps(backend_: str, device: str) -> None:
    """Two steps of all elementwise kernels at shapes that no vector divides."""
    if (backend_, device) == ("triton", "cpu"):
        pytest.skip("Triton runs on a GPU")
    params = [nn.Parameter(noise(shape, i).to(device)) for i, shape in enumerate(((9, 5), (24, 40), (7,), (3, 4099)))]
    groups = [{"params": params[:2]}, {"params": params[2:], "use_muon": False}]
    optimizer = steepest.MuAdam(groups, lr=0.02, polar="auto", backend=backend_)
    for step in range(2):
        for i, p in enumerate(params):
            p.grad = noise(p.shape, 10 * step + i).to(device)
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in params)


@on_devices
@families
def test_runs_are_the_same_to_the_bit(family: str, device: str) -> None:
    """200 of them on a GPU, large and small in turn."""
    large, small, *wanted = pair(family, device)
    same = torch.ones((), dtype=torch.bool, device=device)
    for _ in range(200 if device == "cuda" else 2):
        for call, each in zip((large, small), wanted):
            for x, y in zip(call(), each, strict=True):
                same &= (x == y).all()
    assert bool(same)


@on_devices
@families
def test_two_threads(family: str, device: str) -> None:
    """Each loops over both sizes, on a stream of its own where there are streams."""
    large, small, *wanted = pair(family, device)
    failures: list[object] = []

    def loop(first: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream() if device == "cuda" else None):
                for i in range(50 if device == "cuda" else 3):
                    which = (first + i) % 2
                    if not all_same_bits(list((large, small)[which]()), wanted[which]):
                        failures.append((first, i))
        except Exception as error:
            failures.append(error)

    if device == "cuda":
        torch.cuda.synchronize()
    threads = [threading.Thread(target=loop, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.gpu
@families
def test_a_large_and_a_small_launch_in_a_graph(family: str) -> None:
    """In either order: what a launch may use of shared memory is not what the one before it needed."""
    large, small, *wanted = pair(family, "cuda")
    for order in ((0, 1), (1, 0, 1)):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = [(large, small)[which]() for which in order]
        for _ in range(3):
            for xs in found:
                for x in xs:
                    x.zero_()
            graph.replay()
            for which, xs in zip(order, found, strict=True):
                assert all_same_bits(list(xs), wanted[which])


@pytest.mark.gpu
@families
def test_on_a_side_stream(family: str) -> None:
    """It waits for what its stream was given before, while another stream runs the same."""
    large, small, *wanted = pair(family, "cuda")
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        found = [large(), small()]
    beside = [small(), large()]
    side.synchronize()
    for xs, which in zip((*found, *beside), (0, 1, 1, 0), strict=True):
        assert all_same_bits(list(xs), wanted[which])


# ---- schemas and fakes ---------------------------------------------------------------------------------------------


def chain_arguments(device: str) -> tuple[Any, ...]:
    plan, schedule = chain(SCHEDULES["auto"], (2,)), SCHEDULES["auto"]
    x = prescaled(torch.stack([gaussian(16, 40)] * 2).float(), H).to(device)
    lists = (
        [x],
        [torch.zeros_like(x)],
        [torch.zeros(2, device=device)],
        [],
        [],
        [],
    )
    flat = [value for row in plan.constants for value in row]
    return (*lists, *plan.packed, flat, list(plan.powers), list(schedule.slacks), True, 1e-7, 1, False)


def numbers_arguments(device: str) -> tuple[Any, ...]:
    constants, powers, slacks = given(SCHEDULES["auto"])
    gram = grams(5, torch.bfloat16)[:-1].to(device)
    numbers, slack = torch.zeros(len(gram), len(powers), device=device), torch.zeros(len(gram), device=device)
    scratch = torch.zeros(len(gram) * SCRATCH, dtype=torch.float64, device=device)
    flat = [value for row in constants for value in row]
    return gram, numbers, slack, scratch, flat, list(powers), list(slacks), True, 1e-7


def update_arguments(device: str) -> tuple[Any, ...]:
    a, b = (noise((2, 16, 16), i, H).to(device) for i in range(2))
    weights, number = [torch.ones(16, 16, device=device) for _ in range(2)], torch.ones(2, device=device)
    return a, b, weights, number, 0.5 * number


def small_arguments(device: str) -> tuple[Any, ...]:
    x = noise((2, 24, 40), 0).to(device)
    table = [value for row in SCHEDULES["turbo"].tables[0] for value in (*row, *[float("nan")] * 5)[:5]]
    return [x], [torch.zeros_like(x)], [torch.zeros(2, device=device)], table, 1, [], False, 1e-7


def refresh_arguments(device: str) -> tuple[Any, ...]:
    P = torch.stack([symmetric(EIGENVALUES["power"](33), seed) for seed in range(2)]).float().to(device)
    Q = torch.eye(33, device=device).expand_as(P).contiguous()
    status, order = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 33, dtype=torch.int64)
    return P, Q, torch.zeros_like(P), torch.zeros(2, 33, device=device), status.to(device), order.to(device), 0, 1


ARGUMENTS: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "polar_chain": chain_arguments,
    "chain_numbers": numbers_arguments,
    "weight_update": update_arguments,
    "small_polar": small_arguments,
    "eigh_refresh": refresh_arguments,
}


@pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")
@on_devices
@pytest.mark.parametrize("op", ARGUMENTS)
def test_opcheck(op: str, device: str) -> None:
    """What an op says of its arguments is true: what it writes, and that nothing else changes."""
    overload = getattr(torch.ops.steepest, op).default
    kind = "CUDA" if device == "cuda" else "CPU"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"steepest::{op}", kind):
        pytest.skip(f"this build has no {op} for {kind}")
    arguments = ARGUMENTS[op](device)
    torch.library.opcheck(overload, arguments, test_utils=("test_schema", "test_faketensor"))


@on_devices
def test_a_call_of_all_kinds_of_matrices(device: str) -> None:
    """More than five shapes, small ones, clusters and chains among them: each is what it is alone."""
    sides = ((24, 40), (128, 130), (136, 264), (256, 300), (264, 264), (272, 520), (280, 296), (328, 272), (400, 344))
    xs = [matrices(2, *side, device) for side in sides]
    for x, together in zip(xs, polars(xs), strict=True):
        torch.testing.assert_close(together, polar(x), rtol=0.02, atol=0.01)
