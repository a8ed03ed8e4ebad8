"""Product norms: the table of weights from the definition of a dual norm, Prodigy's rule, and what every coupled
optimizer owes its caller."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from steepest.optimizer import MatrixOptimizer
from steepest.parts import Hyper, Momentum, Spectral
from steepest.parts.product_norm import Box, ProductNorm, escalated
from steepest.recipe import Recipe, step_one
from steepest.zoo.prodigy import ProdigyMuon
from steepest.zoo.product import MuonAdam, MuonMax, ProductNormDescent
from steepest.zoo.schattor import Schattor
from support.host_reads import no_host_reads
from support.problems import FEW, gap, gaussian, polar_by_svd
from support.slow import slow
from support.training import (
    MATRICES,
    VECTORS,
    all_same_bits,
    copies,
    give_gradients,
    parameters,
    same_states,
    state_copies,
)

PRODUCTS = {"max": ProductNorm("max"), "l2": ProductNorm("l2"), "hybrid": ProductNorm("hybrid", 4.0)}
products = pytest.mark.parametrize("name", PRODUCTS)
scales = pytest.mark.parametrize("scale", ["lmo", "dual"])

# ---- the product norm itself ---------------------------------------------------------------------------------------


def layers(seed: int) -> list[Tensor]:
    """Two matrices and two vectors."""
    shapes = ((5, 3), (4, 4), (6,), (3,))
    return [gaussian(*shape, seed=10 * seed + i) * (i + 1) for i, shape in enumerate(shapes)]


def duals(x: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Nuclear norms of the matrices, Euclidean norms of the vectors."""
    return torch.stack([torch.linalg.svdvals(y).sum() for y in x[:2]]), torch.stack([y.norm() for y in x[2:]])


def norms(x: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.stack([torch.linalg.matrix_norm(y, 2) for y in x[:2]]), torch.stack([y.norm() for y in x[2:]])


def inner(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b)]).sum()


def step(product: ProductNorm, m: list[Tensor], scale: Any) -> list[Tensor]:
    weights = torch.cat(product.weights(*duals(m), scale))
    return [w * d for w, d in zip(weights, [*map(polar_by_svd, m[:2]), *(y / y.norm() for y in m[2:])])]


@products
@FEW
@given(seed=st.integers(0, 999))
def test_the_step_attains_the_global_dual_norm_and_has_length_one(name: str, seed: int) -> None:
    product, m = PRODUCTS[name], layers(seed)
    dual, found = product.dual_norm(*duals(m)), step(product, m, "lmo")
    assert gap(inner(m, found), dual) < 1e-13
    assert gap(product.norm(*norms(found)), torch.tensor(1.0)) < 1e-13
    longer = step(product, m, "dual")
    assert max(gap(a, dual * b) for a, b in zip(longer, found)) < 1e-13
    for trial in range(20):
        other = layers(seed + 1000 * (trial + 1))
        assert inner(m, other) <= dual * product.norm(*norms(other)) * (1 + 1e-13)


@products
def test_the_regularized_step_minimizes_its_model(name: str) -> None:
    """<M, X> + psi(X)^2 / (2 eta) is least, -eta dual^2 / 2, at X = -eta step."""
    product, m, eta = PRODUCTS[name], layers(7), 0.3
    best = [-eta * x for x in step(product, m, "dual")]

    def model(x: list[Tensor]) -> Tensor:
        return inner(m, x) + product.norm(*norms(x)) ** 2 / (2 * eta)

    least = -eta * product.dual_norm(*duals(m)) ** 2 / 2
    assert gap(model(best), least) < 1e-13
    for trial in range(60):
        other = [b + 10.0 ** (-trial % 4) * x for b, x in zip(best, layers(trial + 1))]
        assert model(other) >= least * (1 + 1e-13)


@products
@scales
def test_zero_momenta_have_zero_weights_and_no_nan(name: str, scale: Any) -> None:
    weights = PRODUCTS[name].weights(torch.zeros(2), torch.zeros(1), scale)
    assert all(w.isfinite().all() for w in weights)
    assert name == "max" or not torch.cat(weights).any()


