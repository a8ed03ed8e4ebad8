"""What every optimizer does about every fault: measured, in words, as the tables of docs/faults.md.

A column is a fault, a row an optimizer with its options; `Column.right` are the words that are right. Nothing here is
remembered of an earlier run: a class that is added to the package is a row, with what it does.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

import steepest
from steepest.optimizer import MatrixOptimizer
from steepest.zoo.shared import Extras
from support.checkpoint_faults import (
    STATE,
    STRUCTURE,
    VALUES,
    alike,
    each_missing,
    each_odd,
    everything,
    refusal,
)
from support.configurations import CLASSES, CONFIGURATIONS, Shapes, Training, label, training
from support.modes import MODES, together
from support.training import same_bits

Class = type[MatrixOptimizer]
Options = dict[str, Any]
NOT_THERE = "–"
FIVE = ("autocast bf16", "default dtype fp64", "default device", "matmul precision medium", "inference mode")
#: Arguments of every class.
EXTRAS = Extras.__optional_keys__


@dataclass(frozen=True)
class Cell:
    """What happens, in a word or few, and the message if there is one."""

    word: str
    message: str = ""


@dataclass(frozen=True)
class Column:
    """A fault. name: at the head of the column.   what: in a sentence.   right: the words that may stand there."""

    name: str
    what: str
    right: tuple[str, ...]
    measure: Callable[[Class, Options], Cell]


@dataclass(frozen=True)
class Section:
    title: str
    text: str
    columns: Sequence[Column]


# ---- gradients -----------------------------------------------------------------------------------------------------

Spoil = Callable[[Training], object]


def every_entry(change: Callable[[Tensor], Tensor]) -> Spoil:
    """Every gradient is changed so."""

    def spoil(run: Training) -> None:
        for p in run.params.values():
            assert p.grad is not None
            p.grad = change(p.grad)

    return spoil


def one_entry(value: float) -> Spoil:
    """One entry of every gradient has this value."""

    def change(g: Tensor) -> Tensor:
        g = g.clone()
        g.view(-1)[1] = value
        return g

    return every_entry(change)


def found_inf(run: Training) -> None:
    """What a GradScaler tells the step."""
    run.optimizer.found_inf, run.optimizer.grad_scale = torch.ones(()), torch.ones(())  # type: ignore[attr-defined]


def after_gradients(spoil: Spoil) -> Callable[[Class, Options], Cell]:
    """What happens at a first step and at a later one, with good steps after each."""

    def measure(cls: Class, options: Options) -> Cell:
        run = training(cls, options)
        run.give_gradients(0)
        run.optimizer.init_state()
        words = []
        for number in range(4):
            if number % 2:
                run.step(number)
                if not _finite(run):
                    return Cell("is not finite afterwards")
            else:
                words.append(_word(run, number, spoil))
        return Cell(words[0] if words[0] == words[1] else f"{words[0]}, later {words[1]}")

    return measure


def _word(run: Training, number: int, spoil: Spoil) -> str:
    weights, state, skipped = run.weights(), run.state(), run.skipped()
    run.step(number, spoil)
    for key in ("found_inf", "grad_scale"):
        run.optimizer.__dict__.pop(key, None)
    if not _finite(run):
        return "is not finite"
    rows = zip(run.params, weights, run.weights(), state, run.state(), strict=True)
    # Momo makes a tensor of its own when it first sees a matrix.
    same = {name: same_bits(w, v) and all(alike(s[key], t[key]) for key in s) for name, w, v, s, t in rows}
    counted = run.skipped() - skipped
    if counted == len(same) and all(same.values()):
        return "skips"
    if counted == 0:
        return "steps"
    if counted == sum(same.values()):
        return f"skips {' and '.join('the matrix' if name == 'a' else 'the vector' for name in same if same[name])}"
    return f"counts {counted} and leaves {sum(same.values())} as they were"


def _finite(run: Training) -> bool:
    return all(bool(t.isfinite().all()) for t in (*run.weights(), *_kept(run)))


def spike(cls: Class, options: Options) -> Cell:
    """The longest of the steps after a gradient a thousand times too large, by the longest before it."""
    run = training(cls, options, {"a": (6, 5)})
    lengths = []
    for number in range(22):
        (before,) = run.weights()

        def spoil(run: Training, number: int = number) -> None:
            run.give_gradients(number, 1000.0 if number == 10 else 1.0)

        run.step(number, spoil)
        lengths.append(float((run.weights()[0].double() - before.double()).norm()))
    return Cell("usual" if max(lengths[10:]) <= 15 * max(lengths[3:10]) else "longer")


def without_gradient(cls: Class, options: Options) -> Cell:
    """One parameter has none, and then none has one."""
    run = training(cls, options)
    run.step(0)
    for names in ("v", "av"):
        weights, state, skipped = run.weights(), run.state(), run.skipped()

        def spoil(run: Training, names: str = names) -> None:
            for name in names:
                run.params[name].grad = None

        run.step(1, spoil)
        left = [name for name, w, v in zip(run.params, weights, run.weights(), strict=True) if same_bits(w, v)]
        if run.skipped() != skipped or not {*names} <= {*left} or not alike(state[-1], run.state()[-1]):
            return Cell("changes what has no gradient")
    return Cell("left alone")


def with_weight(value: float) -> Callable[[Class, Options], Cell]:
    """One weight of a matrix has this value while gradients are finite: the others step, and what is kept is finite."""

    def measure(cls: Class, options: Options) -> Cell:
        run = training(cls, options, {"a": (4, 3), "b": (4, 4), "v": (4,)})
        run.step(0)
        run.params["a"].data.view(-1)[1] = value
        before, skipped = run.weights(), run.skipped()
        for number in (1, 2):
            run.step(number)
        others = [(w, v) for name, w, v in zip(run.params, before, run.weights(), strict=True) if name != "a"]
        if not all(bool(v.isfinite().all()) and not same_bits(w, v) for w, v in others):
            return Cell("spoils the others")
        if not all(bool(t.isfinite().all()) for t in _kept(run)):
            return Cell("keeps what is not finite")
        return Cell({0: "the others step", 2: "skips the matrix"}.get(run.skipped() - skipped, "miscounts"))

    return measure


def _kept(run: Training) -> list[Tensor]:
    """The state but for the residual of a root that was not taken, which is infinite."""
    return [t for state in run.state() for key, t in state.items() if not key.endswith("residual")]


def with_empty(cls: Class, options: Options) -> Cell:
    """A matrix without entries beside the others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that an empty layer has nothing to initialize
        run = training(cls, options, {"a": (4, 3), "e": (0, 4), "v": (4,)})
    before = run.weights()
    for number in range(3):
        run.step(number)
    moved = [not same_bits(w, v) for w, v in zip(before, run.weights(), strict=True)]
    return Cell("steps" if moved == [True, False, True] and _finite(run) else "stops the others")


