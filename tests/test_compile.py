"""`torch.compile(optimizer.step)`: one graph, which every later call runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from steepest.optimizer import MatrixOptimizer
from training import OPTIMIZERS, both_kinds, give_gradients


@pytest.mark.parametrize("cls", OPTIMIZERS[:2])
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_compiled_once_and_equal_to_eager(cls: type[MatrixOptimizer], tensor: bool) -> None:
    """Matrices and AdamW groups; a learning rate in a tensor may change without a new graph."""

    def lr() -> Any:
        return torch.tensor(0.02) if tensor else 0.02

    torch._dynamo.reset()
    (compiled, a), (eager, b) = (both_kinds(cls, lr=lr(), adamw_lr=lr()) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(compiled.step, backend=counter)
    graphs = []
    for i in range(4):
        for optimizer, params in ((compiled, a), (eager, b)):
            kept = [p.grad for p in params]
            give_gradients(params, i)
            for p, g in zip(params, kept, strict=True):
                p.grad = p.grad if g is None else g.copy_(p.grad)
            for group in optimizer.param_groups if tensor else ():
                group["lr"].fill_(0.02 / (1 + i))
        step()
        eager.step()
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 1, 1]  # no graph break, and nothing recompiled
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