@products
@scales
@pytest.mark.parametrize("kind", [0, 1])
def test_one_kind_of_layer_may_be_missing(name: str, scale: Any, kind: int) -> None:
    product, d, none = PRODUCTS[name], torch.tensor([3.0, 4.0]), torch.zeros(0)
    given_norms = (d, none) if kind == 0 else (none, d)
    wanted = {"max": 7.0, "l2": 5.0, "hybrid": 14.0 if kind == 0 else 5.0}[name]
    assert float(product.dual_norm(*given_norms)) == pytest.approx(wanted)
    assert [len(w) for w in product.weights(*given_norms, scale)] == [len(x) for x in given_norms]
    assert float(product.norm(*given_norms)) == pytest.approx(
        {"max": 4.0, "l2": 5.0, "hybrid": 2.0 if kind == 0 else 5.0}[name]
    )


def test_the_hybrid_of_one_matrix_is_l2_but_for_its_scale() -> None:
    one, others = torch.tensor([2.0]), torch.tensor([1.0, 3.0])
    for scale in ("lmo", "dual"):
        a, b = ProductNorm("hybrid").weights(one, others, scale), ProductNorm("l2").weights(one, others, scale)
        assert gap(torch.cat(a), torch.cat(b)) < 1e-7


def test_the_box_is_the_norm_in_which_x_itself_is_steepest() -> None:
    x = gaussian(4, 3, seed=1)
    d, dual = Box()(x)
    assert torch.equal(d, x)
    assert gap(dual.squeeze(), x.square().sum()) < 1e-14
    for trial in gaussian(50, 4, 3, seed=2):
        assert (x * trial).sum() <= dual.squeeze() * (trial / x).abs().max()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kind": "l1"}, "product norm 'l1' is not known; use 'max', 'l2' or 'hybrid'"),
        ({"kind": "hybrid", "s": 0.0}, "the scale s of the matrices should be > 0 but is: 0.0"),
    ],
)
def test_what_a_product_norm_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProductNorm(**arguments)


# ---- hooks in the parts: Hyper.scale, averages that begin with their first term ------------------------------------


def test_scale_multiplies_the_step_and_not_the_decay() -> None:
    recipe, w, g = Recipe(direction=Spectral("svd")), gaussian(4, 3, seed=1), gaussian(4, 3, seed=2)
    for scale in (0.25, torch.tensor(0.25, dtype=torch.float64)):
        moved, _ = step_one(recipe, w, g, recipe.init(g), Hyper(0.1, 0.5, step_factor=scale))
        assert gap(moved, 0.95 * w - 0.025 * polar_by_svd(g)) < 1e-13


def test_an_average_may_begin_with_its_first_gradient() -> None:
    """torch.optim.SGD's buffer with dampening = momentum, the first gradient having been skipped."""
    p = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    theirs = torch.optim.SGD([p], lr=1.0, momentum=0.9, dampening=0.9)
    recipe, hyper, state = Recipe(Momentum(start="first")), Hyper(0.1), None
    state = recipe.init(p.detach())
    _, state = step_one(recipe, p.detach(), torch.full_like(p, math.nan), state, hyper)
    for seed in range(6):
        p.grad = gaussian(4, 3, seed=seed)
        theirs.step()
        _, state = step_one(recipe, p.detach(), p.grad, state, hyper)
        assert gap(state["momentum_buffer"], theirs.state[p]["momentum_buffer"]) < 1e-15


# ---- Prodigy -------------------------------------------------------------------------------------------------------


def test_escalation_ignores_what_says_nothing() -> None:
    eta = torch.tensor(0.5)
    for gain, dual in ((1.0, 0.0), (math.nan, 1.0), (0.1, 1.0), (-3.0, 1.0)):
        assert torch.equal(escalated(eta, torch.tensor(gain), torch.tensor(dual)), eta)
    assert float(escalated(eta, torch.tensor(3.0), torch.tensor(2.0))) == 1.5


# ---- what the optimizer shell promises -----------------------------------------------------------------------------

