"""The Newton-Schulz iteration as a list of products: what is multiplied, in which order and with which numbers.

    standard    A = X X^T;  Z = b A + c A^2 + ...;  X <- a X + Z X                                       every step
    Gram        R = X X^T once;  Z = b R + c R^2 + ...;  Q <- a Q + Q Z;  R <- (a I + Z) R (a I + Z)     every step,
                then X <- Q X

The Gram form (Dion3 appendix B; Dao-AILab gram-newton-schulz) touches X only where a *segment* begins and ends; a
restart is the start of a new segment, and restarting before every step is the standard form.

Normalisation is never applied to X.  With X_k = s_k Y_k the iteration runs on Y, the scalars s_k enter the
coefficients of the small m x m matrices, and the last of them scales the last product.  Coefficients may differ from
matrix to matrix: every Y advances by the same alpha_k and s takes up the rest, s_{k+1} = s_k a_k / alpha_k.  So every
number of a chain is a constant of the matrix' table times a power of 1 / norm, and a chain depends on a schedule and
restarts alone: it is built once, and `steepest.linalg.newton_schulz` runs it on any batch and any backend.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..ops.polar_chain import BUFFERS, KINDS
from .coefficients import Schedule


@dataclass(frozen=True)
class Column:
    """A number of its own for each matrix: a column of the chain's table of numbers."""

    index: int


Number = float | Column


@dataclass(frozen=True)
class Gram:
    """out = X X^T, or X^T X of a tall X.   Buffers go by name: "x" and "y" have X's shape, the others are squares."""

    out: str
    x: str


@dataclass(frozen=True)
class Product:
    """out = alpha A B + beta C of square matrices that are polynomials in one R: symmetric."""

    out: str
    a: str
    b: str
    c: str
    alpha: Number
    beta: Number


@dataclass(frozen=True)
class Sum:
    """out = alpha A + beta C + gamma I, without a product; beta is 0 where C is not read."""

    out: str
    a: str
    c: str
    alpha: Number
    beta: Number
    gamma: float


@dataclass(frozen=True)
class Apply:
    """out = alpha Q X + beta X, or alpha X Q + beta X of a tall X."""

    out: str
    q: str
    x: str
    alpha: Number
    beta: Number


Node = Gram | Product | Sum | Apply


@dataclass(frozen=True)
class Operand:
    """A buffer, whose rows are contiguous, as it enters a product."""

    buffer: str
    transposed: bool = False


@dataclass(frozen=True)
class Multiplication:
    """The product A B of a node: A is m x k, B k x n; of a symmetric result the lower triangle is enough."""

    a: Operand
    b: Operand
    m: int
    n: int
    k: int
    symmetric: bool

    @property
    def flop(self) -> int:
        """Floating-point operations."""
        return product_flop(self.m, self.n, self.k, symmetric=self.symmetric)


def product_flop(m: int, n: int, k: int, *, symmetric: bool) -> int:
    """Floating-point operations of m x k times k x n, 2 for a multiply and add; the lower triangle if symmetric."""
    return k * (m * (m + 1) if symmetric else 2 * m * n)


def multiplication(node: Gram | Product | Apply, rows: int, columns: int, tall: bool | None = None) -> Multiplication:
    """What a node multiplies where X is rows x columns; tall: whether by X^T X, None: where it has more rows.

    csrc/polar/chain.cpp says the same for a launch; `steepest plan` and `steepest tune` ask here.
    """
    tall = rows > columns if tall is None else tall
    short, long = (columns, rows) if tall else (rows, columns)
    if isinstance(node, Gram):
        a, b = Operand(node.x, transposed=tall), Operand(node.x, transposed=not tall)
        return Multiplication(a, b, short, short, long, symmetric=True)
    if isinstance(node, Product):
        return Multiplication(Operand(node.a), Operand(node.b), short, short, short, symmetric=True)
    left, right = (node.x, node.q) if tall else (node.q, node.x)
    return Multiplication(Operand(left), Operand(right), rows, columns, short, symmetric=False)


@dataclass(frozen=True)
class Chain:
    """What happens to X after its first Gram product, and the numbers of it.

    Column j of the numbers of a matrix that takes table t is ``constants[t][j] norm^-powers[j]``.  ``result`` is the
    buffer that holds the polar factor in the end.
    """

    nodes: tuple[Node, ...]
    constants: tuple[tuple[float, ...], ...]
    powers: tuple[int, ...]
    result: str

    @functools.cached_property
    def packed(self) -> tuple[list[int], list[float]]:
        """The nodes as `steepest.ops.polar_chain` takes them."""
        return self.pack()

    def pack(self) -> tuple[list[int], list[float]]:
        """`packed`, made anew: what torch.compile traces has no lock."""
        ints, floats = [], []
        for node in self.nodes:
            numbers: tuple[Number, Number, float] = (1.0, 0.0, 0.0)
            if isinstance(node, Gram):
                names = (node.x, node.x, node.x)
            elif isinstance(node, Apply):
                names, numbers = (node.q, node.x, node.x), (node.alpha, node.beta, 0.0)
            elif isinstance(node, Product):
                names, numbers = (node.a, node.b, node.c), (node.alpha, node.beta, 0.0)
            else:
                names, numbers = (node.a, node.a, node.c), (node.alpha, node.beta, node.gamma)
            columns = [x.index if isinstance(x, Column) else -1 for x in numbers[:2]]
            buffers = [BUFFERS.index(name) for name in (node.out, *names)]
            ints += [KINDS.index(type(node).__name__.lower()), *buffers, *columns]
            floats += [0.0 if isinstance(x, Column) else x for x in numbers]
        return ints, floats


