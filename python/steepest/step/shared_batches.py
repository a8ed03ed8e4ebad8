"""Which shared matrices travel together: buckets of one shape and recipe, in the same order on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from ..chunking import chunk_by_bytes
from .parameter import LocalMatrices, Matrices, OwnedMatrices, Parameter
from .routes import EVERYONE
from .shared_matrices import Place, SharedMatrices, SplitMatrices, place_of, share_of
from .shared_submatrix import SharedSubmatrices

__all__ = ["bytes_at_once", "round_bytes", "shared_buckets"]

#: less is not worth launches and messages of its own
_LEAST_BYTES = 32 << 20


def bytes_at_once(parameters: Sequence[Parameter], max_bytes: int) -> int:
    """How much of a rank's share of these parameters' matrices travels together."""
    return round_bytes((share_of(item) for p in parameters for item in p.matrices()), max_bytes)


def round_bytes(shares: Iterable[int], max_bytes: int) -> int:
    """How much of these bytes, a rank's share of each item, makes a round: two have room, and some four follow."""
    return min(max_bytes // 2, max(sum(shares) // 4, _LEAST_BYTES))


def shared_buckets(
    parameters: Sequence[Parameter],
    parts: Sequence[LocalMatrices],
    owned: Sequence[OwnedMatrices],
    key: Callable[[Matrices], object],
    max_bytes: int,
) -> Iterator[SharedMatrices]:
    """The matrices of these parameters by shape and recipe, as many together as `bytes_at_once` says.

    The same on all ranks, so that their collectives follow one another in one order.
    """
    buckets: dict[tuple[object, object], list[Matrices]] = {}
    for item in (item for p in parameters for item in p.matrices()):
        buckets.setdefault((key(item), _way(item)), []).append(item)
    here: dict[Place, list[LocalMatrices]] = {}
    for part in parts:
        here.setdefault(place_of(part), []).append(part)
    mine = {item.place: item for item in owned}
    most = bytes_at_once(parameters, max_bytes)
    for (_, way), bucket in buckets.items():
        for some in chunk_by_bytes(bucket, share_of, most):
            order = [
                (part.run.owner, i, part.run.matrices.start, part)
                for i, item in enumerate(some)
                for part in here.get(item.place, ())
            ]
            ordered = [part for *_, part in sorted(order, key=lambda each: each[:3])]
            if way is not None:
                yield SplitMatrices(some, ordered)
                continue
            kind = SharedMatrices if some[0].recipe.submatrix is None else SharedSubmatrices
            yield kind(some, ordered, [mine[item.place] for item in some if item.place in mine])


def _way(item: Matrices) -> object:
    """How those are cut whose directions all ranks take together; None of those that have owners."""
    p = item.parameter
    assert p.sharding is not None
    return p.sharding.placements if p.owners[item.number][0] == EVERYONE else None
