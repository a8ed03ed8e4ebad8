"""load_state_dict: state goes to its name, and a checkpoint to its class. What is wrong with one: test_faults.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import steepest
from steepest.optimizer import MatrixOptimizer
from support.checkpoint_faults import alike, everything
from support.slow import slow
from support.training import (
    EVERY,
    KRONECKER,
    both_kinds,
    copies,
    give_gradients,
    noise,
    parameters,
    same_states,
    state_copies,
    train,
)


def trained(cls: type[MatrixOptimizer], steps: int) -> MatrixOptimizer:
    optimizer, params = both_kinds(cls)
    train(optimizer, params, range(steps))
    return optimizer


@pytest.mark.parametrize("given", [None, [1], "state"])
def test_what_is_no_dictionary_is_refused(given: Any) -> None:
    optimizer = trained(steepest.Muon, 1)
    with pytest.raises(TypeError, match=r"takes what state_dict\(\) gives, a dictionary .* but is given"):
        optimizer.load_state_dict(given)


# ---- by name ----


def named(order: str, shapes: dict[str, tuple[int, ...]] | None = None) -> nn.ParameterDict:
    """Matrices a, b, ... of one shape, unless said otherwise, in this order."""
    shapes = shapes or {}
    return nn.ParameterDict([(k, nn.Parameter(noise(shapes.get(k, (6, 6)), ord(k)))) for k in order])


def gradients(model: nn.ParameterDict, step: int) -> None:
    for k, p in model.items():
        p.grad = noise(p.shape, 100 * step + ord(k))


def run(optimizer: torch.optim.Optimizer, model: nn.ParameterDict, steps: range) -> None:
    for step in steps:
        gradients(model, step)
        optimizer.step()


def test_layers_that_are_new_begin_anew_and_those_that_are_gone_are_named() -> None:
    old, model = named("abc"), named("bxc")
    optimizer, second = steepest.Muon(old, lr=0.1), steepest.Muon(model, lr=0.3)
    run(optimizer, old, range(2))
    with pytest.warns(UserWarning, match=r"dropped of parameters that are not here any more: a$") as caught:
        second.load_state_dict(optimizer.state_dict())
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert set(second.state) == {model["b"], model["c"]}
    assert torch.equal(second.state[model["b"]]["momentum_buffer"], optimizer.state[old["b"]]["momentum_buffer"])
    assert second.param_groups[0]["lr"] == 0.1
    run(second, model, range(2, 3))


def test_a_parameter_that_another_rule_takes_now_begins_anew() -> None:
    old, model = named("abc"), named("abc")
    optimizer = steepest.Muon(steepest.param_groups(old.items(), overrides={"c": "adamw"}), lr=0.1)
    second = steepest.Muon(steepest.param_groups(model.items(), overrides={"a": "adamw"}), lr=0.1)
    run(optimizer, old, range(2))
    with pytest.warns(UserWarning, match=r"another rule takes now.*: (a|c) \(now .*\), (a|c) \(now .*\)$") as caught:
        second.load_state_dict(optimizer.state_dict())
    assert "a (now of AdamW)" in str(caught[0].message)
    assert "c (now a matrix)" in str(caught[0].message)
    assert set(second.state) == {model["b"]}
    run(second, model, range(2, 3))


@pytest.mark.parametrize("split_first", [True, False])
def test_groups_may_be_split_and_merged(split_first: bool) -> None:
    old, model = named("abc"), named("abc")

    def groups(m: nn.ParameterDict, split: bool) -> list[dict[str, Any]]:
        if not split:
            return [{"params": list(m.items()), "weight_decay": 0.1}]
        return [
            {"params": [("a", m["a"])], "weight_decay": 0.1},
            {"params": [("c", m["c"]), ("b", m["b"])], "weight_decay": 0.0},
        ]

    optimizer = steepest.Muon(groups(old, split_first), lr=0.1)
    second = steepest.Muon(groups(model, not split_first), lr=0.2)
    run(optimizer, old, range(2))
    for group in optimizer.param_groups:
        group["lr"] = 0.05  # as a scheduler does
    decays = [group["weight_decay"] for group in second.param_groups]
    with pytest.warns(UserWarning, match="values in which they differ stay as they are: weight_decay of group 0"):
        second.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in second.param_groups] == [0.05] * len(decays)
    assert [group["weight_decay"] for group in second.param_groups] == decays
    for k in "abc":
        assert torch.equal(second.state[model[k]]["momentum_buffer"], optimizer.state[old[k]]["momentum_buffer"])


def test_one_group_of_adam_goes_into_routed_groups_of_its_rule() -> None:
    old, model = named("ab"), named("ab")
    optimizer = steepest.Adam(list(old.items()))
    second = steepest.Adam([{"params": [("b", model["b"])]}, {"params": [("a", model["a"])]}])
    run(optimizer, old, range(2))
    second.load_state_dict(optimizer.state_dict())
    assert torch.equal(second.state[model["a"]]["exp_avg_sq"], optimizer.state[old["a"]]["exp_avg_sq"])


FRONTS = ("module.", "_orig_mod.", "module._orig_mod.", "_forward_module.", "module.module.", "model.", "base.model.")


@pytest.mark.parametrize("front", FRONTS)
def test_what_wrappers_put_in_front_of_a_name_does_not_count(front: str) -> None:
    old, model = named("ab"), named("ba")
    optimizer = steepest.Muon([(front + k, p) for k, p in old.items()])
    second = steepest.Muon(model)
    run(optimizer, old, range(2))
    second.load_state_dict(optimizer.state_dict())
    assert torch.equal(second.state[model["a"]]["momentum_buffer"], optimizer.state[old["a"]]["momentum_buffer"])
    assert second.param_groups[0]["param_names"] == ["b", "a"]


@pytest.mark.parametrize("front", FRONTS)
def test_what_the_loader_is_wrapped_in_does_not_count_either(front: str) -> None:
    old, model = named("abc"), named("ba")
    optimizer, second = steepest.Muon(old), steepest.Muon([(front + k, p) for k, p in model.items()])
    run(optimizer, old, range(2))
    with pytest.warns(UserWarning, match="not here any more: c$"):
        second.load_state_dict(optimizer.state_dict())
    assert torch.equal(second.state[model["a"]]["momentum_buffer"], optimizer.state[old["a"]]["momentum_buffer"])


def test_a_part_of_the_names_is_no_wrapper() -> None:
    """Two layers of one model stand behind the names of another's."""
    old, model = named("ab"), named("ab")
    optimizer = steepest.Muon([("layers.0." + k, p) for k, p in old.items()])
    second = steepest.Muon([("layers.1." + k, p) for k, p in model.items()])
    run(optimizer, old, range(1))
    with pytest.raises(ValueError, match=r"none of the checkpoint's names \(layers.0.a, layers.0.b\)"):
        second.load_state_dict(optimizer.state_dict())


