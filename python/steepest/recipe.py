"""A method is a choice of parts; `step_one` is the whole algorithm.

    G <- corrected(G)            by weight decay, where it is a part of the gradient, and by the gradient before
    m  = momentum(G)             what is remembered
    P.observe(G)                 statistics, from the raw gradient; and those of the transforms
    m  = m_K                     of a recipe with a submatrix, its largest rows or columns; u is 0 beside them
    x  = P.into(m)               to the variables in which the norm is the base norm
    d  = direction(x)            steepest there, of length 1 ("lmo") or of length dual_norm(x) ("dual")
    u  = transform(P.back(d))    back to the weight's variables, and through what may remember updates
    W <- decay(W) - lr step_factor ratio(m, n) u        step_factor: 1 but where layers are coupled
    P.update_factors(G)          factors, and now and then what is made of them, where P has any: before or after
    W <- retraction(W)           onto a sphere, where a constraint says so
    average(W)                   of the iterates, where one is kept

This is Algorithm 1 of arXiv:2510.10777 with the two step types of its section 2: "lmo" is constrained steepest descent
(Muon, SignSGD, MuAdam), "dual" the regularized one (SGD, Adam). `step_one` is the reference: plain torch, any dtype,
nothing in place. `steepest.step` does the same for all parameters at once and must agree with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .matrices import Piece
from .parts import (
    Average,
    Blockwise,
    Decay,
    Diagonal,
    Direction,
    Frobenius,
    Hyper,
    Identity,
    Momentum,
    Precondition,
    Rounding,
    Sphere,
    Submatrix,
    UpdateTransform,
    VarianceReduction,
    shape_ratio,
)
from .parts.precondition import Kronecker, Phase, State
from .state_layout import Codes, Layout, StateSpec, empty_state, piece_view

__all__ = ["ADAMW", "CLOCK", "Recipe", "State", "adamw", "largest", "square_sum", "step_one"]

ROOM = 2.0**-24  # what a sum may take at once of the largest number
ROOM_IN_FP16 = 2.0**-7
CLOCK = "clock"  # steps that factors have seen: int64 on the host, where it is decided when to refresh


@dataclass(frozen=True)
class Recipe:
    """The parts of a method. Frozen and hashable: two equal recipes are one program.

    momentum: None: the direction is asked about the gradient itself.   scale: "lmo" or "dual".
    transforms: of the update, one after another.   average: of the iterates; None: none is kept.
    constraint: a sphere that every matrix stays on, whose radii are state besides that of the recipe; None: none.
    submatrix: the part of the momentum that is stepped by, and damped then: of kind "error_feedback"; None: all of it.
    storage: how averages of gradients, of updates and of squares are stored between steps; None: as they are. What a
    recipe does it does with what the codes stand for.
    """

    # The tracer of torch 2.10 and 2.11 knows no function with an object for a default.
    momentum: Momentum | None = field(default_factory=Momentum)
    precondition: Precondition = field(default_factory=Identity)
    direction: Direction = field(default_factory=Frobenius)
    scale: Literal["lmo", "dual"] = "lmo"
    adjust_lr: str = "none"
    decay: Decay = field(default_factory=Decay)
    rounding: Rounding = field(default_factory=Rounding)
    transforms: tuple[UpdateTransform, ...] = ()
    average: Average | None = None
    constraint: Sphere | None = None
    variance_reduction: VarianceReduction | None = None
    submatrix: Submatrix | None = None
    storage: Blockwise | None = None

    #: whether the direction's input depends on the weight itself
    reads_weight: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.scale not in ("lmo", "dual"):
            raise ValueError(f"scale {self.scale!r} is not known; use 'lmo' (length lr in the norm) or 'dual'")
        shape_ratio(self.adjust_lr, 1, 1)
        self._check_submatrix()
        keys = self.keys
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise ValueError(f"two parts of the recipe keep state under {twice!r}: give one of them another key")
        if self.storage is not None and isinstance(self.precondition, Diagonal) and self.precondition.average == "sum":
            raise ValueError(
                "a sum of squares grows by less than half the distance of two codes and would stand still: leave out "
                "state_bits=8, or take an average of squares (Adam)"
            )

    def _check_submatrix(self) -> None:
        kind = None if self.momentum is None else self.momentum.kind
        if (self.submatrix is not None) != (kind == "error_feedback"):
            raise ValueError(
                f"a submatrix and momentum of kind 'error_feedback' go together, but here is {self.submatrix} with "
                f"momentum of kind {kind!r}: give both or none"
            )
        if self.submatrix is None:
            return
        if not isinstance(self.precondition, Identity):
            name = type(self.precondition).__name__
            raise ValueError(f"a submatrix is of the momentum, not of the variables of {name}: use Identity()")
        layouts = {spec.layout for transform in self.transforms for spec in transform.specs}
        if "elementwise" in layouts or ("row" in layouts and self.submatrix.along != "rows"):
            raise ValueError(
                f"a submatrix along {self.submatrix.along!r} does not go with transforms that remember "
                f"{sorted(layouts)}: it takes state of matrices, and along 'rows' of rows"
            )

    # ---- state ------------------------------------------------------------------------------------------------------

    @property
    def counts_steps(self) -> bool:
        """Whether the state holds a step count t."""
        parts = (self.momentum, self.precondition, self.rounding, *self.transforms)
        return self.variance_reduction is not None or any(part.counts_steps for part in parts if part is not None)

    @property
    def starts_first(self) -> bool:
        """Whether averages begin with the first gradient."""
        return self.momentum is not None and self.momentum.start == "first"

    @property
    def kronecker(self) -> Kronecker | None:
        """The preconditioner, where it has Kronecker factors."""
        return self.precondition if isinstance(self.precondition, Kronecker) else None

    @property
    def layouts(self) -> dict[str, Layout]:
        """The state tensors of a single matrix and how each lies beside the parameter, in a fixed order."""
        return dict(self._state_items)

    @property
    def _state_items(self) -> tuple[tuple[str, Layout], ...]:
        of_metric: Layout = "elementwise" if self.kronecker is None else "factor"
        items: list[tuple[str, Layout]] = [] if self.momentum is None else [(self.momentum.key, "elementwise")]
        items += [(key, of_metric) for key in self.precondition.keys]
        items += [(spec.key, spec.layout) for transform in self.transforms for spec in transform.specs]
        items += [(key, "elementwise") for key in self.rounding.keys]
        items += [(spec.key, spec.layout) for spec in self._average_specs]
        items += [(spec.key, spec.layout) for spec in self._correction_specs]
        items += [(CLOCK, "host")] if self.kronecker is not None else []
        items += [("step", "scalar")] if self.counts_steps else []
        return tuple(items)

    @property
    def _average_specs(self) -> tuple[StateSpec, ...]:
        return () if self.average is None else self.average.specs

    @property
    def _correction_specs(self) -> tuple[StateSpec, ...]:
        return () if self.variance_reduction is None else self.variance_reduction.specs

    @property
    def averages(self) -> dict[str, Codes]:
        """The state that can be stored in codes, and as what."""
        inner = getattr(self.precondition, "inner", self.precondition)
        averages: dict[str, Codes] = {} if self.momentum is None else {self.momentum.key: "signed"}
        if isinstance(inner, Diagonal):
            averages[inner.key] = "squares"
        specs = (spec for transform in self.transforms for spec in transform.specs)
        return averages | {spec.key: spec.codes for spec in specs if spec.codes and spec.layout == "elementwise"}

    def names_of_averages(self, pieces: int) -> dict[str, Codes]:
        """`averages` by their names in the state of a parameter of so many pieces."""
        names = [self.names(number) for number in range(pieces)]
        return {of_piece.get(key, key): kind for key, kind in self.averages.items() for of_piece in names}

    def coded(self, shape: Sequence[int], pieces: int) -> dict[str, Codes]:
        """`names_of_averages` that a parameter of this shape stores in codes: none where the recipe has no storage."""
        return self.names_of_averages(pieces) if self.storage is not None and self.storage.supports(shape) else {}

    @property
    def may_lack(self) -> tuple[str, ...]:
        """The keys that state of the same method may be without: what is kept of the weights begins at any step."""
        return (*self.rounding.keys, *self.average_keys)

    @property
    def average_keys(self) -> tuple[str, ...]:
        """The keys of the average, which are there together or not at all."""
        return tuple(spec.key for spec in self._average_specs)

    @property
    def nonnegative(self) -> tuple[str, ...]:
        """The keys of the state whose entries are >= 0: second moments, and what counts."""
        specs = [spec for transform in self.transforms for spec in transform.specs]
        keys = [spec.key for spec in (*specs, *self._average_specs) if spec.nonnegative]
        of_metric = self.precondition.keys if isinstance(self.precondition, Diagonal) else ()
        return (*keys, *of_metric, *(() if self.kronecker is None else self.kronecker.nonnegative))

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of `layouts`, each as often as a part names it."""
        return tuple(key for key, _ in self._state_items)

    @property
    def by_matrix(self) -> bool:
        """Whether a step needs to know the matrices of a weight before and after its direction."""
        return self.kronecker is not None or self.submatrix is not None or bool(self.transforms)

    @property
    def stores_weights(self) -> bool:
        """Whether something of the weight goes into the state or into a direction, where it has to be finite."""
        return self.average is not None or self.reads_weight

    @property
    def measures_gradients(self) -> bool:
        """Whether a step looks at whole gradients of matrices, besides what is averaged elementwise."""
        read = (transform.measures_gradients or transform.reads_gradient for transform in self.transforms)
        return self.kronecker is not None or any(read)

    @property
    def leaves_directions(self) -> bool:
        """Whether the update is what the preconditioner makes of the momentum, and nothing comes between or after."""
        plain = isinstance(self.direction, Frobenius) and self.scale == "dual"
        return plain and self.submatrix is None and not self.transforms

    def input_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The shape of the direction's input for matrices (batch, m, n)."""
        if self.submatrix is not None:
            return self.submatrix.shape(shape)
        return shape if self.kronecker is None else self.kronecker.input_shape(shape)

    def names(self, piece: int) -> dict[str, str]:
        """Keys of Kronecker factors and all that goes with them, and the names they have in the state of a parameter.

        Elementwise state is the whole parameter's. Factors belong to matrices of one shape: a second piece has its own.
        """
        keys = () if self.kronecker is None else self.kronecker.keys
        return {key: f"{key}.{piece}" if piece else key for key in keys}

    def init(self, w: Tensor, g: Tensor | None = None, pieces: Sequence[Piece] | None = None) -> State:
        """State of weight w before its first gradient, whose dtype g has (None: that of w); `step` is 0-d fp32.

        pieces: how w is read as matrices; None: it is (..., m, n), or where it has fewer dimensions one row. Of a part
        of a weight these are the matrices that have state here; factors of none are empty, so that names are the same.
        """
        g = w if g is None else g
        pieces = (_whole(w),) if pieces is None else pieces
        state = {} if self.momentum is None else {self.momentum.key: self.momentum.init(g)}
        for spec in (spec for transform in self.transforms for spec in transform.specs):
            state[spec.key] = empty_state(spec, g, pieces)
        state |= self.rounding.init(w) | {spec.key: empty_state(spec, w, pieces) for spec in self._average_specs}
        state |= {spec.key: empty_state(spec, g, pieces) for spec in self._correction_specs}
        if self.kronecker is None:
            state |= self.precondition.init(g)
        else:
            state[CLOCK] = torch.zeros((), dtype=torch.int64, device="cpu")
            for number, piece in enumerate(pieces):
                factors = self.kronecker.init(g.new_empty(()).expand(piece.shape))
                state |= {name: factors[key] for key, name in self.names(number).items()}
        if self.counts_steps:
            state["step"] = empty_state(StateSpec("step", "scalar", torch.float32), g, pieces)
        return state

    # ---- which gradients it takes -----------------------------------------------------------------------------------

    def largest_gradient(self, dtype: torch.dtype) -> float:
        """The largest magnitude of an entry of a gradient of this dtype, after which everything elementwise is finite.

        Half the largest number, so that the difference of a gradient and an average of such has room, or what the
        momentum's dtype holds; its root where squares are kept. A heavy ball, or a sum of squares, has room for 2^24,
        one in fp16 for 2^7.
        """
        wide = torch.promote_types(dtype, torch.float32)
        most = torch.finfo(wide).max
        limit = most / 2
        if self.momentum is not None:
            of_momentum = torch.finfo(self.momentum.dtype_for(dtype)).max
            ball = self.momentum.kind != "ema"
            room = 1.0 if not ball else ROOM if of_momentum > 2.0**64 else ROOM_IN_FP16
            limit = min(limit, of_momentum * room)
        if isinstance(self.precondition, Diagonal):
            room = ROOM if self.precondition.average == "sum" else 1.0
            limit = min(limit, (most * room) ** 0.5)
        return limit

    def limits(self, dtype: torch.dtype) -> tuple[float, float]:
        """The largest magnitude of an entry, and the largest sum of squares, of a gradient of this dtype that `accepts`
        takes, of a state that is not asked.
        """
        wide = torch.promote_types(dtype, torch.float32)
        square = math.inf if self.variance_reduction is None else torch.finfo(torch.float64).max
        if self.by_matrix:
            of_factors = None if self.kronecker is None else self.kronecker.dtype
            square = min(square, torch.finfo(of_factors or wide).max / 4)
        return self.largest_gradient(dtype), square

    def accepts(
        self, largest: Tensor, square: Tensor, state: State, names: Sequence[Mapping[str, str]], dtype: torch.dtype
    ) -> Tensor:
        """0-d bool: whether what a gradient of this dtype leaves in the state is finite.

        largest, square: 0-d, the magnitude of its largest entry and the sum of its squares, infinite or NaN where an
        entry is not finite.   names: of the keys of factors, for each piece (`Recipe.names`). Where the state is not
        asked (`accepts_by_state`) several gradients may be asked about at once, a number each.
        """
        most, most_square = self.limits(dtype)
        accepted = largest <= most
        if most_square < math.inf:
            accepted = accepted & (square <= most_square)
        if self.accepts_by_state and names:
            factors = [{key: state[name] for key, name in of_piece.items()} for of_piece in names]
            accepted = accepted & self.accepts_in(square, factors, dtype).all()
        return accepted

    def accepts_in(self, square: Tensor, factors: Sequence[State], dtype: torch.dtype) -> Tensor:
        """(factors,) bool: whether gradients with these sums of squares, one or as many, leave each of these finite."""
        assert self.kronecker is not None
        _, most_square = self.limits(dtype)
        return square * self.kronecker.gains(factors) + self.kronecker.sums(factors) <= most_square

    @property
    def accepts_by_state(self) -> bool:
        """Whether `accepts` asks the state."""
        return self.kronecker is not None and self.kronecker.bounds_read_state

    # ---- a step, in its order ---------------------------------------------------------------------------------------

    @property
    def corrects_gradient(self) -> bool:
        """Whether a step goes by another gradient than that of the loss."""
        return self.decay.method == "l2" or self.variance_reduction is not None

    def penalized(self, g: Tensor, value: Tensor, hyper: Hyper) -> Tensor:
        """The gradient with weight decay, where that is a part of it; value: the weight in fp32 (fp64 for fp64)."""
        return g.to(value.dtype) + value * hyper.weight_decay if self.decay.method == "l2" else g

    def corrected(self, state: State, g: Tensor, hyper: Hyper) -> Tensor:
        """A gradient as `penalized` gives it, corrected by the one before, and yet to be clipped."""
        return g if self.variance_reduction is None else self.variance_reduction.corrected(state, g, hyper)

    def square(self, g: Tensor) -> Tensor:
        """0-d fp64, the sum of squares of what `corrected` gives. In fp64 where `clipped` divides by it: sums of shards
        are then so near that of the whole that fp32 does not tell them apart.
        """
        return square_sum(g, torch.float64 if self.variance_reduction is not None else None)

    def clipped(self, g: Tensor, square: Tensor) -> Tensor:
        """The gradient that a step goes by, from what `corrected` gives and the sum of squares of all of it."""
        return g if self.variance_reduction is None else self.variance_reduction.clipped(g, square)

    def remembered_gradient(self, g: Tensor) -> State:
        """What is kept of a gradient, as `penalized` gives it, for the next one."""
        return {} if self.variance_reduction is None else {self.variance_reduction.key: g}

    def phase(self, state: State) -> Phase:
        """What a step from this state does; reads the host only."""
        return Phase() if self.kronecker is None else self.kronecker.phase(int(state[CLOCK]))

    def update_moments(self, state: State, g: Tensor, hyper: Hyper) -> State:
        """The state after gradient g but for factors, in the state's dtypes; the stored weight's part is not in it."""
        if self.starts_first:
            hyper = hyper.beginning(state["step"])
        fresh = {}
        if self.momentum is not None:
            m = state[self.momentum.key]
            fresh[self.momentum.key] = self.momentum.observe(m, g, hyper.beta1).to(m.dtype)
        fresh |= self.observe(state, g, hyper)
        if self.counts_steps:
            fresh["step"] = state["step"] + 1
        return fresh

    def observe(self, state: State, g: Tensor, hyper: Hyper) -> State:
        """What the preconditioner and the transforms keep elementwise, after gradient g."""
        fresh = {} if self.kronecker is not None else self.precondition.observe(state, g, hyper)
        for transform in self.transforms:
            fresh |= transform.observe(state, g, hyper)
        return fresh

    def observe_matrices(self, state: State, g: Tensor, hyper: Hyper) -> State:
        """What the metric of now and the transforms measure of a raw gradient (batch, m, n), after `update_moments`."""
        fresh = {} if self.kronecker is None else self.kronecker.observe(state, g, hyper)
        for transform in self.transforms:
            fresh |= transform.observe_matrices(state, g, hyper)
        return fresh

    def momentum_of(self, state: State, g: Tensor, hyper: Hyper) -> Tensor:
        """What the momentum reads, in the weight's variables."""
        if self.momentum is None:
            return g
        return self.momentum.read(state[self.momentum.key], g, hyper.beta1, state.get("step"), hyper.beta2)

    def direction_input(
        self, state: State, m: Tensor, hyper: Hyper, w: Tensor | None = None, chosen: Tensor | None = None
    ) -> Tensor:
        """What the direction is asked about: the momentum in the preconditioner's variables.

        m: what the momentum reads (`momentum_of`).   w: the weight in m's shape, for a recipe that `reads_weight`.
        chosen: of a submatrix, where it is known.
        """
        if self.submatrix is not None:
            chosen = self.submatrix.chosen(m) if chosen is None else chosen
            return self.submatrix.take(m, chosen, self.submatrix.dim(*m.shape[-2:]))
        return self.precondition.into(state, m, hyper, state.get("step"))

    def direction_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """The dtype in which a direction's input is gathered, of a gradient in `dtype`, fp32 at least.

        It is that in which the direction works, but `dtype` for fp16 where torch operations make the input: only the
        fused ops scale what they store into the range of fp16.
        """
        works = self.direction.compute_dtype(dtype, device)
        return dtype if works is torch.float16 and self.by_matrix else works

    def descent_direction(self, x: Tensor, hyper: Hyper) -> Tensor:
        """The step in the preconditioner's variables, before the learning rate."""
        return self.direction.unit(x) if self.scale == "lmo" else self.direction.scaled(x)

    def dual_norm(self, x: Tensor, d: Tensor) -> Tensor:
        """The dual norms of x from d, its `descent_direction`."""
        return (self.direction.dual_norm if self.scale == "lmo" else self.direction.dual_norm_of_scaled)(x, d)

    def update(
        self, state: State, d: Tensor, m: Tensor, hyper: Hyper, g: Tensor | None = None, chosen: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """(the update of m's shape, what the transforms remember, and what the momentum is where a submatrix steps).

        m: what the momentum reads (`momentum_of`), (batch, m, n) for a recipe `by_matrix`.   g: the gradient likewise,
        for transforms, which a recipe that is not `by_matrix` has none of.   chosen: of a submatrix, where it is known.
        """
        if self.submatrix is not None:
            chosen = self.submatrix.chosen(m) if chosen is None else chosen
            return self._update_submatrix(self.submatrix, state, d, m, hyper, g, chosen)
        u = self.precondition.back(state, d, hyper, state.get("step"))
        if self.kronecker is not None:
            u = self.kronecker.unblock(u, *m.shape[-2:])
        return self._transformed(state, u, m, hyper, g)

    def _update_submatrix(
        self, part: Submatrix, state: State, d: Tensor, m: Tensor, hyper: Hyper, g: Tensor | None, chosen: Tensor
    ) -> tuple[Tensor, State]:
        """`update` with zeros beside the submatrix, and the momentum damped in it."""
        assert self.momentum is not None
        dim, u = part.dim(*m.shape[-2:]), d
        fresh: State = {}
        if self.transforms:
            g = None if g is None else part.take(g, chosen, dim)
            u, fresh = self.update_chosen(state, d, part.take(m, chosen, dim), hyper, chosen, g)
        fresh[self.momentum.key] = part.damped(m, chosen, hyper.beta1, dim)
        return part.put(u, chosen, m, dim), fresh

    def update_chosen(
        self, state: State, d: Tensor, m: Tensor, hyper: Hyper, chosen: Tensor, g: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """(the update of a submatrix, what the transforms remember of all rows); all tensors but the state are of it.

        chosen: as `Submatrix.chosen` gives it; a row that is not among them is remembered as it was.
        """
        rows = [key for key, layout in self.layouts.items() if layout == "row"]
        u, fresh = self._transformed({**state, **{key: state[key].gather(-1, chosen) for key in rows}}, d, m, hyper, g)
        return u, {
            key: state[key].scatter(-1, chosen, t.to(state[key].dtype)) if key in rows else t
            for key, t in fresh.items()
        }

    def _transformed(self, state: State, u: Tensor, m: Tensor, hyper: Hyper, g: Tensor | None) -> tuple[Tensor, State]:
        """The update after all transforms, and what they remember."""
        fresh: State = {}
        for transform in self.transforms:
            read = g if transform.reads_gradient else m
            assert read is not None
            u, more = transform.apply({**state, **fresh}, u, read, hyper)
            fresh |= more
        return u, fresh

    def moved(self, w: Tensor, u: Tensor, hyper: Hyper, ratio: float) -> Tensor:
        """The weight after its update and decay; ratio: of the matrix' shape."""
        decay = self.decay.length(hyper.lr, hyper.weight_decay, ratio)
        return self.decay.apply(w, u, decay, hyper.lr * ratio * hyper.step_factor)

    def update_factors(self, state: State, g: Tensor, hyper: Hyper, phase: Phase) -> State:
        """The state after what the factors learn from a gradient (batch, m, n), refreshed when due."""
        part = self.kronecker
        assert part is not None
        state = state | part.update_factors(state, g, hyper)
        if phase.commits:
            state |= part.commit(state)
        if phase.refreshes:
            state |= part.refresh(part.gather([state], exact=phase.exact), [state])[0]
        return state | part.commit(state) if phase.at_once else state


def _whole(w: Tensor) -> Piece:
    """All of w (..., m, n) as matrices; fewer than two dimensions are one row."""
    rows, cols = (1, w.numel()) if w.ndim < 2 else w.shape[-2:]
    return Piece(0, w.shape[0] if w.ndim else 1, w.shape[:-2].numel(), rows, cols)


def largest(g: Tensor) -> Tensor:
    """0-d, the largest magnitude of an entry; NaN where one is NaN."""
    return torch.stack(torch.aminmax(g)).abs().amax() if g.numel() else g.new_zeros(())


def square_sum(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """0-d fp64, the sum of squares; inf where those do not fit the dtype, by default fp32 (fp64 for fp64)."""
    dtype = dtype or torch.promote_types(t.dtype, torch.float32)
    return torch.linalg.vector_norm(t, dtype=dtype).double().square()


def step_one(recipe: Recipe, w: Tensor, g: Tensor, state: State, hyper: Hyper) -> tuple[Tensor, State]:
    """One step for one weight (..., m, n): (new weight, new state), inputs untouched.

    A gradient that is not finite, or would leave something in the state that is not (`Recipe.accepts`), leaves the
    weight and its state as they were, but for the clock.
    """
    if not recipe.by_matrix:
        return _step(recipe, w, g, state, hyper)
    piece = _whole(w)
    shaped = {key: piece_view(layout, state[key], (piece,), 0) for key, layout in recipe.layouts.items()}
    shaped |= {
        key: shaped[key].reshape(piece.shape)
        for key, layout in recipe.layouts.items()
        if layout == "elementwise" and shaped[key].numel()
    }
    stepped, fresh = _step(recipe, w.reshape(piece.shape), g.reshape(piece.shape), shaped, hyper)
    return stepped.reshape(w.shape), {key: t.reshape(state[key].shape) for key, t in fresh.items()}


def _step(recipe: Recipe, w: Tensor, g: Tensor, state: State, hyper: Hyper) -> tuple[Tensor, State]:
    phase = recipe.phase(state)
    value, dtype = recipe.rounding.value(w, state), g.dtype
    plain = recipe.penalized(g, value, hyper)
    g = recipe.corrected(state, plain, hyper)
    square = recipe.square(g)
    finite = recipe.accepts(largest(g), square, state, (recipe.names(0),), dtype)
    g = recipe.clipped(g, square)
    fresh, stored = dict(state), w
    if phase.before:
        fresh = recipe.update_factors(fresh, g, hyper, phase)
    if phase.steps:
        fresh |= recipe.update_moments(fresh, g, hyper) | recipe.remembered_gradient(plain)
        if recipe.by_matrix:
            fresh |= recipe.observe_matrices(fresh, g, hyper)
        m = recipe.momentum_of(fresh, g, hyper)
        x = recipe.direction_input(fresh, m, hyper, value).to(value.dtype)
        u, remembered = recipe.update(fresh, recipe.descent_direction(x, hyper), m, hyper, g)
        moved = recipe.moved(value, u.to(value.dtype), hyper, shape_ratio(recipe.adjust_lr, *w.shape[-2:]))
        stored, remainder = recipe.rounding.store(moved, w.dtype, fresh.get("step"), (0, 0, 0))
        fresh |= remembered | remainder
        if recipe.average is not None:
            after, averaged = recipe.average.observe(fresh, value, recipe.rounding.value(stored, fresh), hyper)
            if recipe.average.moves:
                stored, remainder = recipe.rounding.store(after, w.dtype, fresh.get("step"), (0, 0, 1))
            fresh |= averaged | remainder
    if phase.after:
        fresh = recipe.update_factors(fresh, g, hyper, phase)
    kept = {key: torch.where(finite, fresh[key].to(t.dtype), t) for key, t in state.items() if key != CLOCK}
    if CLOCK in state:
        kept[CLOCK] = state[CLOCK] + 1
    return torch.where(finite, stored, w), kept


def adamw(dtype: torch.dtype | None = None, **parts: Any) -> Recipe:
    """AdamW (arXiv:1711.05101) as a recipe: what every parameter that is not a matrix gets.

    dtype: of its momentum.   parts: those of a `Recipe` that end every step, such as decay and rounding.
    """
    return Recipe(
        momentum=Momentum(bias_correction=True, key="exp_avg", dtype=dtype),
        precondition=Diagonal(power=0.25, eps_inside=False),
        direction=Frobenius(),
        scale="dual",
        **parts,
    )


ADAMW = adamw()
