"""The self-check: kernels that are right pass it, kernels that are made wrong on purpose do not, and what follows."""

from __future__ import annotations

import email.message
import importlib.metadata
import importlib.util
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import steepest
from steepest.linalg import basis
from steepest.ops import backend, eigh, multi_tensor, polar_chain, selfcheck
from steepest.ops.checks import (
    chain_numbers,
    eigenvectors,
    eigh_refresh,
    elementwise,
    fp32_products,
    normalization,
    products,
    small_polar,
    weight_update,
)
from steepest.ops.checks import polar_chain as chains
from steepest.ops.checks.comparison import GUARD, Comparison
from steepest.ops.multi_tensor import CHUNK, COLUMNS, SUMS
from steepest.parts import Frobenius, Spectral
from steepest.step import plan
from steepest.step import warm_up as warming
from support.pretended_gpu import OnCpu
from support.slow import slow
from support.triton_interpreter import mend_the_interpreter, multiply_in_bf16, run_interpreted

needs_extension = pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
CPU = torch.device("cpu")
FAILED = "its kernels failed their self-check"
Kernel = Callable[..., Any]


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "_verdicts", {})
    monkeypatch.setattr(selfcheck, "enabled", True)
    monkeypatch.setattr(backend, "_logged", set())


class Counted(TorchDispatchMode):
    """How often the host reads a number of a tensor, and operations in all."""

    reads = calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


# ---- kernels that are right: torch's operations, or the host's version of the op -------------------------------------


def wide(number: Any) -> Any:
    return number.float()[:, None, None] if isinstance(number, Tensor) else number


def torch_product(
    a: Tensor, b: Tensor, c: Tensor | None, alpha: Any, beta: Any, gamma: float, out: Tensor, **more: Any
) -> None:
    found = a.float() @ b.float()
    if c is not None and beta is None:
        found = c.float() + wide(alpha) * (found - c.float())
    else:
        found = wide(alpha) * found + (0.0 if c is None else wide(beta) * c.float())
    found.diagonal(dim1=1, dim2=2).add_(gamma)
    out.copy_(found.tril() + found.tril(-1).mT if more["symmetric"] else found)


def torch_small_polar(xs: Any, outs: Any, slacks: Any, tables: Any, least: Any, *, tight: bool, eps: float) -> None:
    for x, out, slack in zip(xs, outs, slacks):
        found, own = small_polar.reference(x.float(), tight)
        out.copy_(found), slack.copy_(own)


def torch_refresh(P: Tensor, Q: Tensor, *given: Any) -> None:
    *outs, method, sweeps = given
    for out, found in zip(outs, basis.eigh_refresh(P, Q, method=eigh.METHODS[method], sweeps=sweeps)):
        out.copy_(found)


def torch_eigh(A: Tensor, values: Tensor, info: Tensor) -> None:
    found, vectors = torch.linalg.eigh(A)
    A.copy_(vectors.mT), values.copy_(found), info.zero_()


def host(name: str) -> Kernel:
    return getattr(torch.ops.steepest, name)


CHECKS: dict[str, Callable[[Any, Comparison], None]] = {
    "elementwise": lambda kernel, c: elementwise.check(kernel, elementwise.CASES, c),
    "elementwise, cpu": lambda kernel, c: elementwise.check(kernel, elementwise.ON_A_CPU, c),
    "elementwise, triton": lambda kernel, c: elementwise.check(kernel, elementwise.IN_TRITON, c),
    "normalization": lambda kernel, c: normalization.check(kernel, c, normalization.CASES),
    "normalization, cpu": lambda kernel, c: normalization.check(kernel, c, normalization.ON_A_CPU),
    "products": lambda kernel, c: products.check(kernel, c, {True: [None], False: [None]}),
    "fp32 products": fp32_products.check,
    "polar chain": lambda kernel, c: chains.check(kernel, c, (chains.SMALL[:3],)),
    "weight update": lambda kernel, c: weight_update.check(kernel, c, weight_update.SMALL),
    "chain numbers": chain_numbers.check,
    "small polar": lambda kernel, c: small_polar.check(kernel, c, 140),
    "eigh refresh": lambda kernel, c: eigh_refresh.check(kernel, c, 40),
    "eigenvectors": eigenvectors.check,
}
#: By family, without the case's name.
RIGHT: dict[str, Any] = {
    "elementwise": host,
    "normalization": host,
    "products": torch_product,
    "fp32 products": torch_product,
    "polar chain": polar_chain.polar_chain,
    "weight update": lambda *arguments: host("weight_update")(*arguments),
    "chain numbers": lambda *arguments: host("chain_numbers")(*arguments),
    "small polar": torch_small_polar,
    "eigh refresh": torch_refresh,
    "eigenvectors": torch_eigh,
}


