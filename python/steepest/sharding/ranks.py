"""The ranks that share parameters, and the collectives among them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Ranks", "ranks_of_mesh", "replicas"]

T = TypeVar("T")
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class Ranks:
    """The ranks of a process group in the order of their places.

    size: how many; place: of this rank among them.   call: what this rank is doing, and `what` of a collective what it
    waits for: an error of one that fails says both.
    replica_of: by place, which copy of the parameters the shards of a rank are of; more than one where replicas share
    the work.   shards: the ranks of this copy.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        places: Sequence[int],
        device: torch.device,
        *,
        replica_of: Sequence[int] | None = None,
        shards: Ranks | None = None,
    ) -> None:
        """places: for every rank of the group, in the group's order, its place.   device: that its collectives take."""
        self.replica_of = tuple(replica_of or [0] * len(places))
        self.shards = self if shards is None else shards
        self.group, self.size, self.device = group, len(places), device
        self._places = tuple(places)
        self.place = 0 if group is None else places[dist.get_rank(group)]
        self._order = [places.index(place) for place in range(self.size)]  # the group's rank at a place
        self.call = "the step"

    @property
    def world(self) -> tuple[int, ...]:
        """The global ranks, by their places."""
        ranks = [dist.get_rank()] if self.group is None else dist.get_process_group_ranks(self.group)
        return tuple(ranks[at] for at in self._order)

    def all_reduce(
        self, t: Tensor, op: Literal["sum", "max", "min"] = "sum", what: str = "numbers of the parameters they share"
    ) -> None:
        """Reduces in place."""
        if self.size == 1:
            return
        dense = t.contiguous()
        self._run(lambda: dist.all_reduce(dense, op=_OPS[op], group=self.group), what)
        if dense is not t:
            t.copy_(dense)

    def reduce_stats(self, rows: Tensor) -> None:
        """Makes what was measured of shards that of whole gradients.

        rows: (parameters, 3) fp64: finite (0 or 1), sum of squares, largest magnitude.
        """
        most = torch.stack([1 - rows[:, 0], rows[:, 2].nan_to_num(nan=torch.inf)])
        what = f"what is measured of {len(rows)} gradients"
        self.shards.all_reduce(most, "max", what)
        self.shards.all_reduce(rows[:, 1], what=what)
        rows[:, 0], rows[:, 2] = 1 - most[0], most[1]

    def all_to_all(self, sent: Tensor, sizes: Sequence[int], wanted: Sequence[int], what: str) -> Callable[[], Tensor]:
        """Begins to send `sizes[q]` elements to place q, one after another; gives what waits for `wanted[q]` from each.

        sent: one-dimensional; it is not copied where the places are the group's order, and not to be written to before
        the wait.
        """
        received = sent.new_empty(sum(wanted))
        if self.size == 1:
            received.copy_(sent)
            return lambda: received
        plain = self._order == list(range(self.size))
        if not plain:
            sent = torch.cat([sent.split(list(sizes))[place] for place in self._places])
        ours, theirs = ([each[place] for place in self._places] for each in (sizes, wanted))
        # As bytes: not every backend has every dtype.
        work = self._run(
            lambda: dist.all_to_all_single(
                received.view(torch.uint8),
                sent.view(torch.uint8),
                [n * sent.itemsize for n in theirs],
                [n * sent.itemsize for n in ours],
                group=self.group,
                async_op=True,
            ),
            what,
        )

        def wait() -> Tensor:
            self._run(work.wait, what)
            return received if plain else torch.cat([received.split(theirs)[at] for at in self._order])

        return wait

    def sum_parts(self, t: Tensor) -> None:
        """Makes sums over shards sums over whole parameters, in place."""
        self.shards.all_reduce(t)

    def agree(self, value: object) -> bool:
        """Whether all ranks have an equal value, by its text; waits for the device."""
        digest = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7], "big")
        both = torch.tensor([digest, -digest], device=self.device)
        self.all_reduce(both, "max", "a word on whether all are about to take the same step")
        return both[0].item() == -both[1].item()

    def gather_objects(self, value: T) -> list[T]:
        """The value of every rank, by place."""
        values: list[Any] = [None] * self.size
        if self.size == 1:
            return [value]
        self._run(lambda: dist.all_gather_object(values, value, group=self.group), "the reasons of all")
        return [values[at] for at in self._order]

    def _run(self, collective: Callable[[], Any], what: str) -> Any:
        try:
            return collective()
        except RuntimeError as error:
            raise RuntimeError(
                f"a collective of {self.call} failed on rank {dist.get_rank()} among the ranks {self.world}, waiting "
                f"for {what}: {error}\nA rank that ended, or that took another step than the others, leaves them "
                "waiting: look for the first error of every rank. All ranks call the constructor, add_param_group, "
                "step, state_dict, load_state_dict and metrics together"
            ) from error


def replicas(device: torch.device) -> Ranks:
    """All ranks, each of which has all of the parameters. RuntimeError where there are none."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "share_work=True shares work among the ranks of torch.distributed, which is not initialised: call "
            "torch.distributed.init_process_group first, or leave share_work out"
        )
    places = range(dist.get_world_size())
    return Ranks(dist.group.WORLD, places, device, replica_of=places, shards=Ranks(None, (0,), device))


def ranks_of_mesh(
    mesh: DeviceMesh, dims: tuple[int, ...], device: torch.device, *, copies: tuple[int, ...] = ()
) -> Ranks:
    """The ranks that differ from this one in these dimensions of a mesh, in row-major order of their coordinates.

    copies: dimensions whose ranks have the same shards, and share the work on them; they come first in that order.
    device: of what lies on the mesh. Collective where there are several dimensions and no group for them yet.
    """
    if copies:
        shards = ranks_of_mesh(mesh, dims, device)
        ranks = ranks_of_mesh(mesh, (*copies, *dims), device)
        ranks.replica_of = tuple(place // shards.size for place in range(ranks.size))
        ranks.shards = shards
        return ranks
    if not dims:
        return Ranks(None, (0,), device)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    world = []
    for along in product(*(range(mesh.size(i)) for i in dims)):
        at = list(coordinate)
        for i, position in zip(dims, along, strict=True):
            at[i] = position
        world.append(int(mesh.mesh[tuple(at)]))
    group = mesh.get_group(dims[0]) if len(dims) == 1 else _group_of(tuple(sorted(world)), dist.group.WORLD)
    return Ranks(group, [world.index(rank) for rank in dist.get_process_group_ranks(group)], device)


@lru_cache(maxsize=64)
def _group_of(ranks: tuple[int, ...], world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of these ranks of the world, made once. (A flattened mesh would have one, but with it torch 2.13 gathers
    uneven shards of two mesh dimensions in a wrong order.)
    """
    if ranks == tuple(range(dist.get_world_size(world))):
        return world
    return dist.new_group(list(ranks), use_local_synchronization=True)
