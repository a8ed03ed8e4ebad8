"""`torch.compile(optimizer.step)`: one graph, which every later call runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import steepest
from steepest.ops import multi_tensor
from steepest.ops.multi_tensor import Groups, Item, Items, Table
from steepest.ops.program import Program
from steepest.optimizer import MatrixOptimizer
from support.slow import slow
from support.training import OPTIMIZERS, both_kinds, give_gradients, noise

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("cls", "tensor"),
    [
        (steepest.Muon, True),
        slow(steepest.MuAdam, False),
        slow(steepest.Muon, False),
        slow(steepest.MuAdam, True),
        slow(steepest.Dion2, False),
    ],
)
def test_compiled_once_and_equal_to_eager(cls: type[MatrixOptimizer], tensor: bool, device: str) -> None:
    """Matrices and AdamW groups; a learning rate in a tensor may change without a new graph."""

    def lr() -> Any:
        return torch.tensor(0.02, device=device) if tensor else 0.02

    torch._dynamo.reset()
    (compiled, a), (eager, b) = (both_kinds(cls, lr=lr(), adamw_lr=lr()) for _ in range(2))
    for p in (*a, *b):
        p.data = p.data.to(device)
    counter = CompileCounterWithBackend("inductor" if device == "cuda" else "aot_eager")
    step = torch.compile(compiled.step, backend=counter)
    graphs = []
    for i in range(4):
        for optimizer, params in ((compiled, a), (eager, b)):
            for index, p in enumerate(params):
                g = noise(p.shape, 1000 * (i + 1) + index).to(device)
                p.grad = g if p.grad is None else p.grad.copy_(g)
            for group in optimizer.param_groups if tensor else ():
                group["lr"].fill_(0.02 / (1 + i))
        step()
        eager.step()
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 1, 1]  # no graph break, and nothing recompiled
    # On a GPU the one takes torch's products in bf16 and the other the kernels: directions within a twentieth.
    atol = 4 * 0.02 / 20 if device == "cuda" else 1e-4
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=atol)


def graphs_of(optimizer: MatrixOptimizer, params: list[Tensor], steps: int, **options: Any) -> list[int]:
    """How often the step has been compiled after each of so many, with a scheduler that changes the rate every time."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    give_gradients(params, 0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: min(1.0, (epoch + 1) / 3) * 0.9**epoch)
    step = torch.compile(optimizer.step, backend=counter, **options)
    graphs = []
    for _ in range(steps):
        step()
        scheduler.step()
        graphs.append(counter.frame_count)
    return graphs


BAD_VALUES = [
    ("lr", -1.0, "Learning rate should be >= 0 but is: -1.0"),
    ("lr", "1e-3", "lr should be a number .* but is: '1e-3', a string: unquote it"),
    ("lr", float("nan"), "Learning rate should be >= 0 but is: nan"),
    ("lr", float("inf"), "Learning rate should be >= 0 but is: inf; lr takes finite numbers"),
    ("momentum", True, "momentum should be a number .* but is: True"),
    ("nesterov", "no", "nesterov should be True or False but is: 'no', a string: unquote it"),
    ("betas", (0.9, 1.5), r"betas should be two numbers in \[0, 1\) but is"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value", "said"), BAD_VALUES)
def test_a_value_put_into_a_group_is_checked(key: str, value: Any, said: str) -> None:
    """By guards, also where the graph takes any number already; it is not compiled more often for that."""
    torch._dynamo.reset()
    optimizer, params = both_kinds(steepest.Muon)
    group = optimizer.param_groups[number := 0 if key in optimizer.param_groups[0] else 1]
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(optimizer.step, backend=counter)
    good, graphs = group[key], []
    for i in range(4):
        give_gradients(params, i)
        if not isinstance(good, bool):
            scale = 1 - i / 100
            group[key] = tuple(scale * each for each in good) if key == "betas" else scale * good
        step()
        graphs.append(counter.frame_count)
    assert graphs == ([1] * 4 if isinstance(good, bool) else [1, 2, 2, 2])
    before = [p.detach().clone() for p in params]
    group[key] = value
    with pytest.raises((TypeError, ValueError), match=f"group {number}: {said}"):
        step()
    assert all(map(torch.equal, before, params))


@pytest.mark.slow
def test_a_scheduled_learning_rate() -> None:
    """A tensor is compiled once, a number once more, with dynamic=False every number; docs/step.md says so, and what
    to do."""
    cls, rates = OPTIMIZERS[0], {"lr": 0.02, "adamw_lr": 0.01}
    assert graphs_of(*both_kinds(cls, capturable=True, **rates), steps=6) == [1] * 6
    assert graphs_of(*both_kinds(cls, **rates), steps=6) == [1] + [2] * 5
    assert graphs_of(*both_kinds(cls, **rates), steps=4, dynamic=False) == [1, 2, 3, 4]
    assert torch._dynamo.config.recompile_limit == 8
    page = " ".join((ROOT / "docs" / "step.md").read_text(encoding="utf-8").split())
    for said in (
        "`capturable=True` makes learning rate and weight decay tensors",
        "which schedulers fill: the step is compiled once.",
        "it is compiled anew for every number, until torch gives up after 8",
        "So a schedule wants `capturable=True`",
    ):
        assert said in page


def test_the_fused_ops_are_traced_whole() -> None:
    """Called from compiled code they are three nodes that mutate what their schemas say."""
    program = Program(momentum_correction=True, power="quarter", second_correction=True, direction="identity")
    items = Items((Item(program, 0, 1, 0, (0, 0, 0), 1.0),))

    def step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: Tensor, table: Table) -> None:
        groups = Groups([0.1, 0.0, 0.9, 0.999, 1e-8], [], [], [0])
        multi_tensor.grad_stats([g], [t], table, [program.packed()], [0, 1], groups)
        multi_tensor.update_moments([g], [m], [v], [], [p], [], table, items)

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        p, m, v, t = torch.ones(5), torch.zeros(5), torch.zeros(5), torch.zeros(())
        table = Table.empty(torch.zeros((), dtype=torch.int64), [5], [(1, 5)])
        for _ in range(2):
            run(p, torch.arange(5.0), m, v, t, table)
        results.append((p, m, v, t, table.rows, table.sums))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    assert float(results[1][3]) == 2
