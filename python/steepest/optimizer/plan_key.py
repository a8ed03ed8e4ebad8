"""What a plan is made for, of the parameters of a group: it serves as long as this stays as it is.

A step compares it entry by entry with what was: ten thousand parameters are a dozen loops that Python does not see the
inside of. Nothing but the first key is kept, as tuples that live on would set off garbage collections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

from torch import Tensor

from ..ops.whole_steps import PLAIN
from ..sharding.local import is_partial, is_sharded, local_tensor

of_parameter = attrgetter("shape", "dtype", "device")
of_gradient = attrgetter("shape", "dtype", "layout")


def entries(params: Sequence[Tensor], state: Mapping[Tensor, Mapping[str, object]]) -> Iterator[object]:
    """The layouts of parameters with gradients and of these, where their shards lie, and where their state does.

    Of two lists of different lengths some entry differs before the shorter one ends: those that say how many follow
    come first.
    """
    grads = [p.grad for p in params]
    without = [i for i, g in enumerate(grads) if g is None]
    if without:
        params = [p for p in params if p.grad is not None]
    present = [g for g in grads if g is not None]
    # Few layouts of five dimensions and more, and of Triton's tensors, can be walked.
    flat = all(map(Tensor.is_contiguous, params)) and all(map(Tensor.is_contiguous, present))
    plain = PLAIN.issuperset(map(type, params))
    states = list(map(state.get, params))
    values = list(chain.from_iterable([of_one.values() for of_one in states if of_one is not None]))
    place: Callable[[Any], int] = Tensor.data_ptr if PLAIN.issuperset(map(type, values)) else _place
    return chain(
        (len(params), len(without), flat, plain),
        without,
        map(id, params),
        map(of_parameter, params),
        map(of_gradient, present),
        () if flat else map(_strides, params, present),
        () if plain else map(_shard, params, present),
        [None if of_one is None else len(of_one) for of_one in states],
        map(place, values),
    )


def _shard(p: Tensor, g: Tensor) -> tuple[object, ...] | None:
    """The place of a shard and of its gradient, of one that the step is yet to sum as it will be then."""
    if not is_sharded(p):
        return None
    placements = p.placements if is_partial(p) else getattr(g, "placements", None)  # type: ignore[attr-defined]
    return (local_tensor(p).data_ptr(), getattr(g, "device_mesh", None), placements)


def _strides(p: Tensor, g: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    return None if p.is_contiguous() and g.is_contiguous() else (p.stride(), g.stride())


def _place(value: object) -> int:
    """The address of a tensor of the state. A plan's views keep the memory, so that no other tensor comes there."""
    return value.data_ptr() if type(value) is Tensor else id(value)  # a fake tensor has no address
