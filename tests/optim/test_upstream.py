"""PyTorch's own tables for `torch.optim.Muon`, run on `steepest.Muon`.

The inputs, error inputs and schedulers are those of `optim_db` in the installed torch; checked with them is what
PyTorch checks of every optimizer: errors, descent, learning rates as tensors, groups, checkpoints, copies and hooks.
"""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import steepest
from support.training import all_same_bits, copies, give_gradients, parameters, same_states, state_copies, train

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest: pip install expecttest")
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    optim_db,
)

UPSTREAM = next(info for info in optim_db if info.optim_cls is torch.optim.Muon)
INFO = OptimizerInfo(
    steepest.Muon,
    optim_inputs_func=UPSTREAM.optim_inputs_func,
    optim_error_inputs_func=UPSTREAM.optim_error_inputs_func,
    scheduler_inputs=UPSTREAM.scheduler_inputs,
    supported_impls=UPSTREAM.supported_impls,
    not_og_supported_flags=UPSTREAM.not_og_supported_flags,
    supports_complex=UPSTREAM.supports_complex,
)
INPUTS = INFO.optim_inputs_func(device="cpu")
ERRORS = INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)


def described(given: OptimizerInput | ErrorOptimizerInput) -> str:
    return getattr(given, "optimizer_error_input", given).desc.replace(" ", "_")


every_input = pytest.mark.parametrize("given", INPUTS, ids=described)


def build(params: Any, given: OptimizerInput, **more: Any) -> steepest.Muon:
    return INFO.optim_cls(params, **{**copy.deepcopy(given.kwargs), **more})


def matrices() -> list[nn.Parameter]:
    return parameters([(10, 5), (5, 10)])


def test_the_entry_is_found_by_its_name() -> None:
    assert INFO.name == UPSTREAM.name == "Muon"
    assert len(INPUTS) >= 7
    assert len(ERRORS) >= 9


@pytest.mark.parametrize("error", ERRORS, ids=described)
def test_errors(error: ErrorOptimizerInput) -> None:
    given = error.optimizer_error_input
    params = [nn.Parameter(torch.randn(1, 1))] if given.params is None else given.params
    if issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            build(params, given)
    elif error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(error.error_type, match=error.error_regex):
            build(params, given)
    else:
        optimizer = build(params, given)
        with pytest.raises(error.error_type, match=error.error_regex):
            optimizer.step()


@every_input
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("schedulers", [(), *INFO.scheduler_inputs], ids=lambda s: f"{len(s)}_schedulers")
def test_the_loss_goes_down(given: OptimizerInput, contiguous: bool, schedulers: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
    drawn = [torch.randn(10, 5), torch.randn(10, 1)] if contiguous else torch.randn(2, 10, 5, 2)[..., 0].unbind()
    weight, bias = nn.Parameter(drawn[0]), nn.Parameter(drawn[1][:, :1])
    x = torch.randn(5, 1)
    optimizer = build([weight, bias], given)
    followers = [scheduler(optimizer) for scheduler in schedulers]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight.mm(x) + bias).square().sum()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(20):
        loss = optimizer.step(closure)
        for follower in followers:
            follower.step(loss) if isinstance(follower, ReduceLROnPlateau) else follower.step()
    assert closure().item() < first


@every_input
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_tensor_learning_rate_steps_like_its_number(given: OptimizerInput, shape: tuple[int, ...]) -> None:
    lr = float(given.kwargs.get("lr", 1e-3))
    plain, tensor = matrices(), matrices()
    train(build(plain, given, lr=lr), plain, range(5))
    train(build(tensor, given, lr=torch.full(shape, lr)), tensor, range(5))
    for a, b in zip(plain, tensor, strict=True):
        torch.testing.assert_close(a, b)


@every_input
@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_each_group_has_its_own_value(given: OptimizerInput, key: str) -> None:
    together, apart = matrices(), matrices()
    own = {"lr": 0.02, "weight_decay": 0.5}[key]
    train(build([{"params": together[:1]}, {"params": together[1:], key: own}], given), together, range(5))
    first, second = build(apart[:1], given), build(apart[1:], given, **{key: own})
    for step in range(5):
        give_gradients(apart, step)
        first.step()
        second.step()
    assert all_same_bits(together, apart)


@every_input
def test_a_checkpoint_continues_bit_for_bit(given: OptimizerInput) -> None:
    params = matrices()
    optimizer = build(params, given)
    train(optimizer, params, range(4))
    clones = [nn.Parameter(p) for p in copies(params)]
    second = build(clones, given)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    second.load_state_dict(saved)
    assert str(saved) == str(kept)  # loading does not change what it is given
    assert optimizer.state_dict()["state"].keys() == second.state_dict()["state"].keys()
    train(optimizer, params, range(4, 8))
    train(second, clones, range(4, 8))
    assert all_same_bits(params, clones)
    assert same_states(state_copies(optimizer), state_copies(second))


