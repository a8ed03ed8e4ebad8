"""What any `torch.optim` optimizer is expected to do: closures, groups, schedulers, scalers, odd parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import steepest
from steepest.optimizer import MatrixOptimizer
from steepest.zoo.vector import VectorOptimizer
from support.training import (
    COUPLED,
    EVERY,
    MATRICES,
    OPTIMIZERS,
    all_same_bits,
    both_kinds,
    copies,
    give_gradients,
    made,
    noise,
    parameters,
    same_bits,
    same_states,
    state_copies,
    train,
)

every_optimizer = pytest.mark.parametrize("cls", EVERY)
every_independent = pytest.mark.parametrize("cls", [cls for cls in EVERY if cls not in COUPLED])
Maker = type[MatrixOptimizer]


@every_optimizer
def test_a_closure_runs_with_gradients_and_its_loss_is_returned(cls: Maker) -> None:
    optimizer, params = both_kinds(cls)
    start = copies(params)

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure=closure)
    assert loss.item() == pytest.approx(sum(float(s.square().sum()) for s in start))
    optimizer.step(closure)
    assert not any(same_bits(p, s) for p, s in zip(params, start, strict=True))


@every_optimizer
def test_a_group_may_be_added_later(cls: Maker) -> None:
    params = parameters([(6, 4), (6, 4), (5,)])
    optimizer = cls(params[:1], lr=0.1)
    train(optimizer, params[:1], range(1))
    optimizer.add_param_group({"params": params[1:2], "lr": 0.2})
    optimizer.add_param_group({"params": params[2:], "algorithm": "adamw", "lr": 0.3})
    assert [(g["use_muon"], g["lr"]) for g in optimizer.param_groups] == [(True, 0.1), (True, 0.2), (False, 0.3)]
    assert "betas" in optimizer.param_groups[2]
    start = copies(params)
    train(optimizer, params, range(1, 3))
    assert not any(same_bits(p, s) for p, s in zip(params, start, strict=True))


@every_optimizer
def test_a_rejected_group_leaves_the_optimizer_as_it_was(cls: Maker) -> None:
    bad: list[dict[str, Any]] = [
        {"params": [nn.Parameter(torch.ones(4, 3))], "lr": -1.0},
        {"params": [nn.Parameter(torch.ones(4, 3))], "num_heads": 3},
        {"params": [nn.Parameter(torch.ones(4, 3))], "backend": "abacus"},
        {"params": [nn.Parameter(torch.ones(3))], "use_muon": False, "betas": (1.0, 0.9)},
        {"params": [nn.Parameter(torch.ones(3))], "algorithm": "sgd"},
    ]
    if not issubclass(cls, VectorOptimizer):  # which takes vectors too
        bad.append({"params": [nn.Parameter(torch.ones(3))], "use_muon": True})
    optimizer, params = both_kinds(cls)
    for step, group in enumerate(bad):
        train(optimizer, params, range(step, step + 1))
        before, state = repr(optimizer), state_copies(optimizer)
        with pytest.raises(ValueError):
            optimizer.add_param_group(group)
        assert repr(optimizer) == before, group
        assert same_states(state_copies(optimizer), state), group
    train(optimizer, params, range(len(bad), len(bad) + 1))


@every_optimizer
def test_parameters_may_be_replaced_in_their_group(cls: Maker) -> None:
    """Accelerate and FSDP put other tensors in the place of the ones the optimizer was built with."""
    (old,), (new,) = parameters([(6, 4)]), parameters([(6, 4)])
    optimizer = cls([old])
    optimizer.param_groups[0]["params"] = [new]
    start = copies([old, new])
    train(optimizer, [old, new], range(2))
    assert same_bits(old, start[0])
    assert not same_bits(new, start[1])


@every_optimizer
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_a_tensor_learning_rate_is_read_at_every_step(cls: Maker, shape: tuple[int, ...]) -> None:
    lr = torch.full(shape, 0.02, dtype=torch.float64)
    (a, b), plain_params = both_kinds(cls, lr=lr, adamw_lr=lr), both_kinds(cls, lr=0.02, adamw_lr=0.02)
    plain, c = plain_params
    for step, value in enumerate((0.02, 0.01, 0.5)):
        lr.fill_(value)
        for group in plain.param_groups:
            group["lr"] = value
        train(a, b, range(step, step + 1))
        train(plain, c, range(step, step + 1))
    for x, y in zip(b, c, strict=True):
        torch.testing.assert_close(x, y)


def sequential(optimizer: torch.optim.Optimizer) -> lr_scheduler.SequentialLR:
    first = lr_scheduler.ConstantLR(optimizer, 0.1, 2)
    return lr_scheduler.SequentialLR(optimizer, [first, lr_scheduler.ExponentialLR(optimizer, 0.5)], milestones=[2])


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda t: 1 / (1 + t), lambda t: 0.5**t]),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "sequential": sequential,
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8),
}


# Of a scheduler a class sees what it writes into a group; "one cycle" writes all that any of them does.
@pytest.mark.parametrize(
    ("cls", "name", "tensor"),
    [
        *((cls, name, tensor) for cls in OPTIMIZERS[:2] for name in SCHEDULERS for tensor in (False, True)),
        # Fromage has no momentum to cycle.
        *((cls, "lambda" if cls is steepest.Fromage else "one cycle", False) for cls in EVERY[2:]),
    ],
)
def test_schedulers(cls: Maker, name: str, tensor: bool) -> None:
    """A step under a scheduler is a step of an optimizer to which the scheduled numbers were given by hand."""

    def lr(value: float) -> Any:
        return torch.tensor(value) if tensor else value

    optimizer, params = both_kinds(cls, lr=lr(0.02), adamw_lr=lr(0.01))
    cycled = {"cycle_momentum": False} if cls is steepest.Muon else {}
    make = SCHEDULERS[name]
    if name == "one cycle" and cycled:  # torch asks every group for `momentum` or every group for `betas`
        optimizer, params = cls(parameters(MATRICES), lr=lr(0.02)), None
        params = optimizer.param_groups[0]["params"]
    scheduler = make(optimizer)
    plain = made(cls, [{**group, "lr": 0.0, "params": copies_of} for group, copies_of in fresh_groups(optimizer)])
    twins = [p for group in plain.param_groups for p in group["params"]]
    seen = set()
    for step in range(6):
        for group, twin in zip(optimizer.param_groups, plain.param_groups, strict=True):
            twin.update({k: v for k, v in group.items() if k in ("momentum", "betas")}, lr=float(group["lr"]))
        seen.add(tuple((float(g["lr"]), g.get("momentum"), g.get("betas")) for g in optimizer.param_groups))
        train(optimizer, params, range(step, step + 1))
        train(plain, twins, range(step, step + 1))
        scheduler.step(*([1.0] if name == "plateau" else []))
    assert len(seen) >= 3
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-4, atol=1e-5)


def fresh_groups(optimizer: torch.optim.Optimizer) -> list[tuple[dict[str, Any], list[nn.Parameter]]]:
    return [(group, [nn.Parameter(p) for p in copies(group["params"])]) for group in optimizer.param_groups]


def test_one_cycle_moves_the_momentum_of_muon_and_the_betas_of_muadam() -> None:
    muon = steepest.Muon(parameters(MATRICES), momentum=0.95)
    muadam, _ = both_kinds(steepest.MuAdam)
    for optimizer in (muon, muadam):
        lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8, base_momentum=0.7, max_momentum=0.9)
    assert muon.param_groups[0]["momentum"] == 0.9
    assert [group["betas"][0] for group in muadam.param_groups] == [0.9, 0.9]


@pytest.mark.parametrize("scheduler", [lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR])
@pytest.mark.parametrize("cls", EVERY)
def test_schedulers_that_cycle_the_momentum_take_every_class_that_has_one(cls: Maker, scheduler: Any) -> None:
    optimizer, params = both_kinds(cls)
    values: dict[str, Any] = {"max_lr": 0.1}
    values |= {"total_steps": 8} if scheduler is lr_scheduler.OneCycleLR else {"base_lr": 0.01}
    if cls is steepest.Fromage:
        with pytest.raises(ValueError, match="with `cycle_momentum` option enabled"):
            scheduler(optimizer, **values)
        values["cycle_momentum"] = False
    cycling, seen = scheduler(optimizer, **values), set()
    for step in range(3):
        train(optimizer, params, range(step, step + 1))
        cycling.step()
        seen.add(tuple((g.get("momentum"), g.get("betas")) for g in optimizer.param_groups))
    assert (len(seen) > 1) is (cls is not steepest.Fromage)
    assert all(p.isfinite().all() for p in params)


@every_optimizer
def test_ascent_is_descent_on_the_negated_gradient(cls: Maker) -> None:
    (up, a), (down, b) = both_kinds(cls, maximize=True), both_kinds(cls)
    for step in range(3):
        give_gradients(a, step)
        for p, q in zip(a, b, strict=True):
            q.grad = -p.grad
        kept = copies(p.grad for p in a)
        up.step()
        down.step()
        assert all_same_bits(kept, [p.grad for p in a])
    assert all_same_bits(a, b)


@every_independent
def test_a_first_gradient_may_come_late(cls: Maker) -> None:
    """A parameter whose gradient is None is left alone, decay included, and starts when its gradient does."""
    optimizer, params = both_kinds(cls)
    late = [params[1], params[-1]]
    start = copies(late)
    for step in range(3):
        give_gradients(params, step)
        for p in late:
            p.grad = None
        optimizer.step()
    assert all_same_bits(late, start)
    assert not any(p in optimizer.state for p in late)

    fresh = [nn.Parameter(s) for s in start]
    alone = made(cls, [{"params": fresh[:1]}, {"params": fresh[1:], "use_muon": False}], **hyper(optimizer))
    for step in range(3, 5):
        give_gradients(params, step)
        for p, q in zip(late, fresh, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        alone.step()
    assert all_same_bits(late, fresh)


def hyper(optimizer: MatrixOptimizer) -> dict[str, Any]:
    matrix, adamw = optimizer.param_groups
    return {
        "lr": matrix["lr"],
        "weight_decay": matrix["weight_decay"],
        "adamw_lr": adamw["lr"],
        "adamw_weight_decay": adamw["weight_decay"],
    }


@every_optimizer
def test_frozen_then_unfrozen(cls: Maker) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    optimizer = cls([{"params": [model[0].weight, model[1].weight]}, {"params": [model[0].bias], "use_muon": False}])
    model[0].requires_grad_(False)
    start = copies(model[0].parameters())
    for frozen in (True, False):
        model[0].requires_grad_(not frozen)
        optimizer.zero_grad()
        model(noise((5, 4), 0)).square().sum().backward()
        optimizer.step()
        assert all_same_bits(model[0].parameters(), start) == frozen


@pytest.mark.parametrize("cls", OPTIMIZERS)  # in a null space of the gradients a basis follows rounding errors
def test_gradient_accumulation_and_clipping(cls: Maker) -> None:
    """Micro-batches that add up to the batch, clipped to a norm, give the batch's step."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = noise((6, 4), 1)
    for model, parts in zip(models, (1, 3), strict=True):
        matrices, biases = ([p for p in model.parameters() if p.ndim == d] for d in (2, 1))
        optimizer = cls([{"params": matrices}, {"params": biases, "use_muon": False}], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            for chunk in x.chunk(parts):
                (model(chunk).square().sum() / len(x)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@every_optimizer
def test_grad_scaler(cls: Maker) -> None:
    """A scaled loss gives the unscaled step; an overflow skips it and halves the scale."""
    (scaled, a), (plain, b) = both_kinds(cls), both_kinds(cls)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    targets = [noise(p.shape, 50 + i) for i, p in enumerate(a)]
    for broken in (False, True, False):
        before = copies(a)
        for params, scale in ((a, scaler.scale), (b, lambda loss: loss)):
            loss = sum((p * t).sum() for p, t in zip(params, targets, strict=True))
            scale(loss * (math.inf if broken else 1.0)).backward()
        scaler.step(scaled)
        scaler.update()
        if broken:
            assert all_same_bits(a, before)
        else:
            plain.step()
        scaled.zero_grad()
        plain.zero_grad()
    assert scaler.get_scale() == 2.0**9
    assert all_same_bits(a, b)


#: Tensors that are not a plain matrix, by their layout or their size.
ODD: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "empty": lambda dtype: torch.empty(0, 4, dtype=dtype),
    "no columns": lambda dtype: torch.empty(4, 0, dtype=dtype),
    "row": lambda dtype: noise((1, 5), 0, dtype),
    "column": lambda dtype: noise((5, 1), 0, dtype),
    "one": lambda dtype: noise((1, 1), 0, dtype),
    "scalar": lambda dtype: noise((), 0, dtype),
    "empty vector": lambda dtype: torch.empty(0, dtype=dtype),
    "vector": lambda dtype: noise((5,), 0, dtype),
    "strided": lambda dtype: noise((6, 4, 2), 3, dtype)[..., 0],
    "transposed": lambda dtype: noise((4, 6), 0, dtype).T,
    "convolution": lambda dtype: noise((8, 3, 2, 2), 0, dtype),
    "channels last": lambda dtype: noise((8, 3, 2, 2), 0, dtype).to(memory_format=torch.channels_last),
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Whose AdamW is not that of the others: by other numbers, or because all layers depend on one another.
OTHER_ADAMW = (steepest.Schattor, steepest.MuonAdam, *COUPLED)


@pytest.mark.parametrize(
    ("cls", "use_muon", "name"),
    [
        *((cls, True, name) for cls in EVERY for name in ODD if ODD[name](torch.float32).ndim >= 2),
        *((cls, False, name) for cls in (steepest.MuAdam, *OTHER_ADAMW) for name in ODD),
    ],
)
def test_odd_parameters_step_like_plain_ones(cls: Maker, use_muon: bool, name: str) -> None:
    """Any layout and any size: the step is that of a contiguous copy with a contiguous gradient.

    Of the first classes in every dtype, of the others in two, so that each meets every dtype and every shape.
    """
    half = (EVERY.index(cls) + list(ODD).index(name)) % 2
    for dtype in FLOATS if cls in OPTIMIZERS else FLOATS[half::2]:
        p = nn.Parameter(ODD[name](dtype))
        plain = nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
        start = p.detach().clone()
        rates = {"lr": 0.5, "adamw_lr": 0.5, "weight_decay": 0.0}
        optimizers = [made(cls, [{"params": [q], "use_muon": use_muon}], **rates) for q in (p, plain)]
        for step in range(2):
            give_gradients([p], step)
            plain.grad = p.grad.clone(memory_format=torch.contiguous_format)
            for optimizer in optimizers:
                optimizer.step()
        tolerance = {} if dtype in (torch.float32, torch.float64) else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(p.detach(), plain.detach(), **tolerance)
        assert p.isfinite().all()
        assert p.numel() == 0 or not torch.equal(p, start)


@pytest.mark.parametrize("cls", [cls for cls in EVERY if cls not in OTHER_ADAMW])
def test_the_adamw_beside_a_method_is_muadams(cls: Maker) -> None:
    """To the bit, for every odd parameter of every dtype: what is said of one is said of all."""
    found = []
    for each in (cls, steepest.MuAdam):
        params = [nn.Parameter(ODD[name](dtype)) for name in ODD for dtype in FLOATS]
        train(made(each, [{"params": params, "use_muon": False}], lr=0.5, adamw_lr=0.5), params, range(2))
        found.append(params)
    assert all_same_bits(*found)


@every_optimizer
@pytest.mark.parametrize("use_muon", [True, False], ids=["matrix", "adamw"])
def test_an_expanded_gradient_is_read_and_not_written(cls: Maker, use_muon: bool) -> None:
    a, b = parameters([(6, 4)])[0], parameters([(6, 4)])[0]
    row = noise((1, 4), 9)
    a.grad, b.grad = row.expand(6, 4), row.expand(6, 4).contiguous()
    kept = row.clone()
    for p in (a, b):
        optimizer = cls([{"params": [p], "use_muon": use_muon}], lr=0.1)
        optimizer.step()
        optimizer.step()
    torch.testing.assert_close(a, b)
    assert same_bits(row, kept)


@every_independent
@pytest.mark.parametrize("use_muon", [True, False], ids=["matrix", "adamw"])
def test_one_group_may_hold_several_dtypes(cls: Maker, use_muon: bool) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    together = [nn.Parameter(noise((6, 4), i, dtype)) for i, dtype in enumerate(dtypes)]
    apart = [nn.Parameter(p.detach().clone()) for p in together]
    group = {"use_muon": use_muon, "lr": 0.1}
    alone = [cls([{"params": [p], **group}]) for p in apart]
    optimizer = cls([{"params": together, **group}])
    for step in range(3):
        give_gradients(together, step)
        give_gradients(apart, step)
        optimizer.step()
        for other in alone:
            other.step()
    assert all_same_bits(together, apart)


def test_groups_may_be_used_for_two_optimizers() -> None:
    model = nn.ModuleDict({"convolution": nn.Conv1d(4, 8, 3), "linear": nn.Linear(8, 8)})
    groups = steepest.param_groups(model)
    first, second = steepest.MuAdam(groups), steepest.MuAdam(groups, lr=0.5)
    assert first.describe().splitlines()[1].split()[0] == second.describe().splitlines()[1].split()[0]
    assert second.param_groups[0]["lr"] == 0.5
    assert "Conv1d read as" in second.describe()


def test_an_eps_that_is_zero_in_fp32_divides_nothing_by_zero() -> None:
    p = nn.Parameter(torch.randn(8, 8))
    p.grad = torch.randn(8, 8)
    p.grad[0, 0] = 0
    steepest.MuAdam([p], eps=1e-46).step()
    assert p.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_a_number_in_a_narrow_tensor_is_that_number(dtype: torch.dtype) -> None:
    """1 - lr weight_decay was rounded to 16 bits."""
    value = 2**-6 if dtype.is_floating_point else 1
    steps = []
    for lr in (torch.tensor(value, dtype=dtype), float(value)):
        optimizer, params = both_kinds(steepest.Muon)
        for group in optimizer.param_groups:
            group["lr"] = lr
        give_gradients(params, 0)
        optimizer.step()
        steps.append(copies(params))
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(*steps, strict=True))
