"""Optimizers of this package in LLaMA-Factory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from torch import nn

from ..optimizer import MatrixOptimizer
from .configuration import check_class, named, values
from .transformers import OfModel, of_arguments

__all__ = ["register", "use"]

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
    check_class(cls)

    def create(model: nn.Module, training_args: Any, finetuning_args: Any) -> MatrixOptimizer:
        asked = [name for name in OTHERS if getattr(finetuning_args, name, None)]
        if asked:
            raise ValueError(f"{asked[0]} asks for another optimizer than {cls.__name__} of steepest: leave out one")
        return OfModel(cls)(model, **{**of_arguments(training_args), **kwargs})

    for stage in STAGES:
        import_module(f"llamafactory.train.{stage}.trainer").create_custom_optimizer = create  # type: ignore[attr-defined]


def register() -> None:
    """Makes these optimizers the plugin "steepest" of LLaMA-Factory's trainers of USE_V1=1.

        register()
        run_sft()

        optim_config: {name: steepest, optimizer: MuAdam, lr: 0.002, adamw_lr: 0.0003}     in the configuration

    optimizer: the name of any optimizer of this package.   The rest are its arguments; lr is that of the matrices.
    ValueError for a section without a known name; learning_rate of the configuration does not reach a plugin.
    """
    plugins = import_module("llamafactory.v1.plugins.trainer_plugins.optimizer")
    plugins.OptimizerPlugin("steepest").register()(_of_section)


def _of_section(model: nn.Module, section: Mapping[str, Any]) -> MatrixOptimizer:
    """The optimizer that optim_config says, of the model that is trained, sharded or not."""
    arguments = {key: value for key, value in section.items() if key not in ("name", "optimizer")}
    if not isinstance(section.get("optimizer"), str):
        raise ValueError("name the optimizer, as in optim_config: {name: steepest, optimizer: MuAdam, lr: 0.002}")
    return OfModel(named(section["optimizer"]))(model, **values(arguments))