METHODS: dict[str, Callable[..., MatrixOptimizer]] = {
    "MuonMax": lambda p, **o: MuonMax(p, **{"lr": 0.01, **o}),
    "MuonMax-Momo": lambda p, **o: MuonMax(p, **{"lr": 0.1, "lower_bound": 0.0, **o}),
    "MuonMax-Momo, fresh": lambda p, **o: MuonMax(p, **{"lr": 0.1, "lower_bound": 0.0, "stale_dual": False, **o}),
    "MuonAdam-Momo": lambda p, **o: MuonAdam(p, **{"lr": 0.3, "lower_bound": 0.0, **o}),
    "l2, lmo": lambda p, **o: ProductNormDescent(p, **{"lr": 0.1, "product": "l2", "scale": "lmo", **o}),
    "Prodigy": lambda p, **o: ProdigyMuon(p, **{"initial_step": 1e-3, **o}),
    "Schattor-Momo": lambda p, **o: Schattor(p, **{"scale": "dual", "p": 3.0, "lower_bound": 0.0, **o}),
}
#: A bound with norms of the step before, fresh norms without one, a step that is estimated. The others cross these.
QUICK = ("MuonMax-Momo", "l2, lmo", "Prodigy")
every_method = pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in METHODS])
#: Those of which nothing is taken from the step before.
FRESH = ("MuonMax-Momo, fresh", "l2, lmo", "Prodigy")


def both_kinds(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[MatrixOptimizer, list[Tensor]]:
    params: list[Tensor] = list(parameters((*MATRICES, *VECTORS), dtype))
    n = len(MATRICES)
    groups = [{"params": params[:n]}, {"params": params[n:], "use_muon": False}]
    return METHODS[name](groups, **{"weight_decay": 0.1, **options}), params


def loss_at(step: int) -> float:
    return 2.0 + math.sin(step)


def train(optimizer: Any, params: list[Tensor], steps: range) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step(loss=loss_at(step))


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_run(name: str, dtype: torch.dtype) -> None:
    optimizer, params = both_kinds(name, dtype)
    train(optimizer, params, range(3))
    resumed, others = both_kinds(name, dtype)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert same_states(state_copies(optimizer), state_copies(resumed))
    copied, copied_params = copy.deepcopy((optimizer, params))
    for instance, ps in ((optimizer, params), (resumed, others), (copied, copied_params)):
        train(instance, ps, range(3, 6))
    assert all_same_bits(params, others)
    assert all_same_bits(params, copied_params)
    assert same_states(state_copies(optimizer), state_copies(resumed))


def test_the_state_goes_through_torchs_distributed_checkpoint() -> None:
    runs = []
    for _ in range(2):
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
        optimizer = MuonMax(model, lr=0.1, lower_bound=0.0)
        runs.append((model, optimizer, list(model.parameters())))
    (model, optimizer, params), (other, resumed, others) = runs
    train(optimizer, params, range(3))
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, resumed, get_optimizer_state_dict(model, optimizer))
    train(optimizer, params, range(3, 5))
    train(resumed, others, range(3, 5))
    assert all_same_bits(params, others)


@every_method
@pytest.mark.parametrize("first", [0, 2], ids=["first step", "mid-run"])
def test_a_step_of_bad_gradients_is_as_if_it_had_not_been(name: str, first: int) -> None:
    (hurt, a), (well, b) = both_kinds(name), both_kinds(name)
    for step in range(5):
        if step == first:
            give_gradients(a, 99)
            for p in a:
                assert p.grad is not None
                p.grad.view(-1)[0] = math.nan
            hurt.step(loss=1e3)  # type: ignore[call-arg]
        train(hurt, a, range(step, step + 1))
        train(well, b, range(step, step + 1))
        assert all(p.isfinite().all() for p in a)
        assert all(t.isfinite().all() for state in state_copies(hurt) for t in state.values())
    if first or name in FRESH:
        assert all_same_bits(a, b)
        assert same_states(state_copies(hurt), state_copies(well))