def verdict(name: str, kernel: Any, seed: int = 0) -> str | None:
    comparison = Comparison(CPU, seed)
    CHECKS[name](kernel, comparison)
    return comparison.verdict()


def test_every_family_is_here() -> None:
    assert set(RIGHT) == set(selfcheck.FAMILIES)
    assert all(selfcheck.check_of(family).static("cuda", CPU) is not None for family in RIGHT)


@needs_extension
@pytest.mark.parametrize("name", CHECKS)
def test_what_is_right_passes_and_one_flag_is_read(name: str) -> None:
    kernel = RIGHT[name.partition(",")[0]]
    with Counted() as counted:
        assert verdict(name, kernel) is None
    assert counted.reads == 1
    assert verdict(name, kernel, seed=1) is None


# ---- kernels that are wrong ------------------------------------------------------------------------------------------


def beside(t: Tensor) -> Tensor:
    """The element behind a tensor's last one."""
    return t.as_strided((1,), (1,), t.storage_offset() + t.numel())


def elementwise_with(name: str, fault: Callable[..., None]) -> Kernel:
    """The host's ops, and after one of them a fault in what it was given."""

    def op(called: str) -> Kernel:
        def run(*arguments: Any) -> None:
            host(called)(*arguments)
            if called == name:
                fault(*arguments)

        return run

    return op


def longer_than_a_chunk(tensors: list[Tensor]) -> Tensor:
    return next(t for t in tensors if t.numel() > CHUNK)


def unaligned(tensors: list[Tensor]) -> Tensor:
    return next(t for t in tensors if t.numel() and t.data_ptr() % 16)


# What `update_moments` and `apply_update` are given; their first lists.
GRADS, MOMENTA, SECONDS, INPUTS, PARAMS, MANTISSAS = range(6)
ELEMENTWISE: dict[str, tuple[str, Callable[..., None], str]] = {
    "a hundredth too large": ("update_moments", lambda *a: a[MOMENTA][0].mul_(1.01), "momentum of (40, 24)"),
    "one element": ("update_moments", lambda *a: a[SECONDS][1].view(-1)[-1:].mul_(2), "second moment"),
    "an element behind the last": (
        "update_moments",
        lambda *a: beside(a[INPUTS][0]).fill_(1),
        "bytes beside the tensors",
    ),
    "an element before the first": (
        "apply_update",
        lambda *a: a[2][0].as_strided((1,), (1,), a[2][0].storage_offset() - 1).fill_(0),
        "4 bytes beside the tensors were written",
    ),
    "only beyond a chunk": (
        "update_moments",
        lambda *a: longer_than_a_chunk(a[MOMENTA]).view(-1)[CHUNK:].zero_(),
        "momentum",
    ),
    "only where unaligned": ("update_moments", lambda *a: unaligned(a[PARAMS]).view(-1)[-1:].zero_(), "parameter"),
    "the last element of an odd size": ("apply_update", lambda *a: a[2][1].view(-1)[-1:].add_(1), "parameter"),
    "a half of the mantissa": (
        "update_moments",
        lambda *a: next(t for t in a[MANTISSAS] if t.numel()).zero_(),
        "parameter of (131,)",
    ),
    "NaN in a neighbour": ("update_moments", lambda *a: a[MOMENTA][3].view(-1)[:1].fill_(torch.nan), "momentum"),
    "a step with a NaN": ("grad_stats", lambda *a: a[2][:, 0].fill_(1), "whether steps are taken"),
    "a limit that is forgotten": (
        "grad_stats",
        lambda *a: a[2][:, 0].logical_or_(a[2][:, COLUMNS.index("largest_taken")] > 0),
        "whether steps are taken",
    ),
    "a step that is not counted": ("grad_stats", lambda *a: a[1][2].sub_(1), "step counts: 1 of"),
    "a NaN that is not counted": ("grad_stats", lambda *a: a[4].zero_(), "steps not taken"),
    "a step that is decided and not counted": (
        "decide_steps",
        lambda *a: a[0][2].sub_(1),
        "counts that are decided apart",
    ),
    "a number that is decided": ("decide_steps", lambda *a: a[1][:, 5].mul_(2), "rows that are decided apart"),
    "a step that is counted when it is measured": (
        "grad_stats",
        lambda *a: a[3].add_(0) if a[-1] is not False else a[1][2].add_(1),
        "decided apart",
    ),
    "the last item of many": ("update_moments", lambda *a: a[MOMENTA][-1].zero_(), "momentum of (8,)"),
    "a norm": ("apply_update", lambda *a: a[7][:, SUMS.index("update_sq")].mul_(1.1), "update_sq"),
    "the largest of the momenta": (
        "update_moments",
        lambda *a: a[7][:, SUMS.index("momentum_max")].mul_(0.5),
        "momentum_max",
    ),
    "lengths that do not count": (
        "apply_update",
        lambda *a: a[2][1][1].add_(0.001 * a[0][1][1]),
        "parameter of (2, 16387)",
    ),
    "factors that do not count": (
        "apply_update",
        lambda *a: a[2][0].add_(0.001 * a[0][0]),
        "parameter of (40, 24)",
    ),
}


