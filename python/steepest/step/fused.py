"""The step of all parameters on one device by the fused ops: three ops around the direction.

    inspect                                    every gradient
    for every round of matrices
        before                                 every matrix of the round; in the first, all that is elementwise
        d = direction(x)                       buckets of all shapes at once
        after                                  every matrix of the round, but those whose direction moved the weights

What depends only on shapes, dtypes and recipes is laid out once; a step hands the tensors over. Their addresses travel
in the launch (Triton's table of them is keyed by its contents), so no new gradient makes them stale, and inputs are
borrowed from torch's allocator, so that between steps their memory is free for activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from .ops import multi_tensor
from .ops.multi_tensor import Groups, Scaling, Table
from .ops.program import Power, Program
from .parts import Diagonal, Frobenius, Hyper, Identity, Sign
from .recipe import Recipe
from .rounds import Entry, Round, members_of, rounds_of

_POWERS: dict[float, Power] = {0.25: "quarter", 0.5: "half", 1 / 6: "sixth"}


def program(recipe: Recipe, *, maximize: bool = False) -> Program | str:
    """The recipe as the fused ops take it, or the reason why they do not."""
    momentum, precondition, direction = recipe.momentum, recipe.precondition, recipe.direction
    if recipe.decay.after or recipe.decay.scaled:
        return "weight decay comes after the update or goes by the matrix' shape"
    if recipe.coupled:
        return "its step waits for a number that all layers give"
    if recipe.decay.inside or recipe.decay.relative:
        return "its step depends on the weight itself"
    if momentum.of == "updates":
        return "momentum comes after the direction"
    if momentum.start == "first":
        return "averages begin with the first gradient"
    if recipe.graft is not None:
        return "a grafted update's length is that of another one"
    whole = Program(
        heavy_ball=momentum.kind == "heavy_ball",
        nesterov=momentum.nesterov,
        momentum_correction=momentum.bias_correction,
        cautious=recipe.decay.cautious,
        rounding=recipe.rounding.mode,
        maximize=maximize,
    )
    # A ratio of the learning rate belongs to a matrix' shape, which a whole program does not know.
    if recipe.scale == "dual" and isinstance(direction, Frobenius) and recipe.adjust_lr == "none":
        whole = replace(whole, direction="identity")
    if recipe.scale == "lmo" and isinstance(direction, Sign) and recipe.adjust_lr == "none":
        whole = replace(whole, direction="sign")
    if isinstance(precondition, Identity):
        return whole
    if not isinstance(precondition, Diagonal):
        return f"the preconditioner {type(precondition).__name__} is not elementwise"
    power = _POWERS.get(precondition.power)
    if power is None:
        return f"the preconditioner's power is {precondition.power}; the kernels have 1/4, 1/2 and 1/6"
    return replace(
        whole,
        power=power,
        sum=precondition.average == "sum",
        second_correction=precondition.bias_correction,
        eps_inside=precondition.eps_inside,
    )


class Layout:
    """What a step over these entries does, but for its tensors; all of them on one device, with elements."""

    def __init__(self, entries: Sequence[Entry], skipped: Tensor, backend: str, max_workspace_bytes: int) -> None:
        self.entries = entries
        self.device = skipped.device
        self.backend = backend
        self.programs = [entry.program.packed() for entry in entries]
        self.group_of = [entry.group for entry in entries]
        members = members_of(entries)
        lines = [0] * len(entries)
        for member in members:
            lines[member.row] += member.matrices
        self.first_sums = list(accumulate(lines, initial=0))
        sizes = [entry.param.numel() for entry in entries]
        self.table = Table.empty(skipped, sizes, [(member.matrices, member.size) for member in members])
        self.absent = torch.empty(0, device=self.device)
        self.steps = [entry.state.get("step", self.absent) for entry in entries]
        self.rounds = list(rounds_of(members, max_workspace_bytes))
        self._watched = [entry.momentum for entry in entries if entry.input_dtype is torch.float16]
        self._versions: list[int] = []
        self._rows = {own: self._span(own) for own in set(self.group_of)}
        self._remember_state()

    def _span(self, group: int) -> slice:
        """The rows of a group's entries, which follow one another."""
        first = self.group_of.index(group)
        return slice(first, first + self.group_of.count(group))

    def _remember_state(self) -> None:
        """Sums as a step that is not taken leaves them; the momenta's largest entries bound the next fp16 input."""
        for member in (member for round_ in self.rounds for member in round_.members):
            lines = slice(member.line, member.line + member.matrices)
            m, p = (member.view(t).reshape(member.matrices, -1) for t in (member.entry.momentum, member.entry.param))
            self.table.column("momentum_max")[lines] = m.abs().amax(-1)
            for name, t in (("momentum_sq", m), ("param_sq", p)):
                wide = torch.promote_types(t.dtype, torch.float32)
                self.table.column(name)[lines] = torch.linalg.vector_norm(t, dim=-1, dtype=wide).double().square()
        for member in (m for round_ in self.rounds for m in round_.members if m.entry.fuses):
            for name in ("update_sq", "param_sq"):  # nobody measures them
                self.table.column(name)[member.line : member.line + member.matrices] = torch.nan
        self._versions = [m._version for m in self._watched]

    def notice_changes(self) -> None:
        """Looks at momenta anew that somebody else changed: a user, or a compiled step."""
        if [m._version for m in self._watched] != self._versions:
            self._remember_state()

    # ---- what a step measured ---------------------------------------------------------------------------------------

    def sums_of(self, group: int) -> dict[str, Tensor]:
        """Sums of squares over a group's parameters here, and the slack of its matrices; empty where it has none.

        The momentum, update and parameter of a step that was not taken are those of the last that was.
        """
        rows = self._rows.get(group)
        if rows is None:
            return {}
        taken = self.table.column("finite")[rows] > 0
        found = {"grad_sq": torch.where(taken, self.table.column("grad_sq")[rows], 0).sum()}
        lines = slice(self.first_sums[rows.start], self.first_sums[rows.stop])
        for name in ("momentum_sq", "update_sq", "param_sq"):
            found[name] = self.table.column(name)[lines].sum()
        slack = [part for round_ in self.rounds for bucket in round_.buckets for part in bucket.slack_of(group)]
        return found | ({"slack": torch.cat(slack)} if slack else {})

    # ---- the step -------------------------------------------------------------------------------------------------

    def step(self, hypers: Sequence[Hyper], scaling: Scaling) -> None:
        """One step; hypers[group] are the numbers of a group. The gradients are the parameters' own."""
        self.notice_changes()
        grads = [gradient(entry.param) for entry in self.entries]
        groups = _groups(hypers, self.group_of, self.device)
        arguments = (self.steps, self.table, self.programs, self.first_sums, groups, scaling)
        multi_tensor.grad_stats(grads, *arguments, backend=self.backend)
        for round_ in self.rounds:
            self._run(round_)
        self._versions = [m._version for m in self._watched]

    def _run(self, round_: Round) -> None:
        # Views of a parameter are made anew: its `data` may have been exchanged, and its gradient is another one.
        members = round_.members
        params = [m.view(m.entry.param) if m.narrow else m.entry.param for m in members]
        grads = [m.view(gradient(m.entry.param)) if m.narrow else gradient(m.entry.param) for m in members]
        stacks = [bucket.empty() for bucket in round_.buckets]
        whole = round_.whole
        multi_tensor.update_moments(
            grads,
            round_.momenta,
            round_.seconds,
            round_.no_inputs + round_.of_members(stacks),
            params[:whole] + round_.no_params,
            round_.mantissas[:whole] + round_.no_mantissas if whole and round_.mantissas else [],
            self.table,
            round_.before,
            backend=self.backend,
        )
        if not stacks:
            return
        lengths = round_.towards(stacks, self.table)
        if not round_.late:
            return
        directions = [*round_.no_inputs, *round_.of_members(stacks)]
        multi_tensor.apply_update(
            round_.of_late(directions),
            round_.of_late(round_.seconds),
            round_.of_late(params),
            round_.of_late(round_.mantissas),
            lengths or [],
            self.table,
            round_.after,
            backend=self.backend,
        )


def gradient(p: Tensor) -> Tensor:
    """The gradient of a parameter that has one."""
    assert p.grad is not None
    return p.grad


def _groups(hypers: Sequence[Hyper], of: list[int], device: torch.device) -> Groups:
    values: list[float] = []
    tensors: list[Tensor] = []
    at: list[int] = []
    for hyper in hypers:
        for number in (hyper.lr, hyper.weight_decay, hyper.beta1, hyper.beta2, hyper.eps):
            if isinstance(number, Tensor):
                at.append(len(values))
                tensors.append(_on(number, device))
                number = 0.0
            values.append(float(number))
    return Groups(values, tensors, at, of)


def _on(number: Tensor, device: torch.device) -> Tensor:
    wanted = number.dtype if number.dtype in (torch.float32, torch.float64) else torch.float64
    # A copy to the host must have arrived when the host reads it.
    return number.detach().to(device, wanted, non_blocking=device.type == "cuda")
