"""Directions that go straight into the weights: the same step as without, where that is legal, and else no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.ops import backend

pytestmark = pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")

SHAPES = ((24, 40), (40, 24), (24, 40), (48, 16), (140, 130))


def params(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def run(make: Any, dtype: torch.dtype = torch.float32, steps: int = 3, **options: Any) -> tuple[list[Tensor], Any]:
    own = params(dtype)
    groups = [{"params": own[:4], "split_sizes": None}, {"params": own[4:], "lr": 0.05}]
    optimizer = make(groups, lr=0.02, weight_decay=0.1, backend="cpu", **options)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for p in own:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        assert own[2].grad is not None
        if step == 1:
            own[2].grad[0, 0] = torch.nan
        optimizer.step()
    return [p.detach().clone() for p in own], optimizer


@pytest.mark.parametrize("polar", [None, "auto", "exact", "svd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_on_is_off(polar: str | None, dtype: torch.dtype, adjust: str) -> None:
    """Within the rounding of the direction, a few parts in a hundred of it, and of the stored weight."""
    off, _ = run(steepest.Muon, dtype, polar=polar, adjust_lr_fn=adjust)
    on, _ = run(steepest.Muon, dtype, polar=polar, adjust_lr_fn=adjust, fuse_update=True)
    for a, b, start in zip(off, on, params(dtype), strict=True):
        moved = (a - start.detach()).abs().amax().item()
        assert moved > 1e-3
        direction = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(torch.bfloat16).eps * moved
        stored = 3 * torch.finfo(dtype).eps * a.abs().amax().item()
        assert (a - b).abs().amax() <= direction + stored


@pytest.mark.parametrize("options", [{"weight_decay_method": "independent"}, {"weight_decay_method": "l2"}], ids=str)
def test_decay_is_that_of_the_group(options: dict[str, Any]) -> None:
    """Once, and where it is in the gradient not in the weight too."""
    off, _ = run(steepest.Muon, polar="svd", **options)
    on, _ = run(steepest.Muon, polar="svd", fuse_update=True, **options)
    plain, _ = run(steepest.Muon, polar="svd", fuse_update=True)
    for a, b, c in zip(off, on, plain, strict=True):
        assert (a - b).abs().amax() < 1e-5
        assert (a - c).abs().amax() > 1e-3


def test_a_step_that_is_not_taken_changes_no_bit() -> None:
    own = params(torch.float32)
    before = own[1].detach().clone()
    optimizer = steepest.Muon(own, lr=0.02, weight_decay=0.1, polar="auto", fuse_update=True, backend="cpu")
    for p in own:
        p.grad = torch.ones_like(p)
    assert own[1].grad is not None
    own[1].grad[0, 0] = torch.inf
    optimizer.step()
    assert torch.equal(own[1], before)
    assert not torch.equal(own[0], params(torch.float32)[0])
    metrics = optimizer.metrics()
    assert metrics["skipped/cpu"] == 1
    assert metrics["0/update_norm"].isnan()
    assert metrics["0/param_norm"].isnan()
    assert metrics["0/momentum_norm"] > 0


@pytest.mark.parametrize(
    "make,dtype,options",
    [
        (steepest.MuAdam, torch.float32, {}),
        (steepest.Muon, torch.float32, {"cautious_wd": True}),
        (steepest.Muon, torch.bfloat16, {"stochastic_rounding": True}),
        (steepest.Muon, torch.bfloat16, {"keep_mantissa": True}),
    ],
)
def test_where_more_is_asked_of_a_direction_nothing_changes(make: Any, dtype: torch.dtype, options: Any) -> None:
    off, _ = run(make, dtype, **options)
    on, optimizer = run(make, dtype, fuse_update=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(off, on, strict=True))
    assert optimizer.metrics()["0/param_norm"] > 0


def test_weights_of_another_layout_take_the_usual_way() -> None:
    found = []
    for fuse in (False, True):
        w = nn.Parameter(torch.arange(24.0 * 40).view(40, 24).mT)
        optimizer = steepest.Muon([w], lr=0.1, fuse_update=fuse, backend="cpu")
        w.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        found.append(w.detach().clone())
    assert torch.equal(*found)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    found = []
    for fuse in (False, True):
        generator = torch.Generator().manual_seed(0)
        own = [nn.Parameter(torch.randn(256, 512, generator=generator).to("cuda", dtype)) for _ in range(3)]
        optimizer = steepest.Muon(own, lr=0.02, polar="auto", fuse_update=fuse)
        for _ in range(2):
            for p in own:
                p.grad = torch.randn(p.shape, generator=generator).to("cuda", dtype)
            optimizer.step()
        found.append(torch.stack([p.detach().float() for p in own]))
    assert (found[0] - found[1]).abs().amax() <= 4 * torch.finfo(dtype).eps * found[0].abs().amax() + 1e-3


@pytest.mark.parametrize("cls", [steepest.MuonMax, steepest.ProductNormDescent, steepest.ProdigyMuon])
def test_where_layers_wait_the_update_goes_by_itself(cls: Any) -> None:
    """The factor that all layers decide is yet to come when a direction is there."""
    off, _ = run(cls)
    on, _ = run(cls, fuse_update=True)
    assert all(torch.equal(a, b) for a, b in zip(off, on, strict=True))


@pytest.mark.parametrize(
    "shape, layout",
    [
        ((12, 8), {"transposed": True}),
        ((12, 8), {"transposed": True, "num_heads": 2, "split_columns": True}),
        ((8, 6, 2, 2), {"transposed": True}),
    ],
)
def test_weights_that_lie_by_columns_move_as_ever(shape: tuple[int, ...], layout: dict[str, Any]) -> None:
    def moved(fuse_update: bool) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(shape, generator=generator))
        groups = [{"params": [p], "use_muon": True, **layout}]
        optimizer = steepest.Muon(groups, lr=0.1, polar="auto", backend="cpu", fuse_update=fuse_update)
        for _ in range(2):
            p.grad = torch.randn(shape, generator=generator)
            optimizer.step()
        return p.detach()

    assert torch.equal(moved(True), moved(False))
