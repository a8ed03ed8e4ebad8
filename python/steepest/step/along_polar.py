"""Steps along polar factors (Muon's, and MuAdam's), on a CPU: one call for all parameters.

    take    gradients looked at, moments, polar factors, and weights

Matrices of any shapes and presets share it; a preset is a list of products, which the library runs.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property
from typing import cast

from torch import Tensor

from ..ops.backend import wants_cpu_calls
from ..ops.cpu_chain import CpuChain
from ..ops.multi_tensor import NOT_SCALED, Scaling
from ..ops.polar_steps import PolarStep, PolarSteps
from ..ops.program import Program
from ..parts import Hyper, Spectral
from .buckets import FusedItem
from .by_address import ByAddress, has_addresses
from .parameter import Parameter

__all__ = ["AlongPolar", "steps_along_polar"]


def steps_along_polar(p: Parameter, program: Program, backend: str) -> bool:
    """Whether `AlongPolar` takes a parameter: one stack of matrices, which asks for nothing but their polar factors."""
    recipe = p.recipe
    if backend != "cpu" or program.whole or recipe.by_matrix or recipe.submatrix is not None or p.options.fuse_update:
        return False
    if type(recipe.direction) is not Spectral or recipe.scale != "lmo" or not p.source.numel() or len(p.pieces) != 1:
        return False
    piece = p.pieces[0]
    if piece.narrow or not has_addresses(p):
        return False
    return recipe.direction.cpu_chains([(piece.rows, piece.cols)], p.input_dtype) is not None


class AlongPolar(ByAddress):
    """`ByAddress` for parameters that `steps_along_polar` takes."""

    @cached_property
    def _steps_by_address(self) -> PolarSteps:
        places = {id(chain): i for i, chain in enumerate(self._chains)}
        slacks = {
            id(item): slack
            for bucket in self.buckets()
            for item, slack in zip(bucket.items, bucket.slack.split(bucket.sizes), strict=True)
        }
        steps = [
            self._step_of(item, slacks[id(item)], places[id(chain)])
            for item, chain in zip(self._items, self._chain_of_items, strict=True)
        ]
        return PolarSteps(steps, self._chains, self.table, self._max_bytes)

    @cached_property
    def _chain_of_items(self) -> list[CpuChain]:
        """The chain of each item; those of items that share one are the same object."""
        chains: dict[int, CpuChain] = {}
        rows: dict[tuple[Spectral, object], list[int]] = {}
        for i, item in enumerate(self._items):
            direction = cast(Spectral, item.parameter.recipe.direction)
            rows.setdefault((direction, item.input_dtype), []).append(i)
        for (direction, _), some in rows.items():
            shapes = [self._items[i].matrices.shape[1:] for i in some]  # type: ignore[union-attr]
            found = direction.cpu_chains(shapes, self._items[some[0]].input_dtype)
            assert found is not None
            chains |= dict(zip(some, found, strict=True))
        return [chains[i] for i in range(len(self._items))]

    @cached_property
    def _chains(self) -> list[CpuChain]:
        return list({id(chain): chain for chain in self._chain_of_items}.values())

    def _step_of(self, item: FusedItem, slack: Tensor, chain: int) -> PolarStep:
        p, matrices = item.parameter, item.matrices
        assert matrices is not None
        return PolarStep(
            program=item.program,
            shape=matrices.shape,
            grad_dtype=p.grad_dtype,
            param_dtype=p.tensor.dtype,
            input_dtype=item.input_dtype,
            momentum=p.momentum,
            second=item.second,
            mantissa=item.remainder,
            step=p.state.get("step", self._absent),
            slack=slack,
            ratio=matrices.ratio,
            group=p.group,
            chain=chain,
            place=item.place,
        )

    def begin(self, grads: Sequence[Tensor], hypers: Sequence[Hyper], scaling: Scaling = NOT_SCALED) -> bool:
        return super().begin(grads if wants_cpu_calls() else (), hypers, scaling)

    def take(self, numbers: array[float]) -> None:
        self._steps_by_address.take(self._grads, self._weights, numbers, self._scaling)
