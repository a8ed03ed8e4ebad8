"""Which parameters SOAP steps by one call, and that it is the same step, to the bit, whichever way they go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.ops import matmul, rotated
from steepest.step import plan
from steepest.step.in_bases import InBases
from support.gradients import grad_of, one_is_bad, one_is_strided, turned
from support.operations import Operations
from support.training import all_same_bits, copies, give_gradients

pytestmark = pytest.mark.skipif(
    not rotated.supports(torch.zeros(1, 2, 2)), reason="no products are compiled for this processor"
)
SHAPES = ((16, 16), (64, 40), (3, 20, 30), (200, 90), (6, 3, 5, 5), (7,))


def made(kind: str = "SOAP", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    return getattr(steepest, kind)([{"params": params}], **{"lr": 1e-2, **options}), params


def ways(optimizer: Any) -> list[type]:
    return [type(executor) for executor in optimizer._plan.executors]


def state_of(optimizer: Any, params: list[nn.Parameter]) -> list[Tensor]:
    return copies(params) + [t.clone() for p in params for t in optimizer.state[p].values()]


def after_steps(
    change: Callable[[list[nn.Parameter], int], None] | None = None, steps: int = 8, **options: Any
) -> tuple[list[Tensor], str, list[type]]:
    """Weights and state, what was measured last, and who took the steps."""
    optimizer, params = made(**options)
    for step in range(steps):
        give_gradients(params, step)
        if change is not None:
            change(params, step)
        optimizer.step()
    return state_of(optimizer, params), str(optimizer.metrics()), ways(optimizer)


def one_is_large(params: list[nn.Parameter], step: int) -> None:
    if step == 4:
        grad_of(params[1])[0, 0] = 1e30


OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "every step": {"precondition_frequency": 1},
    "every third": {"precondition_frequency": 3, "shampoo_beta": 0.9},
    "exact": {"precondition_frequency": 2, "refresh": "eigh"},
    "one side": {"max_preconditioner_dim": 30},
    "the authors'": {"parity": "authors"},
    "in no metric at first": {"first_step": "move"},
    "momentum in bf16": {"momentum_dtype": torch.bfloat16},
    "a matrix at a time": {"max_workspace_bytes": 1},
    "lr in a tensor": {"lr": torch.tensor(0.01, dtype=torch.float64)},
}
CHANGES = (one_is_bad, one_is_strided, one_is_large, turned)


@pytest.mark.parametrize(
    ("options", "threads"),
    [*((options, 1) for options in OPTIONS.values()), ({}, 2)],
    ids=[*OPTIONS, "on two threads"],
)
def test_steps_have_the_bits_of_the_ops(options: dict[str, Any], threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        options = {"precondition_frequency": 5, **options}
        state, measured, way = after_steps(one_is_bad, **options)
        monkeypatch.setattr(plan, "steps_in_bases", lambda *arguments: False)
        by_ops, measured_by_ops, way_of_ops = after_steps(one_is_bad, **options)
    finally:
        torch.set_num_threads(before)
    assert InBases in way
    assert InBases not in way_of_ops
    assert all_same_bits(state, by_ops)
    assert measured == measured_by_ops


@pytest.mark.parametrize("options", [{"weight_decay": 0.1, "weight_decay_method": "l2"}, {"variance_reduction": 0.1}])
def test_corrected_gradients_are_for_the_ops(options: dict[str, Any]) -> None:
    state, _, way = after_steps(**options)
    assert InBases not in way
    expected, _, _ = after_steps(backend="torch", **options)
    for t, of_torch in zip(state, expected, strict=True):
        torch.testing.assert_close(t, of_torch, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_gradients_of_any_kind_have_the_bits_of_the_ops(
    change: Callable[[list[nn.Parameter], int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, measured, _ = after_steps(change, precondition_frequency=3)
    monkeypatch.setattr(plan, "steps_in_bases", lambda *arguments: False)
    by_ops, measured_by_ops, _ = after_steps(change, precondition_frequency=3)
    assert all_same_bits(state, by_ops)
    assert measured == measured_by_ops


def test_a_scaler_that_found_inf_lets_nothing_step() -> None:
    optimizer, params = made()
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    before = state_of(optimizer, params)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    after = state_of(optimizer, params)
    clocks = [i for i, t in enumerate(after) if t.dtype is torch.int64]
    assert all_same_bits(*[[t for i, t in enumerate(some) if i not in clocks] for some in (before, after)])


def test_gradients_that_a_scaler_scaled_are_unscaled() -> None:
    scaled, plain = made(), made()
    for step in range(4):
        for optimizer, params in (scaled, plain):
            give_gradients(params, step)
            optimizer.grad_scale = torch.tensor(1024.0) if optimizer is scaled[0] else None
            for p in params if optimizer is scaled[0] else ():
                grad_of(p).mul_(1024)
            optimizer.step()
    assert all_same_bits(copies(scaled[1]), copies(plain[1]))


def test_a_checkpoint_goes_on_to_the_bit() -> None:
    options = {"precondition_frequency": 3}
    optimizer, params = made(**options)
    for step in range(4):
        give_gradients(params, step)
        optimizer.step()
    other, copied = made(**options)
    with torch.no_grad():
        for p, of in zip(copied, params, strict=True):
            p.copy_(of)
    other.load_state_dict(optimizer.state_dict())
    for step in range(4, 8):
        for each, some in ((optimizer, params), (other, copied)):
            give_gradients(some, step)
            each.step()
    assert all_same_bits(copies(params), copies(copied))


def test_a_mode_that_looks_at_operations_sees_them() -> None:
    optimizer, params = made()
    for step in range(3):
        give_gradients(params, step)
        with Operations() as seen:
            optimizer.step()
    assert {"steepest.grad_stats.default", "steepest.adam_in_bases.default"} <= set(seen.names)
    assert all_same_bits(state_of(optimizer, params), after_steps(steps=3)[0])


def test_bf16_weights_whose_gradients_are_fp32_round_as_the_ops_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> tuple[list[Tensor], list[type]]:
        optimizer, params = made(dtype=torch.bfloat16, keep_mantissa=True)
        for p in params:
            p.grad_dtype = torch.float32
        for step in range(4):
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(9 * step + i))
            optimizer.step()
        return state_of(optimizer, params), ways(optimizer)

    state, way = trained()
    monkeypatch.setattr(plan, "steps_in_bases", lambda *arguments: False)
    assert InBases in way
    assert all_same_bits(state, trained()[0])


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "torch"},
        {"maximize": True},
        {"shampoo_beta": 1.0},
        {"refresh_delay": 1},
        {"factor_dtype": torch.bfloat16},
        {"average": 0.99},
    ],
    ids=str,
)
def test_what_other_ways_are_for_goes_other_ways(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    state, _, way = after_steps(steps=4, **options)
    monkeypatch.setattr(plan, "steps_in_bases", lambda *arguments: False)
    assert InBases not in way
    assert all_same_bits(state, after_steps(steps=4, **options)[0])


def test_state_in_codes_goes_by_the_ops() -> None:
    coded, plain = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(5, 4))
    optimizer = steepest.SOAP([coded, plain], state_bits=8)
    give_gradients([coded, plain], 0)
    optimizer.step()
    assert {type(each) is InBases: each.parameters[0].source for each in optimizer._plan.executors} == {
        False: coded,
        True: plain,
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_a_counter_of_another_dtype_is_refused_and_nothing_written(dtype: torch.dtype) -> None:
    """As a loop over all of an optimizer's state makes it."""
    optimizer, params = made()
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    for p in params:
        optimizer.state[p]["step"] = optimizer.state[p]["step"].to(dtype)
    before = state_of(optimizer, params)
    with pytest.raises(RuntimeError, match="must be one float32 number"):
        optimizer.step()
    assert all_same_bits(before, state_of(optimizer, params))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