@pytest.mark.parametrize("names_saved", [True, False])
@pytest.mark.parametrize("names_wanted", [True, False])
def test_names_may_come_and_go(names_saved: bool, names_wanted: bool) -> None:
    def build_named(params: list[nn.Parameter], names: bool) -> steepest.Muon:
        return steepest.Muon([(f"layer{i}", p) for i, p in enumerate(params)] if names else params, lr=0.01)

    first, second = parameters([(6, 6), (6, 6)]), parameters([(6, 6), (6, 6)])
    saved = build_named(first, names_saved)
    train(saved, first, range(2))
    wanted = build_named(second, names_wanted)
    wanted.load_state_dict(saved.state_dict())
    assert same_states(state_copies(saved), state_copies(wanted))
    for p, q in zip(first, second, strict=True):
        q.data.copy_(p.data)
    train(saved, first, range(2, 4))
    train(wanted, second, range(2, 4))
    assert all_same_bits(first, second)


@every_input
def test_a_checkpoint_loads_with_weights_only(given: OptimizerInput) -> None:
    params = matrices()
    optimizer = build(params, given)
    train(optimizer, params, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = build(params, given)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert same_states(state_copies(optimizer), state_copies(second))


@pytest.mark.parametrize("key", sorted(set(steepest.Muon([torch.ones(2, 2)]).param_groups[0]) - {"params"}))
def test_an_older_checkpoint_may_lack_a_key(key: str) -> None:
    params = matrices()
    optimizer = steepest.Muon(params)
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()
    del saved["param_groups"][0][key]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0][key] == steepest.Muon(matrices()).param_groups[0][key]
    train(optimizer, params, range(2, 3))


@every_input
def test_no_gradient_means_no_step(given: OptimizerInput) -> None:
    params = matrices()
    start = copies(params)
    optimizer = build(params, given)
    optimizer.step()
    assert all_same_bits(params, start)
    assert not optimizer.state


@every_input
def test_zero_gradients_leave_what_decay_leaves(given: OptimizerInput) -> None:
    params = matrices()
    start = copies(params)
    optimizer = build(params, given, lr=1e-5)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    shrink = 1 - 1e-5 * given.kwargs.get("weight_decay", 0.1)
    for p, s in zip(params, start, strict=True):
        torch.testing.assert_close(p.detach(), s * shrink, rtol=1e-6, atol=0)


@every_input
def test_a_deep_copy_is_whole(given: OptimizerInput) -> None:
    params = matrices()
    optimizer = build(params, given)
    train(optimizer, params, range(2))
    second, clones = copy.deepcopy((optimizer, params))

    def public(instance: object) -> set[str]:
        return {name for name in vars(instance) if not name.startswith("_")}

    assert public(second) == public(optimizer)
    train(optimizer, params, range(2, 4))
    train(second, clones, range(2, 4))
    assert all_same_bits(params, clones)


@every_input
def test_repr_shows_every_value_once(given: OptimizerInput) -> None:
    shown = repr(build([{"params": [p]} for p in matrices()], given))
    assert re.match(r"Muon \(\nParameter Group 0\n", shown)
    for key, value in given.kwargs.items():
        assert shown.count(f"    {key}: {value}\n") == 2


def test_step_hooks_see_the_step_and_may_replace_its_arguments() -> None:
    params = matrices()
    optimizer = steepest.Muon(params)
    seen: list[str] = []

    def before(instance: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        seen.append("before")
        return args, {"closure": lambda: 7.0}

    def after(instance: Any, args: Any, kwargs: Any) -> None:
        seen.append("after")

    handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    give_gradients(params, 0)
    assert optimizer.step() == 7.0
    for handle in handles:
        handle.remove()
    assert optimizer.step() is None
    assert seen == ["before", "after"]


def test_global_step_hooks_run_around_ours() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    params = matrices()
    optimizer = steepest.Muon(params)
    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global after")),
        optimizer.register_step_pre_hook(lambda *_: seen.append("before")),
        optimizer.register_step_post_hook(lambda *_: seen.append("after")),
    ]
    try:
        train(optimizer, params, range(1))
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["global before", "before", "after", "global after"]


def test_checkpoint_hooks_run_in_order_and_may_replace_the_dictionary() -> None:
    params = matrices()
    optimizer = steepest.Muon(params)
    train(optimizer, params, range(1))
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "note": seen.append("saved")})

    def double(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append("load")
        state = {i: {"momentum_buffer": s["momentum_buffer"] * 2} for i, s in given["state"].items()}
        return {**given, "state": state}

    optimizer.register_load_state_dict_pre_hook(double)
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    before = state_copies(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["save", "saved", "load", "loaded"]
    for old, new in zip(before, state_copies(optimizer), strict=True):
        assert torch.equal(old["momentum_buffer"] * 2, new["momentum_buffer"])
