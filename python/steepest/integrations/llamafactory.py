"""Optimizers of this package in LLaMA-Factory."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from ..optimizer import MatrixOptimizer
from .transformers import of_arguments

__all__ = ["use"]

STAGES = ("pt", "sft", "rm", "ppo", "dpo", "kto")
#: Other optimizers by options of its own.
OTHERS = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon", "loraplus_lr_ratio")


def use(cls: Callable[..., MatrixOptimizer], **kwargs: Any) -> None:
    """Has LLaMA-Factory's trainers of every stage make this optimizer, of the model that they train.

        use(steepest.MuAdam, lr=2e-3)
        run_exp()

    cls: an optimizer of this package.   kwargs: its arguments; lr is that of the matrices. learning_rate, adam_beta1,
    adam_beta2 and adam_epsilon of the configuration are AdamW's, and weight_decay is everybody's, but for gains and
    biases; kwargs win.
    A training whose configuration asks for another optimizer, as with use_galore or loraplus_lr_ratio, is a ValueError.
    """

    def create(model: nn.Module, training_args: Any, finetuning_args: Any) -> MatrixOptimizer:
        asked = [name for name in OTHERS if getattr(finetuning_args, name, None)]
        if asked:
            raise ValueError(f"{asked[0]} asks for another optimizer than {cls.__name__} of steepest: leave out one")
        return cls(model, **{**of_arguments(training_args), **kwargs})

    for stage in STAGES:
        import_module(f"llamafactory.train.{stage}.trainer").create_custom_optimizer = create  # type: ignore[attr-defined]