def test_a_stale_dual_norm_that_was_never_measured_counts_as_zero() -> None:
    """After a first gradient that was not finite: matrices stand still for one step, and go on from there."""
    optimizer, params = both_kinds("MuonMax", weight_decay=0.0)
    give_gradients(params, 0)
    for p in params:
        assert p.grad is not None
        p.grad.fill_(math.nan)
    optimizer.step()
    for step, still in ((1, True), (2, False)):
        before = copies(params)
        train(optimizer, params, range(step, step + 1))
        same = [torch.equal(p, w) for p, w in zip(params, before, strict=True)]
        assert same == [still] * len(MATRICES) + [False] * len(VECTORS)


@every_method
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_gradient_stays_where_it_is(name: str, poison: float) -> None:
    """Neither its matrix nor the averages take it; the others go as if that parameter were not there."""
    (hurt, a), (well, b) = both_kinds(name), both_kinds(name)
    for optimizer, params in ((hurt, a), (well, b)):
        train(optimizer, params, range(2))
        give_gradients(params, 2)
    values, states = copies(a), state_copies(hurt)
    assert a[1].grad is not None
    a[1].grad.view(-1)[-1] = poison
    b[1].grad = None
    hurt.step(loss=1.0)  # type: ignore[call-arg]
    well.step(loss=1.0)  # type: ignore[call-arg]
    assert all_same_bits([a[1]], [values[1]])
    assert same_states([state_copies(hurt)[1]], [states[1]])
    assert max(gap(p.detach(), q.detach()) for p, q in zip(a, b)) < 1e-6
    train(hurt, a, range(3, 5))
    assert all(p.isfinite().all() for p in a)


@every_method
def test_closures_numbers_and_tensors_give_one_answer(name: str) -> None:
    runs = []
    for way in range(3):
        optimizer, params = both_kinds(name)
        for step in range(3):
            give_gradients(params, step)
            loss = torch.tensor(loss_at(step), dtype=torch.float64)
            if way == 0:
                assert optimizer.step(lambda loss=loss: loss) is loss  # type: ignore[misc]
            else:
                assert optimizer.step(loss=loss.reshape(1) if way == 1 else float(loss)) is None  # type: ignore[call-arg]
        runs.append((params, state_copies(optimizer)))
    for params, states in runs[1:]:
        assert all_same_bits(params, runs[0][0])
        assert same_states(states, runs[0][1])


@pytest.mark.parametrize("device", ["meta", slow("cpu")])
@every_method
def test_a_step_reads_no_value_of_any_tensor(name: str, device: str) -> None:
    with FakeTensorMode() if device == "cpu" else nullcontext():
        shapes = (*MATRICES, *VECTORS)
        params = [nn.Parameter(torch.empty(shape, device=device, dtype=torch.bfloat16)) for shape in shapes]
        groups = [{"params": params[: len(MATRICES)]}, {"params": params[len(MATRICES) :], "use_muon": False}]
        optimizer: Any = METHODS[name](groups)
        for _ in range(3):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.step(loss=torch.empty((), device=device))
        assert all(t.device.type == device for state in optimizer.state.values() for t in state.values())


@every_method
def test_a_step_does_not_ask_a_tensor_for_its_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = both_kinds(name, torch.bfloat16, lr=torch.tensor(0.02))
    give_gradients(params, 0)
    optimizer.prepare()  # with the plan's self-check, if this process has not had it yet
    for step in range(3):
        give_gradients(params, step)
        loss = torch.tensor(loss_at(step))
        with no_host_reads(monkeypatch):
            optimizer.step(loss=loss)  # type: ignore[call-arg]


@every_method
def test_a_grad_scaler_changes_no_bit_and_its_skipped_steps_do_not_count(name: str) -> None:
    (scaled, a), (plain, b) = both_kinds(name), both_kinds(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    scaler.scale(torch.zeros(()))
    for step in range(4):
        factor = scaler.get_scale()
        give_gradients(a, step)
        for p in a:
            assert p.grad is not None
            p.grad.mul_(factor)
        if step == 2:
            for p in a:
                assert p.grad is not None
                p.grad.view(-1)[0] = math.inf
        scaler.step(scaled, loss=loss_at(step))
        scaler.update()
        if step != 2:
            train(plain, b, range(step, step + 1))
    assert scaler.get_scale() == 2.0**9
    assert all_same_bits(a, b)


def test_a_compiled_function_may_call_a_coupled_step() -> None:
    runs = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="eager")):
        optimizer, params = both_kinds("MuonMax-Momo")
        step = wrap(lambda loss, optimizer=optimizer: optimizer.step(loss=loss))
        for k in range(3):
            give_gradients(params, k)
            step(torch.tensor(loss_at(k)))
        runs.append(params)
    assert all_same_bits(*runs)


