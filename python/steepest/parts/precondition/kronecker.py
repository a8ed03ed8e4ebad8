"""Running Kronecker factors of the gradients of a matrix, and when the metric that is made of them is made anew.

    L <- L + w (G G^T - L)      w = (1 - beta) / (1 - beta^t), the average of all so far
    R <- R + w (G^T G - R)      (beta = 1: sums)

`Rotated` makes eigenbases of them, `Roots` inverse roots. That is the expensive part, done every so many steps and in
three moves, of which the second may run beside the steps that follow (`steepest.ops.streams`):

    gather(states)     copies of the factors, those of one size together, whoever they belong to
    refresh(...)       bases or roots of the copies
    commit(state)      from here on they are used: at once or a fixed number of steps later, `delay`; until then they
                       are pending, in the state

Factors and what is made of them are fp32 (fp64 for fp64 gradients). With dtype=bfloat16 they are stored in 16 bits and
everything is computed in fp32. Factors are then rounded stochastically: an average with beta near 1 moves by less than
half a unit in the last place, and rounded to nearest would stand still. What rounding adds to an entry has mean 0 and a
standard deviation of at most 2^-8 / sqrt(1 - beta^2) of the entry, 1.3% for beta = .95 and 9% for .999; in a sum it
would grow without end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ...linalg.blocks import block_length, from_blocks, parts, to_blocks
from ...linalg.work import Work
from ...ops import rotated
from ...ops.products import syrk_ema
from ..hyper import Hyper, Number, bias_correction
from ..rounding import Rounding
from .base import State

Pair = tuple[str, str]  # keys of the left side and of the right one

FACTORS: Pair = ("left", "right")
NEXT: Pair = ("left_next", "right_next")
COPIES = 14  # of a factor, at most, that a refresh holds at once
PENDING = "pending"  # 0-d, 1 where NEXT waits to be taken
LEARNED = "learned"


class Phase(NamedTuple):
    """What a step does besides stepping, before or after it: its gradient goes into the factors, then what an earlier
    refresh has made is taken, then the next refresh begins, the result of which is taken at once or later. exact: as of
    `Kronecker.gather`.
    """

    before: bool = False
    steps: bool = True
    after: bool = False
    commits: bool = False
    refreshes: bool = False
    at_once: bool = False
    exact: bool | None = None


class Gathered(NamedTuple):
    """Copies of what a refresh reads of factors of one size: for each pair of keys in `reads` one tensor, (b, n, n).

    owners: (state, side) of each stack of `counts` matrices; exact: of each matrix, whether it is to be solved
    exactly.
    """

    owners: list[tuple[int, int]]
    counts: list[int]
    tensors: list[Tensor]
    exact: list[bool]


@dataclass(frozen=True, kw_only=True)
class Kronecker:
    """What `Rotated` and `Roots` have in common; see the module.

    beta: decay rate of the factors, None for that of the second moment, 1 for sums.
    side: "both", or "smaller", the one with fewer rows (one-sided Shampoo, ASGO).
    max_dim: a longer side has no factor, or with blocks=True is cut into blocks of at most this length, each with
        factors of its own.
    external: the factors come from elsewhere (K-FAC's hooks write them).
    every: steps between refreshes; delay: steps until the result of one is taken, the first one's excepted.
    first: what the first step does. "learn": its gradient makes the metric it is stepped in; "identity": it is stepped
        in none, as SPlus; "skip": it only makes the metric, as SOAP's authors have it. In its own bases the first
        gradient is diagonal: an elementwise inner part would divide the rounding errors beside it by themselves.
    update_first: every gradient goes into the factors before its step, and not after.
    dtype: of factors and of what is made of them, None or bfloat16.
    """

    beta: float | None = None
    side: Literal["both", "smaller"] = "both"
    max_dim: int = 10000
    blocks: bool = False
    external: bool = False
    every: int = 10
    delay: int = 0
    first: Literal["learn", "identity", "skip"] = "learn"
    update_first: bool = False
    dtype: torch.dtype | None = None

    #: of kernels, by their names in `steepest.ops.selfcheck`, that factors and refreshes may ask for
    families: ClassVar[tuple[str, ...]] = ("fp32 products",)

    def __post_init__(self) -> None:
        if self.beta is not None and not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta of the factors should be in [0, 1] but is: {self.beta}")
        for name, least in (("every", 1), ("max_dim", 1), ("delay", 0)):
            check_whole(name, getattr(self, name), least)
        if self.delay > self.every:
            raise ValueError(f"delay should be at most every, the steps between refreshes, but is: {self.delay}")
        if self.side not in ("both", "smaller"):
            raise ValueError(f"side {self.side!r} is not known; use 'both' or 'smaller'")
        if self.first not in ("learn", "identity", "skip"):
            raise ValueError(f"first {self.first!r} is not known; use 'learn', 'identity' or 'skip'")
        if self.dtype not in (None, torch.bfloat16):
            raise ValueError(f"factors are fp32 (dtype=None) or torch.bfloat16, but dtype is: {self.dtype}")
        if self.dtype is not None and self.external:
            raise ValueError("factors that are given are not rounded here: leave dtype=None")
        if self.dtype is not None and self.beta == 1:
            raise ValueError(
                "a sum (beta, or shampoo_beta, 1) of bf16 factors drowns in what is rounded: choose a beta below 1 or "
                "leave the dtype (factor_dtype) None"
            )

    # ---- what a subclass says ---------------------------------------------------------------------------------------

    @property
    def reads(self) -> tuple[Pair, ...]:
        """Keys of what a refresh reads, factors first."""
        return (FACTORS,)

    @property
    def extra_keys(self) -> tuple[str, ...]:
        """Keys of the state besides factors and what is to become of them."""
        raise NotImplementedError

    @property
    def keys(self) -> tuple[str, ...]:
        return (*FACTORS, *((*NEXT, PENDING) if self.delay else ()), *self.extra_keys, LEARNED)

    @property
    def nonnegative(self) -> tuple[str, ...]:
        """Keys of the state whose entries are >= 0, beside factors, whose diagonals are."""
        return (*((PENDING,) if self.delay else ()), LEARNED)

    @property
    def may_overflow(self) -> tuple[str, ...]:
        """Keys of what a refresh has made and is looked at before it is taken: it may not be finite."""
        return ()

    @property
    def within_one(self) -> tuple[str, ...]:
        """Keys of the state whose entries are in [-1, 1]."""
        return ()

    @property
    def counts_steps(self) -> bool:
        return False

    def observe(self, state: State, g: Tensor, hyper: Hyper) -> State:
        """Statistics that every gradient adds to in the present metric."""
        return {}

    def into(self, state: State, x: Tensor, hyper: Hyper, step: Tensor | None) -> Tensor:
        """(batch, m, n) -> (batch * blocks, rows, cols)."""
        raise NotImplementedError

    def back(self, state: State, d: Tensor, hyper: Hyper, step: Tensor | None) -> Tensor:
        """(batch * blocks, rows, cols), the same; `unblock` makes it the matrix's."""
        raise NotImplementedError

    def stacks(self, states: Sequence[State], shapes: Sequence[tuple[int, int, int]]) -> rotated.Stacks:
        """The state of matrices of these shapes for the calls that take all of them; good as long as it stays there."""
        factors = [state[key] for state in states for key in FACTORS]
        return rotated.Stacks(shapes, factors, [state[LEARNED] for state in states])

    def turn_all(
        self,
        way: rotated.Way,
        stacks: rotated.Stacks,
        xs: Sequence[Tensor],
        hyper: Hyper,
        outs: Sequence[Tensor],
        flags: Sequence[Tensor] = (),
    ) -> bool:
        """What `into` or `back` gives, or the second moments of `observe`, for all of these by one call into outs, of
        flags where theirs are true; False where there is no such call for them, and nothing is written.
        """
        return False

    def observe_in_place(
        self, stacks: rotated.Stacks, grads: Sequence[Tensor], hyper: Hyper, flags: Sequence[Tensor]
    ) -> bool:
        """What `observe` gives, as `update_factors_in_place` writes what `update_factors` gives."""
        return False

    @property
    def steps_at_once(self) -> bool:
        """Whether there is a call for `step_in_place` at all."""
        return False

    def step_in_place(
        self,
        stacks: rotated.Stacks,
        grads: Sequence[Tensor],
        xs: Sequence[Tensor],
        hyper: Hyper,
        outs: Sequence[Tensor],
        flags: Sequence[Tensor],
    ) -> bool:
        """What `observe_in_place` does, and into outs what `back` gives of `into`, by one call; False as there."""
        return False

    def init_side(self, side: int, count: int, n: int, like: Tensor) -> State:
        """State of one side of length n, 0 without a factor, but for the factor; like: of its dtype and device."""
        raise NotImplementedError

    def solve(self, some: Gathered) -> Mapping[Pair, Tensor]:
        """What a refresh gives, first of all NEXT; (b, ...) each."""
        raise NotImplementedError

    def new_metric(self, state: State) -> State:
        """What changes when NEXT becomes the metric."""
        raise NotImplementedError

    def factor_inputs(self, state: State, g: Tensor, hyper: Hyper, count: Tensor) -> tuple[dict[str, Tensor], State]:
        """(for each factor a Y, of which Y Y^T goes into it; what else is new)."""
        x = self.to_blocks(g)  # products of narrow numbers are exact in wide sums
        return {"left": x, "right": x.mT}, {}

    @property
    def bounds_read_state(self) -> bool:
        """Whether `gains` and `sums` ask the state."""
        return self.beta == 1

    def gains(self, states: Sequence[State]) -> Tensor | float:
        """A bound for each state, (states,): the sum of squares of what a gradient adds to a factor, over that of the
        gradient.
        """
        return 1.0

    def sums(self, states: Sequence[State]) -> Tensor | float:
        """A bound for each state, (states,): the largest entry that factors which are sums have; 0 of averages."""
        return torch.stack(list(map(_largest_trace, states))) if self.beta == 1 else 0.0

    def needs_exact(self, states: Sequence[State], owners: Sequence[tuple[int, int]]) -> list[bool]:
        """Whether the last refresh got no hold of each matrix."""
        return [False for i, side in owners for _ in states[i][FACTORS[side]]]

    # ---- shapes -----------------------------------------------------------------------------------------------------

    def input_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The shape of what `into` gives for (batch, m, n): (batch * blocks, rows, cols)."""
        batch, m, n = shape
        if not self.blocks:
            return shape
        rows, cols = block_length(m, self.max_dim), block_length(n, self.max_dim)
        return batch * parts(m, rows) * parts(n, cols), rows, cols

    def factor_lengths(self, rows: int, cols: int) -> tuple[int, int]:
        """The lengths of the factors of a block, 0 where a side has none."""
        left, right = rows <= self.max_dim, cols <= self.max_dim
        if self.side == "smaller" and left and right:
            left, right = rows <= cols, rows > cols
        return rows if left else 0, cols if right else 0

    def to_blocks(self, x: Tensor) -> Tensor:
        return to_blocks(x, *self.input_shape((len(x), *x.shape[-2:]))[1:])

    def unblock(self, u: Tensor, m: int, n: int) -> Tensor:
        return from_blocks(u, m, n)

    def init(self, g: Tensor) -> State:
        """State before the first gradient; g: (batch, m, n)."""
        count, rows, cols = self.input_shape((len(g), *g.shape[-2:]))
        like = torch.empty(0, dtype=self.dtype or torch.promote_types(g.dtype, torch.float32), device=g.device)
        state: State = {}
        for side, (key, n) in enumerate(zip(FACTORS, self.factor_lengths(rows, cols), strict=True)):
            state[key] = like.new_zeros(shape_of(count, n, n))
            state |= self.init_side(side, count, n, like)
        if self.delay:
            state[PENDING] = torch.zeros((), dtype=torch.float32, device=g.device)
        state[LEARNED] = torch.zeros((), dtype=torch.float32, device=g.device)
        return state

    # ---- what it takes ----------------------------------------------------------------------------------------------

    def work(self, m: int, n: int, device: torch.device | str) -> Work:
        """What a step of one m x n matrix takes beside its direction; a refresh is shared out over `every` steps."""
        blocks, rows, cols = self.input_shape((1, m, n))
        left, right = self.factor_lengths(rows, cols)
        count = left * (left + 1) * cols + right * (right + 1) * rows
        refresh = Work()
        for length in (left, right):
            refresh += self.refresh_work(length, device)
        each = Work(wide=self.turns_flop(rows, cols, left, right) + (0 if self.external else count))
        return (each + refresh.shared_out(self.every)).times(blocks)

    def turns_flop(self, rows: int, cols: int, left: int, right: int) -> int:
        """The products of a step with bases or roots; left, right: lengths of the factors, 0 where a side has none."""
        return 2 * turn_flop(rows, cols, left, right)

    def refresh_work(self, n: int, device: torch.device | str) -> Work:
        """What the refresh of one factor of length n takes."""
        raise NotImplementedError

    # ---- factors ----------------------------------------------------------------------------------------------------

    def phase(self, clock: int) -> Phase:
        """What the step after `clock` earlier ones does."""
        start, refreshes = clock == 0, self._due(clock)
        before = self.update_first or (start and self.first == "learn")
        return Phase(
            before=before,
            steps=not (start and self.first == "skip"),
            after=not before,
            commits=0 < self.delay < clock and self._due(clock - self.delay),
            refreshes=refreshes,
            at_once=refreshes and (start or self.delay == 0),
            exact=False if start else None,
        )

    def _due(self, clock: int) -> bool:
        return clock == 0 or (clock if self.first == "skip" else clock + 1) % self.every == 0

    def update_factors(self, state: State, g: Tensor, hyper: Hyper) -> State:
        """The factors, and whatever else every gradient adds to, after gradient g."""
        count = state[LEARNED] + 1
        fresh: State = {LEARNED: count}
        if self.external:
            return fresh
        inputs, more = self.factor_inputs(state, g, hyper, count)
        weight = self.weight(hyper, count)
        for side, (key, y) in enumerate(inputs.items()):
            if state[key].numel():
                factor = wide(state[key])
                if torch.promote_types(y.dtype, factor.dtype) != factor.dtype:  # fp64 gradients, factors in 16 bits
                    y = y.to(factor.dtype)
                fresh[key] = self.stored(syrk_ema(factor, y, weight), count, side)
        return fresh | more

    @property
    def _updates_factors_alone(self) -> bool:
        """Whether `update_factors` is averages of G G^T and G^T G in full precision, and nothing besides."""
        return not (self.external or self.blocks or self.dtype is not None)

    def update_factors_in_place(
        self, stacks: rotated.Stacks, grads: Sequence[Tensor], hyper: Hyper, flags: Sequence[Tensor]
    ) -> bool:
        """What `update_factors` gives, written by one call for all of these where their flags are true; False where
        there is no such call for them, and nothing is written.
        """
        beta = self.rate(hyper)
        if not self._updates_factors_alone or not isinstance(beta, float) or not 0 <= beta < 1:
            return False
        if not stacks.supports_update(grads):
            return False
        rotated.update_factors(grads, stacks, flags, beta)
        return True

    def refresh_in_place(self, stacks: rotated.Stacks, states: Sequence[State], flags: Sequence[Tensor]) -> bool:
        """A refresh of all of these that is taken at once, written where their flags are true; False where `gather`,
        `refresh` and `commit` are the only one, and nothing is written.   states: those of the stacks.
        """
        return False

    def rate(self, hyper: Hyper) -> Number:
        return hyper.beta2 if self.beta is None else self.beta

    def weight(self, hyper: Hyper, count: Tensor) -> Number | None:
        """The weight of the newest term; None for sums."""
        beta = self.rate(hyper)
        sums = isinstance(beta, float | int) and beta == 1
        return None if sums else (1 - beta) / bias_correction(beta, count)

    def stored(self, factor: Tensor, count: Tensor, side: int) -> Tensor:
        """The factor as the state has it, and symmetric."""
        if self.dtype is None:
            return factor
        rounded, _ = Rounding("stochastic").store(factor, self.dtype, count, (side,))
        return rounded.triu() + rounded.triu(1).mT

    # ---- the refresh ------------------------------------------------------------------------------------------------

    def gather(self, states: Sequence[State], *, exact: bool | None = None) -> list[Gathered]:
        """Copies of what a refresh of all of these reads.

        exact: whether all matrices are to be solved exactly; None: those that the last refresh got no hold of.
        """
        sizes: dict[tuple[int, torch.dtype, torch.device], list[tuple[int, int]]] = {}
        for i, state in enumerate(states):
            for side, key in enumerate(FACTORS):
                p = state[key]
                if p.numel():
                    sizes.setdefault((p.shape[-1], p.dtype, p.device), []).append((i, side))
        gathered = []
        for owners in sizes.values():
            counts = [len(states[i][FACTORS[side]]) for i, side in owners]
            tensors = [wide(self._together([states[i][pair[side]] for i, side in owners])) for pair in self.reads]
            flags = self.needs_exact(states, owners) if exact is None else [exact] * sum(counts)
            gathered.append(Gathered(owners, counts, tensors, flags))
        return gathered

    def _together(self, stacks: list[Tensor]) -> Tensor:
        """One stack of them all: a copy, unless a lone one is read at once."""
        return stacks[0] if len(stacks) == 1 and not self.delay else torch.cat(stacks)

    def refresh(self, gathered: Sequence[Gathered], states: Sequence[State]) -> list[State]:
        """What comes of it for each of the states; `commit` makes the metric of it."""
        fresh: list[State] = [{PENDING: torch.ones_like(state[LEARNED])} for state in states]
        for some in gathered:
            for keys, t in self.solve(some).items():
                for (i, side), part in zip(some.owners, t.split(some.counts), strict=True):
                    fresh[i][keys[side]] = part
        return fresh

    def commit(self, state: State) -> State:
        """The new metric and all that goes with it; nothing new where nothing is pending, or it was taken already."""
        fresh = self.new_metric(state)
        if not self.delay:
            return fresh
        pending = state[PENDING] != 0
        taken = {key: torch.where(pending, t, state[key]) for key, t in fresh.items()}
        return {**taken, PENDING: torch.zeros_like(state[PENDING])}


def turn_flop(rows: int, cols: int, left: int, right: int) -> int:
    """A rows x cols matrix into the variables of its factors, or back."""
    return 2 * rows * cols * (left + right)


def _largest_trace(state: State) -> Tensor:
    """The largest trace of a factor, 0-d fp64."""
    factors = [state[key].double() for key in FACTORS if state[key].numel()]
    traces = [factor.diagonal(dim1=-2, dim2=-1).sum(-1).amax() for factor in factors]
    return torch.stack(traces).amax() if traces else state[LEARNED].new_zeros((), dtype=torch.float64)


def refresh_bytes(state: State) -> int:
    """About what a refresh of this state needs, copies included."""
    return sum(COPIES * wide(state[key][:0]).element_size() * state[key].numel() for key in FACTORS)


def wide(t: Tensor) -> Tensor:
    """The tensor in the dtype that is computed in."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def shape_of(count: int, *lengths: int) -> tuple[int, ...]:
    """The shape of state that only a side with a factor has."""
    return (count, *lengths) if all(lengths) else (0,)


def check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} should be a whole number of at least {least} but is: {value!r}")