NAMES: dict[str, tuple[Any, str]] = {
    "twice": (["a", "a"], "parameter 1 of group 0 and parameter 0 of group 0 are both named 'a': give every"),
    "in two groups": (["a", "c"], "parameter 0 of group 1 and parameter 1 of group 0 are both named 'c': give every"),
    "too few": (["a"], "group 0: param_names has 1 names for the 2 parameters of its group; give every"),
    "none": ([], "group 0: param_names has 0 names for the 2 parameters of its group; give every"),
    "numbers": (["a", 1], "group 0: param_names should be names, and number 1 is: 1; give every"),
    "a name": ("ab", "group 0: param_names should be a list of names, .* but is: 'ab'; give every"),
    "missing": (None, "group 0 has no param_names, and group 1 has: give every"),
}


@pytest.mark.parametrize("fault", NAMES)
def test_names_that_say_nothing_are_refused_by_their_place(fault: str) -> None:
    """And so is the order, which would take state elsewhere in silence."""
    names, text = NAMES[fault]
    old, model = named("abc"), named("abc")

    def made(of: nn.ParameterDict) -> MatrixOptimizer:
        return steepest.Muon(
            [{"params": [(k, of[k]) for k in "ab"]}, {"params": [("c", of["c"])], "use_muon": False}], lr=0.1
        )

    optimizer, second = made(old), made(model)
    run(optimizer, old, range(2))
    saved, before = optimizer.state_dict(), everything(second)
    saved["param_groups"][0]["param_names"] = names
    text = rf"the checkpoint's {text} .* take 'param_names' out of all of checkpoint\['param_groups'\]"
    with pytest.raises((TypeError, ValueError), match=text):
        second.load_state_dict(saved)
    assert alike(everything(second), before)
    for group in saved["param_groups"]:
        del group["param_names"]
    second.load_state_dict(saved)
    assert torch.equal(second.state[model["b"]]["momentum_buffer"], optimizer.state[old["b"]]["momentum_buffer"])