def with_weights_in(dtype: torch.dtype) -> Callable[[Class, Options], Cell]:
    """Whether every weight has moved after so many steps: ProdigyMuon's estimate begins at 1e-6 and grows while
    gradients agree.
    """

    def measure(cls: Class, options: Options) -> Cell:
        run = training(cls, {**options, "lr": 1.0 if cls is steepest.ProdigyMuon else 0.02}, dtype=dtype)
        before = run.weights()
        for number in range(60):
            run.step(0 if cls is steepest.ProdigyMuon else number)
            if not any(map(same_bits, before, run.weights())):
                return Cell("moves" if _finite(run) else "is not finite")
        return Cell("does not move")

    return measure


def scaled(cls: Class, options: Options) -> Cell:
    """Gradients times 1024, and GradScaler's word that they are."""
    runs = []
    for scale in (1.0, 1024.0):
        run = training(cls, options)
        for number in range(2):
            run.optimizer.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]

            def spoil(run: Training, number: int = number, scale: float = scale) -> None:
                run.give_gradients(number, scale)

            run.step(number, spoil)
        runs.append(run.weights())
    close = all(torch.allclose(a.double(), b.double(), rtol=1e-6, atol=1e-7) for a, b in zip(*runs, strict=True))
    return Cell("the same" if close else "another step")


# ---- what no step can be made of ------------------------------------------------------------------------------------


