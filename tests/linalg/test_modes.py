"""Default dtypes and devices do not reach what is called by itself: polar factors, bases, roots."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from steepest import polar
from steepest.linalg.basis import eigh_refresh, tracked
from steepest.linalg.roots import inverse_root
from steepest.linalg.schatten import schatten
from steepest.ops import matmul
from support.modes import MODES
from support.references import gaussian

X = gaussian(3, 24, 40).float()
P = X @ X.mT
Q = torch.linalg.qr(gaussian(3, 24, 24).float())[0]
CALLS: dict[str, Callable[[], Tensor | tuple[Tensor, ...]]] = {
    "polar": lambda: polar(X),
    "polar exact": lambda: polar(X, "svd"),
    "schatten": lambda: schatten(X, 4.0),
    "eigh": lambda: eigh_refresh(P, Q, method="eigh"),
    "qr": lambda: eigh_refresh(P, Q, method="qr"),
    "rotations": lambda: eigh_refresh(P, Q, method="jr"),
    "tracked": lambda: tracked(P, Q),
    "tracked eigenbasis": lambda: tracked(P, torch.linalg.eigh(P)[1]),
    "inverse root": lambda: inverse_root(P, 4),
}


def results(call: str) -> tuple[Tensor, ...]:
    matmul._checked.cache_clear()  # what is looked at once per process is looked at now
    given = CALLS[call]()
    return (given,) if isinstance(given, Tensor) else tuple(given)


@pytest.mark.parametrize("mode", [mode for mode in MODES if "device" in mode or "dtype" in mode])
@pytest.mark.parametrize("call", CALLS)
def test_a_call_is_what_it_is_without(call: str, mode: str) -> None:
    wanted = results(call)
    with MODES[mode]():
        given = results(call)
    for a, b in zip(given, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
