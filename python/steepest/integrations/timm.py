"""Optimizers of this package under names of timm's `create_optimizer_v2` and `train.py --opt`."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from .. import zoo
from ..optimizer import MatrixOptimizer

__all__ = ["named_groups", "register"]


def register() -> list[str]:
    """Makes every optimizer of this package that takes parameters known to timm, and returns the names.

        steepest.integrations.timm.register()
        optimizer = timm.optim.create_optimizer_v2(model, "steepest-muadam", lr=2e-3, weight_decay=0.05)

    A name is "steepest-" and the class's in small letters. timm's groups have no names and are routed by shape, so that
    a head is a matrix: param_group_fn=`named_groups` gives them names, and what timm's fallback_list names is AdamW's.
    timm passes its own momentum, 0.9 unless it is told another.
    """
    from timm.optim import OptimInfo, list_optimizers
    from timm.optim._optim_factory import default_registry

    known, names = set(list_optimizers()), []
    for cls in map(vars(zoo).get, zoo.__all__):
        if not isinstance(cls, type) or not issubclass(cls, MatrixOptimizer):
            continue
        takes, name = inspect.signature(cls).parameters, f"steepest-{cls.__name__.lower()}"
        if "params" not in takes:
            continue
        names.append(name)
        if name not in known:
            flags = {f"has_{key}": key in takes for key in ("eps", "momentum", "betas")}
            default_registry.register(OptimInfo(name, cls, (cls.__doc__ or "").partition("\n")[0], **flags))
    return names


def named_groups(
    model: nn.Module, weight_decay: float = 0.05, layer_decay: float | None = None, **kwargs: Any
) -> list[dict[str, Any]]:
    """The groups that timm makes of a model, with names, by which the optimizer routes them.

        create_optimizer_v2(model, "steepest-muadam", lr=2e-3, param_group_fn=partial(named_groups, weight_decay=0.1))

    layer_decay: None is timm's `param_groups_weight_decay`, a number its `param_groups_layer_decay`; kwargs are theirs.
    """
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    kwargs.setdefault("no_weight_decay_list", getattr(model, "no_weight_decay", set)())
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay, **kwargs)
    else:
        groups = param_groups_layer_decay(model, weight_decay, layer_decay=layer_decay, **kwargs)
    names = {p: name for name, p in model.named_parameters()}
    return [{**group, "params": [(names[p], p) for p in group["params"]]} for group in groups]
