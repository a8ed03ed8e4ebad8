"""State that is overwritten where a flag says so: `steepest.ops.state`."""

import math

import pytest
import torch
from torch import Tensor

from steepest.ops import backend
from steepest.ops.state import copy_if

compiled = pytest.mark.skipif(backend.extension is None, reason=f"nothing is compiled: {backend.extension_reason}")


def tensors(value: float) -> list[Tensor]:
    """One of more than what is copied at once, one without elements, transposed ones, and other dtypes."""
    return [
        torch.full((300, 301), value),
        torch.full((0, 4), value),
        torch.full((5, 7), value, dtype=torch.float64).mT,
        torch.full((33,), value, dtype=torch.bfloat16),
        torch.full((), value),
    ]


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("forced", ["auto", "torch"])
def test_all_or_nothing_is_overwritten(flag: bool, forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "forced", forced)
    for lists in (tensors, lambda value: [t.contiguous() for t in tensors(value)]):
        to, new = lists(1.0), lists(2.0)
        new[0][7, 9] = math.nan
        before = [t.data_ptr() for t in to]
        copy_if(torch.tensor(flag), to, new)
        assert [t.data_ptr() for t in to] == before
        for old, t in zip(to, new, strict=True):
            torch.testing.assert_close(old, t if flag else torch.ones_like(old), rtol=0, atol=0, equal_nan=True)


@compiled
def test_the_op() -> None:
    flag, to, new = torch.tensor(True), [torch.zeros(3, 4), torch.zeros(2)], [torch.ones(3, 4), torch.ones(2)]
    torch.library.opcheck(torch.ops.steepest.copy_if.default, (flag, to, new))


@compiled
@pytest.mark.parametrize(
    ("flag", "to", "new", "message"),
    [
        (torch.tensor(1.0), [torch.zeros(2)], [torch.ones(2)], "flag must be one bool"),
        (torch.tensor(True), [torch.zeros(2)], [], "to has 1 tensors, source has 0"),
        (torch.tensor(True), [torch.zeros(2)], [torch.ones(3)], r"to\[0\] and source\[0\]"),
        (torch.tensor(True), [torch.zeros(2)], [torch.ones(2).double()], "of one dtype"),
        (torch.tensor(True), [torch.zeros(2, 3).mT], [torch.ones(3, 2)], "contiguous"),
    ],
)
def test_what_the_op_refuses(flag: Tensor, to: list[Tensor], new: list[Tensor], message: str) -> None:
    before = [t.clone() for t in to]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.steepest.copy_if(flag, to, new)
    assert all(torch.equal(t, old) for t, old in zip(to, before, strict=True))
