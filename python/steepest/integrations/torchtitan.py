"""Optimizers of this package in torchtitan's container."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer as Container
from torchtitan.components.optimizer.utils import load_flat_optim_state_dict

from .. import zoo
from ..optimizer import MatrixOptimizer

__all__ = ["OptimizersContainer"]


class OptimizersContainer(Container):
    """torchtitan's container, whose groups may name any optimizer of this package.

        OptimizersContainer.Config(
            param_groups=[ParamGroupConfig(pattern=".*", optimizer_name="MuAdam", optimizer_kwargs={"lr": 2e-3})]
        )

    A group is routed by names: embeddings, heads, norms and biases go to AdamW, whose numbers are optimizer_kwargs
    "adamw_lr", "adamw_betas", "adamw_eps" and "adamw_weight_decay". "Adam" and "AdamW" stay torch's.
    implementation="for-loop" and "foreach" take torch operations, "fused" what is fastest.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Container.Config):
        """The fields of torchtitan's."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        if name in zoo.__all__ and name not in ("Adam", "AdamW"):
            return getattr(zoo, name)
        return Container._resolve_optimizer_factory(name)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict()` gave, flat and by names.

        torchtitan's own asks `optimizer.state` what there is, where a rank has of Kronecker factors only those it owns.
        """
        for optimizer in self.optimizers:
            if isinstance(optimizer, MatrixOptimizer):
                optimizer.load_state_dict(_nested(optimizer.state_dict(), state_dict))
            else:
                load_flat_optim_state_dict(optimizer, state_dict)


def _nested(like: dict[str, Any], flat: dict[str, Any]) -> dict[str, Any]:
    """A state dict of the keys of one, with the values of a flat one; ValueError where it lacks state."""
    state: dict[int, dict[str, Any]] = {}
    groups = []
    names = {i: name for group in like["param_groups"] for i, name in zip(group["params"], group["param_names"])}
    lacking = [at for i, kept in like["state"].items() for key in kept if (at := f"state.{names[i]}.{key}") not in flat]
    if lacking:
        raise ValueError(
            f"the checkpoint lacks {len(lacking)} entries that {like['optimizer']} keeps, {lacking[0]!r} first: it is "
            "of another optimizer, or of other parameters"
        )
    for group in like["param_groups"]:
        for i in group["params"]:
            state[i] = {key: flat[f"state.{names[i]}.{key}"] for key in like["state"].get(i, {})}
        kept = {key: group[key] for key in ("params", "param_names")}
        name = next(iter(group["param_names"]), "")
        groups.append(kept | {key: flat[at] for key in group if (at := f"param_groups.{name}.{key}") in flat})
    return {**like, "state": state, "param_groups": groups}
