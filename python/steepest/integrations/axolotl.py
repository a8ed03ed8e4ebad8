"""Optimizers of this package by a section of axolotl's configuration; imported with axolotl."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from .configuration import named, values
from .transformers import optimizer_cls_and_kwargs

__all__ = ["Arguments", "Plugin"]

#: What axolotl makes groups of for its optimizers, and a factory of an optimizer does not see.
_OF_GROUPS = ("loraplus_lr_ratio", "lr_groups", "embedding_lr", "embedding_lr_scale")


class Arguments(BaseModel):
    """What `Plugin` adds to the configuration: an optimizer's name and its arguments."""

    steepest: dict[str, Any]

    @field_validator("steepest")
    @classmethod
    def _check(cls, section: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(section.get("optimizer"), str):
            raise ValueError("name the optimizer, as in steepest: {optimizer: MuAdam, lr: 0.002}")
        named(section["optimizer"])
        return section


class Plugin(BasePlugin):  # type: ignore[misc]  # axolotl is not there where types are checked
    """The optimizer that the section `steepest` of a configuration says, made of the model that is trained.

        plugins: [steepest.integrations.axolotl.Plugin]
        steepest: {optimizer: MuAdam, lr: 0.002}
        learning_rate: 0.0003

    optimizer: the name of any optimizer of this package.   The rest are its arguments; lr is that of the matrices.
    learning_rate, adam_beta1, adam_beta2 and adam_epsilon of the configuration are AdamW's, and weight_decay is
    everybody's, but for gains and biases; the section wins.
    Raises ValueError for options by which axolotl makes groups: loraplus_lr_ratio, lr_groups, embedding_lr.
    """

    def get_input_args(self) -> str:
        return f"{__name__}.{Arguments.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        said = [name for name in _OF_GROUPS if getattr(trainer.args, name, None) is not None]
        if said:
            raise ValueError(
                f"{', '.join(said)}: an optimizer of steepest makes its groups of the model, axolotl's do not reach "
                "it. Leave it out; lr and adamw_lr of the section steepest are the learning rates"
            )
        section = dict(cfg.steepest)
        made = named(section.pop("optimizer"))
        trainer.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs(made, trainer.args, **values(section))
