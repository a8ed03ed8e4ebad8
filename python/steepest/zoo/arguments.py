"""What `help` of a class shows: a signature with all arguments, and a line for each below the docstring.

The lines of what all classes take are the first ones in the docstrings of `Extras` and its kin, those of what several
take are here, and what no other has a class says itself (`argument_lines`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..optimizer import MatrixOptimizer
from ..optimizer.method import merged
from .kronecker import Bases, KroneckerOptimizer
from .product import Coupling, ProductNormOptimizer
from .shared import EXTRAS, Extras

#: Of the column of arguments and defaults.
WIDTH = 30

#: An argument of a class's own, in a line. What it is to one method in particular is in that class's docstring.
LINES: dict[str, str] = {
    "params": "a module, named parameters, tensors or groups; see `steepest.param_groups`",
    "lr": "learning rate, a number >= 0 or a tensor of one element",
    "weight_decay": "how much of lr times the weight a step takes away",
    "momentum": "decay rate of the average of gradients",
    "beta2": "decay rate of the second moment",
    "after": '"rows" or "elements" of the update are normalized; None: they are not',
    "nesterov": "the gradient is weighted once more, as in Nesterov's method",
    "betas": "decay rates of the average of gradients and of the preconditioner",
    "eps": "keeps what is divided by from being 0",
    "adjust_lr_fn": '"original", "match_rms_adamw", "spectral_unclamped", "none"; None: the method\'s',
    "polar": "a preset of `steepest.polar` or a coefficient table",
    "inverse_root": '"basis": by eigenvalues; "newton": by products alone',
    "first_step": '"skip": the first gradient makes the bases; "move": it makes a step too',
    "parity": "the package whose arithmetic is followed; None: the paper's",
    "norm": "the base norm, by its name",
    "scale": '"lmo": steps of length lr; "dual": times the dual norm',
    "matrix_scale": 'weight of the matrices in product="hybrid"',
    "lower_bound": "of the loss, for the truncation of the step; None: none",
    "stale_dual": "dual norms are those of the step before; None: as the class has it",
    "reduce_loss": "the loss is averaged over all processes",
}
_NAMED = re.compile(r"^(\w+): (.+)$", re.MULTILINE)


def list_arguments(exported: Iterable[Any]) -> None:
    """Gives every optimizer among what is exported its whole signature, and its docstring a line for each argument.

    Where Python has dropped docstrings (-OO) there is none to add to.
    """
    for kind in exported:
        if isinstance(kind, type) and issubclass(kind, MatrixOptimizer):
            constructor: Any = kind.__init__
            constructor.__signature__ = whole_signature(kind)
            if kind.__doc__:
                kind.__doc__ = f"{inspect.cleandoc(kind.__doc__)}\n\nAll arguments:\n\n{_listed(kind)}\n"


def whole_signature(kind: type[MatrixOptimizer]) -> inspect.Signature:
    """The constructor's signature, with the keys of the TypedDict of its keyword arguments in place of `**extra`."""
    signature, keywords = inspect.signature(kind.__init__), _keywords(kind)
    if keywords is None:
        return signature
    parameters = {p.name: p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD}
    defaults = _defaults(kind, parameters)
    for name, annotation in keywords.__annotations__.items():
        if name not in parameters and name not in kind.refused_options:
            text = getattr(annotation, "__forward_arg__", annotation)
            more = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name), annotation=text)
            parameters[name] = more
    return signature.replace(parameters=list(parameters.values()))


def _keywords(kind: type[MatrixOptimizer]) -> Any:
    """The TypedDict of `**extra`; None without one."""
    constructor: Any = kind.__init__
    match = re.fullmatch(r"Unpack\[(\w+)\]", constructor.__annotations__.get("extra", ""))
    return inspect.unwrap(constructor).__globals__[match[1]] if match else None


def _defaults(kind: type[MatrixOptimizer], parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """The defaults of shared arguments, where they are not None."""
    defaults = {**EXTRAS, "reduce_loss": True, **getattr(kind, "_bases", {})}
    if issubclass(kind, ProductNormOptimizer):
        defaults["adamw_weight_decay"] = parameters["weight_decay"].default
    return defaults


def _listed(kind: type[MatrixOptimizer]) -> str:
    """A line for each argument: its name, its default, what it is."""
    of_class = merged(kind, "argument_lines")  # type: ignore[arg-type]  # as in `Groups._merged`
    lines = {**LINES, **_lines(Extras), **of_class}
    if issubclass(kind, KroneckerOptimizer):
        lines |= _lines(Bases)
    if issubclass(kind, ProductNormOptimizer):
        lines |= _lines(Coupling)
    lacking = next((p.name for p in _arguments(kind) if p.name not in lines), None)
    if lacking is not None:
        raise TypeError(
            f"{kind.__name__} says nothing about its argument {lacking!r}: give it a line in argument_lines"
        )
    shown = {str(p.replace(annotation=p.empty)): lines[p.name] for p in _arguments(kind)}
    return "\n".join(f"    {argument:{WIDTH}}  {line}" for argument, line in shown.items())


def _lines(keywords: Any) -> dict[str, str]:
    return dict(_NAMED.findall(inspect.cleandoc(keywords.__doc__)))  # Python 3.13 stores it without its margin


def _arguments(kind: type[MatrixOptimizer]) -> list[inspect.Parameter]:
    return list(inspect.signature(kind).parameters.values())
