"""A plan is made once and serves every step until what it was made for changes; what it holds does not grow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import steepest
from steepest.ops.backend import extension
from steepest.optimizer import MatrixOptimizer
from support.training import MATRICES, OPTIMIZERS, all_same_bits, both_kinds, give_gradients, parameters, train

every_optimizer = pytest.mark.parametrize("cls", OPTIMIZERS[:2])


def nothing(optimizer: MatrixOptimizer, params: list[nn.Parameter]) -> None:
    """Gradients are new tensors in every step anyway."""


def new_rates(optimizer: MatrixOptimizer, params: list[nn.Parameter]) -> None:
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.5 * group["lr"], 0.0


def strided_gradient(optimizer: MatrixOptimizer, params: list[nn.Parameter]) -> None:
    params[0].grad = torch.randn(5, 8).t()


def exchanged_data(optimizer: MatrixOptimizer, params: list[nn.Parameter]) -> None:
    params[0].data = params[0].data.clone()


def no_gradient(optimizer: MatrixOptimizer, params: list[nn.Parameter]) -> None:
    params[0].grad = None


def another_dtype(optimizer: MatrixOptimizer, params: list[nn.Parameter]) -> None:
    params[0].grad_dtype = None
    params[0].grad = torch.ones(8, 5, dtype=torch.bfloat16)


def another_recipe(optimizer: MatrixOptimizer, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["adjust_lr_fn"] = "match_rms_adamw"


def another_group(optimizer: MatrixOptimizer, params: list[nn.Parameter]) -> None:
    extra = parameters([(3, 3)])
    give_gradients(extra, 0)
    optimizer.add_param_group({"params": extra})


def another_state(optimizer: MatrixOptimizer, params: list[nn.Parameter]) -> None:
    optimizer.state[params[0]]["momentum_buffer"] = optimizer.state[params[0]]["momentum_buffer"].clone()


def exchanged_state(optimizer: MatrixOptimizer, params: list[nn.Parameter]) -> None:
    """As in moving an optimizer by hand: the tensors are the same, their memory is not."""
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


def refilled_state(optimizer: MatrixOptimizer, params: list[nn.Parameter]) -> None:
    """A new tensor may get the id of the one it replaces."""
    for state in optimizer.state.values():
        for key, value in [(key, state[key].clone()) for key in state]:
            del state[key]
            state[key] = 0.5 * value if value.ndim else value


def inner_list(optimizer: MatrixOptimizer, params: list[nn.Parameter]) -> None:
    """Of the tuples that the optimizer was given only this list is another one. Newton-Schulz' own cubic keeps singular
    values in (0, 1] there, and so does the changed one."""
    group = optimizer.param_groups[0]
    group["polar"] = table = [[1.5, -0.5]]
    optimizer.step()
    table[0][0] = 1.4


def loaded(optimizer: MatrixOptimizer, params: list[nn.Parameter]) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


KEPT = [nothing, new_rates, exchanged_data]
MADE_ANEW = [
    *(strided_gradient, no_gradient, another_dtype, another_recipe, another_group, another_state, loaded),
    *(exchanged_state, refilled_state, inner_list),
]


@every_optimizer
@pytest.mark.parametrize("change", KEPT, ids=lambda f: f.__name__)
def test_serves_on(cls: type[MatrixOptimizer], change: Callable[..., None]) -> None:
    optimizer, params = both_kinds(cls)
    train(optimizer, params, range(2))
    plan = optimizer._plan
    give_gradients(params, 2)
    change(optimizer, params)
    optimizer.step()
    assert optimizer._plan is plan


@every_optimizer
@pytest.mark.parametrize("change", MADE_ANEW, ids=lambda f: f.__name__)
def test_is_made_anew(cls: type[MatrixOptimizer], change: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """And the step is that of the parts, which plan nothing. In fp32: momenta that differ in their last bit may round
    to neighbours in bf16, whose polar factors are not within the bound."""
    monkeypatch.setattr("steepest.linalg.polar.choice.native_bf16", lambda: False)
    runs = []
    for backend in ("auto", "torch"):
        optimizer, params = both_kinds(cls, polar="svd", backend=backend)
        train(optimizer, params, range(2))
        plan = optimizer._plan
        give_gradients(params, 2)
        torch.manual_seed(0)
        change(optimizer, params)
        optimizer.step()
        assert optimizer._plan is not plan
        runs.append(params)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_new_piece_of_memory_is_the_one_that_moves() -> None:
    """Split weights are handed over as views, which must not be those of memory that was exchanged."""
    p = nn.Parameter(torch.ones(6, 4))
    optimizer = steepest.Muon([{"params": [p], "use_muon": True, "split_sizes": (2, 4)}], polar="svd")
    p.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    old = p.data
    p.data = p.data.clone()
    kept = old.clone()
    optimizer.step()
    assert torch.equal(old, kept)
    assert not torch.equal(p.detach(), kept)


class Made(TorchDispatchMode):
    """Bytes of every tensor that an operation returns with memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        new = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.untyped_storage()._cdata not in known]
        self.tensors += new
        return result