@needs_extension
@pytest.mark.parametrize("fault", ELEMENTWISE)
def test_elementwise_kernels_that_are_wrong(fault: str) -> None:
    name, change, said = ELEMENTWISE[fault]
    found = verdict("elementwise", elementwise_with(name, change))
    assert found is not None
    assert said in found


def product_with(fault: Callable[[Tensor], None], when: Callable[..., bool] = lambda *a, **m: True) -> Kernel:
    def product(*arguments: Any, **more: Any) -> None:
        torch_product(*arguments, **more)
        if when(*arguments, **more):
            fault(arguments[6])

    return product


def only(**wanted: Any) -> Callable[..., bool]:
    return lambda *a, **more: all(more.get(key) == value for key, value in wanted.items())


def with_other_numbers(*arguments: Any, **more: Any) -> None:
    """A tensor alpha counts as the first matrix'."""
    alpha = arguments[3]
    alpha = alpha[:1].expand_as(alpha) if isinstance(alpha, Tensor) else alpha
    torch_product(*arguments[:3], alpha, *arguments[4:], **more)


PRODUCTS: dict[str, Kernel] = {
    "the last tile": product_with(lambda out: out[..., -8:, -8:].zero_()),
    "a column of tiles": product_with(lambda out: out[..., 128:136].zero_()),
    "the mirrored half": product_with(lambda out: out.copy_(out.tril()), only(symmetric=True)),
    "one bit of the mirrored half": product_with(
        lambda out: out[0, 0, 1:2].mul_(1 + torch.finfo(out.dtype).eps), only(symmetric=True)
    ),
    "alpha": with_other_numbers,
    "a row of an odd matrix": product_with(lambda out: out[:, -1].zero_(), lambda *a, **m: a[6].shape[1] % 2 == 1),
    "where unaligned": product_with(lambda out: out[0, 0, :1].add_(1), lambda *a, **m: a[0].data_ptr() % 16 > 0),
    "NaN in a neighbour": product_with(lambda out: out[0, 0, :1].fill_(torch.nan), lambda *a, **m: len(a[6]) == 3),
    "an element behind the last": product_with(lambda out: beside(out).fill_(0)),
}


@pytest.mark.parametrize("fault", PRODUCTS)
def test_products_that_are_wrong(fault: str) -> None:
    assert verdict("products", PRODUCTS[fault]) is not None


def too_narrow(*arguments: Any, **more: Any) -> None:
    """Factors of 16 bits."""
    a, b, *rest = arguments
    torch_product(a.to(torch.bfloat16), b.to(torch.bfloat16), *rest, **more)


FP32_PRODUCTS: dict[str, Kernel] = {
    "in 16 bits": too_narrow,
    "alpha": with_other_numbers,
    "the mirrored half": PRODUCTS["the mirrored half"],
    "a row of an odd matrix": PRODUCTS["a row of an odd matrix"],
    "an average": product_with(lambda out: out.mul_(1.01), lambda *a, **m: a[4] is None),
    "an element behind the last": PRODUCTS["an element behind the last"],
}


@pytest.mark.parametrize("fault", FP32_PRODUCTS)
def test_fp32_products_that_are_wrong(fault: str) -> None:
    assert verdict("fp32 products", FP32_PRODUCTS[fault]) is not None


def chain_with(fault: Callable[..., None]) -> Kernel:
    def chain(xs: Any, ys: Any, slacks: Any, *arguments: Any, **more: Any) -> None:
        polar_chain.polar_chain(xs, ys, slacks, *arguments, **more)
        fault(xs, ys, slacks, more)

    return chain


def without_the_last_column(*arguments: Any, **more: Any) -> None:
    """Coefficients of the first table for every matrix."""
    xs, ys, slacks, nodes, constants, *rest = arguments
    polar_chain.polar_chain(xs, ys, slacks, nodes, (constants[0],) * len(constants), *rest, **more)


CHAINS: dict[str, Kernel] = {
    "the last tile": chain_with(lambda xs, ys, slacks, more: xs[0][:, 128:, 256:].zero_()),
    "a column tile of a tall stack": chain_with(lambda xs, ys, slacks, more: xs[1][..., 128:].zero_()),
    "one row": chain_with(lambda xs, ys, slacks, more: xs[2][:, -1].zero_()),
    "a slack": chain_with(lambda xs, ys, slacks, more: slacks[2].mul_(1.01)),
    "NaN in a neighbour": chain_with(lambda xs, ys, slacks, more: xs[0][0, 0].fill_(torch.nan)),
    "the table": without_the_last_column,
    "weights": chain_with(lambda xs, ys, slacks, more: [u.weights[-1][-1].zero_() for u in more["updates"]]),
    "an element behind the last": chain_with(lambda xs, ys, slacks, more: beside(ys[-1]).fill_(0)),
}