def test_names_twice_are_taken_where_order_and_names_say_the_same() -> None:
    def made(of: nn.ParameterDict, names: str) -> MatrixOptimizer:
        params = [(name, of[k]) for name, k in zip(names, "ab", strict=True)]
        return steepest.Muon([{"params": params, "use_muon": True}])

    old, model = named("ab"), named("ab")
    optimizer, second = made(old, "ww"), made(model, "ww")
    run(optimizer, old, range(2))
    second.load_state_dict(optimizer.state_dict())
    assert torch.equal(second.state[model["b"]]["momentum_buffer"], optimizer.state[old["b"]]["momentum_buffer"])
    with pytest.raises(ValueError, match="the checkpoint's parameter 1 of group 0 and .* are both named 'w'"):
        made(model, "wx").load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="this Muon's parameter 1 of group 0 and .* are both named 'w'"):
        second.load_state_dict(made(old, "wx").state_dict())


@pytest.mark.parametrize("names", ["ab", 3, ["a"], [1, 2]])
@pytest.mark.parametrize("rule", [{"use_muon": True}, {}])
def test_a_group_with_names_that_are_none_is_refused(names: Any, rule: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match="param_names (should be|has 1 names)"):
        steepest.Muon([{"params": parameters([(6, 6), (6, 6)]), "param_names": names, **rule}])


def test_names_of_another_model_are_refused_and_without_names_the_order_decides() -> None:
    old, model = named("abcd"), named("wxyz")
    optimizer, second = steepest.Muon(old), steepest.Muon(model)
    run(optimizer, old, range(1))
    saved, before = optimizer.state_dict(), everything(second)
    text = (
        r"names \(a, b, c, ...\) is one of this Muon's \(w, x, y, ...\): give the parameters .* without them the order"
    )
    with pytest.raises(ValueError, match=text):
        second.load_state_dict(saved)
    assert alike(everything(second), before)
    del saved["param_groups"][0]["param_names"]
    second.load_state_dict(saved)
    assert torch.equal(second.state[model["w"]]["momentum_buffer"], optimizer.state[old["a"]]["momentum_buffer"])
    assert second.param_groups[0]["param_names"] == list("wxyz")


def test_distributed_checkpoint_dictionaries_go_by_name_too() -> None:
    """They have the loader's order of parameters beside the saver's list of names."""
    model, other = named("abc"), named("cab")
    optimizer, second = steepest.Muon(model), steepest.Muon(other)
    run(optimizer, model, range(2))
    set_optimizer_state_dict(other, second, get_optimizer_state_dict(model, optimizer))
    for k in "abc":
        assert torch.equal(second.state[other[k]]["momentum_buffer"], optimizer.state[model[k]]["momentum_buffer"])


