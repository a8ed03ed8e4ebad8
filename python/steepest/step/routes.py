"""Which way the direction of a sharded matrix is taken, chosen from its placements.

    local    no shard cuts the matrix: the rank that has it takes its direction, and nothing travels
    gram     tensor parallelism cuts its long side, which is so much longer than the short one that this sends less:
             every rank takes its part, and one Gram matrix of the short side is summed, and one for each restart
             (`steepest.linalg.polar.sharded`)
    owner    any other: its parts travel to one rank, in the dtype of the direction, and the direction back

The first and the last give the bits of one process. The Gram form agrees with it to rounding, and every rank computes
its polynomial; so it is for tensor parallelism alone (a mesh dimension whose name begins with "tp"), whose adapters and
latent projections are that thin. Of P ranks each sends

    gram     2 (P - 1) / P   4 bytes (1 + restarts) `gram_elements`, about n^2 / 2
    owner    2 (P - 1) / P   2 bytes m n / P, on average
"""

from __future__ import annotations

from typing import Literal

from ..matrices import Piece
from ..recipe import Recipe
from ..sharding.layout import Sharding
from ..sharding.regions import shard_dims

__all__ = ["EVERYONE", "gram_dim", "route"]

#: the owner of a matrix whose direction all ranks take together
EVERYONE = -1

Route = Literal["local", "gram", "owner"]


def route(recipe: Recipe, sharding: Sharding, piece: Piece) -> Route:
    """The way of the matrices of a piece; "owner" where only some of them are cut."""
    if all(len(holders) == 1 for holders in sharding.holders(piece)):
        return "local"
    return "owner" if gram_dim(recipe, sharding, piece) is None else "gram"


def gram_dim(recipe: Recipe, sharding: Sharding, piece: Piece) -> int | None:
    """The dimension of its matrices that ranks share, -2 or -1, where the Gram form takes their directions."""
    dims = () if sharding.mesh is None else shard_dims(sharding.placements)
    names = () if sharding.mesh is None else sharding.mesh.mesh_dim_names or ()
    if (
        len(dims) != 1
        or sharding.ranks.shards is not sharding.ranks
        or not names
        or not names[dims[0]].startswith("tp")
    ):
        return None
    plain = recipe.scale == "lmo" and not recipe.by_matrix and not recipe.reads_weight
    if not plain or not recipe.direction.shards or piece.length != piece.rows or piece.by_columns:
        return None
    d = sharding.placements[dims[0]].dim % len(sharding.shape)  # type: ignore[attr-defined]
    summed = recipe.direction.sharded_bytes(min(piece.rows, piece.cols), sharding.ranks.device)
    if summed * sharding.ranks.size >= 2 * piece.rows * piece.cols:
        return None
    if d == piece.dim and piece.length == sharding.shape[d] and piece.rows >= piece.cols:
        return -2
    return -1 if d == piece.col_dim and piece.cols >= piece.rows else None