def refused_step(spoil: Callable[[Training], object]) -> Callable[[Class, Options], Cell]:
    """Whether a step is refused before anything is written, with a message that says whose fault it is."""

    def measure(cls: Class, options: Options) -> Cell:
        run = training(cls, options)
        for number in range(2):
            run.step(number)
        run.give_gradients(2)
        if spoil(run) is NOT_THERE:
            return Cell(NOT_THERE)
        before = everything(run.optimizer), run.weights()
        try:
            run.take_step()
        except (RuntimeError, TypeError, ValueError) as error:
            text = f"{type(error).__name__}: {error}"
            named = "parameter" in text
            unchanged = alike(everything(run.optimizer), before[0]) and all(map(same_bits, before[1], run.weights()))
            return Cell("refuses" if named and unchanged else "refuses halfway" if named else "falls", text)
        return Cell("steps")

    return measure


def make_sparse(run: Training) -> None:
    p = run.params["v"]
    assert p.grad is not None
    p.grad = p.grad.to_sparse()


def make_complex(run: Training) -> None:
    p = run.params["v"]
    p.data = p.data.to(torch.complex64)
    p.grad = torch.ones_like(p)


def make_overlapping(run: Training) -> None:
    p = run.params["a"]
    p.data = torch.ones(1, 3, dtype=p.dtype).expand(4, 3)


def resize(run: Training) -> None:
    p = run.params["v"]
    p.grad, p.data = None, torch.zeros(6, dtype=p.dtype)
    p.grad = torch.ones_like(p)


def keep_old_gradient(run: Training) -> None:
    p = run.params["v"]
    p.data = torch.zeros(6, dtype=p.dtype)


def replaced_state(change: Callable[[Tensor], object]) -> Callable[[Training], object]:
    def spoil(run: Training) -> object:
        state = run.optimizer.state[run.params["a"]]
        key = next((key for key, t in state.items() if t.ndim), None)
        if key is None:
            return NOT_THERE
        state[key] = change(state[key])
        return None

    return spoil


# ---- modes ---------------------------------------------------------------------------------------------------------


def in_modes(*modes: str) -> Callable[[Class, Options], Cell]:
    """The first step, which makes the state, and the third, against steps in no mode."""

    def measure(cls: Class, options: Options) -> Cell:
        row = label(cls, options)
        weights, states = _three_steps(row, modes)
        wanted, those = _in_no_mode(row)
        kept = [[(t.device, t.is_inference(), t.requires_grad) for t in state.values()] for state in states]
        if kept != [[(t.device, False, False) for t in state.values()] for state in those]:
            return Cell("keeps state in another way")
        return Cell("same bits" if alike((weights, states), (wanted, those)) else "another step")

    return measure


