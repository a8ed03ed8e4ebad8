"""Every error of the optimizers' door: the value it names, and the way out it shows."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from steepest.optimizer import MatrixOptimizer
from steepest.step.checks import overlaps
from support.training import (
    EVERY,
    all_same_bits,
    both_kinds,
    copies,
    give_gradients,
    parameters,
    same_states,
    state_copies,
    train,
)

MUON, MUADAM, SANIA = steepest.Muon, steepest.MuAdam, steepest.MuAdamSANIA
SOAP, SHAMPOO, SPLUS = steepest.SOAP, steepest.Shampoo, steepest.SPlus


def matrix(**values: Any) -> list[dict[str, Any]]:
    return [{"params": parameters([(6, 4)]), **values}]


def adamw(**values: Any) -> list[dict[str, Any]]:
    return [{"params": parameters([(4,)]), "use_muon": False, **values}]


# what is built, the error, its text
CONSTRUCTION: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "lr": (lambda: MUON(matrix(), lr=-0.5), ValueError, "Learning rate should be >= 0 but is: -0.5"),
    "lr NaN": (lambda: MUADAM(matrix(), lr=float("nan")), ValueError, "Learning rate should be >= 0 but is: nan"),
    "lr tensor": (
        lambda: MUON(matrix(), lr=torch.ones(2)),
        ValueError,
        "Tensor lr must be 1-element but has 2",
    ),
    "lr of a group": (lambda: MUADAM(matrix(lr=-1)), ValueError, "Learning rate should be >= 0 but is: -1"),
    "lr of AdamW": (lambda: MUON(adamw(lr=-1.0)), ValueError, "Learning rate should be >= 0 but is: -1.0"),
    "adamw_lr": (lambda: MUON(matrix(), adamw_lr=-2.0), ValueError, "Learning rate should be >= 0 but is: -2.0"),
    "momentum": (lambda: MUON(matrix(), momentum=-0.1), ValueError, r"momentum should be in \[0, 1\) but is: -0.1"),
    "weight_decay": (lambda: SANIA(matrix(), weight_decay=-1), ValueError, "weight decay should be >= 0 but is: -1"),
    "adamw_weight_decay": (
        lambda: MUADAM(matrix(), adamw_weight_decay=-1),
        ValueError,
        "weight decay should be >= 0 but is: -1",
    ),
    "adamw_eps": (lambda: MUADAM(matrix(), adamw_eps=-1e-8), ValueError, "eps should be >= 0 but is: -1e-08"),
    "eps": (lambda: MUADAM(matrix(), eps=-1.0), ValueError, "eps should be >= 0 but is: -1.0"),
    "betas": (lambda: MUADAM(matrix(), betas=(0.9, 1.0)), ValueError, r"two numbers in \[0, 1\) but is: \(0.9, 1.0\)"),
    "one beta": (lambda: SANIA(matrix(), betas=(0.9,)), ValueError, r"two numbers in \[0, 1\) but is: \(0.9,\)"),
    "adamw_betas": (lambda: MUON(matrix(), adamw_betas=(-1, 0)), ValueError, r"two numbers in .* but is: \(-1, 0\)"),
    "adjust_lr_fn": (
        lambda: MUON(matrix(), adjust_lr_fn="spectral"),
        ValueError,
        r"function spectral is not supported; use one of original, match_rms_adamw, .*, none.* or None \(original\)",
    ),
    "ns_steps": (
        lambda: MUON(matrix(), ns_steps=100),
        ValueError,
        "Number of steps must be less than 100 for computational efficiency but is: 100",
    ),
    "no ns_steps": (lambda: MUON(matrix(), ns_steps=0), ValueError, "but is: 0; ns_steps is at least 1"),
    "ns_coefficients": (
        lambda: MUON(matrix(), ns_coefficients=(1.0, 2.0)),  # type: ignore[arg-type]
        ValueError,
        r"Coefficients must be a tuple of exactly 3 values but is: \(1.0, 2.0\)",
    ),
    "polar": (lambda: MUADAM(matrix(), polar="best"), ValueError, "preset 'best' is not known; choose one of .*auto"),
    "polar of a group": (lambda: MUON(matrix(polar="best")), ValueError, "preset 'best' is not known"),
    "polar table": (
        lambda: MUON(matrix(), polar=(3.0, (-3.0, 1.0))),  # type: ignore[arg-type]
        TypeError,
        r"a preset's name or coefficients as `steepest.polar` takes them, .* but is: \(3.0, \(-3.0, 1.0\)\)",
    ),
    "polar table entries": (
        lambda: MUADAM(matrix(), polar=[(1.0,)]),
        ValueError,
        r"tuples of 2 to 5 numbers, got \(\(1.0,\),\)",
    ),
    "backend": (
        lambda: MUADAM(matrix(), backend="abacus"),
        ValueError,
        "backend='abacus' is not a backend; use 'auto', 'cuda', 'triton', 'cpu' or 'torch'",
    ),
    "max_workspace_bytes": (
        lambda: MUON(matrix(), max_workspace_bytes=0),
        ValueError,
        "max_workspace_bytes should be positive or None but is: 0",
    ),
    "eps of the polar factor": (lambda: MUON(matrix(), eps=-1.0), ValueError, "eps should be >= 0 but is: -1.0"),
    "coefficients without a first term": (
        lambda: MUON(matrix(), ns_coefficients=(0.0, 1.0, 0.5)),
        ValueError,
        r"must not begin with 0 or hold one term alone, got \(\(0.0, 1.0, 0.5\),\)",
    ),
    "coefficients that diverge": (
        lambda: MUON(matrix(), ns_coefficients=(1.0, 2.0, 3.0)),
        ValueError,
        r"ns_coefficients=.*: coefficients take a singular value of .* not finite, got \(1.0, 2.0, 3.0\)",
    ),
    "a table that diverges": (
        lambda: MUADAM(matrix(), polar=[(2.0, -1.5, 0.5), (9.0, 95.0)]),
        ValueError,
        r"polar=.*: coefficients take a singular value of .* times the norm to .*: choose some that keep",
    ),
    "momentum_dtype": (
        lambda: MUADAM(matrix(), momentum_dtype="bfloat16"),  # type: ignore[arg-type]
        TypeError,
        "momentum_dtype should be a torch.dtype or None but is: 'bfloat16'; write torch.bfloat16",
    ),
    "momentum_dtype of integers": (
        lambda: MUON(matrix(), momentum_dtype=torch.int32),
        ValueError,
        "momentum_dtype should be a floating torch.dtype of 16 bits or more or None but is: torch.int32",
    ),
    "argument": (
        lambda: MUADAM(matrix(), warmup=3),  # type: ignore[call-arg]
        TypeError,
        "MuAdam got an unexpected argument 'warmup'; it takes lr, weight_decay, betas, .*adamw_lr",
    ),
    "argument of routing": (
        lambda: MUADAM(matrix(), overrides={"head": "adamw"}),  # type: ignore[call-arg]
        TypeError,
        r"'overrides': give it to steepest.param_groups, as in MuAdam\(steepest.param_groups\(model, overrides=...\)\)",
    ),
    "algorithm": (
        lambda: MUON(matrix(algorithm="lion")),
        ValueError,
        "group algorithm 'lion' is not known; use 'muon' or 'adamw'",
    ),
    "vector": (
        lambda: MUADAM([{"params": parameters([(5,)]), "use_muon": True}]),
        ValueError,
        r"shape \(5,\) is not a matrix: put it in a group with use_muon=False, or pass the module",
    ),
    "three dimensions": (
        lambda: MUADAM([{"params": parameters([(2, 3, 4)]), "use_muon": True}]),
        ValueError,
        r"shape \(2, 3, 4\) is either a batch of matrices or a convolution: say batch_dims=1 or batch_dims=0",
    ),
    "not 2-D, as in torch": (
        lambda: MUON(parameters([(5,)])),
        ValueError,
        r"only supports 2D parameters whereas we found .* size: torch.Size\(\[5\]\); pass the module itself .*use_muon",
    ),
    "num_heads": (lambda: MUON(matrix(num_heads=4)), ValueError, "num_heads=4 does not divide the 6 rows"),
    "split_sizes": (
        lambda: MUADAM(matrix(split_sizes=(4, 4))),
        ValueError,
        r"split_sizes \(4, 4\) sum to 8, but dimension 0 of shape \(6, 4\) is 6: .* so that they sum to 6",
    ),
    "batch_dims": (lambda: MUON(matrix(batch_dims=1)), ValueError, "send the parameter to AdamW, or lower batch_dims"),
    "shampoo_beta": (
        lambda: SOAP(matrix(), shampoo_beta=1.5),
        ValueError,
        r"shampoo_beta should be in \[0, 1\] or None but is: 1.5",
    ),
    "sums of coupled factors": (
        lambda: steepest.KLShampoo(matrix(), shampoo_beta=1.0),
        ValueError,
        r"beta \(shampoo_beta\) of coupled factors should be below 1",
    ),
    "precondition_frequency": (
        lambda: SOAP(matrix(), precondition_frequency=0),
        ValueError,
        "precondition_frequency should be a whole number of at least 1 but is: 0",
    ),
    "precondition_frequency of a group": (
        lambda: SOAP(matrix(precondition_frequency="10")),
        TypeError,
        "precondition_frequency should be a whole number of at least 1 but is: '10', a string: unquote it",
    ),
    "exact_refreshes": (
        lambda: SPLUS(matrix(), exact_refreshes=-1),
        ValueError,
        "exact_refreshes should be a whole number of at least 0 but is: -1",
    ),
    "max_preconditioner_dim": (
        lambda: SHAMPOO(matrix(), max_preconditioner_dim=0.5),  # type: ignore[arg-type]
        TypeError,
        "max_preconditioner_dim should be a whole number of at least 1 but is: 0.5",
    ),
    "refresh": (
        lambda: SOAP(matrix(), refresh="svd"),
        ValueError,
        "refresh 'svd' is not known; use 'auto' or 'jr' or 'qr' or 'eigh'",
    ),
    "norm": (
        lambda: SOAP(matrix(), norm="nuclear"),
        ValueError,
        "norm 'nuclear' is not known; use 'frobenius' or 'spectral' or 'sign' or None",
    ),
    "polar that is not used": (lambda: SOAP(matrix(), polar="best"), ValueError, "preset 'best' is not known"),
    "parity": (
        lambda: SOAP(matrix(), parity="paper"),
        ValueError,
        "parity 'paper' is not known; use None or 'authors'",
    ),
    "parity and cautious decay": (
        lambda: SOAP(matrix(), parity="authors", cautious_wd=True),
        ValueError,
        "cautious decay looks at the weight before the update; choose one of cautious and after",
    ),
    "graft": (lambda: SHAMPOO(matrix(), graft="sgd"), ValueError, "graft 'sgd' is not known; use 'adam' or None"),
    "average_rate": (
        lambda: SPLUS(matrix(), average_rate=1.0),
        ValueError,
        r"average_rate should be in \[0, 1\) but is: 1.0",
    ),
    "lr of SOAP": (lambda: SOAP(matrix(), lr=-1.0), ValueError, "Learning rate should be >= 0 but is: -1.0"),
    "weight_decay of SPlus": (
        lambda: SPLUS(matrix(), weight_decay=-1.0),
        ValueError,
        "weight decay should be >= 0 but is: -1.0",
    ),
    "eps of Shampoo": (lambda: SHAMPOO(matrix(), eps=-1.0), ValueError, "eps should be >= 0 but is: -1.0"),
    "betas of SOAP": (
        lambda: SOAP(matrix(), betas=(0.9, 1.0)),
        ValueError,
        r"two numbers in \[0, 1\) but is: \(0.9, 1.0\)",
    ),
    "adjust_lr_fn of SPlus": (
        lambda: SPLUS(matrix(), adjust_lr_fn="spectral"),
        ValueError,
        "function spectral is not supported",
    ),
    "argument of SOAP": (
        lambda: SOAP(matrix(), merge_dims=True),  # type: ignore[call-arg]
        TypeError,
        "SOAP got an unexpected argument 'merge_dims'; it takes lr, weight_decay, .*precondition_frequency",
    ),
    "no matrices": (
        lambda: MUADAM(nn.Sequential(nn.Embedding(8, 4), nn.LayerNorm(4))),
        ValueError,
        "none of 3 parameters goes to the matrix method .*Use torch.optim.AdamW.*overrides=",
    ),
    "one tensor": (
        lambda: MUADAM(nn.Parameter(torch.ones(3, 3))),  # type: ignore[arg-type]
        TypeError,
        "should be an iterable of Tensors or dicts, but got torch.FloatTensor",
    ),
    "empty": (lambda: MUON([]), ValueError, "optimizer got an empty parameter list"),
    "nothing": (
        lambda: MUON(None),  # type: ignore[arg-type]
        TypeError,
        "Muon takes a module, named parameters, tensors or groups, but is given: None",
    ),
    "a group of values": (
        lambda: MUON([{"lr": 0.1}]),
        TypeError,
        r"a parameter group should have 'params', a list of tensors, of \(name, tensor\) or a module, but has 'lr'",
    ),
    "a group of None": (lambda: MUON([{"params": None}]), TypeError, "should have 'params', .*, but has None"),
}


@pytest.mark.parametrize(("build", "error", "text"), CONSTRUCTION.values(), ids=CONSTRUCTION)
def test_construction(build: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build()


def test_a_group_that_is_no_dictionary() -> None:
    optimizer, _ = both_kinds(MUON)
    with pytest.raises(TypeError, match="param_group must be a dict, but got <class 'list'>"):
        optimizer.add_param_group([1])  # type: ignore[arg-type]


def make_complex(p: nn.Parameter) -> None:
    p.data = p.data.to(torch.complex64)
    p.grad = torch.ones_like(p)


def make_integers(p: nn.Parameter) -> None:
    p.requires_grad_(False)
    p.data, p.grad = p.data.to(torch.int32), None
    p.grad = torch.ones_like(p)


def make_narrow(p: nn.Parameter) -> None:
    p.data, p.grad = p.data.to(torch.float8_e4m3fn), None
    p.grad = torch.ones_like(p)


def make_sparse(p: nn.Parameter) -> None:
    p.grad = torch.ones_like(p.data).to_sparse()


@pytest.mark.parametrize("cls", [MUON, MUADAM, SANIA])
@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (
            make_complex,
            r"does not support complex parameters; found parameter 1 \(group 1, shape \(4, 3\)\): .*view_as_complex",
        ),
        (make_integers, r"steps floating-point parameters of 16 bits or more, and parameter 1 .* is torch.int32: keep"),
        (make_narrow, r"steps floating-point parameters .*, and parameter 1 .* is torch.float8_e4m3fn: keep"),
        (
            make_sparse,
            r"does not support sparse gradients; found one of parameter 1 .*: make the layer with sparse=False, or",
        ),
    ],
    ids=["complex", "integers", "8 bits", "sparse"],
)
def test_gradients(cls: type[MatrixOptimizer], spoil: Callable[[nn.Parameter], None], text: str) -> None:
    optimizer, params = both_kinds(cls)
    spoil(params[-1])
    with pytest.raises(RuntimeError, match=f"{cls.__name__} {text}"):
        optimizer.step()


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    "make",
    [lambda: torch.ones(1, 4).expand(4, 4), lambda: torch.ones(10).as_strided((4, 4), (2, 1))],
    ids=["expanded", "overlapping"],
)
def test_a_parameter_that_cannot_be_written(make: Callable[[], torch.Tensor], backend: str) -> None:
    p = nn.Parameter(make())
    optimizer = MUON([("w", p)], backend=backend)
    p.grad = torch.ones(4, 4)
    with pytest.raises(RuntimeError, match=r"^parameter 'w' .* holds one element at two .*: make .* from a clone"):
        optimizer.step()
    assert not optimizer.state


def test_strides_that_do_not_overlap_are_no_error() -> None:
    for w in (torch.ones(4, 8)[:, ::2], torch.ones(8, 4).T, torch.ones(2, 3, 4).permute(2, 0, 1), torch.ones(0, 4)):
        assert not overlaps(w)


@pytest.mark.parametrize("cls", [MUON, MUADAM, steepest.Adam, SOAP])
def test_lazy_parameters(cls: type[MatrixOptimizer]) -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    params = list(model.parameters())
    for given in (model, params, [{"params": params}], [{"params": params, "use_muon": False}]):
        with pytest.raises(ValueError, match=r"has no shape yet \(lazy module\): run the model once before this"):
            cls(given)


def resize(p: nn.Parameter) -> None:
    p.grad = None
    p.data = torch.zeros(6, 3)
    p.grad = torch.ones(6, 3)


def keep_old_gradient(p: nn.Parameter) -> None:
    p.grad = torch.ones_like(p)
    p.data = torch.zeros(2, 3)


def resize_gradient(p: nn.Parameter) -> None:
    p.grad = torch.ones_like(p)
    p.grad.data = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (resize_gradient, r"parameter 'b' \(group 1, shape \(4, 3\)\) has a gradient of shape \(2, 3\)"),
        (
            resize,
            r"parameter 'b' \(group 1, shape \(6, 3\)\) has a state 'exp_avg' of shape \(4, 3\): a parameter that",
        ),
        (keep_old_gradient, r"parameter 'b' \(group 1, shape \(2, 3\)\) has a gradient of shape \(4, 3\)"),
    ],
    ids=["resized gradient", "resized", "old gradient"],
)
@pytest.mark.parametrize("cls", [MUON, MUADAM])
def test_a_parameter_that_changed_is_named_before_anything_is_written(
    cls: type[MatrixOptimizer], spoil: Callable[[nn.Parameter], None], text: str
) -> None:
    a, b = nn.Parameter(torch.ones(5, 4)), nn.Parameter(torch.ones(4, 3))
    optimizer = cls([{"params": [("a", a)]}, {"params": [("b", b)], "use_muon": False}])
    for p in (a, b):
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = a.detach().clone(), {key: t.clone() for key, t in optimizer.state[a].items()}
    spoil(b)
    with pytest.raises(RuntimeError, match=text):
        optimizer.step()
    assert torch.equal(a, before[0])
    assert all(torch.equal(t, before[1][key]) for key, t in optimizer.state[a].items())


def test_state_that_is_no_tensor() -> None:
    optimizer, params = both_kinds(MUADAM)
    train(optimizer, params, range(1))
    optimizer.state[params[0]]["step"] = 3
    give_gradients(params, 1)
    with pytest.raises(RuntimeError, match=r"has a state 'step' that is 3: put a tensor there"):
        optimizer.step()


def test_state_left_on_another_device() -> None:
    optimizer, params = both_kinds(MUADAM)
    train(optimizer, params, range(1))
    optimizer.state[params[0]]["exp_avg_sq"] = torch.zeros(8, 5, device="meta")
    give_gradients(params, 1)
    with pytest.raises(RuntimeError, match=r"is on cpu and its state 'exp_avg_sq' on meta: move the state too"):
        optimizer.step()


def test_one_group_on_two_devices() -> None:
    mixed = [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3, device="meta"))]
    with pytest.raises(ValueError, match="a group has parameters on cpu and meta: make one group per device"):
        MUON(mixed)
    MUON([{"params": [p]} for p in mixed])


def test_a_checkpoint_of_other_shapes_is_refused_whole() -> None:
    old, params = both_kinds(MUADAM)
    train(old, params, range(2))
    saved = old.state_dict()
    saved["state"][len(params) - 1]["exp_avg"] = torch.zeros(9, 9)
    optimizer, others = both_kinds(MUADAM)
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 1 has shape \(9, 9\) and the parameter \(4, 3\)"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state
    assert optimizer.param_groups[0]["params"] == others[: len(others) - 2]


def test_two_ways_of_storing_bf16() -> None:
    with pytest.raises(ValueError, match="stochastic_rounding and keep_mantissa are two answers to one question"):
        both_kinds(MUADAM, stochastic_rounding=True, keep_mantissa=True)


# a group value that was good when the group was added; the error of the next step
LATER: dict[str, tuple[str, Any, type[Exception], str]] = {
    "polar": ("polar", "best", ValueError, "preset 'best' is not known"),
    "backend": ("backend", "abacus", ValueError, "backend='abacus' is not a backend"),
    "a backend that cannot run": ("backend", "cuda", RuntimeError, "backend='cuda' cannot run: the tensors are on cpu"),
    "num_heads": ("num_heads", 5, ValueError, "num_heads=5 does not divide the 8 rows"),
    "adjust_lr_fn": ("adjust_lr_fn", "spectral", ValueError, "function spectral is not supported; use one of original"),
}


@pytest.mark.parametrize("cls", [MUON, MUADAM, SANIA])
@pytest.mark.parametrize(("key", "value", "error", "text"), LATER.values(), ids=LATER)
def test_values_that_go_bad(
    cls: type[MatrixOptimizer], key: str, value: Any, error: type[Exception], text: str
) -> None:
    optimizer, params = both_kinds(cls)
    train(optimizer, params, range(1))
    optimizer.param_groups[0][key] = value
    with pytest.raises(error, match=text):
        optimizer.step()


#: What a user or a scheduler may put into a group.
BAD_NUMBERS: dict[str, tuple[Any, ...]] = {
    "lr": ("1e-3", None, -1.0, float("nan"), float("inf"), [0.1], torch.tensor(float("nan")), torch.ones(2)),
    "weight_decay": ("0.1", -0.5, float("nan")),
    "momentum": (None, -0.1, float("inf")),
    "beta2": ("0.9", 1.0, float("nan")),
    "betas": (0.9, (0.9,), (0.9, 1.0), ("0.9", 0.9), (float("nan"), 0.9)),
    "eps": (-1e-8, "1e-8"),
    "maximize": ("false", 1),
    "cautious_wd": ("yes",),
    "momentum_dtype": ("bfloat16", torch.int8),
    "max_workspace_bytes": (0, 2.5),
}


@pytest.mark.parametrize("cls", EVERY)
@pytest.mark.parametrize("number", [0, 1])
def test_a_value_put_into_a_group_is_refused_before_a_step_writes(cls: type[MatrixOptimizer], number: int) -> None:
    optimizer, params = both_kinds(cls)
    train(optimizer, params, range(1))
    give_gradients(params, 1)
    group, before = optimizer.param_groups[number], (copies(params), state_copies(optimizer))
    for key, values in BAD_NUMBERS.items():
        for value in values if key in optimizer._options(group) else ():
            good = group[key]
            group[key] = value
            with pytest.raises((TypeError, ValueError), match=f"group {number}: .*{key}") as caught:
                optimizer.step()
            shown = "nan" if isinstance(value, torch.Tensor) and value.numel() == 1 else str(value)
            assert shown in str(caught.value) or isinstance(value, torch.Tensor)
            group[key] = good
    assert all_same_bits(params, before[0])
    assert same_states(state_copies(optimizer), before[1])
    optimizer.step()


@pytest.mark.parametrize("key", ["lr", "weight_decay", "maximize"])
def test_a_value_that_is_gone_is_named(key: str) -> None:
    optimizer, params = both_kinds(steepest.Muon)
    train(optimizer, params, range(1))
    del optimizer.param_groups[1][key]
    with pytest.raises(ValueError, match=f"group 1: {key} is not there any more: put it back, as group\\['{key}'\\]"):
        train(optimizer, params, range(1, 2))


@pytest.mark.parametrize("cls", EVERY)
def test_what_a_scheduler_puts_into_a_group_is_taken(cls: type[MatrixOptimizer]) -> None:
    np = pytest.importorskip("numpy")
    (optimizer, params), (other, others) = both_kinds(cls), both_kinds(cls)
    for step, value in enumerate([np.float32(0.5), torch.tensor(0.25), 1, np.float64(0.125), torch.tensor([0.5])]):
        for each in optimizer.param_groups:
            each["lr"] = value
        for each in other.param_groups:
            each["lr"] = float(value)
        for one, some in ((optimizer, params), (other, others)):
            train(one, some, range(step, step + 1))
    assert all(torch.allclose(p, q, rtol=1e-4, atol=1e-5) for p, q in zip(params, others, strict=True))


def test_a_lower_bound_that_goes_bad() -> None:
    optimizer, params = both_kinds(steepest.MuonMax, lower_bound=0.0)
    give_gradients(params, 0)
    optimizer.step(loss=1.0)  # type: ignore[call-arg]
    for value in ("0", float("nan"), [0.0], float("inf")):
        optimizer.lower_bound = value  # type: ignore[attr-defined]
        with pytest.raises((TypeError, ValueError), match="lower_bound should be .* but is: .*(0|nan|inf)"):
            optimizer.step(loss=1.0)  # type: ignore[call-arg]
    optimizer.lower_bound = torch.tensor(0.5)  # type: ignore[attr-defined]
    optimizer.step(loss=1.0)  # type: ignore[call-arg]


def test_a_tensor_that_looks_like_an_embedding_warns_once() -> None:
    big, small = nn.Parameter(torch.zeros(8192, 2)), nn.Parameter(torch.zeros(4, 3))
    with pytest.warns(UserWarning, match=re.escape("param_0 (8192, 2)")) as caught:
        MUON([big, small])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MUON([small])