@pytest.mark.parametrize("how", ["shape", "groups", "sizes", "rules"])
def test_without_names_doubt_is_an_error_that_says_how_to_give_them(how: str) -> None:
    shapes = {"shape": [(4, 6), (6, 6), (5,)], "sizes": [(6, 6), (5,)]}.get(how, [(6, 6), (4, 6), (5,)])

    def build(shapes: list[tuple[int, ...]], one: bool = False, turned: bool = False) -> MatrixOptimizer:
        params = parameters(shapes)
        if turned:
            return steepest.Muon([{"params": params[:2], "use_muon": False}, {"params": params[2:], "use_muon": False}])
        groups = [{"params": params[:-1]}, {"params": params[-1:], "use_muon": False}]
        optimizer = steepest.Muon(groups[:1] if one else groups)
        train(optimizer, [p for group in optimizer.param_groups for p in group["params"]], range(1))
        return optimizer

    saved = build([(6, 6), (4, 6), (5,)]).state_dict()
    optimizer = build(shapes, one=how == "groups", turned=how == "rules")
    before = everything(optimizer)
    with pytest.raises(ValueError, match=r"make both from a module or from model.named_parameters\(\)") as caught:
        optimizer.load_state_dict(saved)
    if how in ("groups", "sizes"):
        assert "2 groups of 2 and 1 parameters in the checkpoint" in str(caught.value)
    assert alike(everything(optimizer), before)


# ---- what is missing ----


def momo(lower_bound: float | None = 0.0) -> tuple[MatrixOptimizer, list[nn.Parameter]]:
    return both_kinds(steepest.MuonMax, lower_bound=lower_bound)


def steps(optimizer: Any, params: list[nn.Parameter], numbers: range) -> None:
    for number in numbers:
        give_gradients(params, number)
        optimizer.step(loss=1.0)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (
            "loss_average",
            "state of all parameters has inner_average, losses and lacks loss_average, which MuonMax keeps",
        ),
        ("losses", "state of all parameters has inner_average, loss_average and lacks losses"),
    ],
)
def test_part_of_a_model_of_the_loss_is_refused(key: str, text: str) -> None:
    optimizer, params = momo()
    steps(optimizer, params, range(2))
    saved = optimizer.state_dict()
    del saved["state"][0][key]
    with pytest.raises(ValueError, match=text):
        momo()[0].load_state_dict(saved)


def test_a_lower_bound_that_is_new_begins_and_says_so() -> None:
    optimizer, params = momo(None)
    steps(optimizer, params, range(2))
    second, others = momo()
    with pytest.warns(
        UserWarning, match="begins anew: inner_average of parameter 0, .*, loss_average of all parameters"
    ):
        second.load_state_dict(optimizer.state_dict())
    steps(second, others, range(2, 4))
    assert float(second.state[others[0]]["losses"]) == 2


def test_a_first_parameter_without_a_gradient_leaves_what_is_shared_whole() -> None:
    optimizer, params = momo()
    give_gradients(params, 0)
    params[0].grad = None
    optimizer.prepare()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        momo()[0].load_state_dict(optimizer.state_dict())


def test_weights_that_were_averaged_are_there_together() -> None:
    optimizer, params = both_kinds(steepest.Muon, average=0.9)
    train(optimizer, params, range(2))
    optimizer.eval()
    saved = optimizer.state_dict()
    second, _ = both_kinds(steepest.Muon, average=0.9)
    second.load_state_dict(saved)
    del saved["state"][1]["weights"]
    with pytest.raises(ValueError, match="state of parameter 1 has .* and lacks weights, which Muon keeps"):
        second.load_state_dict(saved)


def test_state_that_has_nothing_of_this_class_is_named() -> None:
    optimizer, params = both_kinds(steepest.Muon)
    train(optimizer, params, range(1))
    saved = optimizer.state_dict()
    saved["state"][2] = {"momentum": saved["state"][2]["momentum_buffer"]}
    second, _ = both_kinds(steepest.Muon)
    with pytest.warns(UserWarning, match="does not have begins anew: everything of parameter 2$"):
        second.load_state_dict(saved)


