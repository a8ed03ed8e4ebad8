"""What a method says to the shell around it: every name that a class of the zoo gives or overrides.

    class SignOfMomentum(MatrixOptimizer):
        def __init__(self, params, lr=1e-3, weight_decay=0.0, momentum=0.9, adjust_lr_fn=None, **extra):
            options = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "adjust_lr_fn": adjust_lr_fn}
            super().__init__(params, *defaults_of("SignOfMomentum", options, extra))

        def recipe(self, group):
            return recipe_of(group, ratio="none", momentum=Momentum(), direction=Sign())

        def hyper(self, group):
            return Hyper(group["lr"], group["weight_decay"], group["momentum"])

`recipe` and `hyper` are all that there has to be; the rest has a default. A group with use_muon=True is of the method,
one with use_muon=False of the *others*, which AdamW takes unless the method says otherwise. What the shell knows and a
method may ask for is at the end of `MatrixOptimizer`. Names with an underscore are of the shell alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..parts import Hyper
from ..recipe import Recipe, State, adamw
from .group_options import Group, adam_hyper, finish
from .option_types import OptionType

if TYPE_CHECKING:
    from ..ops.multi_tensor import Scaling
    from ..parts import Number
    from ..step import Plan
    from ..step.coupling import Coupling
    from .checkpoint_state import Kept

__all__ = ["Method", "merged"]


class Method(torch.optim.Optimizer):
    """The protocol of a method; tuples and dictionaries of classes are those of their bases as well."""

    # ---- what it is -------------------------------------------------------------------------------------------------

    def recipe(self, group: Group) -> Recipe:
        """The method of a matrix group. It depends on no number that may change from step to step."""
        raise NotImplementedError

    def hyper(self, group: Group) -> Hyper:
        """The numbers of this step for a matrix group, read from the group and nothing else: it may be asked again
        only once a value there has changed.
        """
        raise NotImplementedError

    def recipe_of_others(self, group: Group) -> Recipe:
        """The method of a group with use_muon=False."""
        return adamw(group["momentum_dtype"], **finish(group))

    def hyper_of_others(self, group: Group) -> Hyper:
        """`hyper` of a group with use_muon=False."""
        return adam_hyper(group)

    @property
    def rule_of_others(self) -> str:
        """What `describe` calls the method of groups with use_muon=False."""
        return "AdamW"

    # ---- its arguments ----------------------------------------------------------------------------------------------

    #: options whose type is another one than in every other optimizer, and those that no other has
    option_types: ClassVar[dict[str, OptionType]] = {}
    #: arguments that no other optimizer has, each with its line of `help`; those of the others are in `zoo.arguments`
    argument_lines: ClassVar[dict[str, str]] = {}
    #: arguments that every optimizer has but this one
    refused_options: ClassVar[tuple[str, ...]] = ()
    #: attributes that a copy of the optimizer takes along
    carried: ClassVar[tuple[str, ...]] = ()

    def check_values(self, group: Group) -> None:
        """ValueError for values of a matrix group that the method cannot take; each is what its type says. That
        `recipe` raises nothing is found out after this.
        """

    def check_values_of_others(self, group: Group) -> None:
        """`check_values` of a group with use_muon=False."""

    def check_numbers(self) -> None:
        """TypeError or ValueError for a number that has become another one since the last step, of any group; a
        subclass adds its attributes. Called before every step.
        """
        raise NotImplementedError

    # ---- its parameters ---------------------------------------------------------------------------------------------

    #: whether its matrices may be of any shape, where fewer than two dimensions are one column
    takes_any_shape: ClassVar[bool] = False

    def route(self, params: Any) -> list[Group]:
        """Groups of a module's parameters, of named ones or of tensors."""
        raise NotImplementedError

    def route_tensors(self, params: list[Any]) -> list[Any]:
        """`route` of parameters that came without names or a module."""
        return self.route(params)

    def split_group(self, group: Group) -> list[Group]:
        """The groups of one that does not say its rule, which keep its values; itself if all is of the class's rule."""
        raise NotImplementedError

    def check_parameters(self, group: Group) -> None:
        """ValueError or RuntimeError for parameters that do not go with the method or with the values of their group,
        of any rule. Called for a new group and for every new plan.
        """

    # ---- its state --------------------------------------------------------------------------------------------------

    #: keys of what is kept for all parameters, in the state of the first one
    common_state: ClassVar[tuple[str, ...]] = ()

    def fresh_state(self, p: Tensor, dtype: torch.dtype, group: Group) -> State:
        """State before the first gradient, which has this dtype: the recipe's, and what a step cannot begin without."""
        raise NotImplementedError

    def extra_state(self, p: Tensor, group: Group) -> State:
        """What is yet to be added to the state of a parameter that has all of `fresh_state`. Called for every plan."""
        return {}

    def kept_state(self, p: Tensor, group: Group) -> dict[str, Kept]:
        """What a checkpoint may have of a parameter besides its recipe's state, by key; all of it super's too."""
        return {}

    def check_loaded(self, state: Mapping[Any, Mapping[str, Any]]) -> None:
        """ValueError for the state of a checkpoint, by parameters, whose tensors do not belong together."""

    def forget(self) -> None:
        """Forgets what was made for the state, which is about to be replaced, or is that of a copy."""
        raise NotImplementedError

    # ---- its step ---------------------------------------------------------------------------------------------------

    #: whether its parameters lie ahead of the weights, by how far these moved, what hooks did included
    extrapolates: ClassVar[bool] = False

    def take_step(self, scaling: Scaling, loss: Number | None) -> None:
        """Moves everything that has a gradient; loss: what a closure returned. A method that does something before or
        after overrides this and calls super's. Not what torch.compile traces.
        """
        raise NotImplementedError

    def couples(self) -> bool:
        """Whether layers wait for one another."""
        return False

    def coupling(self, plan: Plan, loss: Number | None) -> Coupling | None:
        """What this step's layers wait for, where they do."""
        return None

    def plan_depends_on(self) -> Sequence[object]:
        """What a plan is made for besides tensors and group values: where it has changed, there is a new plan."""
        return ()


@cache
def merged(kind: type, name: str) -> dict[str, Any]:
    """A class attribute of this name, of a class and its bases: dictionaries as one, tuples as their keys."""
    both: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        both |= dict.fromkeys(value) if isinstance(value := vars(base).get(name, {}), tuple) else value
    return both
