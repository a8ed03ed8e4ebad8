"""What is asked of the PTX of Triton's kernels, in a process of triton_process.py.

Each check runs under several seeds of the simulator, and what they compute is the same to the bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from ptx import triton_device
from ptx.triton_device import driver, edited, lent
from ptx.triton_faults import FAULTS
from steepest.kernels import multi_tensor
from steepest.kernels import symm_gemm as kernels
from steepest.ops.multi_tensor import Table
from support import fused_ops, triton_products
from support.triton_products import B, Case, F, H, make_case

Capability = tuple[int, int]
SEEDS = (1, 2, 3)
#: Element type of the operands, precision, element type of c and the output.
KINDS: dict[str, tuple[torch.dtype, Any, torch.dtype]] = {
    "fp16": (H, None, H),
    "bf16": (B, None, B),
    "bf16 into fp32": (B, None, F),
    "tf32": (F, "tf32", F),
    "tf32x3": (F, "tf32x3", F),
    "fp32": (F, "ieee", F),
}

kernels._machine = lambda device: (triton_device.CAPABILITIES[driver.device], triton_device.MULTIPROCESSORS)


def version() -> str:
    return str(triton.__version__)


# ---- products ------------------------------------------------------------------------------------------------------


def every_candidate(capability: Capability, kind: str, symmetric: bool) -> None:
    """All configurations that may be chosen for a product agree to the bit, and with fp64 within the bound."""
    for case in _aligned_cases(capability, kind, symmetric):
        dtype, precision, into = KINDS[kind]
        wide = into != dtype
        listed = kernels.candidates(capability, symmetric, True, precision, wide)
        first: Tensor | None = None
        for chosen in listed:
            result = run(replace(case, chosen=chosen), capability)
            first = result if first is None else first
            assert same_bits(result, first), f"{case}: {chosen} and {listed[0]} differ"


def _aligned_cases(capability: Capability, kind: str, symmetric: bool) -> Iterator[Case]:
    """Cut tiles; more turns of the loop than are in flight, the last one whole or cut; layouts differ with the kind."""
    dtype, precision, into = KINDS[kind]
    block_k = kernels.candidates(capability, symmetric, True, precision, into != dtype)[0].block_k
    torch.manual_seed(0)
    draw = random.Random(0)
    number = 4 * list(KINDS).index(kind) + 2 * triton_device.CAPABILITIES.index(capability) + symmetric
    for turn, k in ((number, 6 * block_k), (number + 13, 6 * block_k - 24)):
        m, n = 136 + 8 * draw.randrange(8), 136 + 8 * draw.randrange(8)
        sizes = (2 if turn % 2 else 1, m, m if symmetric else n, k)
        case = make_case(draw, turn, dtype, sizes, symmetric, 8, torch.device("cpu"), into)
        yield replace(case, precision=precision or "ieee")


def averages(capability: Capability) -> None:
    """L + w (G G^T - L), in place, of gradients of 16 bits and of fp32; tall, wide and of odd sizes."""
    torch.manual_seed(0)
    for turn, (m, k) in enumerate(((40, 136), (136, 40), (33, 65))):
        for dtype in (B, F):
            weight = torch.tensor([0.0, 1.0, 0.05]) if turn % 2 else 0.25
            g = torch.randn(3, k, m).to(dtype).mT if turn == 1 else torch.randn(3, m, k).to(dtype)
            factor = torch.randn(3, m, m)
            case = Case(g, g.mT, factor + factor.mT, "out", weight, None, 0.0, True, 0, "tf32x3")
            result = run(case, capability)
            if turn % 2:
                assert torch.equal(result[0], case.c[0]), "of weight 0 is the factor"


def odd_products(capability: Capability, kind: str) -> None:
    """Sizes at random, empty and single ones among them; a matrix alone, and beside one of NaN."""
    with triton_device.device(capability) as device:
        triton_products.compare(device, KINDS[kind][0], 8, 100)


def far_apart(capability: Capability) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False  # gigabytes of it
    try:
        with triton_device.device(capability) as device:
            triton_products.far_apart(device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


def run(case: Case, capability: Capability, seeds: Sequence[int] = SEEDS) -> Tensor:
    """The result, which is within the bound and the same under every seed."""
    results = []
    for seed in seeds:
        with triton_device.device(capability, seed):
            results.append(case.run())
    case.check(results[0])
    for result in results[1:]:
        assert same_bits(result, results[0]), f"{case}: two runs differ"
    return results[0]


def same_bits(x: Tensor, y: Tensor) -> bool:
    x, y = (each.contiguous().view(-1).view(torch.uint8) for each in (x, y))
    return torch.equal(x, y)


# ---- elementwise ---------------------------------------------------------------------------------------------------


class Ops:
    """The elementwise ops, which find their tensors in tables: each is lent those that it is given, and the directions
    that it multiplies by the factors of their rows.
    """

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
                scale = multi_tensor._scaled

                def scaled(direction: Tensor, factors: Tensor) -> Tensor:
                    product = scale(direction, factors)
                    stack.enter_context(lent([product]))
                    return product

                patch.setattr(multi_tensor, "_scaled", scaled)
                stack.enter_context(lent(_tensors(arguments)))
                getattr(multi_tensor, name)(*arguments)

        return call


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for each in arguments:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, (list, tuple)):
            yield from _tensors(each)


def steps(capability: Capability) -> None:
    """Three steps of all recipes, element types and sizes as the host takes them; gradients with NaN are skipped."""
    with triton_device.device(capability) as device:
        fused_ops.compare(Ops(), device)


def steps_under_seeds(capability: Capability) -> None:
    first: fused_ops.State | None = None
    for seed in SEEDS:
        with triton_device.device(capability, seed) as device:
            state = fused_ops.problem().copy(device)
            fused_ops.grad_stats(Ops(), state, None, None)
            fused_ops.update_moments(Ops(), state)
            fused_ops.apply_update(Ops(), state)
        first = state if first is None else first
        for (name, found, _), (_, wanted, _) in zip(state.written(), first.written()):
            assert same_bits(found, wanted), f"{name} differs between two runs"


def many_chunks(capability: Capability) -> None:
    """A gradient whose partial sums are added up in two turns."""
    size = multi_tensor.LINES * multi_tensor.CHUNK + 5
    with triton_device.device(capability) as device:
        state = fused_ops.random_state([(1, (size,))], [fused_ops.PROGRAMS[0]], fused_ops.TYPES[:1])
        fused_ops.compare_step(Ops(), device, state)


# ---- planted faults ------------------------------------------------------------------------------------------------


def fault(name: str) -> str:
    """The error that a kernel with this fault ends in under some seed; "" if it goes through under all."""
    planted = FAULTS[name]
    if planted.tma is None:
        kernel, attempt = multi_tensor.grad_stats_kernel, _inspection(planted.capability)
    else:
        kernel, attempt = kernels.product_kernel, _product(planted.capability, planted.tma)
    attempt(0)  # as it is, without the fault
    with edited(planted.plant, kernel):
        for seed in range(1, 33):
            try:
                attempt(seed)
            except (AssertionError, RuntimeError) as error:
                return str(error)
    return ""


def _product(capability: Capability, tma: bool) -> Callable[[int], None]:
    case = next(_aligned_cases(capability, "fp16", False))
    case.chosen = next(c for c in kernels.candidates(capability, False) if c.tma == tma)

    def multiply(seed: int) -> None:
        run(case, capability, [seed])

    return multiply


def inspect_a_stranger() -> None:
    """A gradient that its table names and nobody lent."""
    _inspection((9, 0), multi_tensor)(0)


def _inspection(capability: Capability, ops: Any = None) -> Callable[[int], None]:
    grad = torch.randn(3, 1000)
    table = Table.empty(torch.zeros((), dtype=torch.int64), [grad.numel()], [(1, grad.numel())])
    numbers = [0.1, 0.0, 0.9, 0.99, 1e-8]

    def inspect(seed: int) -> None:
        with triton_device.device(capability, seed):
            where = (table.rows, table.sums, table.skipped, table.scratch)
            (ops or Ops()).grad_stats([grad], [], *where, [0], [0, 1], [0], numbers, [], [], None, None)
        found = float(table.column("grad_sq"))
        assert abs(found / float(grad.double().square().sum()) - 1) < 1e-5, found

    return inspect
