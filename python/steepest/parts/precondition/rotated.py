"""A norm in the eigenbases of running Kronecker factors:  ||X|| = N(P(Q_L^T X Q_R)).

    L = Q_L diag(l) Q_L^T     averages of G G^T        R = Q_R diag(r) Q_R^T     averages of G^T G

    into(x) = P^-T(Q_L^T x Q_R)        back(d) = Q_L (P^-1 d) Q_R^T

P, the `inner` preconditioner, is the identity (SPlus), elementwise with statistics of the rotated gradient (SOAP), or
one value for a row and one for a column (`Sides`: Shampoo, KL-Shampoo). With `coupling` each factor is measured in the
metric of the other, as the KL divergence between Gaussians asks for (arXiv:2509.03378):

    L <- L + w (G R^-1 G^T / n - L)    l <- beta l + (1 - beta) mean_j (Q_L^T G Q_R)_ij^2 / r_j      and so for R, r

The bases are refreshed now and then by `steepest.linalg.basis`; see `Kronecker`. Sources: SOAP arXiv:2409.11321,
Shampoo arXiv:1802.09568, SPlus arXiv:2506.07254.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ...linalg.basis import (
    ACCEPTED,
    FELL_BACK,
    LIMITS,
    TRIES,
    WANTS_EXACT,
    Method,
    Refreshed,
    eigh_refresh,
    refresh_work,
    tracked,
)
from ...linalg.work import Work
from ...ops import rotated, streams
from ...ops.matmul import matmul
from ...ops.reductions import total
from ..hyper import Hyper, Number
from .base import State
from .diagonal import Diagonal
from .kronecker import FACTORS, LEARNED, NEXT, Gathered, Kronecker, Pair, Phase, check_whole, shape_of, turn_flop, wide
from .none import Identity
from .sides import LEFT, RIGHT, Sides

BASES: Pair = ("left_basis", "right_basis")
VALUES: Pair = (LEFT, RIGHT)
NEXT_VALUES: Pair = ("left_next_values", "right_next_values")
ORDERS: Pair = ("left_order", "right_order")
STATUS: Pair = ("left_status", "right_status")


@dataclass(frozen=True)
class Rotated(Kronecker):
    """The part; see the module, and `Kronecker` for what else it takes.

    method: of `eigh_refresh`; exact: how many of the first refreshes are exact.
    transport: averages of squares at a refresh: "slots" stay with their columns, which a refresh keeps in place or says
        where they went; "hadamard" mixes them by the squares of the rotation, as if rotated entries were independent;
        "fixed" leaves them where they are, whichever column comes there.

    With method="auto" a matrix that a refresh got no hold of is solved exactly in the next one. The host then reads the
    status of the last one, always at the same step, and does not wait for what has begun since. On a CPU, where nothing
    waits, it is solved at once (`steepest.linalg.basis.tracked`), and columns that orthogonal iteration has turned a
    little keep their averages of squares.
    """

    inner: Identity | Diagonal | Sides = field(default_factory=Identity)
    coupling: Sides | None = None
    method: Method = "auto"
    exact: int = 1
    transport: Literal["slots", "hadamard", "fixed"] = "slots"

    families: ClassVar[tuple[str, ...]] = ("fp32 products", "eigh refresh", "eigenvectors")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta == 1 and self.coupling is not None:
            raise ValueError(
                "beta (shampoo_beta) of coupled factors should be below 1 but is 1: their values would never move"
            )
        check_whole("exact", self.exact, 0)
        if self.method not in get_args(Method):
            raise ValueError(f"method {self.method!r} is not known; use one of {', '.join(get_args(Method))}")
        if self.transport not in ("slots", "hadamard", "fixed"):
            raise ValueError(f"transport {self.transport!r} is not known; use 'slots', 'hadamard' or 'fixed'")

    @property
    def sides(self) -> Sides | None:
        """The part that reads a value for every row and column."""
        return self.inner if isinstance(self.inner, Sides) else self.coupling

    @property
    def extra_keys(self) -> tuple[str, ...]:
        pairs = [BASES, *([VALUES] if self.sides is not None else [])]
        pairs += [STATUS] if self.method == "auto" else []
        pairs += [ORDERS] if self.delay else []
        pairs += [NEXT_VALUES] if self.delay and self._of_refresh else []
        return (*(key for pair in pairs for key in pair), *(() if isinstance(self.inner, Sides) else self.inner.keys))

    @property
    def nonnegative(self) -> tuple[str, ...]:
        inner = self.inner.keys if isinstance(self.inner, Diagonal) else ()
        return (*super().nonnegative, *VALUES, *NEXT_VALUES, *inner)

    @property
    def within_one(self) -> tuple[str, ...]:
        return BASES

    @property
    def counts_steps(self) -> bool:
        return self.inner.counts_steps

    @property
    def reads(self) -> tuple[Pair, ...]:
        return FACTORS, BASES

    @property
    def _of_refresh(self) -> bool:
        return self.sides is not None and self.sides.values == "refresh"

    # ---- state ------------------------------------------------------------------------------------------------------

    def init(self, g: Tensor) -> State:
        state = super().init(g)
        if isinstance(self.inner, Diagonal):
            shape = self.input_shape((len(g), *g.shape[-2:]))
            state |= self.inner.init(g.new_zeros(shape))
        return state

    def init_side(self, side: int, count: int, n: int, like: Tensor) -> State:
        eye = torch.eye(n, dtype=like.dtype, device=like.device).repeat(count, 1, 1)
        basis, vector = eye.reshape(shape_of(count, n, n)), wide(like).new_zeros(shape_of(count, n))
        state = {BASES[side]: basis}
        if self.sides is not None:
            state[VALUES[side]] = vector + self.sides.initial
        if self.method == "auto":
            state[STATUS[side]] = like.new_zeros(count if n else 0, dtype=torch.int32)
        if self.delay:
            state[NEXT[side]] = basis.clone()
            state[ORDERS[side]] = torch.arange(n, device=like.device).repeat(count, 1).reshape(vector.shape)
        if self.delay and self._of_refresh:
            state[NEXT_VALUES[side]] = vector
        return state

    # ---- the change of variables ------------------------------------------------------------------------------------

    def observe(self, state: State, g: Tensor, hyper: Hyper) -> State:
        """Statistics of the inner part, in the present bases."""
        if not isinstance(self.inner, Diagonal):
            return {}
        fused = self._in_one_call(state, g, hyper, None, "observe")
        if fused is not None:
            return {self.inner.key: fused}
        return self.inner.observe(state, self._rotate(state, g), hyper)

    def into(self, state: State, x: Tensor, hyper: Hyper, step: Tensor | None) -> Tensor:
        fused = self._in_one_call(state, x, hyper, step, "into")
        return self.inner.into(state, self._rotate(state, x), hyper, step) if fused is None else fused

    def back(self, state: State, d: Tensor, hyper: Hyper, step: Tensor | None) -> Tensor:
        fused = self._in_one_call(state, d, hyper, step, "back")
        if fused is not None:
            return fused
        return self._rotated(state, self.inner.back(state, d, hyper, step), "back")

    def _in_one_call(
        self, state: State, x: Tensor, hyper: Hyper, step: Tensor | None, way: rotated.Way
    ) -> Tensor | None:
        """What `observe`, `into` and `back` give, by one call; None where there is none for this."""
        if (call := self._of_call(hyper)) is None:
            return None
        inner, beta, eps = call
        left, right, second = state[BASES[0]], state[BASES[1]], state[inner.key]
        if not rotated.supports(x, left, right, second):
            return None
        count, inside = _count(inner, step, second), inner.eps_inside
        return rotated.rotate(x, left, right, second, count, way, beta=beta, eps=eps, inside=inside)

    def stacks(self, states: Sequence[State], shapes: Sequence[tuple[int, int, int]]) -> rotated.Stacks:
        given, none = super().stacks(states, shapes), states[0][LEARNED].new_empty(0)
        if self.sides is not None:
            given = replace(given, values=[state[key] for state in states for key in VALUES])
        bases = [state[key] for state in states for key in BASES]
        statuses = [state[key] for state in states for key in STATUS] if self.method == "auto" else []
        if not isinstance(self.inner, Diagonal):
            absent = [none] * len(states)
            return replace(given, bases=bases, statuses=statuses, seconds=absent, steps=absent)
        seconds = [state[self.inner.key] for state in states]
        steps = [_count(self.inner, state.get("step"), none) for state in states]
        return replace(given, bases=bases, statuses=statuses, seconds=seconds, steps=steps)

    def turn_all(
        self,
        way: rotated.Way,
        stacks: rotated.Stacks,
        xs: Sequence[Tensor],
        hyper: Hyper,
        outs: Sequence[Tensor],
        flags: Sequence[Tensor] = (),
    ) -> bool:
        if not stacks.supports_rotation(xs):
            return False
        if (call := self._of_call(hyper)) is not None:
            inner, beta, eps = call
            rotated.rotate_all(xs, stacks, way, outs, flags, beta=beta, eps=eps, inside=inner.eps_inside)
            return True
        if way == "observe" or not self._scales_by_values(stacks):
            return False
        scales = self._scales(stacks, hyper)
        if way == "back":
            xs = torch._foreach_mul(list(xs), scales) if scales else xs
        rotated.rotate_all(xs, stacks, way, outs)
        if way == "into" and scales:
            torch._foreach_mul_(list(outs), scales)
        return True

    def _scales_by_values(self, stacks: rotated.Stacks) -> bool:
        """Whether what comes between the rotations is known of values of rows and columns, or is nothing at all, the
        same for stacks of one shape.
        """
        alike = len({shape[1:] for shape in stacks.shapes}) == 1
        return alike and self.input_shape(stacks.shapes[0]) == stacks.shapes[0] and not isinstance(self.inner, Diagonal)

    def _scales(self, stacks: rotated.Stacks, hyper: Hyper) -> list[Tensor]:
        """1/D of every stack; none where D is 1."""
        if not isinstance(self.inner, Sides):
            return []
        counts = [batch for batch, _, _ in stacks.shapes]
        return self.inner.inverses(stacks.values[::2], stacks.values[1::2], counts, hyper)

    def observe_in_place(
        self, stacks: rotated.Stacks, grads: Sequence[Tensor], hyper: Hyper, flags: Sequence[Tensor]
    ) -> bool:
        if not isinstance(self.inner, Diagonal):
            return False
        return self.turn_all("observe", stacks, grads, hyper, stacks.seconds, flags)

    @property
    def steps_at_once(self) -> bool:
        return self._divides_by_roots or not isinstance(self.inner, Diagonal)

    def factor_rate_of_whole_steps(self, hyper: Hyper) -> float | None:
        """The rate of the factors' averages where `steepest.ops.steps_in_bases` has whole steps by these numbers, None
        where it has not.
        """
        beta, plain = self.rate(hyper), self._updates_factors_alone and self.sides is None
        if not plain or self._of_call(hyper) is None or not isinstance(beta, float):
            return None
        return beta if 0 <= beta < 1 else None

    def step_in_place(
        self,
        stacks: rotated.Stacks,
        grads: Sequence[Tensor],
        xs: Sequence[Tensor],
        hyper: Hyper,
        outs: Sequence[Tensor],
        flags: Sequence[Tensor],
    ) -> bool:
        if not stacks.supports_rotation([*grads, *xs]):
            return False
        if (call := self._of_call(hyper)) is not None:
            inner, beta, eps = call
            rotated.adam(grads, xs, stacks, outs, flags, beta=beta, eps=eps, inside=inner.eps_inside)
            return True
        if not self._scales_by_values(stacks):
            return False
        turned = [torch.empty_like(x) for x in xs]
        rotated.rotate_all(xs, stacks, "into", turned)
        if scales := self._scales(stacks, hyper):
            for _ in range(2):
                torch._foreach_mul_(turned, scales)
        rotated.rotate_all(turned, stacks, "back", outs)
        return True

    def _of_call(self, hyper: Hyper) -> tuple[Diagonal, float, float] | None:
        """The inner part, beta2 and eps, where `steepest.ops.rotated.rotate` is for them."""
        inner, beta, eps = self.inner, hyper.beta2, hyper.eps
        if not isinstance(inner, Diagonal) or not self._divides_by_roots:
            return None
        return (inner, beta, eps) if isinstance(beta, float) and isinstance(eps, float) else None

    @property
    def _divides_by_roots(self) -> bool:
        """Whether the division is that of the calls."""
        inner = self.inner
        return isinstance(inner, Diagonal) and inner.power == 0.25 and inner.average == "ema" and not self.blocks

    def _bases(self, state: State) -> tuple[Tensor, Tensor]:
        return wide(state[BASES[0]]), wide(state[BASES[1]])

    def _rotate(self, state: State, x: Tensor) -> Tensor:
        return self._rotated(state, self.to_blocks(x.to(wide(state[BASES[0]]).dtype)), "into")

    def _rotated(self, state: State, x: Tensor, way: Literal["into", "back"]) -> Tensor:
        """Q_L^T x Q_R, or Q_L x Q_R^T, with the bits of the calls that turn many at once, where there are such."""
        left, right = self._bases(state)
        x = x.to(left.dtype)
        if rotated.supports(x, left, right):
            none = x.new_empty(0)
            return rotated.rotate(x, left, right, none, none, way)
        if left.numel():
            x = matmul(left.mT if way == "into" else left, x)
        return matmul(x, right if way == "into" else right.mT) if right.numel() else x

    # ---- what it takes ----------------------------------------------------------------------------------------------

    def turns_flop(self, rows: int, cols: int, left: int, right: int) -> int:
        turn = turn_flop(rows, cols, left, right)
        flop = 2 * turn + (turn if isinstance(self.inner, Diagonal) else 0)
        if self.coupling is not None:
            flop += turn + 2 * rows * cols * left
        if self.sides is not None and self.sides.values == "present":
            flop += 2 * (left**3 + right**3)
        return flop

    def refresh_work(self, n: int, device: torch.device | str) -> Work:
        tracks = self.method == "auto" and torch.device(device).type == "cpu"
        return refresh_work(n, "qr" if tracks else self.method)

    # ---- factors ----------------------------------------------------------------------------------------------------

    def phase(self, clock: int) -> Phase:
        phase, earlier = super().phase(clock), -(-clock // self.every)  # refreshes
        return phase._replace(exact=True) if phase.refreshes and earlier < self.exact else phase

    def update_factors(self, state: State, g: Tensor, hyper: Hyper) -> State:
        fresh = super().update_factors(state, g, hyper)
        if self.sides is not None and self.sides.values == "present":
            now = {**state, **fresh}
            for side, factor in enumerate(FACTORS):
                if state[factor].numel():
                    fresh[VALUES[side]] = self._values_of(now[factor], state[BASES[side]])
        return fresh

    def factor_inputs(self, state: State, g: Tensor, hyper: Hyper, count: Tensor) -> tuple[dict[str, Tensor], State]:
        """The factors' inputs, and with coupling averages of values too."""
        if self.coupling is None:
            return super().factor_inputs(state, g, hyper, count)
        left, right = self._bases(state)
        x = self.to_blocks(g.to(left.dtype))
        images = {
            "left": matmul(x, right) if right.numel() else x,
            "right": matmul(x.mT, left) if left.numel() else x.mT,
        }
        # The first gradient makes the bases. Until then the metric of the other side is the identity.
        started = count > 1
        values = self._values(state, images, self.coupling, self.rate(hyper), started)
        return self._measured(state, images, self.coupling, started), values

    @property
    def bounds_read_state(self) -> bool:
        return super().bounds_read_state or self.coupling is not None

    def gains(self, states: Sequence[State]) -> Tensor | float:
        if self.coupling is None:
            return super().gains(states)
        most = torch.ones(len(states), dtype=torch.float64, device=states[0][FACTORS[0]].device)
        alike: dict[int, list[tuple[int, Tensor]]] = {}
        for i, state in enumerate(states):
            for values in (state[key] for key in VALUES if state[key].numel()):
                alike.setdefault(values.shape[-1], []).append((i, values))
        for some in alike.values():
            inverse = self.coupling.whitening(torch.cat([values for _, values in some]))
            owners = torch.tensor([i for i, values in some for _ in values]).to(most.device, non_blocking=True)
            most.scatter_reduce_(0, owners, inverse.double().square().amax(-1), "amax")
        return most

    def _values_of(self, factor: Tensor, basis: Tensor) -> Tensor:
        """diag(Q^T P Q)."""
        q = wide(basis)
        return self._resolved(total(matmul(wide(factor), q) * q, -2))

    def _resolved(self, values: Tensor) -> Tensor:
        """Values not below what rounding leaves of the largest: a direction without a gradient would be divided by it.

        A unit in the last place of factors in bf16; else sqrt(n), about what products of length n add up to.
        """
        if self.dtype is None:
            resolution = torch.finfo(values.dtype).eps * values.shape[-1] ** 0.5
        else:
            resolution = torch.finfo(self.dtype).eps
        return torch.maximum(values, values.amax(-1, keepdim=True) * resolution)

    def _measured(self, state: State, images: State, sides: Sides, started: Tensor) -> State:
        """Y with Y Y^T = G R^-1 G^T / n on the left side, and so on the right; G G^T / n before the start."""
        inputs: State = {}
        for factor, other in (("left", RIGHT), ("right", LEFT)):
            y, values = images[factor], state[other]
            if values.numel():
                y = y * torch.where(started, sides.whitening(values).unsqueeze(-2), 1)
            inputs[factor] = y / max(1, y.shape[-1]) ** 0.5
        return inputs

    def _values(self, state: State, images: State, sides: Sides, beta: Number, started: Tensor) -> State:
        """Averages of the squared entries of the rotated gradient, over the other side's metric."""
        left, fresh = wide(state[BASES[0]]), {}
        squares = (matmul(left.mT, images["left"]) if left.numel() else images["left"]).square()
        for key, other, y in ((LEFT, RIGHT, squares), (RIGHT, LEFT, squares.mT)):
            if state[key].numel():
                if state[other].numel():
                    y = y * sides.whitening(state[other]).square().unsqueeze(-2)
                mixed = sides.limit(state[key] * beta + total(y, -1) / max(1, y.shape[-1]) * (1 - beta))
                fresh[key] = torch.where(started, mixed.to(state[key].dtype), state[key])
        return fresh

    def update_factors_in_place(
        self, stacks: rotated.Stacks, grads: Sequence[Tensor], hyper: Hyper, flags: Sequence[Tensor]
    ) -> bool:
        if self.coupling is None:
            return super().update_factors_in_place(stacks, grads, hyper, flags)
        beta = self.rate(hyper)
        if not super()._updates_factors_alone or not self._averages_values or not isinstance(beta, float):
            return False
        if not 0 <= beta < 1 or not stacks.supports_coupled_update(grads):
            return False
        rotated.update_coupled(grads, stacks, flags, beta, self.coupling.limited)
        return True

    @property
    def _averages_values(self) -> bool:
        return self.sides is not None and self.sides.values == "average"

    @property
    def _updates_factors_alone(self) -> bool:
        present = self.sides is not None and self.sides.values == "present"
        return super()._updates_factors_alone and self.coupling is None and not present

    # ---- the refresh ------------------------------------------------------------------------------------------------

    def refresh_in_place(self, stacks: rotated.Stacks, states: Sequence[State], flags: Sequence[Tensor]) -> bool:
        """One call tracks all bases; those that it gets no hold of are solved exactly."""
        if not self.tracks_in_place(stacks.factors[0].device) or not stacks.supports_track():
            return False
        for i, side, matrix in rotated.track(stacks, flags, LIMITS, ACCEPTED, TRIES):
            self.solve_in_place(states[i], side, matrix)
        return True

    def tracks_in_place(self, device: torch.device) -> bool:
        """Whether a refresh that is taken at once is that of `steepest.ops.rotated.track`, and of what `solve_in_place`
        gives where that leaves a basis.
        """
        plain = self.method == "auto" and self.transport != "fixed" and (self.sides is None or self._averages_values)
        return plain and not self.delay and not self.blocks and self.dtype is None and _tracks(device)

    def solve_in_place(self, state: State, side: int, matrix: int) -> None:
        """The exact basis of one matrix, and all that goes with it."""
        keys = [FACTORS[side], BASES[side], STATUS[side]]
        keys += [self.inner.key] if isinstance(self.inner, Diagonal) else []
        keys += [] if self.sides is None else [VALUES[side]]
        one = {key: state[key][matrix : matrix + 1] for key in keys}
        solved = _solved(one[FACTORS[side]], one[BASES[side]])
        fresh: State = {STATUS[side]: solved.status}
        made = {NEXT[side]: solved.basis, ORDERS[side]: solved.order, STATUS[side]: solved.status}
        self._turn({**one, **made}, fresh, side)
        for name, t in fresh.items():
            one[name].copy_(t)

    def needs_exact(self, states: Sequence[State], owners: Sequence[tuple[int, int]]) -> list[bool]:
        first, side = owners[0]
        if self.method != "auto" or _tracks(states[first][FACTORS[side]].device):
            return super().needs_exact(states, owners)
        statuses = streams.read([states[i][STATUS[side]] for i, side in owners])
        return [bool(status & WANTS_EXACT) for status in statuses]

    def solve(self, some: Gathered) -> Mapping[Pair, Tensor]:
        factors, bases = some.tensors
        refreshed = self._refreshed(factors, bases, some.exact)
        given = {NEXT: refreshed.basis, ORDERS: refreshed.order, STATUS: refreshed.status}
        return {**given, NEXT_VALUES: self._resolved(refreshed.values)} if self._of_refresh else given

    def _refreshed(self, factors: Tensor, bases: Tensor, exact: list[bool]) -> Refreshed:
        """Bases made by the exact solver where that is wanted, which reads the device, and by the method elsewhere."""
        if self.method == "auto" and _tracks(factors.device):
            refresh = functools.partial(tracked, values=self._of_refresh)
        else:
            refresh = functools.partial(eigh_refresh, method=self.method)
        return _by_turns(factors, bases, exact, refresh)

    def new_metric(self, state: State) -> State:
        """The new bases, and the values and second moments that belong to them."""
        fresh: State = {}
        for side, factor in enumerate(FACTORS):
            if state[factor].numel():
                self._turn(state, fresh, side)
        return fresh

    def _turned(self, state: State, side: int) -> Tensor:
        """The matrices whose averages are mixed by the rotation; others stay with their columns."""
        every = torch.arange(len(state[BASES[side]]), device=state[BASES[side]].device)
        if self.transport != "hadamard":
            return every[:0]
        if self.method != "auto" or not _tracks(every.device):
            return every
        return every[(state[STATUS[side]] & FELL_BACK) != 0]

    def _turn(self, state: State, fresh: State, side: int) -> None:
        old, order = state[BASES[side]], state[ORDERS[side]]
        basis = fresh[BASES[side]] = state[NEXT[side]].to(old.dtype)
        turned = self._turned(state, side)

        def moved(v: Tensor, dim: int = -1) -> Tensor:
            """Averages of squares, one of whose dimensions is this side's."""
            if self.transport == "fixed":
                return v
            if len(turned) == 0:
                return _reordered(v, order, dim)
            squares = matmul(wide(old[turned]).mT, wide(basis[turned])).square().to(v.dtype)
            mixed = matmul(v[turned], squares) if dim == -1 else matmul(squares.mT, v[turned])
            return mixed if len(turned) == len(v) else _reordered(v, order, dim).index_copy(0, turned, mixed)

        if self.sides is not None:
            average, now = state[VALUES[side]], state[FACTORS[side]]
            if self.sides.values == "average":
                fresh[VALUES[side]] = moved(average.unsqueeze(-2)).squeeze(-2)
            else:
                fresh[VALUES[side]] = state[NEXT_VALUES[side]] if self._of_refresh else self._values_of(now, basis)
        if isinstance(self.inner, Diagonal):
            v = fresh.get(self.inner.key, state[self.inner.key])
            fresh[self.inner.key] = moved(v, side - 2)