@every_method
def test_schedulers_set_the_learning_rate_of_every_layer(name: str) -> None:
    (scheduled, a), (manual, b) = both_kinds(name, lr=0.02), both_kinds(name, lr=0.02)
    scheduler = torch.optim.lr_scheduler.LambdaLR(scheduled, lambda step: 1 / (1 + step))
    for step in range(4):
        for group in manual.param_groups:
            group["lr"] = 0.02 / (1 + step)
        train(scheduled, a, range(step, step + 1))
        train(manual, b, range(step, step + 1))
        scheduler.step()
    assert all_same_bits(a, b)


@every_method
def test_fused_weights_experts_and_small_workspaces(name: str) -> None:
    """Heads, splits and experts are layers of their own, however few matrices share a direction call."""
    runs = []
    for options in ({}, {"max_workspace_bytes": 1}):
        params = parameters([(6, 5), (9, 4), (3, 4, 5), (7,)], torch.float64)
        groups = [
            {"params": params[:1], "num_heads": 2},
            {"params": params[1:2], "split_sizes": (4, 3, 2)},
            {"params": params[2:3], "batch_dims": 1},
            {"params": params[3:], "use_muon": False},
        ]
        optimizer = METHODS[name](groups, **options)
        train(optimizer, list(params), range(4))
        runs.append([p.detach() for p in params])
    assert max(gap(p, q) for p, q in zip(*runs)) < 1e-10


def test_a_layer_is_a_matrix_not_a_parameter() -> None:
    """One parameter of two heads moves as two parameters do."""
    start, kept = gaussian(6, 5, seed=1), []
    for groups in (
        lambda p: [{"params": [p], "num_heads": 2}],
        lambda p: [{"params": [nn.Parameter(half.clone()) for half in p.detach().chunk(2)]}],
    ):
        params = groups(nn.Parameter(start.clone()))
        optimizer = MuonMax(params, lr=0.01, lower_bound=0.0, polar="svd")
        for step in range(5):
            g = gaussian(6, 5, seed=10 + step)
            own = optimizer.param_groups[0]["params"]
            for p, part in zip(own, g.chunk(len(own))):
                p.grad = part
            optimizer.step(loss=1.0)
        kept.append(torch.cat([p.detach() for p in optimizer.param_groups[0]["params"]]))
    assert gap(*kept) < 1e-13


def test_metrics_and_description_of_a_coupled_step() -> None:
    optimizer, params = both_kinds("MuonMax-Momo")
    train(optimizer, params, range(2))
    found = optimizer.metrics()
    assert {"0/grad_norm", "1/update_norm", "1/param_norm"} <= found.keys()
    assert all(t.isfinite().all() for name, t in found.items() if name != "1/polar_slack")
    assert found["1/polar_slack"].isnan().all()  # the others' norm is no spectral one
    assert "AdamW" not in optimizer.describe()