@needs_extension
@pytest.mark.parametrize("fault", [*list(CHAINS)[:3], *map(slow, list(CHAINS)[3:])])
def test_chains_that_are_wrong(fault: str) -> None:
    assert verdict("polar chain", CHAINS[fault]) is not None


def normalization_with(fault: Callable[[dict[str, Any]], Any], name: str = "normalize_and_apply_update") -> Kernel:
    """The host's ops, and after one of them a fault in what it was given, by the names of its schema."""

    def op(called: str) -> Kernel:
        names = [argument.name for argument in host(called).default._schema.arguments]

        def run(*arguments: Any) -> None:
            host(called)(*arguments)
            if called == name:
                fault(dict(zip(names, arguments, strict=True)))

        return run

    return op


def of_refused(given: dict[str, Any], name: str) -> list[Tensor]:
    """The tensors of items whose step is not taken."""
    return [t for t, row in zip(given[name], given["row_of"]) if given["rows"][row, 0] == 0]


NORMALIZATION: dict[str, Kernel] = {
    "a second moment": normalization_with(lambda given: given["averages"][0][0, -1:].mul_(1.001)),
    "a factor": normalization_with(lambda given: given["factors"][1][0, -1:].mul_(0.999)),
    "a step that is not taken": normalization_with(
        lambda given: [v.mul_(2) for v in of_refused(given, "averages")],
    ),
    "a weight that stays": normalization_with(lambda given: [w.mul_(2) for w in of_refused(given, "params")]),
    "a weight": normalization_with(lambda given: given["params"][3][0, -1, -1:].mul_(1.001)),
    "a step without its factors": normalization_with(lambda given: given["params"][0].add_(0.01)),
    "a sum": normalization_with(lambda given: given["sums"][0].mul_(1.01)),
    "an entry": normalization_with(lambda given: [t[0, -1, -1:].mul_(1.01) for t in given["divided"] if t.numel()]),
    "a long row": normalization_with(
        lambda given: [f.mul_(1.001) for u, f in zip(given["directions"], given["factors"]) if u.shape[-1] > 1000]
    ),
    "NaN in its row": normalization_with(
        lambda given: [
            v[0, 1].fill_(torch.nan) for u, v in zip(given["directions"], given["averages"]) if u.isnan().any()
        ]
    ),
    "a flag": normalization_with(lambda given: given["meeting"][len(given["sums"]) + 1 :][:1].fill_(1)),
    "a ticket": normalization_with(lambda given: given["meeting"][:1].fill_(1)),
    "a counter": normalization_with(lambda given: given["scratch"][:1].fill_(1)),
    "the last of many": normalization_with(lambda given: given["factors"][-1].mul_(1.001)),
    "an element behind the last": normalization_with(lambda given: beside(given["averages"][2]).zero_()),
    "factors by themselves": normalization_with(
        lambda given: given["factors"][0][0, -1:].mul_(0.999), "normalize_updates"
    ),
    "second moments by themselves": normalization_with(
        lambda given: given["seconds"][-1][0, -1:].mul_(1.001), "normalize_updates"
    ),
}


@needs_extension
@pytest.mark.parametrize("fault", NORMALIZATION)
def test_normalizations_that_are_wrong(fault: str) -> None:
    assert verdict("normalization", NORMALIZATION[fault]) is not None


def after_the(right: Kernel, fault: Callable[..., Any]) -> Kernel:
    def kernel(*arguments: Any, **more: Any) -> None:
        right(*arguments, **more)
        fault(*arguments)

    return kernel


def in_wide_only(t: Tensor, m: int) -> None:
    if min(t.shape[1:]) > m:
        t[..., -1:].zero_()


OTHERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("weight update", "the last tile"): lambda a, b, weights, alpha, beta: weights[0][-8:, -8:].mul_(1.1),
    ("weight update", "a weight that stays"): lambda a, b, weights, alpha, beta: weights[-1][:1].mul_(1.01),
    ("weight update", "b by columns"): lambda a, b, weights, *_: weights[0].zero_() if b.stride(1) == 1 else None,
    ("weight update", "an element behind the last"): lambda a, b, weights, *_: beside(weights[0]).zero_(),
    ("chain numbers", "a number"): lambda gram, numbers, *_: numbers[0, -1:].mul_(1.001),
    ("chain numbers", "one row more"): lambda gram, numbers, *_: gram.shape[1] > 256 and numbers.mul_(1.01),
    ("chain numbers", "a slack"): lambda gram, numbers, slack, *_: slack[1:2].mul_(0.99),
    ("chain numbers", "NaN in a neighbour"): lambda gram, numbers, *_: numbers[0].fill_(torch.nan),
    ("chain numbers", "NaN becomes a number"): lambda gram, numbers, *_: numbers[3].fill_(1),
    ("chain numbers", "an element behind the last"): lambda gram, numbers, *_: beside(numbers).zero_(),
    ("small polar", "one row"): lambda xs, outs, *_: outs[2][:, -1].zero_(),
    ("small polar", "clusters"): lambda xs, outs, *_: [in_wide_only(out, 128) for out in outs],
    ("small polar", "rows that are apart"): lambda xs, outs, *_: outs[1].copy_(outs[1].roll(1, -1)),
    ("small polar", "a slack"): lambda xs, outs, slacks, *_: slacks[3].mul_(1.01),
    ("small polar", "NaN in a neighbour"): lambda xs, outs, *_: outs[0][2].fill_(torch.nan),
    ("small polar", "an element behind the last"): lambda xs, outs, *_: beside(outs[-1]).zero_(),
    ("eigh refresh", "no longer orthonormal"): lambda P, Q, basis, *_: basis[0, :, -1].mul_(1.001),
    ("eigh refresh", "values"): lambda P, Q, basis, values, *_: values[2].mul_(1.001),
    ("eigh refresh", "no rotation"): lambda P, Q, basis, *_: basis.copy_(Q),
    ("eigh refresh", "not accepted"): lambda P, Q, basis, values, status, *_: status.bitwise_and_(~1),
    ("eigh refresh", "a basis that was to stay"): lambda P, Q, basis, *_: basis[1, :, :1].neg_(),
    ("eigh refresh", "order"): lambda P, Q, basis, values, status, order, *_: order[0].zero_(),
    ("eigh refresh", "an element behind the last"): lambda P, Q, basis, *_: beside(basis).zero_(),
    ("eigenvectors", "columns for rows"): lambda A, *_: A.copy_(A.mT.clone()),
    ("eigenvectors", "order"): lambda A, values, info: values.copy_(values.flip(-1)),
    ("eigenvectors", "status"): lambda A, values, info: info.fill_(3),
}


@needs_extension
@pytest.mark.parametrize("family,fault", [each if i % 2 else slow(*each) for i, each in enumerate(OTHERS)], ids=str)
def test_other_kernels_that_are_wrong(family: str, fault: str) -> None:
    assert verdict(family, after_the(RIGHT[family], OTHERS[family, fault])) is not None


@needs_extension
def test_large_shapes_have_every_way_to_share_out_tiles() -> None:
    """Whole and streamed tiles of both sizes, on a GPU of 132 multiprocessors."""
    assert backend.extension is not None
    ways = set()
    for shapes in (chains.SMALL, chains.STREAMED, chains.WIDE, chains.WIDE_STREAMED):
        grams = [(b, min(m, n), min(m, n), max(m, n), "kk" if m <= n else "mnmn", True) for b, m, n in shapes]
        launches = backend.extension.symm_gemm_plan(grams, 132)["launches"]
        ways |= {(launch["cluster"], launch["steps"] > 0) for launch in launches}
    assert ways == {(1, False), (1, True), (2, False), (2, True)}
    updates = [
        backend.extension.symm_gemm_plan([(b, m, n, k, "kmn", False)], 132) for b, m, k, n in weight_update.LARGE
    ]
    launches = [found["launches"][0] for found in updates]
    assert [(launch["cluster"], launch["steps"] > 0) for launch in launches] == [(1, True), (2, False), (2, True)]


def test_a_comparison_says_how_much_is_wrong() -> None:
    comparison = Comparison(CPU)
    t = comparison.normal(4, 5, dtype=torch.bfloat16, shift=1)
    assert t.data_ptr() % 16 == 2
    comparison.expect("first", t, t.double() + 0.5, 0.25)
    comparison.expect("second", torch.tensor([1.0, torch.nan, 2.0]), torch.tensor([1.0, 1.0, 1.0]), 0.1)
    t.as_strided((1,), (1,), t.storage_offset() - 1).fill_(1)
    assert comparison.verdict() == (
        "first: 20 of 20 numbers are wrong, by 0.5 where 0.25 is allowed; "
        "second: 2 of 3 numbers are wrong, by nan where 0.1 is allowed; 2 bytes beside the tensors were written"
    )
    assert GUARD >= 128


ON_A_GPU = [(family, name) for family, names in selfcheck.FAMILIES.items() for name in names if name != "cpu"]


@pytest.mark.gpu
@pytest.mark.parametrize("family,name", ON_A_GPU)
def test_on_a_gpu(family: str, name: str) -> None:
    device = torch.device("cuda", 0)
    if (reason := selfcheck.check_of(family).static(name, device)) is not None:
        pytest.skip(reason)
    assert selfcheck.run(family, name, device) is None


