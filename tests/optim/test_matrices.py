"""matrices.py: the pieces are disjoint views that cover a parameter, and bad layouts are refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.matrices import Piece, pieces

SHAPES = [
    # shape, layout, the (batch, rows, cols) of each piece
    ((5, 7), {}, [(1, 5, 7)]),
    ((64, 3, 7, 5), {}, [(1, 64, 105)]),
    ((8, 6, 4), {"batch_dims": 1}, [(8, 6, 4)]),
    ((2, 3, 6, 4, 5), {"batch_dims": 2}, [(6, 6, 20)]),
    ((12, 4), {"split_sizes": [4, 4, 4]}, [(1, 4, 4)] * 3),
    ((12, 4), {"num_heads": 3}, [(3, 4, 4)]),
    ((12, 4), {"split_sizes": (4, 8), "num_heads": 2}, [(2, 2, 4), (2, 4, 4)]),
    ((16, 4), {"split_sizes": (8, 4, 4), "num_heads": (4, 2, 2)}, [(4, 2, 4), (2, 2, 4), (2, 2, 4)]),
    ((3, 10, 4), {"batch_dims": 1, "split_sizes": (4, 6), "num_heads": 2}, [(6, 2, 4), (6, 3, 4)]),
    ((0, 4), {}, [(1, 0, 4)]),
    ((4, 12), {"num_heads": 3, "split_columns": True}, [(3, 4, 4)]),
    ((4, 12), {"split_sizes": (8, 4), "num_heads": (4, 1), "split_columns": True}, [(4, 4, 2), (1, 4, 4)]),
    ((3, 4, 10), {"batch_dims": 1, "num_heads": 2, "split_columns": True}, [(6, 4, 5)]),
    ((12, 4), {"num_heads": 3, "split_columns": True, "transposed": True}, [(3, 4, 4)]),
    ((12, 4, 3, 2), {"transposed": True}, [(1, 24, 12)]),
    ((12, 4, 3, 2), {"transposed": True, "num_heads": 3, "split_columns": True}, [(3, 24, 4)]),
    ((2, 12, 4, 3), {"transposed": True, "batch_dims": 1}, [(2, 12, 12)]),
    ((24, 4), {"split_sizes": (12, 6, 6), "interleaved": 3}, [(1, 12, 4), (1, 6, 4), (1, 6, 4)]),
    (
        (2, 4, 12),
        {"split_sizes": (8, 4), "interleaved": 4, "num_heads": (2, 1), "transposed": True, "batch_dims": 1},
        [(4, 4, 4), (2, 4, 4)],
    ),
    ((12, 4), {"split_sizes": (12,), "interleaved": 3}, [(1, 12, 4)]),
]


@pytest.mark.parametrize(("shape", "layout", "expected"), SHAPES)
def test_shapes(shape: tuple[int, ...], layout: dict[str, Any], expected: list[tuple[int, int, int]]) -> None:
    assert [piece.shape for piece in pieces(shape, **layout)] == expected


def test_the_matrices_are_the_rows_of_each_head() -> None:
    t = torch.arange(2 * 6 * 3.0).reshape(2, 6, 3)
    first, second = pieces(t.shape, split_sizes=(2, 4), num_heads=(1, 2), batch_dims=1)
    assert torch.equal(first.view(t).reshape(first.shape), t[:, :2])
    heads = second.view(t).reshape(second.shape)
    assert torch.equal(heads, torch.stack([t[0, 2:4], t[0, 4:6], t[1, 2:4], t[1, 4:6]]))


@pytest.mark.parametrize("transposed", [False, True])
def test_heads_of_columns_lie_side_by_side(transposed: bool) -> None:
    t = torch.arange(2 * 3 * 6.0).reshape(2, 3, 6)
    stored = t.mT.contiguous() if transposed else t
    (piece,) = pieces(stored.shape, num_heads=3, batch_dims=1, split_columns=True, transposed=transposed)
    heads = piece.view(stored).reshape(piece.shape)
    assert torch.equal(heads, torch.stack([t[b, :, first : first + 2] for b in range(2) for first in (0, 2, 4)]))


def test_interleaved_splits_are_gathered_group_by_group() -> None:
    t = torch.arange(12.0)[:, None].expand(12, 2).clone()
    q, k, v = pieces(t.shape, split_sizes=(6, 3, 3), num_heads=(2, 1, 1), interleaved=3)
    rows = [piece.view(t).reshape(piece.shape)[..., 0].tolist() for piece in (q, k, v)]
    assert rows == [[[0, 1, 4], [5, 8, 9]], [[2, 6, 10]], [[3, 7, 11]]]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_pieces_cover_the_tensor_once_and_go_back(data: st.DataObject) -> None:
    batch = tuple(data.draw(st.lists(st.integers(1, 3), max_size=2)))
    parts = data.draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3))
    rest = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    groups = data.draw(st.integers(1, 3))
    splits, heads = tuple(h * r * groups for h, r in parts), tuple(h for h, _ in parts)
    t = torch.randn(*batch, sum(splits), *rest)
    turned = data.draw(st.sampled_from(["split_columns", "transposed", None])) if len(rest) == 1 else None
    if turned:
        t = t.mT.contiguous()
    if data.draw(st.booleans()):
        t = t.transpose(0, -1).contiguous().transpose(0, -1)
    back, seen = torch.full_like(t, float("nan")), torch.zeros_like(t)
    layout: dict[str, Any] = {"batch_dims": len(batch), **({turned: True} if turned else {})}
    layout["interleaved"] = 1 if turned == "split_columns" else groups
    for piece in pieces(t.shape, split_sizes=splits, num_heads=heads, **layout):
        piece.view(back).copy_(piece.view(t).reshape(piece.shape).reshape(piece.view(t).shape))
        piece.view(seen).add_(1)
    assert torch.equal(back, t)
    assert torch.equal(seen, torch.ones_like(t))


def test_view_is_a_view_of_any_strides() -> None:
    t = torch.zeros(4, 6).t()
    piece = pieces((6, 4), split_sizes=(2, 4))[1]
    piece.view(t).fill_(1)
    assert t[2:].eq(1).all()
    assert t[:2].eq(0).all()


def test_defaults_are_one_piece_and_calls_are_cached() -> None:
    assert pieces(torch.Size((4, 3))) == (Piece(0, 4, 1, 4, 3),)
    assert pieces((6, 3), split_sizes=[2, 4]) is pieces([6, 3], split_sizes=(2, 4))


@pytest.mark.filterwarnings("error:Dynamo")
def test_traced_without_a_graph_break_or_a_warning() -> None:
    def scaled(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([piece.view(t) * piece.rows for piece in pieces(t.shape, split_sizes=(2, 4))])

    t = torch.randn(6, 3)
    compiled = torch.compile(scaled, backend="eager", fullgraph=True)
    assert torch.equal(compiled(t), scaled(t))


@pytest.mark.parametrize(
    ("shape", "layout", "error", "message"),
    [
        (
            (12, 4),
            {"split_sizes": (4, 4)},
            ValueError,
            "(4, 4) sum to 8, but dimension 0 of shape (12, 4) is 12",
        ),
        ((2, 9, 4), {"split_sizes": (4, 4), "batch_dims": 1}, ValueError, "dimension 1 of shape (2, 9, 4) is 9"),
        ((12, 4), {"split_sizes": (12, 0)}, ValueError, "positive integers but is: (12, 0)"),
        ((12, 4), {"split_sizes": ()}, ValueError, "positive integers but is: ()"),
        ((12, 4), {"split_sizes": (6.0, 6.0)}, TypeError, "split_sizes must be integers"),
        ((12, 4), {"split_sizes": 12}, TypeError, "split_sizes must be integers"),
        (
            (12, 4),
            {"split_sizes": (8, 4), "interleaved": 8},
            ValueError,
            "not divide the split of 4 rows (splits (8, 4))",
        ),
        ((12, 4), {"split_sizes": (8, 4), "interleaved": 0}, ValueError, "an integer >= 1, but is: 0"),
        ((12, 4), {"interleaved": 2}, ValueError, "give split_sizes, the rows of each in all groups together"),
        (
            (4, 12),
            {"split_sizes": (8, 4), "interleaved": 2, "split_columns": True},
            ValueError,
            "interleaved=2 is of rows",
        ),
        ((12, 4), {"num_heads": "4"}, TypeError, "num_heads must be integers"),
        ((12, 4), {"num_heads": 5}, ValueError, "num_heads=5 does not divide the 12 rows"),
        ((12, 4), {"num_heads": 0}, ValueError, "num_heads=0 does not divide the 12 rows"),
        ((12, 4), {"split_sizes": (4, 8), "num_heads": (1, 2, 2)}, ValueError, "has 3 entries for 2 splits (4, 8)"),
        ((4, 12), {"num_heads": 5, "split_columns": True}, ValueError, "num_heads=5 does not divide the 12 columns"),
        ((4, 3, 2, 2), {"split_columns": True}, ValueError, "split_columns=True takes 2 with batch_dims=0: it is not"),
        ((4, 3, 2), {"transposed": True, "num_heads": 2}, ValueError, "num_heads=2 would cut the kernels of shape"),
        ((4, 6, 2), {"transposed": True, "split_sizes": (6, 6)}, ValueError, "split_sizes=(6, 6) would cut the kernel"),
        ((4, 12), {"split_sizes": (4,), "split_columns": True}, ValueError, "dimension 1 of shape (4, 12) is 12"),
        ((12,), {}, ValueError, "shape (12,) has 1 dimensions, but a matrix needs 2 with batch_dims=0"),
        ((2, 12), {"batch_dims": 1}, ValueError, "a matrix needs 3 with batch_dims=1"),
        ((2, 12), {"batch_dims": -1}, ValueError, "batch_dims must be an integer >= 0 but is: -1"),
    ],
)
def test_bad_layouts(shape: tuple[int, ...], layout: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        pieces(shape, **layout)
