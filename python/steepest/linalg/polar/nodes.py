"""The products that a choice of `choose` comes to, and their work."""

from __future__ import annotations

from ..chain import Chain, Gram, Node, Sum, chain, multiplication, plain_chain, product_flop
from .choice import Choice


def nodes_of(choice: Choice) -> tuple[Node, ...]:
    """The nodes of a choice, the first Gram product among them."""
    return (Gram("gram", "x"), *chain_of(choice).nodes)


def chain_of(choice: Choice) -> Chain:
    """The products of a choice after the first Gram product."""
    return plain_chain(choice.schedule.tables[0]) if choice.form == "plain" else chain(choice.schedule, choice.restarts)


def polar_flop(choice: Choice, rows: int, columns: int, tall: bool | None = None) -> int:
    """Floating-point operations of the products for a matrix of rows x columns; tall as for `multiplication`.

    Of a part of a sharded matrix, rows or columns of which lie here, the squares are whole.
    """
    products = [multiplication(node, rows, columns, tall) for node in nodes_of(choice) if not isinstance(node, Sum)]
    if choice.form == "plain":
        return sum(product_flop(p.m, p.n, p.k, symmetric=False) for p in products)
    return sum(p.flop for p in products)
