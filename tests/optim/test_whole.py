"""Which parameters a step takes by their addresses, and that it is the same step whichever way they go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.step.whole import Whole
from support.operations import Operations
from support.training import all_same_bits, copies, give_gradients

SHAPES = ((8, 5), (7,), (3, 4, 2), ())


def made(**options: Any) -> tuple[Any, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    return steepest.MuAdam([{"params": params, "use_muon": False, **options}]), params


def ways(optimizer: Any) -> list[type]:
    return [type(executor) for executor in optimizer._plan.executors]


class Tagged(Tensor):
    pass


def turned(params: list[nn.Parameter]) -> None:
    for p in params:
        assert p.grad is not None
        p.grad = torch._neg_view(-p.grad)


def of_a_class(params: list[nn.Parameter]) -> None:
    for p in params:
        assert p.grad is not None
        p.grad = p.grad.as_subclass(Tagged)


def after_steps(change: Callable[[list[nn.Parameter]], None] | None, steps: int = 3, **options: Any) -> list[Tensor]:
    optimizer, params = made(**options)
    for step in range(steps):
        give_gradients(params, step)
        if change is not None and step > 0:
            change(params)
        optimizer.step()
    return copies(params)


def test_adamw_goes_by_addresses_and_moves_what_torch_moves() -> None:
    optimizer, params = made(lr=1e-2, weight_decay=0.1)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    group = optimizer.param_groups[0]
    theirs = torch.optim.AdamW(twins, lr=1e-2, weight_decay=0.1, betas=group["betas"], eps=group["eps"])
    for step in range(4):
        give_gradients(params, step)
        for p, twin in zip(params, twins, strict=True):
            assert p.grad is not None
            twin.grad = p.grad.clone()
        optimizer.step()
        theirs.step()
    assert ways(optimizer) == [Whole]
    torch.testing.assert_close(copies(params), copies(twins), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("change", [turned, of_a_class], ids=lambda change: change.__name__)
def test_a_gradient_without_numbers_at_its_address_goes_by_the_ops(
    change: Callable[[list[nn.Parameter]], None],
) -> None:
    assert all_same_bits(after_steps(change), after_steps(None))


def test_a_mode_that_looks_at_operations_sees_them() -> None:
    optimizer, params = made()
    give_gradients(params, 0)
    optimizer.step()
    give_gradients(params, 1)
    with Operations() as seen:
        optimizer.step()
    assert {"steepest.grad_stats.default", "steepest.update_moments.default"} <= set(seen.names)
    assert all_same_bits(copies(params), after_steps(None, steps=2))


def test_numbers_may_be_tensors() -> None:
    assert all_same_bits(after_steps(None, lr=torch.tensor(0.01, dtype=torch.float64)), after_steps(None, lr=0.01))


def test_weights_that_are_strided_go_by_the_ops() -> None:
    p = nn.Parameter(torch.randn(6, 5).mT)
    optimizer = steepest.MuAdam([{"params": [p], "use_muon": False}])
    give_gradients([p], 0)
    optimizer.step()
    assert Whole not in ways(optimizer)


@pytest.mark.parametrize("options", [{"state_bits": 8}, {"backend": "torch"}], ids=str)
def test_what_other_ways_are_for_goes_other_ways(options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.randn(64, 64))
    optimizer = steepest.MuAdam([{"params": [p], "use_muon": False, **options}])
    give_gradients([p], 0)
    optimizer.step()
    assert Whole not in ways(optimizer)


def test_layers_that_wait_for_one_another_are_decided_together() -> None:
    weights, vector = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(7))
    optimizer = steepest.MuonMax([{"params": [weights]}, {"params": [vector], "use_muon": False}])
    give_gradients([weights, vector], 0)
    optimizer.step()
    assert Whole not in ways(optimizer)


def test_beside_matrices_each_goes_its_way() -> None:
    weights, vector = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(7))
    optimizer = steepest.Muon([{"params": [weights]}, {"params": [vector], "use_muon": False}])
    before = copies([weights, vector])
    for step in range(2):
        give_gradients([weights, vector], step)
        assert vector.grad is not None
        vector.grad[3] = torch.nan
        optimizer.step()
    assert sorted(kind.__name__ for kind in ways(optimizer)) in (["AlongPolar", "Whole"], ["Fused", "Whole"])
    assert torch.equal(vector, before[1])
    assert not torch.equal(weights, before[0])
    assert sum(int(count) for count in optimizer.skipped_updates().values()) == 2


@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        *(("step", dtype) for dtype in (torch.float64, torch.bfloat16, torch.int16)),
        ("mantissa", torch.bfloat16),
        ("exp_avg_sq", torch.int16),
    ],
)
def test_state_of_a_dtype_that_is_not_handed_over_is_refused_before_it_is_written(key: str, dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.randn(8, 5, generator=torch.Generator().manual_seed(3)).bfloat16())
    optimizer = steepest.MuAdam([{"params": [p], "use_muon": False, "keep_mantissa": True}])
    give_gradients([p], 0)
    optimizer.step()
    assert ways(optimizer) == [Whole]
    optimizer.state[p][key] = optimizer.state[p][key].to(dtype)
    kept = [p.detach(), *(t for name, t in optimizer.state[p].items() if name != "step" or name == key)]
    before = [t.clone() for t in kept]
    with pytest.raises(RuntimeError, match="float32 number|int16"):
        optimizer.step()
    assert all_same_bits(before, kept)