#: Operations that take no time on a device.
FREE = {"alias", "as_strided", "detach", "promote_types", "select", "slice", "split", "split_with_sizes", "view"}


class Called(TorchDispatchMode):
    """How often each of torch's operations is called that does something on a device.   least: elements of what it
    makes, in one tensor.
    """

    def __init__(self, least: int = 0) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.least = least

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("aten", "steepest") and func.overloadpacket.__name__ not in FREE:
            made = func(*args, **(kwargs or {}))
            if not self.least or (isinstance(made, Tensor) and made.numel() >= self.least):
                self.count[func.overloadpacket.__name__] += 1
            return made
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cls", [steepest.NorMuon, steepest.AdaMuon])
def test_more_parameters_are_normalized_by_the_same_calls(cls: type[MatrixOptimizer]) -> None:
    """Without the compiled part one of each stores the rows' statistics, and entries are taken one by one. What more
    polar factors take is not counted: on some processors they go one by one.
    """

    def called(number: int, cls: type[MatrixOptimizer] = cls) -> Counter[str]:
        params = [nn.Parameter(torch.ones(6, 4)) for _ in range(number)]
        optimizer = cls([{"params": params, "use_muon": True}])
        train(optimizer, params, range(2))
        give_gradients(params, 2)
        with Called() as counted:
            optimizer.step()
        return counted.count

    more = called(9) - called(3) - (called(9, steepest.Muon) - called(3, steepest.Muon))
    if extension is not None:
        assert not more
        assert called(3)["normalize_and_apply_update"] == 1
        assert not called(3).keys() & {"normalize_updates", "apply_update"}
    elif cls is steepest.NorMuon:
        assert more == Counter({"where": 6})


@pytest.mark.skipif(extension is None, reason="without the compiled part updates are torch's")
def test_the_ratio_of_a_matrix_is_left_to_apply_update() -> None:
    """A step of `NAMO` does to tensors of a matrix' size what one of `Muon` does, and multiplies none."""

    def called(cls: type[MatrixOptimizer]) -> Counter[str]:
        params = [nn.Parameter(torch.ones(64, 48)) for _ in range(3)]
        optimizer = cls([{"params": params, "use_muon": True}])
        train(optimizer, params, range(2))
        give_gradients(params, 2)
        with Called(least=64 * 48) as counted:
            optimizer.step()
        return counted.count

    assert called(steepest.NAMO) - called(steepest.Muon) <= Counter({"_to_copy": 1})


@every_optimizer
def test_the_elementwise_part_makes_nothing_but_inputs(
    cls: type[MatrixOptimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a direction that is its input, a step in the steady state makes one tensor a shape and nothing else."""
    monkeypatch.setattr("steepest.parts.direction.Spectral.units", lambda self, xs, slacks: list(xs))
    optimizer, params = both_kinds(cls)
    train(optimizer, params, range(2))
    give_gradients(params, 2)
    with Made() as made:
        optimizer.step()
    shapes = sorted(tuple(t.shape) for t in made.tensors)
    counts = {shape: MATRICES.count(shape) for shape in MATRICES}
    assert shapes == sorted((count, *shape) for shape, count in counts.items())


@every_optimizer
def test_state_of_equal_shapes_is_one_memory(cls: type[MatrixOptimizer]) -> None:
    optimizer, params = both_kinds(cls)
    train(optimizer, params, range(1))
    first, last = optimizer.state[params[0]]["momentum_buffer"], optimizer.state[params[3]]["momentum_buffer"]
    assert first.shape == last.shape
    assert first.untyped_storage()._cdata == last.untyped_storage()._cdata
    twin, others = both_kinds(cls)
    twin.load_state_dict(optimizer.state_dict())
    loaded_first = twin.state[others[0]]["momentum_buffer"]
    assert loaded_first.untyped_storage()._cdata != first.untyped_storage()._cdata
    assert loaded_first.untyped_storage()._cdata == twin.state[others[3]]["momentum_buffer"].untyped_storage()._cdata
    assert all_same_bits([loaded_first], [first])


@pytest.mark.parametrize("cls", [steepest.NorMuon, steepest.AdaMuon])
def test_memory_where_blocks_meet_is_made_before_a_step(
    cls: type[MatrixOptimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step makes while a graph is captured is zeroed when that is replayed and not before."""
    params = parameters([(8, 5), (5, 8)])
    optimizer = cls(params)
    give_gradients(params, 0)
    optimizer.prepare()

    def late(*arguments: object) -> Tensor:
        raise AssertionError("a step makes the scratch of blocks that normalize")

    for module in ("step.buckets", "ops.multi_tensor"):
        monkeypatch.setattr(f"steepest.{module}.scratch_for", late)
    optimizer.step()
