"""Where shards lie, against torch's own function for it, and that parts of matrices cover them."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from steepest.matrices import pieces
from steepest.sharding.layout import Sharding
from steepest.sharding.ranks import Ranks
from steepest.sharding.regions import Region, rectangle, regions, shard_dims


class Mesh:
    """As much of a mesh as torch's function asks for, at one coordinate."""

    def __init__(self, shape: tuple[int, ...], coordinate: tuple[int, ...]) -> None:
        self.shape, self.ndim, self._coordinate = shape, len(shape), coordinate

    def get_coordinate(self) -> list[int]:
        return list(self._coordinate)

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def _sym_get_coordinate(self, dim: int) -> int:
        return self._coordinate[dim]

    def _is_current_rank_part_of_mesh(self) -> bool:
        return True


PLACEMENTS = st.sampled_from([Replicate(), Shard(0), Shard(1), Shard(-1)])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=3).map(tuple),
    st.lists(st.tuples(st.integers(1, 5), PLACEMENTS), min_size=1, max_size=3),
)
def test_regions_are_those_of_torch(shape: tuple[int, ...], mesh: list[tuple[int, Placement]]) -> None:
    lengths = tuple(length for length, _ in mesh)
    placements = [Shard(len(shape) - 1) if p == Shard(-1) else p for _, p in mesh]
    boxes = regions(shape, lengths, placements)
    for box, coordinate in zip(boxes, product(*map(range, lengths)), strict=True):
        local, offset = compute_local_shape_and_global_offset(shape, Mesh(lengths, coordinate), placements)  # type: ignore[arg-type]
        assert box.shape == tuple(local)
        if box.numel:  # an empty shard begins anywhere
            assert box.start == tuple(offset)


def test_a_negative_dimension_counts_from_the_last() -> None:
    assert regions((4, 6), (2,), [Shard(-1)]) == regions((4, 6), (2,), [Shard(1)])
    assert shard_dims([Replicate(), Shard(0), Shard(1)]) == (1, 2)


LAYOUTS = [
    ((34, 12), {}),
    ((36, 10), {"split_sizes": (12, 12, 12), "num_heads": 3}),
    ((32, 7), {"split_sizes": (16, 8, 8), "num_heads": (4, 2, 2)}),
    ((5, 6, 8), {"batch_dims": 1}),
    ((4, 10, 6), {"batch_dims": 1, "split_sizes": (6, 4)}),
    ((3, 8, 6), {"batch_dims": 1, "num_heads": 2}),
    ((2, 3, 4, 5), {"batch_dims": 2}),
    ((10, 3, 3, 3), {}),
    ((10, 24), {"transposed": True, "split_sizes": (12, 6, 6), "num_heads": (2, 1, 1)}),
    ((3, 6, 8), {"transposed": True, "batch_dims": 1}),
    ((48, 5), {"split_sizes": (24, 12, 12), "interleaved": 4}),
    ((36, 5), {"split_sizes": (12, 18, 6), "interleaved": 3, "num_heads": (3, 6, 1)}),
    ((36, 5), {"split_sizes": (12, 12, 12), "interleaved": 6, "num_heads": (2, 3, 4)}),
    ((5, 36), {"split_sizes": (18, 18), "interleaved": 9, "transposed": True}),
    ((4, 20, 6), {"batch_dims": 1, "split_sizes": (10, 10), "interleaved": 5}),
    ((4, 6, 20), {"batch_dims": 1, "split_sizes": (15, 5), "interleaved": 5, "num_heads": 5, "transposed": True}),
    ((24, 3, 2), {"split_sizes": (16, 8), "interleaved": 8}),
    ((10, 6, 2, 3), {"transposed": True}),
    ((12, 5, 3), {"transposed": True, "num_heads": 3, "split_columns": True}),
    ((2, 12, 4, 3, 2), {"batch_dims": 1, "transposed": True, "split_sizes": (8, 4), "split_columns": True}),
]
CUTS = [
    ((4,), [Shard(0)]),
    ((3,), [Shard(1)]),
    ((7,), [Shard(0)]),
    ((2, 2), [Shard(0), Shard(1)]),
    ((2, 3), [Shard(0), Shard(0)]),
]


@pytest.mark.parametrize("mesh, placements", CUTS, ids=str)
@pytest.mark.parametrize("shape, options", LAYOUTS, ids=str)
def test_parts_cover_a_shard_once_and_are_what_they_say(
    shape: tuple[int, ...], options: dict[str, object], mesh: tuple[int, ...], placements: list[Placement]
) -> None:
    """Every element is numbered; a part's view of the shard shows the numbers of its rectangle of its matrices, and all
    of a matrix, one below the other, are what the region has of it.
    """
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    parts = pieces(shape, **options)  # type: ignore[arg-type]
    boxes = regions(shape, mesh, placements)
    owners = [[(3 * number + k) % 2 for k in range(piece.batch)] for number, piece in enumerate(parts)]
    for place, box in enumerate(boxes):
        sharding = Sharding(shape, _ranks(place, len(boxes)), boxes)
        shard = whole[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))].contiguous()
        seen = torch.zeros(whole.numel(), dtype=torch.int64)
        below: dict[tuple[int, int], list[torch.Tensor]] = {}
        for each in sharding.local_parts(parts, owners):
            piece = parts[each.piece]
            matrices = piece.view(whole).reshape(piece.shape)
            here = each.part.view(shard).reshape(each.part.shape)
            assert len(here) == len(each.matrices)
            for k, m in zip(each.matrices, here, strict=True):
                assert owners[each.piece][k] == each.owner
                r = each.rectangle
                assert torch.equal(m, matrices[k, r.top : r.bottom, r.left : r.right])
                below.setdefault((each.piece, k), []).append(m)
            seen[here.flatten()] += 1
        for (number, k), some in below.items():
            piece, r = parts[number], rectangle(box, shape, parts[number], k)
            assert r is not None
            matrix = piece.view(whole).reshape(piece.shape)[k]
            assert torch.equal(torch.cat(some), matrix[r.top : r.bottom, r.left : r.right])
        assert torch.equal(seen.nonzero().flatten(), shard.flatten().sort().values)
        assert seen.max() <= 1


def test_a_kernel_that_is_cut_is_no_rectangle() -> None:
    box = Region((0, 0, 1, 0), (4, 3, 2, 3))
    with pytest.raises(ValueError, match=r"dimension 2 of shape \(4, 3, 3, 3\) is sharded.*shard dimension 0 or 1"):
        rectangle(box, (4, 3, 3, 3), pieces((4, 3, 3, 3))[0], 0)


def _ranks(place: int, size: int) -> Ranks:
    ranks = Ranks(None, range(size), torch.device("cpu"))
    ranks.place = place
    return ranks
