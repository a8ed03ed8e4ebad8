"""Whole steps along polar factors on a CPU (Muon's), one call for many parameters.

What `grad_stats`, `update_moments`, `cpu_chain` and `apply_update` do one after the other, with their bits, in one call
of the library that is no op (csrc/cpu_polar/steps.h). Addresses are written down once, as `steepest.ops.whole_steps`
has it, and of a step only those of gradients and weights are new.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backend as _backend
from .cpu_chain import CpuChain
from .multi_tensor import NOT_SCALED, Scaling, Table, count_writes
from .program import Program
from .whole_steps import CODES, addresses, memory_of


@dataclass(frozen=True)
class PolarStep:
    """A parameter's step but for its gradient and weight, both of `shape`, (matrices, rows, columns), and contiguous.

    Absent tensors are without elements.   input_dtype: of what the direction is asked about, and of the direction.
    slack: (matrices,) fp32, as of `cpu_chain`.   ratio: on the learning rate, for the shape.   chain: which of the
    chains it takes.   place: tells its random bits from another's.
    """

    program: Program
    shape: tuple[int, int, int]
    grad_dtype: torch.dtype
    param_dtype: torch.dtype
    input_dtype: torch.dtype
    momentum: Tensor
    second: Tensor
    mantissa: Tensor
    step: Tensor
    slack: Tensor
    ratio: float
    group: int
    chain: int
    place: tuple[int, int, int]

    def row(self) -> list[int]:
        """`PolarStep` in csrc/cpu_polar/steps.h."""
        dtypes = (self.grad_dtype, self.param_dtype, self.momentum.dtype, self.second.dtype, self.input_dtype)
        state = (self.momentum, self.second, self.mantissa, self.step, self.slack)
        addresses = [t.data_ptr() if t.numel() else 0 for t in state]
        rest = [self.program.packed(), self.group, self.chain, *self.place]
        return [*self.shape, *[CODES[dtype] for dtype in dtypes], *addresses, *rest]


class PolarSteps:
    """Steps of parameters whose state stays where it is; the i-th has row i of `table`, and lines after those of the
    ones before it.

    workspace: bytes that the inputs of directions and these may take at once, of more than one parameter.
    """

    def __init__(self, steps: Sequence[PolarStep], chains: Sequence[CpuChain], table: Table, workspace: int) -> None:
        self._steps, self._table, self._workspace = steps, table, workspace
        self._rows = array("q", [number for step in steps for number in step.row()])
        self._ratios = array("d", [step.ratio for step in steps])
        packed = [_packed(chain) for chain in chains]
        self._chain_ints = array("q", [number for ints, _ in packed for number in ints])
        self._chain_floats = array("d", [number for _, floats in packed for number in floats])
        self._chains = len(packed)

    def take(
        self, grads: Sequence[Tensor], params: Sequence[Tensor], numbers: array[float], scaling: Scaling = NOT_SCALED
    ) -> None:
        """One step; numbers: `numbers_of` all groups."""
        assert _backend.extension is not None
        memory = [*memory_of(self._table, scaling.found_inf, scaling.grad_scale), self._workspace]
        chains = (self._chain_ints, self._chain_floats, self._chains)
        step = (addresses(grads), addresses(params), numbers)
        _backend.extension.polar_steps(self._rows, self._ratios, *chains, *step, memory)
        count_writes(params)


def _packed(chain: CpuChain) -> tuple[list[int], list[float]]:
    """A chain as `chains_of` in csrc/cpu_polar/steps.h takes it."""
    node_ints, node_floats = chain.nodes
    tables, columns = len(chain.constants), len(chain.powers)
    head = [len(node_ints) // 7, tables, columns, chain.tight, chain.result, chain.divides]
    ints = [*head, CODES[chain.dtype], chain.at_once, *node_ints, *chain.powers]
    constants = [number for row in chain.constants for number in row]
    return ints, [*node_floats, *constants, *chain.least, chain.eps]
