"""The Triton kernels against the host's, op by op on the same numbers; Triton's interpreter runs them without a GPU."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.ops import backend
from steepest.ops.multi_tensor import COLUMNS, SUMS
from steepest.ops.program import HYPERS
from support.fused_ops import GROUPS, State, compare, grad_stats, problem, update_moments
from support.triton_interpreter import mend_the_interpreter, run_interpreted

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_extension = pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")


def nothing_is_uploaded_twice(device: torch.device) -> None:
    """The same tensors and numbers find their table; another learning rate is another table of numbers only."""
    from steepest.kernels import multi_tensor as kernels

    uploads: list[int] = []
    upload = kernels._to_device

    def count(numbers: list[int], device: torch.device) -> Tensor:
        uploads.append(len(numbers))
        return upload(numbers, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_to_device", count)
        state = problem().copy(device)
        for _ in range(2):
            grad_stats(kernels, state, None, None)
            update_moments(kernels, state, members=[0, 4])
        assert len(uploads) == 3
        moved = State(**{**vars(state), "overrides": [t.clone() for t in state.overrides]})
        grad_stats(kernels, moved, None, None)
        assert uploads[3:] == [3 * len(HYPERS) * len(GROUPS)]


@pytest.mark.slow
@needs_triton
@needs_extension
def test_in_the_interpreter() -> None:
    done = run_interpreted(__file__)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.gpu
@needs_triton
@needs_extension
def test_on_a_gpu() -> None:
    compare(pytest.importorskip("steepest.kernels.multi_tensor"), torch.device("cuda"))
    nothing_is_uploaded_twice(torch.device("cuda"))


@pytest.mark.gpu
@needs_triton
def test_in_a_captured_graph() -> None:
    """A step that has run is captured, table and all, and its replay outlives the table's place among those kept."""
    from steepest.kernels import multi_tensor as kernels

    device = torch.device("cuda")
    state, twin = problem().copy(device), problem().copy(device)
    for each in (state, twin):
        grad_stats(kernels, each, None, None)
        update_moments(kernels, each)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad_stats(kernels, state, None, None)
        update_moments(kernels, state)
        with pytest.raises(RuntimeError, match="run one step with the same tensors before capturing"):
            update_moments(kernels, state, members=[0])
    kernels._plans.clear()
    graph.replay()
    grad_stats(kernels, twin, None, None)
    update_moments(kernels, twin)
    for (name, found, _), (_, wanted, _) in zip(state.written(), twin.written()):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True, msg=f"{name}: {{}}".format)


@needs_triton
def test_capture_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("steepest.kernels.multi_tensor", reason="steepest.kernels is not importable")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="update_moments: a CUDA graph is being captured.*run one step"):
        kernels._recall("update_moments", ("key",), torch.device("cuda"), lambda: None)


@needs_triton
def test_what_the_kernels_take() -> None:
    kernels = pytest.importorskip("steepest.kernels.multi_tensor", reason="steepest.kernels is not importable")
    matrix, absent = torch.ones(6, 4), torch.empty(0)
    assert kernels.can_use([matrix, absent, matrix.bfloat16()], 3) is None
    assert kernels.can_use([matrix.t(), matrix.t().half()], 1) is None
    assert kernels.can_use([matrix, matrix.view(2, 3, 4)], 2) is None
    assert "equal strides" in kernels.can_use([matrix.t(), torch.ones(24)], 1)
    assert kernels.can_use([torch.ones(4, 1, 6)[:, :, :1], torch.ones(4, 1, 1)], 1) is not None
    assert kernels.can_use([torch.ones(1, 4).t()[:, :1], torch.ones(4, 1)], 1) is None
    assert "torch.float64" in kernels.can_use([matrix.double()], 1)
    assert "2 matrices" in kernels.can_use([matrix.t()], 2)
    assert "equal strides" in kernels.can_use([matrix, matrix.t().contiguous().t()], 1)
    assert "equal strides" in kernels.can_use([matrix[:, ::2]], 1)


@needs_triton
@pytest.mark.parametrize(
    "change,message",
    [
        ({"grads": [torch.ones(3, dtype=torch.float64)]}, "item 0: a tensor is torch.float64"),
        ({"grads": [torch.ones(4)]}, r"item 0: the tensors differ in size: \(4,\), \(3,\)"),
        (
            {"momenta": [torch.empty(0)]},
            "item 0 has grads, directions; its program 0x0 takes grads, momenta",
        ),
        ({"seconds": [torch.ones(3)]}, "item 0 has grads, momenta, seconds, directions; its program"),
        ({"scratch": torch.zeros(7, dtype=torch.float64)}, "scratch has 7 elements; these tensors need 8"),
    ],
    ids=["float64", "shape", "missing", "unused", "scratch"],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    kernels = pytest.importorskip("steepest.kernels.multi_tensor", reason="steepest.kernels is not importable")
    arguments: dict[str, Any] = {
        **{name: [torch.ones(3)] for name in ("grads", "momenta", "inputs")},
        **{name: [torch.empty(0)] for name in ("seconds", "params", "mantissas")},
        "rows": torch.zeros(1, len(COLUMNS), dtype=torch.float64),
        "sums": torch.zeros(1, len(SUMS), dtype=torch.float64),
        "scratch": torch.zeros(8, dtype=torch.float64),
        **{name: [0] for name in ("programs", "row_of", "first_sums")},
        "matrices": [1],
        "places": [0, 0, 0],
        "ratios": [1.0],
    }
    with pytest.raises(ValueError, match=message):
        kernels.update_moments(**{**arguments, **change})


if __name__ == "__main__":
    mend_the_interpreter()
    compare(importlib.import_module("steepest.kernels.multi_tensor"), torch.device("cpu"))
    nothing_is_uploaded_twice(torch.device("cpu"))
    print("equal")