# ---- what follows ----------------------------------------------------------------------------------------------------


def broken(monkeypatch: pytest.MonkeyPatch, name: str, fault: Callable[..., None]) -> list[str]:
    """The CPU's elementwise kernels with a fault; the names of ops as they are called."""
    called: list[str] = []
    op = elementwise_with(name, fault)

    def counted(each: str, backend: str) -> Kernel:
        called.append(each)
        return op(each)

    monkeypatch.setattr(multi_tensor, "_op", counted)
    return called


def fail(*arguments: Any) -> None:
    raise ValueError("no room for 227 KB\nof shared memory")


def stepped(**options: Any) -> tuple[Tensor, steepest.MuAdam]:
    w = torch.nn.Parameter(torch.linspace(-1, 1, 96).view(8, 12))
    w.grad = torch.linspace(1, 2, 96).view(8, 12).sin()
    optimizer = steepest.MuAdam([w], lr=0.1, **options)
    optimizer.step()
    return w.detach(), optimizer


FAULTS = {
    "wrong numbers": ("update_moments", ELEMENTWISE["a hundredth too large"][1], "momentum of"),
    "out of bounds": ("update_moments", ELEMENTWISE["an element behind the last"][1], "bytes beside the tensors"),
    "an error": ("grad_stats", fail, "ValueError: no room for 227 KB"),
}


@needs_extension
@pytest.mark.parametrize("fault", FAULTS)
def test_the_next_backend_is_taken_and_it_is_said_once(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name, change, said = FAULTS[fault]
    called = broken(monkeypatch, name, change)
    wanted, _ = stepped(backend="torch")
    assert called == []
    found, optimizer = stepped()
    assert torch.equal(found, wanted)
    assert optimizer.prepare() == {"torch"}
    stepped()
    every = ["grad_stats", "grad_stats", "decide_steps", "update_moments", "apply_update"]
    assert called in (every, every[:1]), "checked once, and never used"
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    text = warning.getMessage()
    assert text.startswith("the cpu kernels of elementwise failed their self-check on cpu and are not used: ")
    for part in (said, torch.__version__, steepest.__version__, "CPU (", "Triton", selfcheck.tracker()):
        assert part in text
    assert "\n" not in text


@needs_extension
@pytest.mark.parametrize("fault", FAULTS)
def test_a_backend_that_is_forced_raises_before_anything_is_written(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, change, said = FAULTS[fault]
    broken(monkeypatch, name, change)
    w = torch.nn.Parameter(torch.ones(8, 12))
    w.grad = torch.ones(8, 12)
    optimizer = steepest.MuAdam([w], lr=0.1, backend="cpu")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"backend='cpu' cannot run: {FAILED}") as raised:
            optimizer.step()
        assert said in str(raised.value)
    assert torch.equal(w.detach(), torch.ones(8, 12))
    assert not any(t.any() for t in optimizer.state[w].values())
    monkeypatch.setattr(backend, "forced", "cpu")
    with pytest.raises(RuntimeError, match=f"{FAILED}"):
        multi_tensor.route("grad_stats", [w])


@needs_extension
def test_an_op_that_has_no_other_version(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "grad_stats", fail)
    with pytest.raises(RuntimeError, match=f"grad_stats has no version in torch ops.*'cpu': '{FAILED}"):
        multi_tensor.route("grad_stats", [torch.zeros(1)])


@needs_extension
def test_a_device_that_is_lost_is_no_reason_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA context says after an illegal access, whatever is asked of it."""

    def lose(*arguments: Any) -> None:
        monkeypatch.setattr(selfcheck, "is_usable", lambda device: False)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    broken(monkeypatch, "update_moments", lose)
    w = torch.nn.Parameter(torch.ones(8, 12))
    w.grad = torch.ones(8, 12)
    optimizer = steepest.MuAdam([w], lr=0.1)
    with pytest.raises(RuntimeError, match="Restart with STEEPEST_BACKEND=torch") as raised:
        optimizer.step()
    assert "illegal memory access was encountered)" in str(raised.value)
    assert torch.__version__ in str(raised.value)
    assert torch.equal(w.detach(), torch.ones(8, 12))


def test_an_error_that_is_over_leaves_a_device_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([torch.AcceleratorError("CUDA error: invalid argument")])
    ones = torch.ones

    def late(*arguments: Any, **options: Any) -> Tensor:
        for error in errors:
            raise error
        return ones(*arguments, **options)

    monkeypatch.setattr(torch, "ones", late)
    assert selfcheck.is_usable(CPU)
    errors = iter([torch.AcceleratorError("CUDA error: an illegal memory access was encountered")] * 9)
    assert not selfcheck.is_usable(CPU)


@needs_extension
def test_nobody_elses_settings_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a check change anything of theirs."""
    before = torch.get_rng_state()
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), Counted() as counted, torch.device("meta"):
            assert selfcheck.reason("elementwise", "cpu", CPU) is None
        for name in CHECKS:
            assert verdict(name, RIGHT[name.partition(",")[0]]) is None
    finally:
        torch.set_default_dtype(default)
    assert selfcheck._verdicts == {("elementwise", "cpu", CPU): None}
    assert counted.calls == 0
    assert torch.equal(torch.get_rng_state(), before)


