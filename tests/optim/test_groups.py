"""Groups that do not say their rule are routed, and keep what a framework has put into them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

import steepest
from steepest.optimizer import MatrixOptimizer


def network() -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = {"embed": nn.Embedding(9, 6), "norm": nn.LayerNorm(6), "up": nn.Linear(6, 8), "head": nn.Linear(8, 9)}
    return nn.ModuleDict(layers)


def step(model: nn.ModuleDict, optimizer: MatrixOptimizer) -> None:
    x = model["norm"](model["embed"](torch.arange(9)))
    model["head"](model["up"](x).tanh()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def shown(optimizer: MatrixOptimizer) -> list[tuple[Any, ...]]:
    return [(g["use_muon"], *(tuple(p.shape) for p in g["params"])) for g in optimizer.param_groups]


def values(optimizer: MatrixOptimizer, key: str) -> list[Any]:
    return [group.get(key) for group in optimizer.param_groups]


def test_a_group_without_names_is_split_by_shape_and_keeps_its_values() -> None:
    group = {"params": network().parameters(), "lr": 0.5, "lr_scale": 0.25, "weight_decay": 0.1, "initial_lr": 2.0}
    optimizer = steepest.MuAdam([group], adamw_weight_decay=0.7)
    assert shown(optimizer) == [(True, (9, 6), (8, 6), (9, 8)), (False, (6,), (6,), (8,), (9,))]
    for key in ("lr", "lr_scale", "weight_decay", "initial_lr"):
        assert values(optimizer, key) == [group[key]] * 2
    assert all(list(g)[:5] == list(group) for g in optimizer.param_groups)
    assert "use_muon" not in group


@pytest.mark.parametrize("how", ["pairs", "param_names", "module"])
def test_names_of_a_group_route_it(how: str) -> None:
    model = network()
    names, params = zip(*model.named_parameters(), strict=True)
    group: dict[str, Any] = {"params": model.named_parameters() if how == "pairs" else params, "kind": "a"}
    if how == "param_names":
        group["param_names"] = list(names)
    elif how == "module":
        group["params"] = model
    optimizer = steepest.MuAdam([group])
    assert values(optimizer, "param_names")[0] == ["up.weight"]
    assert shown(optimizer)[1][:3] == (False, (9, 6), (6,))
    assert values(optimizer, "kind") == ["a", "a"]
    assert values(optimizer, "lr") == [1e-3, 3e-4]
    assert "head, by the name pattern 'head'" in optimizer.describe()


def test_vectors_are_not_decayed_where_the_group_does_not_say() -> None:
    optimizer = steepest.MuAdam([{"params": network().named_parameters()}], adamw_weight_decay=0.7)
    assert shown(optimizer) == [(True, (8, 6)), (False, (9, 6), (9, 8)), (False, (6,), (6,), (8,), (9,))]
    assert values(optimizer, "weight_decay") == [0.0, 0.7, 0.0]


def test_groups_stay_in_their_order() -> None:
    a, b = network(), network()
    groups = [{"params": list(m.parameters()), "number": i} for i, m in enumerate((a, b))]
    assert values(steepest.MuAdam([groups[0], {"params": []}, groups[1]]), "number") == [0, 0, None, 1, 1]


def test_a_group_that_says_its_rule_or_how_it_is_read_is_not_split() -> None:
    w = [nn.Parameter(torch.ones(1, 4)), nn.Parameter(torch.ones(4, 4))]
    for said in ({"use_muon": True}, {"algorithm": "muon"}, {"num_heads": 1}):
        assert shown(steepest.MuAdam([{"params": w, **said}])) == [(True, (1, 4), (4, 4))]
    assert shown(steepest.MuAdam([{"params": w}])) == [(True, (4, 4)), (False, (1, 4))]


def test_stacks_have_a_group_of_their_own() -> None:
    optimizer = steepest.MuAdam([{"params": [nn.Parameter(torch.ones(s)) for s in ((4, 3), (2, 4, 3), (1, 1, 3))]}])
    assert shown(optimizer) == [(True, (4, 3)), (True, (2, 4, 3)), (False, (1, 1, 3))]
    assert values(optimizer, "batch_dims") == [None, 1, None]


def test_frozen_parameters_of_a_group_stay() -> None:
    model = network()
    model["up"].requires_grad_(False)
    optimizer = steepest.MuAdam([{"params": model.named_parameters()}])
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("cls", [steepest.MuAdam, steepest.SOAP])
def test_vectors_alone_are_of_adamw(cls: type[MatrixOptimizer]) -> None:
    p = nn.Parameter(torch.ones(4))
    assert shown(cls([p])) == shown(cls([{"params": [p]}])) == [(False, (4,))]  # type: ignore[call-arg]


def test_an_optimizer_for_each_parameter_as_hooks_in_backward_have_it() -> None:
    together, apart = network(), network()
    whole = steepest.Muon([{"params": together.parameters(), "lr": 0.1}])
    each = [steepest.Muon([{"params": [p], "lr": 0.1}]) for p in apart.parameters()]
    by_parameter = dict[torch.Tensor, MatrixOptimizer](zip(apart.parameters(), each, strict=True))

    def hook(p: torch.Tensor) -> None:
        by_parameter[p].step()
        by_parameter[p].zero_grad()

    for p in apart.parameters():
        p.register_post_accumulate_grad_hook(hook)
    for _ in range(3):
        step(together, whole)
        step(apart, whole)
    for p, q in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_routed_group_steps_as_one_that_says_its_rule() -> None:
    model, other = network(), network()
    plain = steepest.MuAdam([{"params": list(model.parameters()), "lr": 0.01}])
    params = list(other.parameters())
    kinds = {True: [p for p in params if p.ndim > 1], False: [p for p in params if p.ndim < 2]}
    said = steepest.MuAdam([{"params": ps, "use_muon": kind, "lr": 0.01} for kind, ps in kinds.items()])
    for _ in range(3):
        step(model, plain)
        step(other, said)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    resumed = steepest.MuAdam([{"params": list(model.parameters()), "lr": 0.01}])
    resumed.load_state_dict(plain.state_dict())


def test_torch_s_matrices_stay_matrices_in_muon() -> None:
    w = [nn.Parameter(torch.ones(1, 4)), nn.Parameter(torch.ones(4, 4))]
    assert shown(steepest.Muon([{"params": w}])) == [(True, (1, 4), (4, 4))]
    assert shown(steepest.Muon([{"params": [*w, nn.Parameter(torch.ones(3))]}])) == [
        (True, (4, 4)),
        (False, (1, 4), (3,)),
    ]


def test_a_bad_group_leaves_all_of_it_out() -> None:
    optimizer = steepest.MuAdam(nn.ModuleDict({"first": nn.Linear(4, 4)}))
    before = copy.copy(optimizer.param_groups)
    with pytest.raises(TypeError, match="lr should be"):
        optimizer.add_param_group({"params": network(), "lr": "a"})
    with pytest.raises(ValueError, match="param_names has 1 names for the 2 parameters of its group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))] * 2, "param_names": ["a"]})
    assert optimizer.param_groups == before


@pytest.mark.parametrize("switches", [{"foreach": None, "fused": None}, {"foreach": True, "fused": True}])
def test_switches_of_a_framework_are_taken(switches: dict[str, Any]) -> None:
    optimizer = steepest.MuAdam([{"params": network().parameters(), **switches}], **switches)
    assert not any(key in group for group in optimizer.param_groups for key in switches)


def test_a_routed_group_may_have_the_numbers_of_adamw() -> None:
    group = {"params": network(), "lr": 0.02, "adamw_lr": 1e-3, "adamw_betas": (0.8, 0.9), "adamw_weight_decay": 0.1}
    optimizer = steepest.MuAdam([group])
    assert values(optimizer, "lr")[0] == 0.02
    of_adamw = [group for group in optimizer.param_groups if not group["use_muon"]]
    assert {group["lr"] for group in of_adamw} == {1e-3}
    assert {group["betas"] for group in of_adamw} == {(0.8, 0.9)}
    decays = [(group["weight_decay"], {p.ndim < 2 for p in group["params"]}) for group in of_adamw]
    assert set(map(str, decays)) <= {"(0.1, {False})", "(0.0, {True})"}  # gains and biases are not decayed
    assert not [key for group in optimizer.param_groups for key in group if key.startswith("adamw_")]


@pytest.mark.parametrize(
    ("cls", "values", "text"),
    [
        (
            steepest.ProdigyMuon,
            {"momentum": 0.9},
            r"momentum=0.9 is of the whole optimizer, .* to ProdigyMuon\(\.\.\.\)",
        ),
        (steepest.MuonMax, {"lower_bound": 0.0}, "lower_bound=0.0 is of the whole optimizer, not of a group"),
        (steepest.Muon, {"adamw_lr": 0.1, "use_muon": True}, "adamw_lr=0.1 .* with use_muon=False as lr="),
    ],
)
def test_a_group_that_says_what_is_of_the_whole_optimizer_is_refused(
    cls: type[MatrixOptimizer], values: dict[str, Any], text: str
) -> None:
    with pytest.raises(TypeError, match=text):
        cls([{"params": [nn.Parameter(torch.ones(4, 3))], **values}])
    optimizer = cls([nn.Parameter(torch.ones(4, 3))])
    with pytest.raises(TypeError, match=text):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 3))], **values})
    assert len(optimizer.param_groups) == 1


def test_one_cycle_keeps_the_ratios_of_the_groups() -> None:
    optimizer = steepest.MuAdam(network(), lr=0.02, adamw_lr=0.001)
    OneCycleLR(optimizer, optimizer.group_lrs(0.2), total_steps=10)
    assert values(optimizer, "max_lr") == pytest.approx([0.2, 0.01])
    OneCycleLR(optimizer, 0.2, total_steps=10)
    assert values(optimizer, "max_lr") == [0.2, 0.2]  # torch's meaning of one number
    with pytest.raises(ValueError, match="group 0 has the learning rate 0, to which the others have no ratio"):
        steepest.MuAdam(network(), lr=0.0).group_lrs(0.1)
