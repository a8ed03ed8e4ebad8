"""Every argument of every class: a value of another type is refused by its name, its value and a way out."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from steepest.optimizer import MatrixOptimizer
from steepest.optimizer.option_types import OPTION_TYPES, check_option
from steepest.zoo.kronecker import BasesAndExtras
from steepest.zoo.product import Coupling
from steepest.zoo.shared import Extras
from support.training import EVERY, give_gradients, noise, parameters

CLASSES: tuple[type[MatrixOptimizer], ...] = (*EVERY, steepest.KFAC)
MORE = {"Unpack[Extras]": Extras, "Unpack[BasesAndExtras]": BasesAndExtras, "Unpack[Coupling]": Coupling}
OF_ALL = Extras.__optional_keys__
#: Tried where the argument does not take them.
WRONG: tuple[Any, ...] = ("1e-4", "0.1", "false", None, 0.9, 2.5, 3, True, [1.5], (), {}, object(), torch.ones(3))


NAN, INF, HUGE = float("nan"), float("inf"), 10**400
#: Tried of every argument: whatever it makes of them.
ODD: tuple[Any, ...] = (
    *(
        "",
        "abc",
        b"abc",
        True,
        False,
        NAN,
        INF,
        -INF,
        -1,
        -0.5,
        0,
        3,
        10**30,
        HUGE,
        1j,
        set(),
        range(3),
        lambda: 1,
        int,
    ),
    *(
        [0.9],
        (0.9, 0.9, 0.9),
        (NAN, 0.9),
        (True, False),
        [None, None],
        ("a", "b"),
        [HUGE, 1, 1],
        [[0.9]],
        [[1, 2, 3], [4]],
    ),
    *(torch.int8, torch.complex64, torch.float8_e4m3fn, torch.ones(2, 2), torch.tensor(NAN), torch.tensor(INF)),
    *(
        torch.tensor(-1.0),
        torch.tensor(2),
        torch.tensor(True),
        torch.tensor([0.5]),
        torch.tensor(0.5).to(torch.float8_e5m2),
    ),
    *(torch.tensor(1j), torch.ones((), device="meta"), (torch.tensor(0.9), torch.tensor(NAN)), (torch.ones(2), 0.9)),
)


def arguments(cls: type[MatrixOptimizer]) -> list[str]:
    extra = MORE[cls.__init__.__annotations__["extra"]]
    return [*list(inspect.signature(cls).parameters)[1:], *sorted(extra.__optional_keys__)]


def build(cls: type[MatrixOptimizer], **values: Any) -> MatrixOptimizer:
    if cls is steepest.KFAC:
        return cls(nn.Linear(4, 3, bias=False), **values)
    return cls(parameters([(4, 3)]), **values)


@functools.cache
def names_of_options(cls: type[MatrixOptimizer]) -> set[str]:
    return {*build(cls).defaults, "use_muon"}


@pytest.mark.parametrize("cls", CLASSES)
def test_every_argument_refuses_what_is_no_value_of_it(cls: type[MatrixOptimizer]) -> None:
    bare, types = [], {**cls.option_types, **OPTION_TYPES}  # those of a class alone, too
    for name in arguments(cls):
        kind = types[name.removeprefix("adamw_")]
        for value in WRONG:
            if kind.accepts(value) or (name == "adamw_lr" and value is None):
                continue
            try:
                build(cls, **{name: value})
                bare.append(f"{name}={value!r} is taken")
            except (TypeError, ValueError) as error:
                text = str(error)
                if "does not take" in text:  # this class has no such argument
                    break
                if name not in text or (repr(value) not in text and not isinstance(value, torch.Tensor)):
                    bare.append(f"{name}={value!r}: {text}")
                if value in ("1e-4", "0.1", "false") and "unquote it" not in text and not kind.accepts("name"):
                    bare.append(f"{name}={value!r} does not say to unquote it: {text}")
    assert not bare


def takes_steps(optimizer: MatrixOptimizer) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for number in range(0 if isinstance(optimizer, steepest.KFAC) else 2):
        give_gradients(params, number)
        optimizer.step(**({"loss": 1.0} if getattr(optimizer, "lower_bound", None) is not None else {}))


def says(error: Exception, name: str, value: Any) -> bool:
    """Whether the text has the argument and its value, as it is or as it was read, or says what that is."""
    text = str(error)
    read = value if not isinstance(value, list | range) else tuple(value)
    shown = {repr(value), str(value), repr(read), type(value).__name__}
    if (isinstance(value, int) and value >= 10**30) or (isinstance(value, list) and HUGE in value):
        shown |= {"1e+30", "inf"}
    return name in text and (isinstance(value, torch.Tensor) or any(each in text for each in shown))


@pytest.mark.parametrize("cls", CLASSES)
def test_every_argument_makes_steps_of_an_odd_value_or_names_it(cls: type[MatrixOptimizer]) -> None:
    bare = []
    for name in arguments(cls) if cls is steepest.Muon else sorted({*arguments(cls)} - OF_ALL):
        for value in (*ODD, *of_numpy()):
            try:
                takes_steps(build(cls, **{name: value}))
            except (TypeError, ValueError) as error:
                if "does not take" in str(error):  # this class has no such argument
                    break
                if not says(error, name, value):
                    bare.append(f"{name}={value!r}: {error}")
            except RuntimeError as error:
                if "torch.distributed, which is not initialised" not in str(error):
                    bare.append(f"{name}={value!r}: {error}")
    assert not bare


def of_numpy() -> list[Any]:
    np = pytest.importorskip("numpy")
    return [np.array([0.5, 0.5]), np.array([[1.0, 2.0]]), np.array("x"), np.array(True), np.float32(NAN), np.int64(3)]


@pytest.mark.parametrize("name", OPTION_TYPES)
def test_a_group_is_checked_as_the_arguments_are(name: str) -> None:
    """By every class that has the option: of the first with all values that it does not take, of others with one."""
    kind = OPTION_TYPES[name]
    wrong = [value for value in WRONG if not kind.accepts(value)]
    for number, cls in enumerate(cls for cls in CLASSES[:-1] if name in names_of_options(cls)):
        for value in [wrong[number % len(wrong)]] if number else wrong:
            with pytest.raises((TypeError, ValueError), match=name):
                cls([{"params": parameters([(4, 3)]), name: value}])


@pytest.mark.parametrize("name", ["lr", "betas", "eps", "weight_decay", "momentum_dtype", "cautious_wd"])
def test_groups_of_adamw_are_checked_too(name: str) -> None:
    for value in WRONG:
        if not OPTION_TYPES[name].accepts(value):
            with pytest.raises((TypeError, ValueError), match=name):
                steepest.Muon([{"params": parameters([(4,)]), "use_muon": False, name: value}])
    with pytest.raises(ValueError, match="of 16 bits or more or None but is: torch.float8_e4m3fn"):
        steepest.Muon([{"params": parameters([(4,)]), "use_muon": False, "momentum_dtype": torch.float8_e4m3fn}])


def test_what_a_user_keeps_in_a_group_is_his() -> None:
    optimizer = steepest.Muon([{"params": parameters([(4, 3)]), "scale": "mine", "p": "too", "lr_scale": "0.1"}])
    assert optimizer.param_groups[0]["scale"] == "mine"


def test_numbers_of_numpy_become_numbers() -> None:
    np = pytest.importorskip("numpy")
    optimizer = steepest.Muon(
        parameters([(4, 3)]),
        lr=np.float32(0.5),
        weight_decay=np.array(0.25),
        ns_steps=np.int64(4),
        nesterov=np.bool_(False),
        adamw_betas=(np.float64(0.5), np.float64(0.75)),
    )
    group = optimizer.param_groups[0]
    values = [group[key] for key in ("lr", "weight_decay", "ns_steps", "nesterov")]
    assert values == [0.5, 0.25, 4, False]
    assert [type(value) for value in values] == [float, float, int, bool]
    optimizer.add_param_group({"params": parameters([(4,)]), "use_muon": False})
    assert [type(beta) for beta in optimizer.param_groups[1]["betas"]] == [float, float]
    with pytest.raises(TypeError, match=r"lr should be a number >= 0 .* but is: array\(\[0.5\]\)"):
        steepest.Muon(parameters([(4, 3)]), lr=np.array([0.5]))


def test_the_text_for_yaml() -> None:
    with pytest.raises(TypeError, match="lr should be .* '1e-4', a string: unquote it; YAML reads 1e-4 as a string"):
        check_option("lr", "1e-4")
    with pytest.raises(TypeError, match="momentum_dtype should be a torch.dtype or None .*; write torch.bfloat16"):
        check_option("momentum_dtype", "bfloat16")


@pytest.mark.parametrize("coefficients", [(3.0, -3.2, 1.2), [3.0, -3.2, 1.2], [(3.0, -3.2, 1.2), (2.0, -1.5, 0.5)]])
def test_polar_takes_the_coefficients_that_polar_takes(coefficients: Any) -> None:
    p = nn.Parameter(torch.zeros(6, 4))
    optimizer = steepest.Muon([p], lr=1.0, weight_decay=0.0, momentum=0.0, polar=coefficients, adjust_lr_fn="none")
    p.grad = noise((6, 4), 1)
    optimizer.step()
    assert torch.allclose(-p, steepest.polar(p.grad, coefficients=coefficients), atol=1e-6)


@pytest.mark.parametrize("cls", [steepest.Muon, steepest.MuAdam, steepest.SOAP, steepest.MuonMax])
def test_switches_of_torch(cls: type[MatrixOptimizer]) -> None:
    plain = build(cls).param_groups[0]
    for foreach in (None, True):
        for fused in (None, True):
            assert build(cls, foreach=foreach, fused=fused).param_groups[0].keys() == plain.keys()
    group = build(cls, foreach=False, fused=False).param_groups[0]
    assert (group["max_workspace_bytes"], group["backend"]) == (1, "torch")
    assert "foreach" not in group
    group = build(cls, foreach=False, fused=False, max_workspace_bytes=99, backend="cpu").param_groups[0]
    assert (group["max_workspace_bytes"], group["backend"]) == (99, "cpu")
    group = build(cls, foreach=False, fused=True).param_groups[0]  # of which torch takes fused
    assert (group["max_workspace_bytes"], group["backend"]) == (plain["max_workspace_bytes"], plain["backend"])
    group = cls([{"params": parameters([(4, 3)]), "fused": False, "foreach": None}]).param_groups[0]
    assert (group["backend"], "fused" in group) == ("torch", False)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"betas": ["9e-1", 0.95]},
            r"betas should be .* but is: \['9e-1', 0.95\], in which '9e-1' is a string: unquote it",
        ),
        ({"momentum_dtype": "bf16"}, "momentum_dtype should be .* but is: 'bf16'; write torch.bfloat16"),
        ({"momentum_dtype": "torch.bfloat16"}, "momentum_dtype should be .*; write torch.bfloat16"),
        ({"maximize": "off"}, "maximize should be True or False but is: 'off', a string: unquote it"),
    ],
)
def test_what_a_configuration_file_makes_of_values_has_a_way_out(values: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        build(steepest.MuAdam, **values)


def test_what_is_not_used_is_checked_too() -> None:
    with pytest.raises(ValueError, match="preset 'nonsense' is not known"):
        build(steepest.Schattor, polar="nonsense")
    with pytest.raises(ValueError, match="lower_bound should be a number below infinity or None but is"):
        build(steepest.MuonMax, lower_bound=float("nan"))


#: Tensors that are no numbers for an option.
NO_NUMBERS: dict[str, torch.Tensor] = {
    "two": torch.ones(2),
    "empty": torch.ones(0),
    "bool": torch.tensor(True),
    "complex": torch.tensor(1j),
    "8 bits": torch.tensor(0.5).to(torch.float8_e5m2),
    "without order": torch.tensor(1, dtype=torch.uint16),
    "sparse": torch.ones(1).to_sparse(),
    "meta": torch.ones((), device="meta"),
    "NaN": torch.tensor(NAN),
    "below 0": torch.tensor(-1.0),
}
NUMBERS = ("lr", "weight_decay", "momentum", "beta2", "betas", "eps", "damping", "loss_scale")


def group_of(cls: type[MatrixOptimizer]) -> tuple[MatrixOptimizer, dict[str, Any]]:
    """An optimizer with a gradient, after a step."""
    optimizer = build(cls)
    (p,) = optimizer.param_groups[0]["params"]
    if cls is steepest.KFAC:
        return optimizer, optimizer.param_groups[0]
    for number in range(2):
        p.grad = noise((4, 3), number)
        if not number:
            optimizer.step()
    return optimizer, optimizer.param_groups[0]


@pytest.mark.parametrize("cls", CLASSES)
def test_a_tensor_that_is_no_number_is_refused_wherever_it_is_given(cls: type[MatrixOptimizer]) -> None:
    """To the constructor, by a checkpoint and in a group, before anything is written."""
    optimizer, group = group_of(cls)
    weight, saved = group["params"][0].detach().clone(), optimizer.state_dict()
    for name in (name for name in NUMBERS if name in group):
        good = group[name]
        for tensor in NO_NUMBERS.values():
            value = (tensor, 0.5) if name == "betas" else tensor
            if name in arguments(cls):
                with pytest.raises((TypeError, ValueError), match=f"{name}|[Ll]earning rate|weight decay"):
                    build(cls, **{name: value})
            given = {**saved, "param_groups": [{**saved["param_groups"][0], name: value}]}
            with pytest.raises((TypeError, ValueError), match="the checkpoint's group 0"):
                optimizer.load_state_dict(given)
            group[name] = value
            with pytest.raises((TypeError, ValueError), match="group 0: "):
                optimizer.prepare()
        group[name] = good
    assert torch.equal(group["params"][0], weight)


@pytest.mark.parametrize("value", [NAN, -1.0, INF])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_tensor_on_the_host_is_looked_at_when_its_value_is_another(cls: type[MatrixOptimizer], value: float) -> None:
    optimizer, group = group_of(cls)
    for name in (name for name in NUMBERS if name in group):
        good, tensor = group[name], torch.tensor(0.5)
        group[name] = (tensor, 0.5) if name == "betas" else tensor
        optimizer.prepare()
        tensor.fill_(0.25)  # as a scheduler does
        optimizer.prepare()
        tensor.fill_(value)
        with pytest.raises(ValueError, match="group 0: "):
            optimizer.prepare()
        tensor.fill_(0.25)
        optimizer.prepare()
        group[name] = good


def test_a_lower_bound_on_the_host_is_looked_at_too() -> None:
    bound = torch.tensor(0.0)
    optimizer = steepest.MuonMax(parameters([(4, 3)]), lower_bound=bound)
    give_gradients(optimizer.param_groups[0]["params"], 0)
    optimizer.step(loss=1.0)
    bound.fill_(NAN)
    with pytest.raises(ValueError, match="lower_bound should be a number below infinity or None but is"):
        optimizer.step(loss=1.0)


@pytest.mark.parametrize("key", sorted(names_of_options(steepest.Muon) | {"refresh", "factor_dtype"}))
def test_what_is_put_into_a_group_later_is_refused_by_the_groups_number(key: str) -> None:
    """Arrays and tensors too, whose truth nobody may ask for."""
    optimizer, group = group_of(steepest.SOAP if key in ("refresh", "factor_dtype") else steepest.Muon)
    good, text = group[key], rf"group 0: .*{key}|group 0: (Tensor|Learning rate|weight decay)"
    for value in (torch.ones(3), torch.ones((), device="meta"), {}, object(), *of_numpy()[:2]):
        group[key] = value
        with pytest.raises((TypeError, ValueError), match=text):
            optimizer.step()
    group[key] = good
    optimizer.step()


@pytest.mark.parametrize("key", ["lr", "weight_decay", "betas", "eps"])
def test_a_value_of_another_type_that_is_equal_to_the_one_before_is_refused(key: str) -> None:
    """As 1 + 0j and an array of a 1 are to 1."""
    np = pytest.importorskip("numpy")
    optimizer, group = group_of(steepest.MuAdam)
    good = group[key]
    number = good[0] if key == "betas" else good
    for value in (complex(number), np.array([number]), *([np.bool_(number)] if number in (0, 1) else [])):
        group[key] = (value, good[1]) if key == "betas" else value
        with pytest.raises(TypeError, match=f"group 0: {key} should be .* but is: "):
            optimizer.step()
    group[key] = np.float64(number) if key != "betas" else tuple(map(np.float64, good))
    optimizer.step()
    assert group[key] == good


def test_a_rule_that_is_changed_without_its_numbers_is_named() -> None:
    optimizer, group = group_of(steepest.Muon)
    group["use_muon"] = False
    with pytest.raises(ValueError, match=r"group 0: betas is not there any more: put it back, as group\['betas'\]"):
        optimizer.step()
