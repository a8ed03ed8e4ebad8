"""State survives saving, copying and moving: training goes on as if nothing had happened, in the dtypes it had."""

from __future__ import annotations

import copy
import io
import multiprocessing.reduction
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import steepest
from steepest.optimizer import MatrixOptimizer
from support.training import (
    COUPLED,
    EVERY,
    KRONECKER,
    OPTIMIZERS,
    all_same_bits,
    both_kinds,
    copies,
    noise,
    same_states,
    state_copies,
    train,
)

every_optimizer = pytest.mark.parametrize("cls", EVERY)
# dtype of parameters, of gradients
DTYPES = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "bf16, fp32 gradients": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, None),
    "fp64": (torch.float64, None),
}
ROUNDED = {"stochastic_rounding": True, "cautious_wd": True}  # of bf16 alone
PLAIN = (type(None), bool, int, float, str, torch.Tensor)


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed() -> Iterator[Any]:
    """Every dtype and rounding of the first classes. Of the others a state in fp32, one that is wider than its weights
    and one that was rounded: which bits a tensor has is not the class's concern.
    """
    runs: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in DTYPES}
    runs |= {"rounded": ("bf16", ROUNDED), "rounded, fp32 gradients": ("bf16, fp32 gradients", ROUNDED)}
    for cls in EVERY:
        for name, (dtypes, options) in runs.items():
            few = name not in ("fp32", "bf16, fp32 gradients", "rounded")
            marks = [pytest.mark.slow] if few and cls not in OPTIMIZERS else []
            yield pytest.param(cls, DTYPES[dtypes], options, id=f"{name}-{cls.__name__}", marks=marks)


@pytest.mark.parametrize(("cls", "dtypes", "options"), list(resumed()))
def test_a_resumed_run_is_the_run(
    cls: type[MatrixOptimizer], dtypes: tuple[torch.dtype, torch.dtype | None], options: dict[str, Any]
) -> None:
    dtype, grad_dtype = dtypes
    options = {**options, **({"precondition_frequency": 2} if cls in KRONECKER else {})}
    if cls in (steepest.Fromage, steepest.OrthogonalSGDM):  # their own decay cannot be cautious
        options.pop("cautious_wd", None)
    optimizer, params = both_kinds(cls, dtype, grad_dtype, **options)
    train(optimizer, params, range(3), grad_dtype)
    resumed, others = both_kinds(cls, dtype, grad_dtype, **options)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert same_states(state_copies(optimizer), state_copies(resumed))  # dtypes too
    for instance, ps in ((optimizer, params), (resumed, others)):
        train(instance, ps, range(3, 6), grad_dtype)
    assert all_same_bits(params, others)
    assert same_states(state_copies(optimizer), state_copies(resumed))


@every_optimizer
def test_second_moments_of_bf16_parameters_are_fp32(cls: type[MatrixOptimizer]) -> None:
    optimizer, params = both_kinds(cls, torch.bfloat16)
    train(optimizer, params, range(1))
    states = [state for state in state_copies(optimizer) if "exp_avg_sq" in state]
    assert states or cls in (steepest.Schattor, steepest.ProdigyMuon)
    assert all(state["exp_avg_sq"].dtype == torch.float32 for state in states)


@every_optimizer
def test_momentum_dtype(cls: type[MatrixOptimizer]) -> None:
    optimizer, params = both_kinds(cls, momentum_dtype=torch.bfloat16)
    train(optimizer, params, range(2))
    state = optimizer.state[params[0]]
    assert state.get("momentum_buffer", state.get("exp_avg")).dtype == torch.bfloat16
    second, _ = both_kinds(cls)
    second.load_state_dict(through_a_file(optimizer.state_dict()))
    assert second.param_groups[0]["momentum_dtype"] == torch.bfloat16
    assert same_states(state_copies(optimizer), state_copies(second))


@every_optimizer
def test_what_is_saved_is_plain(cls: type[MatrixOptimizer]) -> None:
    """Tensors, numbers and strings in dictionaries; lists and tuples only in groups, as torch itself has them."""
    optimizer, params = both_kinds(cls)
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()
    assert all(isinstance(value, torch.Tensor) for state in saved["state"].values() for value in state.values())
    for group in saved["param_groups"]:
        for key, value in group.items():
            values = value if isinstance(value, list | tuple) else [value]
            assert all(isinstance(v, PLAIN) for v in values), key


@every_optimizer
def test_loading_copies(cls: type[MatrixOptimizer]) -> None:
    """Two optimizers that loaded one dictionary do not share memory with it or each other."""
    optimizer, params = both_kinds(cls)
    train(optimizer, params, range(1))
    saved = optimizer.state_dict()
    second, others = both_kinds(cls)
    second.load_state_dict(saved)
    before = state_copies(optimizer)
    train(second, others, range(1, 3))
    assert same_states(state_copies(optimizer), before)


@every_optimizer
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_a_copy_trains_on_alone(cls: type[MatrixOptimizer], clone: Any) -> None:
    optimizer, params = both_kinds(cls, torch.bfloat16)
    train(optimizer, params, range(2))
    second, others = clone((optimizer, params))
    kept = copies(params)
    train(second, others, range(2, 4))
    assert all_same_bits(params, kept)
    train(optimizer, params, range(2, 4))
    assert all_same_bits(params, others)
    assert second.describe() == optimizer.describe()
    assert second.skipped_updates() == optimizer.skipped_updates()


