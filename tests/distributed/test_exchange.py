"""Parts of matrices travel to their owners and back: all ranks played by one process, bytes counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Placement, Shard

from steepest.matrices import pieces
from steepest.sharding.exchange import Exchange
from steepest.sharding.layout import Sharding
from steepest.sharding.ranks import Ranks
from steepest.sharding.regions import regions

CUTS = [((4,), [Shard(0)]), ((3,), [Shard(1)]), ((2, 2), [Shard(0), Shard(1)]), ((9,), [Shard(0)])]
SHAPES = [((8, 6), {}), ((6, 8), {"transposed": True}), ((5, 8, 6), {"batch_dims": 1}), ((16, 6), {"num_heads": 2})]


class Played(Ranks):
    """A rank of a group that one process plays: what it sends is put aside, what it gets is laid out before."""

    def __init__(self, place: int, size: int) -> None:
        super().__init__(None, range(size), torch.device("cpu"))
        self.place = place
        self.sent: list[Tensor] = []
        self.got: Tensor | None = None

    def all_to_all(self, sent: Tensor, sizes: Sequence[int], wanted: Sequence[int], what: str) -> Callable[[], Tensor]:
        self.sent = list(sent.split(list(sizes)))

        def wait() -> Tensor:
            if self.got is None:
                raise WaitingError
            assert self.got.numel() == sum(wanted)
            return self.got

        return wait


class WaitingError(Exception):
    """Raised where a rank would wait for the others."""


def everyone(exchanges: Sequence[Exchange], ways: Sequence[str], tensors: Sequence[Tensor]) -> list[Tensor]:
    """What `to_owners` or `from_owners` gives on every rank."""
    (way,) = set(ways)
    for exchange, t in zip(exchanges, tensors, strict=True):
        exchange.ranks.got = None  # type: ignore[attr-defined]
        with pytest.raises(WaitingError):
            getattr(exchange, way)(t)()
    found = []
    for place, (exchange, t) in enumerate(zip(exchanges, tensors, strict=True)):
        exchange.ranks.got = torch.cat([other.ranks.sent[place] for other in exchanges])  # type: ignore[attr-defined]
        found.append(getattr(exchange, way)(t)())
    return found


@pytest.mark.parametrize("mesh, placements", CUTS, ids=str)
def test_there_and_back(mesh: tuple[int, ...], placements: list[Placement]) -> None:
    """Owners get the matrices, ranks get back their parts, and no element leaves a rank that need not."""
    torch.manual_seed(0)
    wholes = [torch.randn(shape) for shape, _ in SHAPES]
    layouts = [pieces(shape, **options)[0] for shape, options in SHAPES]  # type: ignore[arg-type]
    size = len(regions((1, 1), mesh, [Shard(0)] * len(mesh)))
    owners = [[(7 * i + 5 * k + 1) % size for k in range(piece.batch)] for i, piece in enumerate(layouts)]
    matrices = [piece.view(t).reshape(piece.shape) for t, piece in zip(wholes, layouts, strict=True)]
    exchanges, buffers = [], []
    for place in range(size):
        units, parts = [], []
        for i, ((shape, _), piece, t) in enumerate(zip(SHAPES, layouts, wholes, strict=True)):
            boxes = regions(shape, mesh, placements)
            sharding = Sharding(shape, Played(place, size), boxes)
            units.append(sharding.unit(piece, owners[i]))
            box = boxes[place]
            shard = t[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))].contiguous()
            for part in sharding.local_parts([piece], [owners[i]]):
                parts.append((part.owner, i, part.matrices.start, part.part.view(shard).reshape(-1)))
        parts.sort(key=lambda each: each[:3])
        buffers.append(torch.cat([part for *_, part in parts]) if parts else torch.empty(0))
        exchanges.append(Exchange(Played(place, size), units))
    found = everyone(exchanges, ["to_owners"] * size, buffers)
    for place, t in enumerate(found):
        mine = [matrices[i][k] for i in range(len(SHAPES)) for k in range(layouts[i].batch) if owners[i][k] == place]
        assert torch.equal(t, torch.stack(mine) if mine else t[:0])
    for place, exchange in enumerate(exchanges):
        sent = [sum(part.numel() for part in exchange.ranks.sent[:place])]  # type: ignore[attr-defined]
        sent.append(sum(part.numel() for part in exchange.ranks.sent[place + 1 :]))  # type: ignore[attr-defined]
        assert sum(exchange.sends) - exchange.sends[place] == sum(sent)
    assert sum(sum(exchange.sends) for exchange in exchanges) == sum(sum(exchange.receives) for exchange in exchanges)
    back = everyone(exchanges, ["from_owners"] * size, found)
    for got, sent_parts in zip(back, buffers, strict=True):
        assert torch.equal(got, sent_parts)


def test_matrices_that_no_shard_cuts_do_not_travel() -> None:
    (piece,) = pieces((4, 8, 6), batch_dims=1)
    boxes = regions((4, 8, 6), (2,), [Shard(0)])
    exchange = Exchange(Played(0, 2), [Sharding((4, 8, 6), Played(0, 2), boxes).unit(piece, [0, 0, 1, 1])])
    parts = torch.randn(2 * 8 * 6)
    assert not exchange.travels
    assert torch.equal(exchange.to_owners(parts)(), parts.view(2, 8, 6))  # nobody is waited for
    assert torch.equal(exchange.from_owners(parts.view(2, 8, 6))(), parts)