@functools.cache
def chain(schedule: Schedule, restarts: tuple[int, ...]) -> Chain:
    """The chain that runs ``schedule``, with a new Gram product before each of the steps ``restarts`` (from 1)."""
    build = _Builder(schedule)
    last, x, q = schedule.steps - 1, "x", ""
    for k in range(schedule.steps):
        if k in restarts:
            build.nodes.append(Gram("gram", x))
            q = ""
        alpha = schedule.tables[0][k][0]
        build.polynomial(k)
        ends = k == last or k + 1 in restarts
        if not ends:
            # R <- (alpha I + Z) R (alpha I + Z); the factors commute.
            build.nodes += [Product("t", "gram", "z", "gram", 1.0, alpha), Product("gram", "z", "t", "t", 1.0, alpha)]
        other = "y" if x == "x" else "x"
        if ends and k < last and not q:
            build.nodes.append(Apply(other, "z", x, 1.0, alpha))
            x = other
            continue
        if q:
            build.nodes.append(Product("p" if q == "q" else "q", q, "z", q, 1.0, alpha))
            q = "p" if q == "q" else "q"
        else:
            build.nodes.append(Sum("q", "z", "z", 1.0, 0.0, alpha))
            q = "q"
        if ends:
            factor = build.number(build.scales(last + 1), 1) if k == last else 1.0
            build.nodes.append(Apply(other, q, x, factor, 0.0))
            x = other
    return Chain(tuple(build.nodes), tuple(zip(*build.columns.values())), tuple(build.powers), x)


@functools.cache
def plain_chain(table: tuple[tuple[float, ...], ...]) -> Chain:
    """The standard form of a quintic table as it is printed, for an X that was divided by its norm before.

    Z = b A + c A^2, X <- a X + Z X for A = X X^T: the products and roundings of torch.optim.Muon.
    """
    nodes: list[Node] = []
    for (a, b, c), (x, y) in zip(table, (("x", "y"), ("y", "x")) * len(table)):
        nodes += [Gram("gram", x), Product("z", "gram", "gram", "gram", c, b), Apply(y, "z", x, 1.0, a)]
    return Chain(tuple(nodes[1:]), ((),), (), y)


@dataclass
class _Builder:
    schedule: Schedule
    nodes: list[Node] = field(default_factory=list)
    columns: dict[tuple[int, tuple[float, ...]], tuple[float, ...]] = field(default_factory=dict)

    @property
    def powers(self) -> list[int]:
        return [power for power, _ in self.columns]

    def number(self, values: Sequence[float], power: int) -> Number:
        """values[t] norm^-power: a plain number where it is the same for every matrix."""
        if power == 0 and len(set(values)) == 1:
            return values[0]
        key = (power, tuple(values))
        self.columns.setdefault(key, key[1])
        return Column(list(self.columns).index(key))

    def scales(self, k: int) -> list[float]:
        """s_k of every table, for norm 1."""
        first = self.schedule.tables[0]
        return [math.prod([step[0] / other[0] for step, other in zip(t[:k], first)]) for t in self.schedule.tables]

    def polynomial(self, k: int) -> None:
        """Z = (alpha / a) (b R + c R^2 + d R^3 + e R^4) for R = s_k^2 gram, in "z"; every number has a table's index.

        Degree 9 by completing the square, T = sqrt|e| (R^2 + u R) with u = d / 2e, so that e R^4 + d R^3 + c R^2 + b R
        = sign(e) T^2 + (sign(e) sqrt|e| kappa T + lambda R): the large terms of opposite sign, which in bf16 leave an
        off-diagonal error of .04-.26 instead of .01-.03, never meet.
        """
        alpha = self.schedule.tables[0][k][0]
        steps = [[alpha / table[k][0] * v for v in table[k][1:]] for table in self.schedule.tables]
        scales = self.scales(k)

        def of(values: Sequence[float], degree: int) -> Number:
            """values[t] R^degree, as a factor on gram^degree."""
            return self.number([v * s ** (2 * degree) for v, s in zip(values, scales)], 2 * degree)

        b, c, d, e = [*zip(*steps), (), (), ()][:4]
        terms = len(steps[0])
        if terms == 1:
            self.nodes.append(Sum("z", "gram", "gram", of(b, 1), 0.0, 0.0))
        elif terms == 2:
            self.nodes.append(Product("z", "gram", "gram", "gram", of(c, 2), of(b, 1)))
        elif terms == 3:
            self.nodes.append(Product("t", "gram", "gram", "gram", of(d, 3), of(c, 2)))
            self.nodes.append(Product("z", "gram", "t", "gram", 1.0, of(b, 1)))
        else:
            root = [math.sqrt(abs(w)) for w in e]
            sign = [math.copysign(1.0, w) for w in e]
            u = [v / (2 * w) for v, w in zip(d, e)]
            kappa = [v / w - p * p for v, w, p in zip(c, e, u)]
            linear = [v - w * p * r for v, w, p, r in zip(b, e, u, kappa)]
            self.nodes += [
                Product("t", "gram", "gram", "gram", of(root, 2), of([r * p for r, p in zip(root, u)], 1)),
                Sum("z", "t", "gram", of([g * r * w for g, r, w in zip(sign, root, kappa)], 0), of(linear, 1), 0.0),
                Product("z", "t", "t", "z", of(sign, 0), 1.0),
            ]