def test_an_empty_entry_is_named_and_one_that_was_looked_at_is_not_saved() -> None:
    """A parameter without an entry had no gradient yet, and `optimizer.state[p]` makes an entry."""
    optimizer, params = both_kinds(steepest.Muon)
    for p in params:
        assert optimizer.state[p] == {}
    assert optimizer.state_dict()["state"] == {}
    give_gradients(params, 0)
    params[1].grad = None
    optimizer.step()
    saved = optimizer.state_dict()
    assert sorted(saved["state"]) == [i for i in range(len(params)) if i != 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both_kinds(steepest.Muon)[0].load_state_dict(saved)
        nothing = {**saved, "state": {key: {} for key in range(len(params))}}
        both_kinds(steepest.Muon)[0].load_state_dict(nothing)
    saved["state"][1] = saved["state"][2] = {}
    second, others = both_kinds(steepest.Muon)
    with pytest.warns(UserWarning, match="begins anew: everything of parameter 1, parameter 2$"):
        second.load_state_dict(saved)
    assert others[1] not in second.state
    assert others[2] not in second.state


def test_a_root_that_was_not_taken_is_loaded() -> None:
    optimizer, params = both_kinds(steepest.Shampoo, inverse_root="newton")
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()
    saved["state"][0]["left_residual"].fill_(torch.inf)
    second, _ = both_kinds(steepest.Shampoo, inverse_root="newton")
    second.load_state_dict(saved)
    assert torch.isinf(second.state[second.param_groups[0]["params"][0]]["left_residual"]).all()


@pytest.mark.parametrize("dtype", [torch.float64, slow(torch.float16)])
@pytest.mark.parametrize(
    "cls, options", [(cls, {}) for cls in KRONECKER] + [(steepest.SOAP, {"factor_dtype": torch.bfloat16})]
)
def test_factors_of_another_dtype_are_taken_in_that_of_the_steps(
    cls: type[MatrixOptimizer], options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Each tensor in turn, so that one is of another dtype than those it is multiplied with."""
    optimizer, params = both_kinds(cls, **options)
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()
    for key, t in saved["state"][0].items():
        if not t.is_floating_point() or key == "step":
            continue
        state = {**saved["state"], 0: {**saved["state"][0], key: t.to(dtype)}}
        second, others = both_kinds(cls, **options)
        second.load_state_dict({**saved, "state": state})
        kept = second.state[second.param_groups[0]["params"][0]][key].dtype
        elementwise = key == "momentum_buffer" or t.shape == params[0].shape
        assert kept is (dtype if elementwise and dtype == torch.float64 else t.dtype)
        train(second, others, range(2, 4))
        assert all(p.isfinite().all() for p in others)


@pytest.mark.parametrize("cls", [steepest.Muon, steepest.MuAdam, steepest.SOAP, steepest.NAMO, steepest.AdaMuon])
def test_state_that_was_halved_on_the_way_is_widened(cls: type[MatrixOptimizer]) -> None:
    """As Ultralytics stores it. The squares of small gradients are 0 in fp16, and would stay so."""
    optimizer, params = both_kinds(cls)
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()
    wanted = {i: {key: t.dtype for key, t in state.items()} for i, state in saved["state"].items()}
    halved = {
        i: {key: t.half() if t.dtype == torch.float32 else t for key, t in state.items()}
        for i, state in saved["state"].items()
    }
    second, others = both_kinds(cls)
    second.load_state_dict({**saved, "state": halved})
    found = second.state_dict()["state"]
    assert {i: {key: t.dtype for key, t in state.items()} for i, state in found.items()} == wanted
    train(second, others, range(2, 4))
    assert all(p.isfinite().all() for p in others)


def test_bf16_averages_of_gradients_stay_bf16_and_squares_do_not() -> None:
    optimizer, params = both_kinds(steepest.MuAdam)
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()
    for key in ("momentum_buffer", "exp_avg_sq"):
        saved["state"][0][key] = saved["state"][0][key].bfloat16()
    second, _ = both_kinds(steepest.MuAdam)
    second.load_state_dict(saved)
    state = second.state_dict()["state"][0]
    assert (state["momentum_buffer"].dtype, state["exp_avg_sq"].dtype) == (torch.bfloat16, torch.float32)


def test_a_factor_beyond_the_dtype_of_the_steps_is_refused() -> None:
    optimizer, params = both_kinds(steepest.SOAP)
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()
    saved["state"][0]["left"] = saved["state"][0]["left"].double() * 1e300
    with pytest.raises(ValueError, match="the checkpoint's 'left' of parameter 0 has numbers beyond torch.float32"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_momo_averages_may_be_in_another_dtype(dtype: torch.dtype) -> None:
    optimizer, params = momo()
    steps(optimizer, params, range(2))
    saved = optimizer.state_dict()
    for key in ("inner_average", "loss_average", "losses"):
        saved["state"][0][key] = saved["state"][0][key].to(dtype)
    second, others = momo()
    second.load_state_dict(saved)
    steps(second, others, range(2, 4))
    assert all(p.isfinite().all() for p in others)


# ---- whose it is ----


@pytest.mark.parametrize("cls", EVERY)
def test_a_checkpoint_names_its_class_and_no_other_takes_it(cls: type[MatrixOptimizer]) -> None:
    saved = trained(cls, 2).state_dict()
    assert saved["optimizer"] == cls.__name__
    for other in EVERY:
        if other is not cls:
            optimizer, _ = both_kinds(other)
            with pytest.raises(ValueError, match=f"is of {cls.__name__}, and this is {other.__name__}: load it into"):
                optimizer.load_state_dict(saved)
    del saved["optimizer"]  # as older versions have it
    optimizer, _ = both_kinds(cls)
    optimizer.load_state_dict(saved)
    assert same_states(state_copies(optimizer), [*saved["state"].values()])


def test_without_a_class_the_options_and_the_state_tell() -> None:
    for saver, loader, text in (
        (steepest.MuAdam, steepest.Muon, "it has betas, after, which Muon does not take"),
        (steepest.Muon, steepest.MuAdam, "it has momentum, nesterov, .*which MuAdam does not take"),
        (steepest.Shampoo, steepest.SOAP, "it has graft, inverse_root, which SOAP does not take"),
        (steepest.SOAP, steepest.KLShampoo, "lacks .*, which KLShampoo keeps"),
        (steepest.Muon, steepest.SignSGD, "it has ns_coefficients, eps, ns_steps, polar, which SignSGD does not take"),
    ):
        saved = trained(saver, 2).state_dict()
        del saved["optimizer"]
        optimizer, _ = both_kinds(loader)
        with pytest.raises(ValueError, match=text):
            optimizer.load_state_dict(saved)


class Mine(steepest.Muon):
    """A user's own."""


def test_a_users_class_takes_its_base() -> None:
    optimizer, params = both_kinds(steepest.Muon)
    train(optimizer, params, range(1))
    mine, _ = both_kinds(Mine)
    mine.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="is of Mine, and this is Muon"):
        optimizer.load_state_dict(mine.state_dict())


def trained_by_torch(cls: Any, **values: Any) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    params = parameters([(6, 4), (4, 5)])
    optimizer = cls(params, lr=0.01, **values)
    train(optimizer, params, range(3))
    return optimizer, params


OF_TORCH: dict[str, Callable[[], tuple[torch.optim.Optimizer, list[nn.Parameter]]]] = {
    "SGD": lambda: trained_by_torch(torch.optim.SGD, momentum=0.9),
    "RMSprop": lambda: trained_by_torch(torch.optim.RMSprop),
    "Adagrad": lambda: trained_by_torch(torch.optim.Adagrad),
    "NAdam": lambda: trained_by_torch(torch.optim.NAdam),
    "AdamW": lambda: trained_by_torch(torch.optim.AdamW),
    "AdamW, amsgrad": lambda: trained_by_torch(torch.optim.AdamW, amsgrad=True),
    "Adam": lambda: trained_by_torch(torch.optim.Adam),
}


@pytest.mark.parametrize("name", OF_TORCH)
@pytest.mark.parametrize("cls", EVERY)
def test_other_optimizers_of_torch_are_refused(cls: type[MatrixOptimizer], name: str) -> None:
    theirs, params = OF_TORCH[name]()
    optimizer = cls(parameters([(6, 4), (4, 5)]))
    before = everything(optimizer)
    if (cls, name) == (steepest.Adam, "AdamW"):
        optimizer.load_state_dict(theirs.state_dict())
        others = optimizer.param_groups[0]["params"]
        for p, q in zip(params, others, strict=True):
            q.data.copy_(p.data)
        for o, ps in ((theirs, params), (optimizer, others)):
            train(o, ps, range(3, 5))
        assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(params, others, strict=True))
        assert "amsgrad" not in optimizer.param_groups[0]
        return
    with pytest.raises(ValueError, match="of another optimizer|it is incomplete"):
        optimizer.load_state_dict(theirs.state_dict())
    assert alike(everything(optimizer), before)


