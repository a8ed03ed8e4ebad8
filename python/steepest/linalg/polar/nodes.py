"""The products that a choice of `choose` comes to, and their work."""

from __future__ import annotations

from ..chain import Gram, Node, Sum, chain, multiplication, plain_chain, product_flop
from .choice import Choice


def nodes_of(choice: Choice) -> tuple[Node, ...]:
    """The nodes of a choice, the first Gram product among them."""
    plain = choice.form == "plain"
    products = plain_chain(choice.schedule.tables[0]) if plain else chain(choice.schedule, choice.restarts)
    return (Gram("gram", "x"), *products.nodes)


def polar_flop(choice: Choice, rows: int, columns: int, tall: bool | None = None) -> int:
    """Floating-point operations of the products for a matrix of rows x columns; tall as for `multiplication`.

    Of a part of a sharded matrix, rows or columns of which lie here, the squares are whole.
    """
    products = [multiplication(node, rows, columns, tall) for node in nodes_of(choice) if not isinstance(node, Sum)]
    if choice.form == "plain":
        return sum(product_flop(p.m, p.n, p.k, symmetric=False) for p in products)
    return sum(p.flop for p in products)
