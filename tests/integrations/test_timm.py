"""timm: its groups, its factory, its schedulers, resume."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch

timm = pytest.importorskip("timm", reason="timm is not installed (make test-integrations)")

from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay  # noqa: E402
from timm.scheduler import CosineLRScheduler  # noqa: E402

import steepest  # noqa: E402
from steepest.integrations.timm import named_groups, register  # noqa: E402


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5
    )


def train(model: Any, optimizer: Any, steps: range) -> None:
    for seed in steps:
        x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        torch.nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
        optimizer.step()
        optimizer.zero_grad()


def rules(model: Any, optimizer: Any) -> dict[str, bool]:
    of = {p: group["use_muon"] for group in optimizer.param_groups for p in group["params"]}
    return {name: of[p] for name, p in model.named_parameters()}


def test_weight_decay_groups_are_routed_by_shape(model: Any) -> None:
    optimizer = steepest.MuAdam(param_groups_weight_decay(model, 0.05), lr=1e-3)
    found = rules(model, optimizer)
    assert found["blocks.0.attn.qkv.weight"]
    assert not found["blocks.0.attn.qkv.bias"]
    assert {group["weight_decay"] for group in optimizer.param_groups if group["use_muon"]} == {0.05}
    train(model, optimizer, range(2))


def test_layer_decay_groups_with_names_keep_their_scale(model: Any) -> None:
    groups = param_groups_layer_decay(model, 0.05, layer_decay=0.5)
    scales = {p: group["lr_scale"] for group in groups for p in group["params"]}
    groups = named_groups(model, 0.05, layer_decay=0.5)
    optimizer = steepest.Muon(groups, lr=1e-3)
    found = rules(model, optimizer)
    assert found["blocks.1.mlp.fc1.weight"]
    assert not found["head.weight"]
    assert not found["pos_embed"]
    for group in optimizer.param_groups:
        assert all(scales[p] == group["lr_scale"] for p in group["params"])
    train(model, optimizer, range(2))


def test_the_factory_knows_every_name(model: Any) -> None:
    names = register()
    assert {"steepest-muadam", "steepest-muon", "steepest-soap", "steepest-adam"} <= set(names)
    assert "steepest-kfac" not in names
    for name in names:
        optimizer = create_optimizer_v2(model, name, lr=1e-3, foreach=True)
        assert type(steepest.unwrap(optimizer)).__name__.lower() == name.removeprefix("steepest-")


def test_named_groups_and_fallbacks_route_the_head(model: Any) -> None:
    register()
    group_fn = partial(named_groups, weight_decay=0.1)
    optimizer = create_optimizer_v2(model, "steepest-muadam", lr=1e-3, param_group_fn=group_fn)
    assert not rules(model, optimizer)["head.weight"]
    of_timm = {
        p: g["weight_decay"]
        for g in param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
        for p in g["params"]
    }
    assert of_timm == {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    optimizer = create_optimizer_v2(model, "steepest-muadam", lr=1e-3, weight_decay=0.1, fallback_list=("head.*",))
    assert not rules(model, optimizer)["head.weight"]
    assert rules(model, optimizer)["blocks.0.attn.qkv.weight"]


@pytest.mark.parametrize("name", ["steepest-muadam", "steepest-soap"])
def test_a_schedule_and_resume_are_the_same_bit_for_bit(model: Any, name: str) -> None:
    register()

    def made() -> tuple[Any, Any]:
        group_fn = partial(named_groups, layer_decay=0.7)
        optimizer = create_optimizer_v2(model, name, lr=1e-2, param_group_fn=group_fn)
        return optimizer, CosineLRScheduler(optimizer, t_initial=8, warmup_t=2, warmup_lr_init=1e-4)

    def run(optimizer: Any, scheduler: Any, steps: range) -> None:
        for step in steps:
            scheduler.step(step)
            for group in optimizer.param_groups:
                assert group["lr"] <= 1e-2 * group["lr_scale"]
            train(model, optimizer, range(step, step + 1))

    optimizer, scheduler = made()
    run(optimizer, scheduler, range(3))
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    run(optimizer, scheduler, range(3, 6))
    whole = [p.detach().clone() for p in model.parameters()]
    model.load_state_dict(saved["model"])
    optimizer, scheduler = made()
    optimizer.load_state_dict(saved["optimizer"])
    run(optimizer, scheduler, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), whole, strict=True))
