"""Optimizers of this package in Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from ..attention import QKClip
from ..optimizer import MatrixOptimizer
from ..routing import ADAMW_NUMBERS, param_groups
from ..routing.overrides import Overrides
from ..zoo import KFAC
from .configuration import check_class, pairs

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments

__all__ = ["optimizer_cls_and_kwargs", "qk_clip"]


def optimizer_cls_and_kwargs(
    cls: Callable[..., MatrixOptimizer], args: TrainingArguments | None = None, **kwargs: Any
) -> tuple[Callable[[], OfModel], dict[str, Any]]:
    """What `transformers.Trainer` takes under this name: it builds the optimizer from the model that is trained.

        Trainer(model, args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(steepest.MuAdam, args, lr=2e-3))

    cls: an optimizer of this package, KFAC too.   kwargs: its arguments; lr is that of the matrices. Also overrides, as
        `steepest.param_groups` takes them, but for KFAC.
    args: whose weight_decay all groups take, but for gains and biases, and whose learning_rate, adam_beta1, adam_beta2
        and adam_epsilon are AdamW's; optim_args, as in "lr=0.02,momentum=0.9", win over these, and kwargs over all.
        None: the class's own.
    Needs transformers 5, whose Trainer hands the model over; ImportError with an older one. TypeError for another cls.
    """
    check_class(cls)
    try:
        from transformers.trainer_optimizer import is_optimizer_factory  # noqa: F401
    except ImportError as error:
        why = "optimizer_cls_and_kwargs needs a Trainer that hands its model over: pip install 'transformers>=5'"
        raise ImportError(why) from error
    return partial(OfModel, cls), {**of_arguments(args), **kwargs}


class OfModel:
    """What makes an optimizer of a model, which Trainer calls with it."""

    def __init__(self, cls: Callable[..., MatrixOptimizer]) -> None:
        self.cls = cls

    def __call__(
        self, model: nn.Module, _args: Any = None, *, overrides: Overrides | None = None, **kwargs: Any
    ) -> MatrixOptimizer:
        """_args: axolotl's trainers hand over their arguments too, which `optimizer_cls_and_kwargs` has read."""
        if overrides is None:
            return self.cls(model, **kwargs)
        cls: Any = self.cls
        if isinstance(cls, type) and issubclass(cls, KFAC):
            raise TypeError(f"{cls.__name__} takes a module, whose layers it watches: leave out overrides")
        adamw = {"weight_decay": kwargs.get("adamw_weight_decay", ADAMW_NUMBERS["weight_decay"])}  # not of gains
        return cls(param_groups(model, overrides=overrides, adamw=adamw), **kwargs)


def qk_clip(threshold: float = 100.0, balance: float = 0.5) -> TrainerCallback:
    """A callback of `transformers.Trainer`: `steepest.QKClip` on the model that is trained, while it is.

        Trainer(model, args, optimizer_cls_and_kwargs=how, callbacks=[qk_clip(threshold=100.0)])

    Its attribute `clip` is the QKClip of the last training. Raises as that does, when training begins.
    """
    from transformers import TrainerCallback

    class Clip(TrainerCallback):
        clip: QKClip | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.clip is not None:
                self.clip.remove()
            self.clip = QKClip(kwargs["optimizer"], kwargs["model"], threshold, balance)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert self.clip is not None
            self.clip.remove()

    return Clip()


def of_arguments(args: TrainingArguments | None) -> Mapping[str, Any]:
    """The arguments of an optimizer that TrainingArguments say; none without them."""
    if args is None:
        return {}
    return {
        "weight_decay": args.weight_decay,
        "adamw_weight_decay": args.weight_decay,
        "adamw_lr": args.learning_rate,
        "adamw_betas": (args.adam_beta1, args.adam_beta2),
        "adamw_eps": args.adam_epsilon,
        **pairs(args.optim_args or ""),
    }