def _count(inner: Diagonal, step: Tensor | None, like: Tensor) -> Tensor:
    """The steps that the inner part corrects by; without elements where it does not."""
    return step if step is not None and inner.bias_correction else like.new_empty(0)


def _reordered(v: Tensor, order: Tensor, dim: int) -> Tensor:
    """v, (b, m, n), with what was at place order[i] at place i of its last dimension (-1) or that before (-2)."""
    if dim == -2:  # rows of memory: of all matrices at once
        first = torch.arange(len(v), device=v.device).mul_(v.shape[-2])
        return v.flatten(0, 1).index_select(0, (order + first[:, None]).flatten()).view_as(v)
    if len(v) == 1:
        return v.index_select(-1, order.flatten())
    return v.gather(-1, order.unsqueeze(-2).expand_as(v))


def _tracks(device: torch.device) -> bool:
    """Whether "auto" is orthogonal iteration and, where that gets no hold, the exact solver at once."""
    return device.type == "cpu"


def _by_turns(
    factors: Tensor, bases: Tensor, exact: list[bool], refresh: Callable[[Tensor, Tensor], Refreshed]
) -> Refreshed:
    """The refresh, and the exact solver of those that are to be solved exactly."""
    if not any(exact):
        return refresh(factors, bases)
    if all(exact):
        return _solved(factors, bases)
    parts = []
    for kind, how in ((True, _solved), (False, refresh)):
        index = torch.tensor([i for i, flag in enumerate(exact) if flag is kind], device=factors.device)
        parts.append((index, how(factors[index], bases[index])))
    back = torch.cat([index for index, _ in parts]).argsort()
    return Refreshed(*(torch.cat(each)[back] for each in zip(*(refreshed for _, refreshed in parts), strict=True)))


def _solved(factors: Tensor, bases: Tensor) -> Refreshed:
    solved = eigh_refresh(factors, bases, method="eigh")
    return solved._replace(status=solved.status | FELL_BACK) if _tracks(factors.device) else solved