@pytest.mark.parametrize("key", ["left", "right"])
def test_a_factor_of_another_dtype_is_for_the_ops(
    key: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for _ in range(2):
        optimizer, params = made()
        for step in range(6):
            if step == 3:
                optimizer.state[params[1]][key] = optimizer.state[params[1]][key].to(dtype)
            give_gradients(params, step)
            optimizer.step()
        taken = {id(p.source): type(each) for each in optimizer._plan.executors for p in each.parameters}
        assert taken[id(params[1])] is not InBases
        results.append(state_of(optimizer, params[1:2]))
        monkeypatch.setattr(plan, "steps_in_bases", lambda *arguments: False)
    assert all_same_bits(*results)


def test_numbers_that_change_on_the_way_are_read_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(params: list[nn.Parameter], step: int) -> None:
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        optimizer.param_groups[0]["betas"] = (0.9, torch.tensor(0.95)) if step == 5 else (0.9, 0.9 + step / 100)

    results = []
    for _ in range(2):
        optimizer, params = made()
        for step in range(8):
            give_gradients(params, step)
            change(params, step)
            optimizer.step()
        results.append(state_of(optimizer, params))
        monkeypatch.setattr(plan, "steps_in_bases", lambda *arguments: False)
    assert all_same_bits(*results)


def test_groups_have_numbers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for _ in range(2):
        _, params = made()
        first: dict[str, Any] = {"params": params[:3], "lr": 3e-3, "betas": (0.8, 0.9), "precondition_frequency": 2}
        second: dict[str, Any] = {"params": params[3:], "shampoo_beta": 0.7, "eps": 1e-4, "weight_decay": 0.0}
        optimizer = steepest.SOAP([first, second], lr=1e-2)
        for step in range(6):
            give_gradients(params, step)
            optimizer.step()
        results.append(state_of(optimizer, params))
        monkeypatch.setattr(plan, "steps_in_bases", lambda *arguments: False)
    assert all_same_bits(*results)


@pytest.mark.parametrize("threads", [1, 2])
def test_long_sides_where_our_products_are_the_faster_ones(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_gemm_is_faster", lambda: True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    results = []
    try:
        for way in (True, False):
            generator = torch.Generator().manual_seed(3)
            params = [
                nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((40, 300), (288, 272), (20, 16))
            ]
            optimizer = steepest.SOAP(params, lr=1e-2, precondition_frequency=2)
            for step in range(4):
                give_gradients(params, step)
                optimizer.step()
            assert ways(optimizer) == ([InBases] if way else ways(optimizer))
            results.append(state_of(optimizer, params))
            monkeypatch.setattr(plan, "steps_in_bases", lambda *arguments: False)
    finally:
        torch.set_num_threads(before)
    assert InBases not in ways(optimizer)
    assert all_same_bits(*results)


def test_long_sides_and_split_weights_go_by_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_gemm_is_faster", lambda: False)
    long, split, short = (nn.Parameter(torch.randn(shape)) for shape in ((257, 8), (48, 16), (48, 16)))
    groups = [{"params": [long]}, {"params": [split], "split_sizes": [16, 32]}, {"params": [short]}]
    optimizer = steepest.SOAP(groups)
    give_gradients([long, split, short], 0)
    optimizer.step()
    taken = {id(p.source): type(each) for each in optimizer._plan.executors for p in each.parameters}
    assert [taken[id(p)] is InBases for p in (long, split, short)] == [False, False, True]