def test_muon_of_torch_is_loaded_and_leaves_other_options_alone() -> None:
    theirs, params = trained_by_torch(torch.optim.Muon)
    optimizer = steepest.Muon([{"params": copies_of(params), "num_heads": 2}], backend="torch")
    optimizer.load_state_dict(theirs.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["num_heads"], group["backend"]) == (0.01, 2, "torch")
    assert torch.equal(
        optimizer.state[group["params"][0]]["momentum_buffer"], theirs.state[params[0]]["momentum_buffer"]
    )


def copies_of(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(t) for t in copies(params)]


@pytest.mark.parametrize("key", [str, lambda number: number + 7])
def test_state_that_no_group_lists_is_not_lost_in_silence(key: Any) -> None:
    optimizer, params = both_kinds(steepest.Muon)
    train(optimizer, params, range(1))
    saved = optimizer.state_dict()
    saved["state"]["mine"] = {"anything": 3}
    saved["state"] = {key(k) if isinstance(k, int) else k: entry for k, entry in saved["state"].items()}
    second, _ = both_kinds(steepest.Muon)
    with pytest.raises(ValueError, match="which no group lists in 'params', .* JSON makes strings"):
        second.load_state_dict(saved)
    assert not second.state


def test_what_a_schedule_in_numpy_leaves_in_a_group_is_saved_as_plain_numbers(tmp_path: Path) -> None:
    """A checkpoint that is written after scheduler.step(), as most are, and read by torch.load as it is by default."""
    np = pytest.importorskip("numpy")
    model = named("ab")
    optimizer = steepest.MuAdam(model, lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: np.cos(np.float32(t) / 10))
    run(optimizer, model, range(1))
    schedule.step()
    group = optimizer.param_groups[0]
    group["betas"], group["note"] = (np.float64(0.8), 0.9), {"of": "a framework"}
    assert isinstance(group["lr"], np.floating)
    torch.save(optimizer.state_dict(), tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt")["param_groups"][0]
    assert [type(saved["lr"]), *map(type, saved["betas"])] == [float, float, float]
    assert (saved["lr"], saved["betas"], saved["note"]) == (group["lr"], (0.8, 0.9), {"of": "a framework"})
    second = steepest.MuAdam(named("ab"))
    second.load_state_dict(torch.load(tmp_path / "saved.pt"))
    assert second.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
