"""The products that a choice of `choose` comes to, and their work."""

from __future__ import annotations

from ..chain import Apply, Gram, Node, Product, Sum, chain, multiplication, product_flop
from ..coefficients import Schedule
from .choice import Choice


def nodes_of(choice: Choice) -> tuple[Node, ...]:
    """The nodes of a choice, the first Gram product among them."""
    if choice.form == "plain":
        return _plain_nodes(choice.schedule)
    return (Gram("gram", "x"), *chain(choice.schedule, choice.restarts).nodes)


def polar_flop(choice: Choice, rows: int, columns: int, tall: bool | None = None) -> int:
    """Floating-point operations of the products for a matrix of rows x columns; tall as for `multiplication`.

    Of a part of a sharded matrix, rows or columns of which lie here, the squares are whole.
    """
    products = [multiplication(node, rows, columns, tall) for node in nodes_of(choice) if not isinstance(node, Sum)]
    if choice.form == "plain":
        return sum(product_flop(p.m, p.n, p.k, symmetric=False) for p in products)
    return sum(p.flop for p in products)


def _plain_nodes(schedule: Schedule) -> tuple[Node, ...]:
    nodes: list[Node] = []
    for (a, b, c), (x, y) in zip(schedule.tables[0], (("x", "y"), ("y", "x")) * schedule.steps):
        nodes += [Gram("gram", x), Product("z", "gram", "gram", "gram", c, b), Apply(y, "z", x, 1.0, a)]
    return tuple(nodes)