@needs_extension
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.functionalize])
def test_a_transformed_function_around_it_does_not_matter(transform: Callable[..., Any]) -> None:
    """A verdict that came of it would hold for the process."""

    def function(x: Tensor) -> Tensor:
        assert selfcheck.reason("elementwise", "cpu", CPU) is None
        return x.square().sum()

    transform(function)(torch.ones(3))
    assert selfcheck._verdicts == {("elementwise", "cpu", CPU): None}


def never(*arguments: Any) -> None:
    raise AssertionError("a check was made")


def test_when_nothing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switched off, traced, on tensors that are fake, on a device that the backend does not run on."""
    monkeypatch.setattr(selfcheck, "run", never)
    cuda = torch.device("cuda", 0)
    assert selfcheck.reason("elementwise", "triton", CPU) is None
    with FakeTensorMode():
        assert selfcheck.reason("elementwise", "cpu", CPU) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert selfcheck.reason("elementwise", "cuda", cuda) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="have not been checked on cuda:0 yet; run one step before capturing"):
            selfcheck.reason("elementwise", "cuda", cuda)
    monkeypatch.setattr(selfcheck, "enabled", False)
    assert selfcheck.reason("elementwise", "cuda", cuda) is None
    backend.prepare(("fp32 products",), cuda)
    assert selfcheck._verdicts == {}


def test_memory_that_runs_out_says_nothing_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(selfcheck, "check_of", lambda family: selfcheck.Check(never, run_out))
    assert selfcheck.reason("elementwise", "cpu", CPU) is None
    assert selfcheck._verdicts == {}


def test_a_captured_step_needs_no_check_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(selfcheck, "_verdicts", {("products", "triton", cuda): f"{FAILED}: x"})
    assert selfcheck.reason("products", "triton", cuda) == f"{FAILED}: x"
    assert backend.choose("gemm", "auto", {"triton": None}, cuda, "products") == "torch"
    monkeypatch.setattr(backend, "forced", "triton")
    with pytest.raises(RuntimeError, match=f"gemm: backend='triton' cannot run: {FAILED}: x"):
        backend.choose("gemm", "auto", {"triton": None}, cuda, "products")


def test_ops_without_a_choice_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(selfcheck, "_verdicts", {("small polar", "cuda", cuda): f"{FAILED}: x"})
    assert backend.checked("small polar", cuda) == f"{FAILED}: x"
    monkeypatch.setattr(backend, "forced", "cuda")
    with pytest.raises(RuntimeError, match=f"small polar: backend='cuda' cannot run: {FAILED}: x"):
        backend.checked("small polar", cuda)


def test_a_plan_prepares_what_its_steps_may_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions by shape, kernels of factors by family; all before the first op is called."""
    done: list[Any] = []
    monkeypatch.setattr(plan, "warm_up", lambda direction, shape, dtype, device, weights=None: done.append(shape))
    monkeypatch.setattr(plan, "prepare", lambda families, device: done.append(families))
    monkeypatch.setattr(plan, "steps_along_polar", lambda *arguments: False)
    grad_stats = multi_tensor.grad_stats
    monkeypatch.setattr(
        multi_tensor, "grad_stats", lambda *a, **more: (done.append("grad_stats"), grad_stats(*a, **more))
    )
    shapes = [(12, 8), (6, 20)]
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for w in weights:
        w.grad = torch.ones_like(w)
    steepest.Muon(weights, lr=0.1).step()
    fused = backend.extension is not None
    assert done == [*shapes, "grad_stats"] if fused else shapes
    done.clear()
    steepest.Muon(weights, lr=0.1, backend="torch").step()
    assert done == shapes
    done.clear()
    steepest.SOAP(weights[:1], lr=0.1).step()
    families = [("fp32 products", "eigh refresh", "eigenvectors"), shapes[0]]
    assert done == [*families, "grad_stats"] if fused else families


def test_families_are_asked_for_where_nothing_is_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    static = {"fp32 products": None, "eigh refresh": "built without CUDA"}
    monkeypatch.setattr(selfcheck, "check_of", lambda family: selfcheck.Check(lambda *_: static[family], never))
    monkeypatch.setattr(selfcheck, "reason", lambda family, backend, device: asked.append((family, backend)))
    for forced, wanted in (("auto", [("fp32 products", "triton")]), ("torch", []), ("cuda", [])):
        monkeypatch.setattr(backend, "forced", forced)
        backend.prepare(static, torch.device("cuda", 0))
        backend.prepare(static, CPU)
        assert asked == wanted
        asked.clear()