def _three_steps(row: str, modes: Sequence[str]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Weights and state after them."""
    run = training(*CONFIGURATIONS[row])
    for number in range(3):
        run.give_gradients(number)
        with together(*modes) if number != 1 else contextlib.nullcontext():
            run.take_step()
    return run.weights(), [dict(run.optimizer.state[p]) for p in run.params.values()]


@cache
def _in_no_mode(row: str) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    return _three_steps(row, ())


# ---- options -------------------------------------------------------------------------------------------------------


def refused_value(*names: str, value: Any) -> Callable[[Class, Options], Cell]:
    """Whether the constructor refuses a value by its name, and a group too, which leaves the optimizer as it was."""

    def measure(cls: Class, options: Options) -> Cell:
        run = training(cls, options)
        known = {key for base in type(run.optimizer).__mro__ for key in inspect.signature(base.__init__).parameters}
        name = next((name for name in names if name in known | EXTRAS), None)
        if name is None:
            return Cell(NOT_THERE)
        before, message = everything(run.optimizer), ""
        p = torch.nn.Parameter(torch.ones(4, 3))
        group = {"params": [("another", p)] if "param_names" in run.optimizer.param_groups[0] else [p], name: value}
        for attempt in (
            lambda: training(cls, {**options, name: value}),
            lambda: run.optimizer.add_param_group(group),
        ):
            try:
                attempt()
                return Cell("is taken")
            except (TypeError, ValueError) as error:
                message = message or f"{type(error).__name__}: {error}"
                if str(value) not in str(error) and repr(value) not in str(error):
                    return Cell("refuses without the value", str(error))
        return Cell("refuses" if alike(everything(run.optimizer), before) else "half added", message)

    return measure


def of_numpy(cls: Class, options: Options) -> Cell:
    import numpy as np

    run = training(cls, {**options, "lr": np.float32(0.5)})
    return Cell("a number" if type(run.optimizer.defaults["lr"]) is float else "stays numpy's")


def unknown_argument(cls: Class, options: Options) -> Cell:
    try:
        training(cls, {**options, "warmup": 3})
    except TypeError as error:
        return Cell("refuses" if "'warmup'" in str(error) else "falls", f"TypeError: {error}")
    return Cell("is taken")


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def refused_checkpoint(faults: dict[str, Callable[[dict[str, Any]], Any]]) -> Callable[[Class, Options], Cell]:
    def measure(cls: Class, options: Options) -> Cell:
        run = training(cls, options)
        run.step(0)
        good = run.optimizer.state_dict()
        for group in good["param_groups"]:
            group.pop("param_names", None)  # which KFAC has of its model
        run.step(1)
        fault, message = refusal(run.optimizer, good, faults)
        return Cell(fault or "refuses", message)

    return measure


def with_odd_state(cls: Class, options: Options) -> Cell:
    """Each tensor of the state in turn."""
    run = training(cls, options)
    run.step(0)
    good = run.optimizer.state_dict()
    for group in good["param_groups"]:
        group.pop("param_names", None)
    fault, message = refusal(run.optimizer, good, each_odd(good))
    return Cell(fault or "refuses", message)


def without_state(cls: Class, options: Options) -> Cell:
    """Without each tensor of the state in turn."""
    run = training(cls, options)
    run.step(0)
    good = run.optimizer.state_dict()
    words, message = set(), ""
    for key, drop in each_missing(good).items():
        other, saved = training(cls, options), copy.deepcopy(good)
        drop(saved)
        before = everything(other.optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                other.optimizer.load_state_dict(saved)
                text, word = " ".join(str(each.message) for each in caught), "begins anew, warns"
            except ValueError as error:
                text, word = f"ValueError: {error}", "refuses"
                if not alike(everything(other.optimizer), before):
                    return Cell(f"half loads without {key}", text)
        if key not in text or "parameter" not in text:
            return Cell(f"takes it without {key}", text)
        words.add(word)
        message = message or text
    return Cell(" or ".join(sorted(words, reverse=True)) or NOT_THERE, message)


def of_another_class(cls: Class, options: Options) -> Cell:
    """Of two other classes of the package, which say their names."""
    run = training(cls, options)
    run.step(0)
    good = run.optimizer.state_dict()
    bases = {base.__name__ for base in type(run.optimizer).__mro__}
    others = [each.__name__ for each in CLASSES if each.__name__ not in bases][:2]

    def named(other: str) -> Callable[[dict[str, Any]], Any]:
        return lambda saved: saved.update(optimizer=other)

    fault, message = refusal(run.optimizer, good, {other: named(other) for other in others})
    return Cell(fault or "refuses", message)


TORCHS: tuple[tuple[type[torch.optim.Optimizer], dict[str, Any]], ...] = (
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.RMSprop, {}),
    (torch.optim.Adagrad, {}),
    (torch.optim.NAdam, {}),
)


def of_torch(cls: Class, options: Options) -> Cell:
    """Of optimizers of torch that have no counterpart here."""
    run = training(cls, options)
    run.step(0)
    saved = []
    for other, values in TORCHS:
        params = [torch.nn.Parameter(p.detach().clone()) for p in run.params.values()]
        theirs = other([{"params": [p]} for p in params], **values)
        for p in params:
            p.grad = torch.ones_like(p)
        theirs.step()
        saved.append(theirs.state_dict())
    taken = {
        other.__name__: lambda given, of=of: given.clear() or given.update(of)
        for (other, _), of in zip(TORCHS, saved, strict=True)
    }
    fault, message = refusal(run.optimizer, run.optimizer.state_dict(), taken)
    return Cell(fault or "refuses", message)


def saved_and_loaded(cls: Class, options: Options) -> Cell:
    run, other = training(cls, options), training(cls, options)
    for number in range(3):
        run.step(number)
    other.step(0)
    saved, keys = run.optimizer.state_dict(), [set(group) for group in other.optimizer.param_groups]
    other.optimizer.load_state_dict(copy.deepcopy(saved))
    same = alike(other.optimizer.state_dict(), saved)
    same &= [set(group) for group in other.optimizer.param_groups] == keys
    return Cell("the same" if same and "differentiable" not in other.optimizer.defaults else "differs when saved again")


FOUR: Shapes = dict.fromkeys("abcd", (4, 4))


def _named(cls: Class, options: Options, names: str) -> Training:
    options = {key: value for key, value in options.items() if key != "stochastic_rounding"}  # its bits go by place
    return training(cls, options, {name: FOUR[name] for name in names}, named=True)


def in_another_order(cls: Class, options: Options) -> Cell:
    """The run goes on as it would have."""
    run, other = _named(cls, options, "abcd"), _named(cls, options, "dbca")
    run.step(0)
    run.step(1)
    for name, p in other.params.items():
        p.data.copy_(run.params[name].data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.optimizer.load_state_dict(run.optimizer.state_dict())
    for each in (run, other):
        each.step(2)
        each.step(3)
    # Layers that wait for one another are summed in another order.
    most = 1e-5 if isinstance(run.optimizer, steepest.Momo) else 0.0
    same = all(float((p - run.params[name]).detach().abs().max()) <= most for name, p in other.params.items())
    return Cell("by name" if same else "another step")


def with_other_layers(cls: Class, options: Options) -> Cell:
    """Layer c is new, layer a is gone; b, the first, has what belongs to all layers."""
    run, other = _named(cls, options, "bad"), _named(cls, options, "bcd")
    run.step(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other.optimizer.load_state_dict(run.optimizer.state_dict())
    said = [str(each.message) for each in caught]
    kept = all(
        alike(value, other.optimizer.state[other.params[name]][key])
        for name in "bd"
        for key, value in run.optimizer.state[run.params[name]].items()
    )
    fresh = not other.optimizer.state.get(other.params["c"])
    other.step(1)
    fine = kept and fresh and len(said) == 1 and "not here any more: " in said[0] and _finite(other)
    return Cell("begins anew, warns" if fine else "is not told", said[0] if said else "")


def unnamed_and_other_shapes(cls: Class, options: Options) -> Cell:
    run = training(cls, options)
    other = training(cls, options, {"a": (3, 4), "v": (4,)})
    run.step(0)
    saved = run.optimizer.state_dict()
    for group in saved["param_groups"]:
        group.pop("param_names", None)
    fault, message = refusal(other.optimizer, saved, {"it": lambda given: None})
    return Cell(fault or "refuses", message)


# ---- the tables ----------------------------------------------------------------------------------------------------

REFUSES, SKIPS, STEPS = ("refuses",), ("skips",), ("steps",)
EITHER = ("skips", "steps", "skips the matrix", "skips the vector")

SECTIONS = (
    Section(
        "Gradients",
        "**skips**: weight and state stay as they are bit for bit, and `skipped_updates()` counts it. **steps**: the "
        "step is taken, and weights and state are finite, at once and after the steps that follow. What would be "
        "stored must be finite: a finite gradient is skipped where its square, or what a metric makes of it, is not. "
        "How far a learning rate leads is not looked at in a step, which would read the weights once more: rates and "
        "decays with which weights become infinite whatever the gradients are, are refused as options.",
        (
            Column("NaN", "one entry is NaN", SKIPS, after_gradients(one_entry(torch.nan))),
            Column("inf", "one entry is infinite", SKIPS, after_gradients(one_entry(torch.inf))),
            Column("found_inf", "a GradScaler has found an infinity", SKIPS, after_gradients(found_inf)),
            Column(
                "1e20",
                "all entries are around 1e20, their squares beyond fp32",
                EITHER,
                after_gradients(every_entry(lambda g: g * 1e20)),
            ),
            Column("one 1e20", "one entry is 1e20", EITHER, after_gradients(one_entry(1e20))),
            Column("3e38", "one entry is near the largest of fp32", EITHER, after_gradients(one_entry(3e38))),
            Column(
                "1e-30",
                "all entries are around 1e-30, their squares 0 in fp32",
                STEPS,
                after_gradients(every_entry(lambda g: g * 1e-30)),
            ),
            Column(
                "zero",
                "all entries are 0, in the first step too",
                STEPS,
                after_gradients(every_entry(torch.zeros_like)),
            ),
            Column(
                "spike",
                "one gradient is 1000 times the others; usual: no step after it is 15 times the longest before it",
                ("usual", "longer"),
                spike,
            ),
            Column(
                "NaN weight",
                "one weight of a matrix is NaN: the other parameters step, and all state stays finite",
                ("the others step", "skips the matrix"),
                with_weight(torch.nan),
            ),
            Column("none", "one parameter has no gradient, and then none has one", ("left alone",), without_gradient),
            Column("no entries", "a parameter of shape (0, 4) is beside the others", STEPS, with_empty),
            Column("scaled", "gradients are 1024 times as large, and `grad_scale` says so", ("the same",), scaled),
            Column("bf16", "weights are plain bf16", ("moves",), with_weights_in(torch.bfloat16)),
            Column("fp16", "weights are plain fp16", ("moves",), with_weights_in(torch.float16)),
        ),
    ),
    Section(
        "Tensors that no step is made of",
        "**refuses**: a RuntimeError names the parameter and the way out before anything is written. –: there is no "
        "such tensor.",
        (
            Column("sparse", "a gradient is sparse", REFUSES, refused_step(make_sparse)),
            Column("complex", "a parameter is complex", REFUSES, refused_step(make_complex)),
            Column(
                "overlap",
                "a parameter holds one element at two indices (`expand`)",
                REFUSES,
                refused_step(make_overlapping),
            ),
            Column(
                "resized",
                "a parameter and its gradient have another shape than its state",
                (*REFUSES, NOT_THERE),
                refused_step(resize),
            ),
            Column(
                "old gradient",
                "a parameter has another shape than its gradient",
                REFUSES,
                refused_step(keep_old_gradient),
            ),
            Column(
                "state of numbers",
                "a tensor of the state has become a number",
                (*REFUSES, NOT_THERE),
                refused_step(replaced_state(lambda t: 3)),
            ),
            Column(
                "state elsewhere",
                "a tensor of the state is on another device",
                (*REFUSES, NOT_THERE),
                refused_step(replaced_state(lambda t: t.to("meta"))),
            ),
        ),
    ),
    Section(
        "What is set in torch around a step",
        "**same bits**: weights and state after three steps, the first of which makes the state, are those of steps "
        "without it, state on the same device.",
        tuple(Column(mode, "", ("same bits",), in_modes(mode)) for mode in MODES)
        + (Column("five at once", ", ".join(FIVE), ("same bits",), in_modes(*FIVE)),),
    ),
    Section(
        "Options",
        "**refuses**: constructor and `add_param_group` refuse, with the value, and leave the optimizer as it was. –: "
        "not an option of this class.",
        (
            Column("lr=-1", "", REFUSES, refused_value("lr", value=-1.0)),
            Column("lr=nan", "", REFUSES, refused_value("lr", value=float("nan"))),
            Column("lr=1e38", "", REFUSES, refused_value("lr", value=1e38)),
            Column('lr="1e-4"', "as YAML reads it", REFUSES, refused_value("lr", value="1e-4")),
            Column("lr of numpy", "`np.float32`", ("a number",), of_numpy),
            Column("weight_decay=-1", "", (*REFUSES, NOT_THERE), refused_value("weight_decay", value=-1.0)),
            Column("momentum=1.5", "", (*REFUSES, NOT_THERE), refused_value("momentum", value=1.5)),
            Column("betas=(2, 5)", "", (*REFUSES, NOT_THERE), refused_value("betas", value=(2, 5))),
            Column("betas=0.9", "", (*REFUSES, NOT_THERE), refused_value("betas", value=0.9)),
            Column("eps=-1", "", (*REFUSES, NOT_THERE), refused_value("eps", value=-1.0)),
            Column(
                "ns_steps=2.5",
                "or any other whole number",
                (*REFUSES, NOT_THERE),
                refused_value("ns_steps", "precondition_frequency", value=2.5),
            ),
            Column('maximize="false"', "", REFUSES, refused_value("maximize", value="false")),
            Column("backend=None", "", REFUSES, refused_value("backend", value=None)),
            Column(
                "fp8",
                "`momentum_dtype=torch.float8_e4m3fn`",
                REFUSES,
                refused_value("momentum_dtype", value=torch.float8_e4m3fn),
            ),
            Column("warmup=3", "an argument that there is not", REFUSES, unknown_argument),
        ),
    ),
    Section(
        "Checkpoints",
        "**refuses**: `load_state_dict` raises a TypeError or ValueError that says it is the checkpoint, and nothing "
        "of the optimizer has changed, for every one of the faults named.",
        (
            Column("values", ", ".join(VALUES), REFUSES, refused_checkpoint(VALUES)),
            Column("state", ", ".join(STATE), REFUSES, refused_checkpoint(STATE)),
            Column(
                "any tensor",
                "each tensor of the state in turn is NaN, on meta, of another dtype or shape, or below 0 where it "
                "cannot be; a number of steps is no whole number",
                REFUSES,
                with_odd_state,
            ),
            Column(
                "missing",
                "each tensor of the state in turn is missing; what may be turned on at any time begins anew, and a "
                "warning names it",
                (*REFUSES, "begins anew, warns", "refuses or begins anew, warns", NOT_THERE),
                without_state,
            ),
            Column("half written", ", ".join(STRUCTURE), REFUSES, refused_checkpoint(STRUCTURE)),
            Column("another class", "of other classes here", REFUSES, of_another_class),
            Column("torch's", ", ".join(f"torch.optim.{other.__name__}" for other, _ in TORCHS), REFUSES, of_torch),
            Column("other shapes", "of another model, without names", REFUSES, unnamed_and_other_shapes),
            Column("its own", "saved, loaded and saved again", ("the same",), saved_and_loaded),
            Column("reordered", "the parameters have names and another order", ("by name",), in_another_order),
            Column(
                "other layers",
                "one of the named layers is new, one is gone",
                ("begins anew, warns",),
                with_other_layers,
            ),
        ),
    ),
)


# ---- the page --------------------------------------------------------------------------------------------------------

HEAD = """# What happens when something is wrong

Every optimizer of the package, with its defaults and with options that change what a step does, meets every fault
below. The tables are measured, on a CPU: `python bench/faults.py` writes this page, and a test wants it to be what is
measured now. A message is that of one optimizer.
"""


def measured(section: Section, rows: Iterable[str] = CONFIGURATIONS) -> dict[str, list[Cell]]:
    """By rows, a cell each column."""
    return {row: [column.measure(*CONFIGURATIONS[row]) for column in section.columns] for row in rows}


def written(section: Section, table: Mapping[str, Sequence[Cell]]) -> str:
    """The section as docs/faults.md has it."""
    blocks = (section.text, *(("\n".join(legend),) if (legend := legend_of(section, table)) else ()))
    return "\n\n".join((f"\n## {section.title}", *blocks, "\n".join(rows_of(section, table)))) + "\n"


def legend_of(section: Section, table: Mapping[str, Sequence[Cell]]) -> list[str]:
    """A line for every fault of which there is something to say: what it is, and the message to a Muon, or to whoever
    has one.
    """
    lines = []
    for at, column in enumerate(section.columns):
        said = next((cells[at].message for cells in (table["Muon"], *table.values()) if cells[at].message), "")
        quote = "``" if "`" in said else "`"
        parts = [column.what, f"{quote}{said}{quote}" if said else ""]
        if any(parts):
            lines.append(f"- **{column.name}**: {'; '.join(part for part in parts if part)}")
    return lines


def rows_of(section: Section, table: Mapping[str, Sequence[Cell]]) -> list[str]:
    """The lines of the table, of which the first two are its head."""
    head = ["", *(column.name for column in section.columns)]
    lines = [head, ["---"] * len(head)]
    lines += [[f"`{row}`", *(cell.word for cell in cells)] for row, cells in table.items()]
    return [f"| {' | '.join(line)} |" for line in lines]