@every_optimizer
def test_init_state_makes_the_state_of_a_first_step(cls: type[MatrixOptimizer]) -> None:
    (ready, a), (lazy, b) = both_kinds(cls), both_kinds(cls)
    start = copies(a)
    ready.init_state()
    assert all_same_bits(a, start)
    train(lazy, b, range(1))
    later = {"descent"} if cls in COUPLED else set()  # what a matrix has once it has moved
    assert [set(s) for s in state_copies(ready)] == [set(s) - later for s in state_copies(lazy)]
    train(ready, a, range(1))
    assert all_same_bits(a, b)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6))


def backward(model: nn.Module, seed: int) -> None:
    model.zero_grad()
    model(noise((5, 4), seed)).square().sum().backward()


@every_optimizer
def test_distributed_checkpoint_dictionaries_round_trip(cls: type[MatrixOptimizer]) -> None:
    """torch.distributed.checkpoint keys state by parameter name, after a step of its own with zero gradients."""
    model, other = network(), network()
    optimizer, second = cls(model), cls(other)
    for seed in range(2):
        backward(model, seed)
        optimizer.step()
    other.load_state_dict(model.state_dict())
    start = copies(other.parameters())
    saved = get_optimizer_state_dict(model, optimizer)
    assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    set_optimizer_state_dict(other, second, saved)
    assert all_same_bits(other.parameters(), start)
    assert same_states(state_copies(optimizer), state_copies(second))
    for m, o in ((model, optimizer), (other, second)):
        backward(m, 9)
        o.step()
    assert all_same_bits(model.parameters(), other.parameters())


@pytest.mark.parametrize("cls", EVERY)
def test_a_checkpoint_before_the_first_step_is_no_step(cls: type[MatrixOptimizer]) -> None:
    """torch.distributed.checkpoint has an optimizer without state make it by a step: weights and clocks stay."""
    (model, optimizer), (other, second) = ((m := network(), cls(m)) for _ in range(2))
    start = copies(model.parameters())
    saved = get_optimizer_state_dict(model, optimizer)
    assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    assert all_same_bits(model.parameters(), start)
    for m, o in ((model, optimizer), (other, second)):
        for seed in range(3):
            backward(m, seed)
            o.step()
    assert all_same_bits(model.parameters(), other.parameters())


def test_a_checkpoint_before_the_first_step_decays_nothing() -> None:
    """A decay that is independent of the learning rate, which torch sets to 0. What is frozen has no state."""
    model = network()
    model[0].weight.requires_grad_(False)
    weights = [model[0].weight, model[2].weight]
    optimizer = steepest.Muon(weights, weight_decay=0.1, weight_decay_method="independent")
    start = copies(weights)
    saved = get_optimizer_state_dict(model, optimizer)
    assert all_same_bits(weights, start)
    assert list(saved["state"]) == ["2.weight"]


def test_state_may_be_shared_between_processes() -> None:
    """What a worker would receive: torch's own pickler, which sends handles to shared memory."""
    optimizer, params = both_kinds(steepest.MuAdam)
    train(optimizer, params, range(1))
    assert multiprocessing.reduction.ForkingPickler.dumps(optimizer)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_users_hook_has_the_last_word_on_loading(cls: type[MatrixOptimizer]) -> None:
    optimizer, params = both_kinds(cls)
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()

    def forget(loaded: torch.optim.Optimizer) -> None:
        for state in loaded.state.values():
            next(iter(state.values())).zero_()

    optimizer.register_load_state_dict_post_hook(forget)
    optimizer.load_state_dict(saved)
    assert all(not next(iter(state.values())).any() for state in optimizer.state.values())


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_users_hook_has_the_first_word_on_loading(cls: type[MatrixOptimizer]) -> None:
    """What it makes of the checkpoint is what is checked and loaded."""
    (optimizer, params), (wider, more) = both_kinds(cls), both_kinds(cls)
    train(optimizer, params, range(2))
    more[0].data = torch.zeros(16, 5)

    def widen(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        state = {key: torch.cat([t, t]) if t.ndim else t for key, t in saved["state"][0].items()}
        return {**saved, "state": {**saved["state"], 0: state}}

    with pytest.raises(ValueError, match="it is of another model"):
        wider.load_state_dict(optimizer.state_dict())
    wider.register_load_state_dict_pre_hook(widen)
    wider.load_state_dict(optimizer.state_dict())
    train(wider, more, range(2, 3))
    assert more[0].isfinite().all()


@every_optimizer
def test_state_of_the_users_own_is_loaded_as_it_is(cls: type[MatrixOptimizer]) -> None:
    optimizer, params = both_kinds(cls)
    train(optimizer, params, range(2))
    optimizer.state[params[0]]["mine"] = torch.arange(3)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = state["step"].reshape(1)
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[params[0]]["mine"], torch.arange(3))
    train(optimizer, params, range(2, 3))
