"""A norm in the eigenbases of running Kronecker factors:  ||X|| = N(P(Q_L^T X Q_R)).

    L <- L + w (G G^T - L)        L = Q_L diag(l) Q_L^T,   w = (1 - beta) / (1 - beta^t), the average of all so far
    R <- R + w (G^T G - R)        R = Q_R diag(r) Q_R^T    (beta = 1: sums)

    into(x) = P^-T(Q_L^T x Q_R)        back(d) = Q_L (P^-1 d) Q_R^T

P, the `inner` preconditioner, is the identity (SPlus), elementwise with statistics of the rotated gradient (SOAP), or
one value for a row and one for a column (`Sides`: Shampoo, KL-Shampoo). With `coupling` each factor is measured in the
metric of the other, as the KL divergence between Gaussians asks for (arXiv:2509.03378):

    L <- L + w (G R^-1 G^T / n - L)    l <- beta l + (1 - beta) mean_j (Q_L^T G Q_R)_ij^2 / r_j      and so for R, r

Factors, bases and values are fp32 (fp64 for fp64 gradients), and the bases are refreshed now and then by
`steepest.linalg.basis`. Sources: SOAP arXiv:2409.11321, Shampoo arXiv:1802.09568, SPlus arXiv:2506.07254.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ...linalg.basis import Method, eigh_refresh
from ...linalg.blocks import block_length, from_blocks, parts, to_blocks
from ...ops.products import syrk_ema
from ..hyper import Hyper, Number, mass
from .base import State
from .diagonal import Diagonal
from .none import Identity
from .sides import LEFT, RIGHT, Sides

FACTORS, BASES, VALUES = ("left", "right"), ("left_basis", "right_basis"), (LEFT, RIGHT)
LEARNED = "learned"
_IDENTITY = Identity()


class Phase(NamedTuple):
    """What a step does besides stepping: takes the gradient into the factors before or after, refreshes the bases."""

    before: bool = False
    steps: bool = True
    after: bool = False
    refreshes: bool = False
    exact: bool = False


@dataclass(frozen=True)
class Rotated:
    """The part; see the module.

    beta: decay rate of the factors, None for that of the second moment, 1 for sums.
    side: "both", or "smaller", the one with fewer rows (one-sided Shampoo, ASGO).
    max_dim: a longer side has no factor, or with blocks=True is cut into blocks of at most this length, each with
        factors of its own.
    given: the factors come from elsewhere (K-FAC's hooks write them).
    every: steps between refreshes; method: of `eigh_refresh`; exact: how many of the first refreshes are exact.
    first: what the first step does. "learn": its gradient makes the bases it is stepped in; "identity": it is stepped
        without a rotation, as SPlus; "skip": it only makes the bases, as SOAP's authors have it. In its own bases the
        first gradient is diagonal: an elementwise inner part would divide the rounding errors beside it by themselves.
    current: every gradient goes into the factors before its step, and not after.
    transport: averages of squares at a refresh: "slots" stay with their columns, which a refresh keeps in place or says
        where they went; "hadamard" mixes them by the squares of the rotation, as if rotated entries were independent.
    """

    inner: Identity | Diagonal | Sides = _IDENTITY
    coupling: Sides | None = None
    beta: float | None = None
    side: Literal["both", "smaller"] = "both"
    max_dim: int = 10000
    blocks: bool = False
    given: bool = False
    every: int = 10
    method: Method = "auto"
    exact: int = 1
    first: Literal["learn", "identity", "skip"] = "learn"
    current: bool = False
    transport: Literal["slots", "hadamard"] = "slots"

    elementwise = False

    def __post_init__(self) -> None:
        if self.beta is not None and not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta of the factors should be in [0, 1] but is: {self.beta}")
        if self.beta == 1 and self.coupling is not None:
            raise ValueError(
                "beta (shampoo_beta) of coupled factors should be below 1 but is 1: their values would never move"
            )
        for name, least in (("every", 1), ("max_dim", 1), ("exact", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} should be a whole number of at least {least} but is: {value!r}")
        if self.method not in get_args(Method):
            raise ValueError(f"method {self.method!r} is not known; use one of {', '.join(get_args(Method))}")
        if self.side not in ("both", "smaller"):
            raise ValueError(f"side {self.side!r} is not known; use 'both' or 'smaller'")
        if self.first not in ("learn", "identity", "skip"):
            raise ValueError(f"first {self.first!r} is not known; use 'learn', 'identity' or 'skip'")
        if self.transport not in ("slots", "hadamard"):
            raise ValueError(f"transport {self.transport!r} is not known; use 'slots' or 'hadamard'")

    @property
    def sides(self) -> Sides | None:
        """The part that reads a value for every row and column."""
        return self.inner if isinstance(self.inner, Sides) else self.coupling

    @property
    def keys(self) -> tuple[str, ...]:
        values = VALUES if self.sides is not None else ()
        return (*FACTORS, *BASES, *values, *(key for key in self.inner.keys if key not in values), LEARNED)

    @property
    def counts_steps(self) -> bool:
        return self.inner.counts_steps

    # ---- shapes -----------------------------------------------------------------------------------------------------

    def input_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Of what `into` gives for (batch, m, n): (batch * blocks, rows, cols)."""
        batch, m, n = shape
        if not self.blocks:
            return shape
        rows, cols = block_length(m, self.max_dim), block_length(n, self.max_dim)
        return batch * parts(m, rows) * parts(n, cols), rows, cols

    def init(self, g: Tensor) -> State:
        """State before the first gradient; g: (batch, m, n)."""
        count, rows, cols = self.input_shape((len(g), *g.shape[-2:]))
        wide = torch.promote_types(g.dtype, torch.float32)
        like = torch.zeros((count, rows, cols), dtype=wide, device=g.device)
        state: State = {}
        lengths = dict(zip(FACTORS, (rows, cols), strict=True))
        present = {key for key, length in lengths.items() if length <= self.max_dim}
        if self.side == "smaller" and len(present) == 2:
            present = {"left" if rows <= cols else "right"}
        for factor, basis, values in zip(FACTORS, BASES, VALUES, strict=True):
            n = lengths[factor] if factor in present else 0
            shape = (count, n, n) if n else (0,)
            state[factor] = like.new_zeros(shape)
            state[basis] = torch.eye(n, dtype=wide, device=g.device).repeat(count, 1, 1) if n else like.new_empty(0)
            if self.sides is not None:
                state[values] = like.new_full((count, n) if n else (0,), self.sides.initial)
        if isinstance(self.inner, Diagonal):
            state |= self.inner.init(like)
        state[LEARNED] = torch.zeros((), dtype=torch.float32, device=g.device)
        return state

    # ---- the change of variables ------------------------------------------------------------------------------------

    def observe(self, state: State, g: Tensor, hyper: Hyper) -> State:
        """Statistics of the inner part that every gradient adds to, in the present bases."""
        if not isinstance(self.inner, Diagonal):
            return {}
        return self.inner.observe(state, self._rotate(state, self._blocks(state, g)), hyper)

    def into(self, state: State, x: Tensor, hyper: Hyper, step: Tensor | None) -> Tensor:
        """(batch, m, n) -> (batch * blocks, rows, cols)."""
        return self.inner.into(state, self._rotate(state, self._blocks(state, x)), hyper, step)

    def back(self, state: State, d: Tensor, hyper: Hyper, step: Tensor | None) -> Tensor:
        """(batch * blocks, rows, cols), the same rotated back; `unblock` makes it the matrix's."""
        u = self.inner.back(state, d, hyper, step)
        left, right = (state[key] for key in BASES)
        u = u.to(left.dtype)
        u = left @ u if left.numel() else u
        return u @ right.mT if right.numel() else u

    def unblock(self, u: Tensor, m: int, n: int) -> Tensor:
        return from_blocks(u, m, n)

    def _blocks(self, state: State, x: Tensor) -> Tensor:
        _, rows, cols = self.input_shape((len(x), *x.shape[-2:]))
        return to_blocks(x.to(state[BASES[0]].dtype), rows, cols)

    def _rotate(self, state: State, blocks: Tensor) -> Tensor:
        left, right = (state[key] for key in BASES)
        x = left.mT @ blocks if left.numel() else blocks
        return x @ right if right.numel() else x

    # ---- what is learned --------------------------------------------------------------------------------------------

    def phase(self, clock: int) -> Phase:
        """What the step after `clock` earlier ones does."""
        start = clock == 0
        number = clock if self.first == "skip" else clock + 1
        due = start or number % self.every == 0
        before = self.current or (start and self.first == "learn")
        steps = not (start and self.first == "skip")
        earlier = -(-clock // self.every)  # refreshes
        return Phase(before, steps, not before, due, due and earlier < self.exact)

    def learn(self, state: State, g: Tensor, hyper: Hyper) -> State:
        """The factors, and averages of values, after gradient g."""
        learned = state[LEARNED] + 1
        fresh: State = {LEARNED: learned}
        if not self.given:
            fresh |= self._factors(state, g, hyper, learned)
        if self.sides is not None and self.sides.values == "present":
            for factor, basis, values in zip(FACTORS, BASES, VALUES, strict=True):
                if state[factor].numel():
                    q = state[basis]
                    fresh[values] = ((fresh.get(factor, state[factor]) @ q) * q).sum(-2)
        return fresh

    def _factors(self, state: State, g: Tensor, hyper: Hyper, learned: Tensor) -> State:
        """The factors after gradient g, and averages of values."""
        fresh: State = {}
        beta = hyper.beta2 if self.beta is None else self.beta
        if self.coupling is None:
            _, rows, cols = self.input_shape((len(g), *g.shape[-2:]))
            x = to_blocks(g, rows, cols)  # products of narrow numbers are exact in wide sums
            seen = {"left": x, "right": x.mT}
        else:
            x = self._blocks(state, g)
            # The first gradient makes the bases; only then is there a metric of the other side.
            started = learned > 1
            images = self._images(state, x)
            fresh |= self._values(state, images, self.coupling, beta, started)
            seen = self._measured(state, images, self.coupling, started)
        sums = isinstance(beta, float | int) and beta == 1
        weight = None if sums else (1 - beta) / mass(beta, learned)
        for factor, y in seen.items():
            if state[factor].numel():
                fresh[factor] = syrk_ema(state[factor], y, weight)
        return fresh

    def _images(self, state: State, x: Tensor) -> State:
        """G Q_R for the left side and G^T Q_L for the right one."""
        turned: State = {}
        for factor, basis, y in (("left", state[BASES[1]], x), ("right", state[BASES[0]], x.mT)):
            turned[factor] = y @ basis if basis.numel() else y
        return turned

    def _measured(self, state: State, images: State, sides: Sides, started: Tensor) -> State:
        """Y with Y Y^T = G R^-1 G^T / n on the left side, and so on the right; G G^T before the start."""
        found: State = {}
        for factor, other in (("left", RIGHT), ("right", LEFT)):
            y, values = images[factor], state[other]
            scale = y.new_full((), max(1, y.shape[-1]) ** -0.5)
            if values.numel():
                scale = sides.whitening(values).unsqueeze(-2) * scale
            found[factor] = y * torch.where(started, scale, 1)
        return found

    def _values(self, state: State, images: State, sides: Sides, beta: Number, started: Tensor) -> State:
        """Averages of the squared entries of the rotated gradient, over the other side's metric."""
        left, fresh = state[BASES[0]], {}
        squares = (left.mT @ images["left"] if left.numel() else images["left"]).square()
        for key, other, y in ((LEFT, RIGHT, squares), (RIGHT, LEFT, squares.mT)):
            if state[key].numel():
                if state[other].numel():
                    y = y * sides.whitening(state[other]).square().unsqueeze(-2)
                mixed = state[key] * beta + y.sum(-1) / max(1, y.shape[-1]) * (1 - beta)
                fresh[key] = torch.where(started, mixed.to(state[key].dtype), state[key])
        return fresh

    def refresh(self, states: Sequence[State], *, exact: bool = False) -> list[State]:
        """New bases for all of these at once, with the values and second moments that belong to them.

        Factors of one size are refreshed together, whoever they belong to.
        """
        fresh: list[State] = [{} for _ in states]
        sizes: dict[tuple[int, torch.dtype, torch.device], list[tuple[int, int]]] = {}
        for i, state in enumerate(states):
            for side, key in enumerate(FACTORS):
                p = state[key]
                if p.numel():
                    sizes.setdefault((p.shape[-1], p.dtype, p.device), []).append((i, side))
        for some in sizes.values():
            factors = [states[i][FACTORS[side]] for i, side in some]
            bases = [states[i][BASES[side]] for i, side in some]
            # On a CPU an exact solver takes no longer than a rotation, and the stages of "auto" three times as long.
            host = factors[0].device.type == "cpu"
            method = "eigh" if exact or (host and self.method == "auto") else self.method
            found = eigh_refresh(torch.cat(factors), torch.cat(bases), method=method)
            counts = [len(p) for p in factors]
            found_of = zip(*(t.split(counts) for t in (found.basis, found.values, found.order)), strict=True)
            for (i, side), (basis, values, order) in zip(some, found_of, strict=True):
                self._take(states[i], fresh[i], side, basis, values, order)
        return fresh

    def _take(self, state: State, fresh: State, side: int, basis: Tensor, values: Tensor, order: Tensor) -> None:
        def moved(v: Tensor) -> Tensor:
            """Averages of squares, whose last dimension is this side's."""
            if self.transport == "hadamard":
                return v @ (state[BASES[side]].mT @ basis).square()
            return v.gather(-1, order.unsqueeze(-2).expand_as(v))

        fresh[BASES[side]] = basis
        if self.sides is not None:
            own = VALUES[side]
            average = self.sides.values == "average"
            fresh[own] = moved(state[own].unsqueeze(-2)).squeeze(-2) if average else values
        if isinstance(self.inner, Diagonal):
            v = fresh.get(self.inner.key, state[self.inner.key])
            fresh[self.inner.key] = moved(v) if side else moved(v.mT).mT
