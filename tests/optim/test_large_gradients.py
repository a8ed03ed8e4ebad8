"""One gradient of any size: what is stored stays finite, or the parameter skips the step and says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import steepest
from steepest.optimizer import MatrixOptimizer
from support.training import KRONECKER, OPTIMIZERS, RELATIVES, both_kinds, copies, give_gradients

EXTRAS: dict[str, tuple[type[MatrixOptimizer], dict[str, Any]]] = {
    "SOAP, spectral": (steepest.SOAP, {"norm": "spectral"}),
    "SOAP by authors": (steepest.SOAP, {"parity": "authors"}),
    "SOAP, bf16 factors": (steepest.SOAP, {"factor_dtype": torch.bfloat16}),
    "SOAP, late": (steepest.SOAP, {"refresh_delay": 3}),
    "SOAP of sums": (steepest.SOAP, {"shampoo_beta": 1.0}),
    "Shampoo by roots": (steepest.Shampoo, {"inverse_root": "newton"}),
    "KLShampoo by roots": (steepest.KLShampoo, {"inverse_root": "newton"}),
    "KLShampoo by authors": (steepest.KLShampoo, {"parity": "authors"}),
    "MuAdam by torch": (steepest.MuAdam, {"backend": "torch"}),
    "Muon in fp16": (steepest.Muon, {"momentum_dtype": torch.float16}),
    "Muon by torch in fp16": (steepest.Muon, {"momentum_dtype": torch.float16, "backend": "torch"}),
    "MuonMax with Momo": (steepest.MuonMax, {"lower_bound": 0.0}),
}
CASES = {cls.__name__: (cls, {}) for cls in (*OPTIMIZERS, *KRONECKER, *RELATIVES)} | EXTRAS
SIZES = (1e5, 1e9, 1e13, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e25, 1e30, 1e36, 5e37)


def train(name: str, size: float, dtype: torch.dtype) -> tuple[MatrixOptimizer, list[torch.nn.Parameter], bool]:
    """Six steps, the third with gradients of this size; whether some weight moved in the last one."""
    cls, extra = CASES[name]
    optimizer, params = both_kinds(cls, dtype, lr=1e-3, **extra)
    given: dict[str, Any] = {"loss": 1.0} if extra.get("lower_bound") is not None else {}
    before = copies(params)
    for step in range(12):
        give_gradients(params, step)
        for p in params if step == 2 else ():
            p.grad = (p.grad.double() * size).to(dtype)
        before = copies(params)
        optimizer.step(**given)
    return optimizer, params, not all(map(torch.equal, params, before))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_what_is_stored_is_finite(name: str, size: float) -> None:
    optimizer, params, _ = train(name, size, torch.float32)
    for p in params:
        assert p.isfinite().all()
        for key, value in optimizer.state[p].items():
            assert value.isfinite().all() or "residual" in key, key