def test_training_in_bf16_goes_down() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4)).bfloat16()
    optimizer = MuonMax(model, lr=0.05, weight_decay=0.0, lower_bound=0.0, keep_mantissa=True)
    x = gaussian(64, 8, seed=1, dtype=torch.bfloat16)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - x[:, :4]).float().square().mean()
        loss.backward()
        optimizer.step(loss=loss)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda p: MuonMax(p, adamw_lr=1e-3), TypeError, "MuonMax does not take adamw_lr"),
        (lambda p: MuonMax(p, matrix_scale=0.0), ValueError, "should be > 0 but is: 0.0"),
        (lambda p: MuonMax(p, betas=(1.0, 0.9)), ValueError, "betas should be two numbers"),
        (
            lambda p: MuonMax(p, lower_bound="low"),
            TypeError,
            "lower_bound should be one number or None but is: 'low'",
        ),
        (lambda p: MuonMax(p, lower_bound=0.0, maximize=True), ValueError, "minimize the negative loss"),
        (lambda p: ProductNormDescent(p, others="l1"), ValueError, "others='l1' is not known"),
        (lambda p: ProductNormDescent(p, scale="x"), ValueError, "scale 'x' is not known"),
        (lambda p: ProdigyMuon(p, norm="x"), ValueError, "norm 'x' is not known"),
        (lambda p: ProdigyMuon(p, initial_step=0), ValueError, "initial_step should be > 0"),
        (lambda p: MuonMax(p, lower_bound=0.0).step(), RuntimeError, "has a lower bound and needs the loss"),
        (lambda p: MuonMax(p, lower_bound=0.0).step(lambda: None), RuntimeError, "the closure returned None"),
        (
            lambda p: MuonMax(p, lower_bound=0.0).step(loss=torch.ones(2)),
            ValueError,
            "the loss should have one element",
        ),
        (
            lambda p: MuonMax([*p, nn.Parameter(torch.empty(3, 3, device="meta"))]),
            ValueError,
            "parameters on|cpu and meta",
        ),
    ],
)
def test_what_is_refused(make: Callable[[list[nn.Parameter]], object], error: Any, message: str) -> None:
    p = nn.Parameter(gaussian(4, 3))
    p.grad = gaussian(4, 3)
    with pytest.raises(error, match=message):
        make([p])


# ---- numbers beyond a dtype -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("product", ["max", "l2", "hybrid"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_dual_norm_beyond_fp32_moves_weights_no_further_than_that(product: Any, backend: str) -> None:
    """Ten singular values of 3e37 are no fp32 number, and the weights were infinite for good."""
    weight = nn.Parameter(torch.zeros(10, 12))
    optimizer = ProductNormDescent([weight], product=product, backend=backend)
    for step in range(3):
        weight.grad = torch.randn(10, 12, generator=torch.Generator().manual_seed(step)) * 3e37
        optimizer.step()
        assert weight.isfinite().all()
        assert weight.any()


@pytest.mark.parametrize("product", ["max", "l2", "hybrid"])
@pytest.mark.parametrize("others", ["euclidean", "sign"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    ("dtype", "sizes", "rtol"),
    [(torch.float64, (1e-300, 1e-160, 1e155, 1e300), 1e-9), (torch.float32, (1e-25, 1e20, 1e36), 1e-4)],
)
def test_constrained_steps_do_not_depend_on_the_size_of_gradients(
    product: Any, others: str, backend: str, dtype: torch.dtype, sizes: Sequence[float], rtol: float
) -> None:
    """Squares of dual norms are no numbers of the dtype there, and the steps were 0 for good, or of another length."""
    options: dict[str, Any] = {"product": product, "others": others, "scale": "lmo", "polar": "svd"}
    moved = []
    for scale in (1.0, *sizes):
        weights = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((4, 3), (3, 5), (7,))]
        groups = [{"params": weights[:2]}, {"params": weights[2:], "use_muon": False}]
        optimizer = ProductNormDescent(groups, lr=0.1, backend=backend, **options)
        for step in range(3):
            for number, p in enumerate(weights):
                generator = torch.Generator().manual_seed(10 * step + number)
                p.grad = (torch.rand(p.shape, dtype=torch.float64, generator=generator) * scale).to(dtype)
            optimizer.step()
        moved.append(torch.cat([p.detach().flatten() for p in weights]))
    assert moved[0].norm() > 0.1
    for each in moved[1:]:
        assert torch.allclose(each, moved[0], rtol=rtol, atol=rtol / 1000)


@pytest.mark.parametrize(("product", "scale"), [("max", "dual"), ("l2", "dual"), ("hybrid", "dual"), ("hybrid", "lmo")])
def test_a_dual_norm_beyond_fp64_moves_weights_no_further_than_that(product: Any, scale: Any) -> None:
    weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    optimizer = ProductNormDescent([weight], product=product, scale=scale)
    for _ in range(3):
        weight.grad = torch.full_like(weight, 1.5e307)
        optimizer.step()
        assert weight.isfinite().all()
    assert weight.any()
