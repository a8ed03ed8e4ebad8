"""Scion: each layer's norm, its ball, its start, and which layer gets which. fp64, exact polar."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.zoo.scion import NORMS, Scion, scion_groups
from support.problems import gap, gaussian, polar_by_svd

RADIUS, LR, ALPHA = 5.0, 0.02, 0.3

Function = Callable[[Tensor], Tensor]


def flat(x: Tensor) -> Tensor:
    return x.flatten(1)


def operator(x: Tensor) -> Tensor:
    """From RMS to RMS."""
    return torch.linalg.svdvals(x)[0] * math.sqrt(x.shape[1] / x.shape[0])


# norm: (shape of a parameter, length, steepest step of length 1)
LAYERS: dict[str, tuple[tuple[int, ...], Function, Function]] = {
    "spectral": ((4, 6), operator, lambda m: math.sqrt(4 / 6) * polar_by_svd(m)),
    "first": ((4, 6), lambda w: torch.linalg.svdvals(w)[0], polar_by_svd),
    "conv": (
        (4, 3, 3, 3),
        lambda w: torch.linalg.svdvals(flat(w))[0] * math.sqrt(3 / 4) * 9,
        lambda m: (math.sqrt(4 / 3) / 9 * polar_by_svd(flat(m))).reshape(m.shape),
    ),
    "sign": ((4, 6), lambda w: w.abs().max() * 6, lambda m: m.sign() / 6),
    "rows": ((4, 6), lambda w: w.norm(dim=1).max() * 6**0.5, lambda m: m / m.norm(dim=1)[:, None] / 6**0.5),
    "embedding": ((4, 6), lambda w: w.norm(dim=1).max() / 6**0.5, lambda m: m / m.norm(dim=1)[:, None] * 6**0.5),
    "columns": ((4, 6), lambda w: w.norm(dim=0).max() / 2, lambda m: m / m.norm(dim=0) * 2),
    "bias": ((7,), lambda w: w.square().mean().sqrt(), lambda m: m / m.square().mean().sqrt()),
}
every_norm = pytest.mark.parametrize("norm", NORMS)


def layer(norm: str, **options: Any) -> tuple[Scion, nn.Parameter]:
    p = nn.Parameter(gaussian(*LAYERS[norm][0]))
    values = {"lr": LR, "momentum": 1 - ALPHA, "norm": norm, "radius": RADIUS, "polar": "svd", **options}
    return Scion([{"params": [p]}], **values), p


def test_every_norm_is_tested() -> None:
    assert set(LAYERS) == set(NORMS)


@every_norm
def test_the_constrained_weights_stay_in_their_ball(norm: str) -> None:
    length = LAYERS[norm][1]
    optimizer, p = layer(norm, lr=0.3)
    optimizer.init()
    assert abs(length(p.detach()) / RADIUS - 1) < 1e-12
    for t in range(40):
        p.grad = -p.detach().clone() if t > 20 else gaussian(*p.shape, seed=t + 1) * 10.0 ** (t % 7 - 3)
        optimizer.step()
        assert length(p.detach()) <= RADIUS * (1 + 1e-12)
    assert length(p.detach()) > 0.9 * RADIUS


@every_norm
def test_every_unconstrained_step_has_the_length_lr_radius_in_its_norm(norm: str) -> None:
    optimizer, p = layer(norm, constrained=False)
    for t in range(5):
        before = p.detach().clone()
        p.grad = gaussian(*p.shape, seed=t + 1)
        optimizer.step()
        assert abs(LAYERS[norm][1](p.detach() - before) / (LR * RADIUS) - 1) < 1e-10


def test_spectral_everywhere_is_muon_of_unit_steps() -> None:
    found = []
    for made in (Scion, steepest.Muon):
        params = [nn.Parameter(gaussian(*shape, seed=i)) for i, shape in enumerate([(6, 4), (4, 6), (5, 5)])]
        if made is Scion:
            optimizer: Any = Scion([{"params": params}], LR, momentum=0.9, radius=1.0, constrained=False)
        else:
            optimizer = steepest.Muon(
                params, LR, 0.0, 0.9, nesterov=False, adjust_lr_fn="spectral_unclamped", polar="auto"
            )
        for t in range(20):
            for i, p in enumerate(params):
                p.grad = gaussian(*p.shape, seed=100 * t + i)
            optimizer.step()
        found.append([p.detach() for p in params])
    assert max(map(gap, *found)) < 1e-12


def test_with_heads_each_of_them_has_its_norm() -> None:
    p = nn.Parameter(gaussian(6, 4))
    optimizer = Scion([{"params": [p], "num_heads": 2}], LR, radius=RADIUS, polar="svd")
    optimizer.init()
    values = torch.linalg.svdvals(p.detach().reshape(2, 3, 4))
    assert (values / (RADIUS * (3 / 4) ** 0.5) - 1).abs().max() < 1e-12


def test_the_start_leaves_zeros_and_adamw_alone() -> None:
    zero, other = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    Scion([{"params": [zero], "norm": "bias"}, {"params": [other], "use_muon": False}]).init()
    assert torch.equal(zero, torch.zeros(3))
    assert torch.equal(other, torch.ones(3))


# ---- who gets which norm --------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        self.wpe = nn.Parameter(torch.randn(1, 5, 8))
        self.patch = nn.Conv2d(3, 8, 4)
        self.mix = nn.Conv2d(8, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.experts = nn.Parameter(torch.randn(3, 8, 8))
        self.lm_head = nn.Linear(8, 11, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight


def norms(groups: list[dict[str, Any]]) -> dict[str, tuple[str, float]]:
    return {
        name: (group["norm"], group["radius"]) if group["use_muon"] else ("adamw", 0.0)
        for group in groups
        for name, _ in group["params"]
    }


def test_norms_follow_from_roles() -> None:
    found = norms(scion_groups(Model(), radius=2.0))
    assert found["wte.weight"] == found["wpe"] == ("embedding", 2.0)
    assert found["patch.weight"] == found["mix.weight"] == found["depthwise.weight"] == ("conv", 2.0)
    assert found["norm.weight"] == found["patch.bias"] == found["attention.in_proj_bias"] == ("bias", 2.0)
    assert found["attention.in_proj_weight"] == found["experts"] == ("spectral", 2.0)
    assert found["lm_head.weight"] == ("sign", 120.0)
    assert len(found) == len(list(Model().parameters()))


def test_a_tied_embedding_is_a_head() -> None:
    assert norms(scion_groups(Model(tied=True), head_radius=7.0))["wte.weight"] == ("sign", 7.0)


def test_overrides_choose_the_norm_the_radius_or_adamw() -> None:
    overrides = {"patch.weight": {"norm": "first", "radius": 1.0}, "norm.*": "adamw", "wpe": "exclude"}
    found = norms(scion_groups(Model(), overrides=overrides))
    assert found["patch.weight"] == ("first", 1.0)
    assert found["norm.weight"] == found["norm.bias"] == ("adamw", 0.0)
    assert "wpe" not in found


def test_a_model_trains_in_the_balls_of_its_layers() -> None:
    torch.manual_seed(0)
    model = Model().double()
    optimizer = Scion(model, lr=0.1, radius=2.0, polar="svd")
    assert "sign (Linear)" in optimizer.describe()
    optimizer.init()
    for t in range(10):
        for i, p in enumerate(model.parameters()):
            p.grad = gaussian(*p.shape, seed=100 * t + i)
        optimizer.step()
    assert model.lm_head.weight.abs().max() * 8 <= 120.0 * (1 + 1e-12)
    assert operator(model.experts[1]) <= 2.0 * (1 + 1e-12)
    assert operator(model.attention.in_proj_weight[8:16]) <= 2.0 * (1 + 1e-12)
    kernel = model.patch.weight.flatten(1)
    assert torch.linalg.svdvals(kernel)[0] * math.sqrt(3 / 8) * 16 <= 2.0 * (1 + 1e-12)
    assert (model.wte.weight.norm(dim=1) / 8**0.5).max() <= 2.0 * (1 + 1e-12)
    assert model.wpe.norm(dim=2).max() / 8**0.5 <= 2.0 * (1 + 1e-12)


def test_bare_tensors_have_the_norms_of_their_shapes() -> None:
    optimizer = Scion([nn.Parameter(torch.zeros(shape)) for shape in ((3,), (4, 5), (4, 3, 2, 2))])
    assert [group["norm"] for group in optimizer.param_groups] == ["bias", "spectral", "conv"]


@pytest.mark.parametrize(
    "group, text",
    [
        ({"norm": "round"}, "norm 'round' is not known; use one of spectral, first"),
        ({"radius": 0.0}, "radius should be > 0 but is: 0.0"),
        ({"momentum": 1.0}, r"momentum should be in \[0, 1\) but is: 1.0"),
        ({"norm": "bias"}, "norm 'bias', which is for vectors"),
    ],
)
def test_bad_values_are_named(group: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Scion([{"params": [nn.Parameter(torch.zeros(3, 2))], **group}])


def test_kernels_of_two_sizes_need_two_groups() -> None:
    params = [nn.Parameter(torch.zeros(2, 2, k, k)) for k in (1, 3)]
    with pytest.raises(ValueError, match="make one group for each size"):
        Scion([{"params": params, "norm": "conv"}])
    assert len(scion_groups(params)) == 2


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="frozen"):
        scion_groups(Model().requires_grad_(False))