@pytest.mark.parametrize("weights", [None, torch.bfloat16])
def test_directions_are_warmed_up_once_for_a_shape(
    weights: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warming, "_warm", set())
    called = []
    for name in ("units", "move"):
        monkeypatch.setattr(Spectral, name, lambda self, xs, *more, name=name: called.append((name, xs[0].shape)))
    monkeypatch.setattr(Frobenius, "units", never)
    cuda = torch.device("cuda", 0)
    with OnCpu():
        for shape in ((8, 12), (8, 12), (16, 4)):
            warming.warm_up(Spectral(), shape, torch.float16, cuda, weights)
        warming.warm_up(Spectral("svd"), (8, 12), torch.float16, cuda)
        warming.warm_up(Frobenius(), (8, 12), torch.float16, cuda)
        warming.warm_up(Spectral(), (8, 12), torch.float32, CPU)
    name = "units" if weights is None else "move"
    assert called == [(name, (1, 8, 12)), (name, (1, 16, 4))]


@pytest.mark.parametrize("weights", [None, torch.bfloat16])
def test_a_warm_up_goes_by_no_default_dtype(weights: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slack in fp64 would be refused."""
    monkeypatch.setattr(warming, "_warm", set())
    monkeypatch.setattr(selfcheck, "reason", lambda *_: None)
    default, cuda = torch.get_default_dtype(), torch.device("cuda", 0)
    torch.set_default_dtype(torch.float64)
    try:
        with OnCpu():
            warming.warm_up(Spectral(), (8, 12), torch.float32, cuda, weights)
    finally:
        torch.set_default_dtype(default)
    assert len(warming._warm) == 1


@pytest.mark.slow
def test_switches_are_read_at_import() -> None:
    text = "from steepest.ops import selfcheck, polar_chain as p; import torch;"
    text += "print(selfcheck.enabled, p.device_reason(torch.device('cuda', 0)))"
    environment = {**os.environ, "STEEPEST_SELFCHECK": "0", "STEEPEST_HOPPER": "0"}
    done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False STEEPEST_HOPPER=0 turns the products for Hopper off", done.stderr


def test_where_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = email.message.Message()
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: metadata)
    assert selfcheck.tracker() == "the issue tracker of steepest"
    metadata["Project-URL"] = "Homepage, https://example.org/steepest"
    assert selfcheck.tracker() == "https://example.org/steepest"
    metadata["Project-URL"] = "Issues, https://example.org/steepest/issues"
    assert selfcheck.tracker() == "https://example.org/steepest/issues"


# ---- Triton's kernels in its interpreter -----------------------------------------------------------------------------


@pytest.mark.slow
@needs_triton
@needs_extension
@pytest.mark.parametrize("family", ["products", slow("elementwise"), slow("fp32 products")])
def test_triton_in_the_interpreter(family: str) -> None:
    done = run_interpreted(__file__, family)
    verdicts = done.stdout.splitlines()
    assert len(verdicts) == 2, done.stdout + done.stderr
    assert verdicts[0] == "None", done.stdout + done.stderr
    assert "numbers are wrong" in verdicts[1]


def interpret(family: str) -> None:
    """The verdict on the kernels as they are, and with a fault, by inputs that show it."""
    from steepest.kernels import multi_tensor as elements
    from steepest.kernels import symm_gemm as kernels

    def forgets(*arguments: Any, **more: Any) -> None:
        kernels.product(*arguments, **more)
        arguments[6][..., -1:] = 0

    def elementwise_that_forgets(name: str) -> Kernel:
        def run(*arguments: Any) -> None:
            getattr(elements, name)(*arguments)
            if name == "apply_update":
                arguments[2][0].view(-1)[CHUNK:] = 0

        return run

    some = {"elementwise": (lambda name: getattr(elements, name), elementwise_that_forgets)}
    configurations = {symmetric: kernels.candidates((9, 0), symmetric)[:2] for symmetric in (True, False)}
    cases = [replace(case, count=min(case.count, 2)) for case in elementwise.IN_TRITON]
    long = [case for case in cases if math.prod(case.shape) // case.matrices > CHUNK]
    for number, kernel in enumerate(some.get(family, (kernels.product, forgets))):
        comparison = Comparison(CPU)
        if family == "elementwise":
            elementwise.check(kernel, long if number else cases, comparison)
        elif family == "products":
            products.check(kernel, comparison, {True: (), False: ()} if number else configurations)
        else:
            fp32_products.check(kernel, comparison)
        print(comparison.verdict())


if __name__ == "__main__":
    mend_the_interpreter()
    multiply_in_bf16()
    for family in sys.argv[1:]:
        interpret(family)
