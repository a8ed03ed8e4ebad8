"""What an optimizer says about itself: what a step measured, what it left out, and who takes which parameter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .. import routing
from ..matrices import Piece
from ..parts import Number, shape_ratio
from ..recipe import Recipe
from ..step import Plan
from .group_options import Group
from .shards import Shards
from .wrappers import unwrap

__all__ = ["Reports"]


class Reports(Shards):
    """The questions a user may ask; a subclass knows recipes, numbers, matrices and backends."""

    _plan: Plan | None = None
    _skipped: dict[torch.device, Tensor]

    def _backend(self, p: Tensor, group: Group) -> str:
        raise NotImplementedError

    def skipped_updates(self) -> dict[torch.device, Tensor]:
        """Counts, per device, the parameter updates that were left out for their gradients (0-d int64 tensors)."""
        return dict(self._skipped)

    def metrics(self) -> dict[str, Tensor]:
        """What the last step measured, on the device: nothing waits for it until a value is read.

        Keys are "<group>/<name>" and "skipped/<device>"; every value a new tensor, fp64 and 0-d but for polar_slack.

            grad_norm, momentum_norm, param_norm    Frobenius norms over the group's parameters; gradients unscaled
            update_norm     of lr ratio u, weight decay not included
            polar_slack     fp32, one number a matrix: how much larger its singular values were to the iteration than
                            after division by ||X||_F, see `steepest.polar`; NaN where the direction has none. Bucket
                            by bucket: matrices of one shape together, in the order of the group. Not of what
                            backend="torch" steps; of sharded parameters the matrices that this rank works on
            skipped         int64, parameter updates left out because of a gradient that was not finite, so far

        A parameter whose step was not taken counts with its last momentum, update and value and without a gradient. A
        step inside torch.compile leaves no metrics. Empty before the first step.
        """
        optimizer = unwrap(self)  # Fabric's and Lightning's wrappers are of this class, too
        if optimizer._plan is None:
            return {}
        optimizer._name_collectives("metrics()")
        groups = {
            f"{i}/{name}": t
            for i, each in enumerate(optimizer._plan.metrics(len(optimizer.param_groups)))
            for name, t in each.items()
        }
        return groups | {f"skipped/{device}": count.clone() for device, count in optimizer._skipped.items()}

    def has_step_hooks(self) -> bool:
        """Whether something is to run around every step: hooks of this optimizer or of all of torch's."""
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        return bool(hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)

    def describe(self) -> str:
        """A table with a row per parameter: name, shape, rule, reason, effective learning rate and backend."""
        counter, optimizer = itertools.count(), unwrap(self)
        return routing.format_table(
            [row for group in optimizer.param_groups for row in optimizer._rows(group, counter)]
        )

    def _rows(self, group: Group, counter: Iterator[int]) -> list[tuple[str, ...]]:
        names = group.get("param_names") or [f"param_{next(counter)}" for _ in group["params"]]
        lr, recipe = self._hyper(group).lr, self._recipe(group)
        return [
            (
                name,
                "x".join(map(str, p.shape)) or "scalar",
                (type(self).__name__ if group["use_muon"] else self.rule_of_others)
                + (", 8-bit state" if self._coded(p, group) else ""),
                self._reasons.get(p, f"use_muon={group['use_muon']} in its group"),
                _effective_lr(lr, recipe, self._pieces(p, group)),
                self._backend(p, group),
            )
            for name, p in zip(names, group["params"], strict=True)
        ]


def _effective_lr(lr: Number, recipe: Recipe, parts: tuple[Piece, ...]) -> str:
    ratios = dict.fromkeys(shape_ratio(recipe.adjust_lr, piece.rows, piece.cols) for piece in parts)
    return " | ".join(f"{float(lr) * ratio:.3g}" for ratio in ratios)
