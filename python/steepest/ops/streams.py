"""Work beside the steps, whose result a later one reads: on a CUDA stream of its own, on other devices at once.

with beside(device, tensors): ...    begun after all that was begun before; nothing waits for it
written(tensors)                     said after writing, wherever that was
join(tensors)                        what comes next, comes after the writing of these
read(tensors)                        the host reads these, and waits for their writing and for nothing else
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_STREAMS: dict[tuple[torch.device, str], torch.cuda.Stream] = {}
_WRITTEN = WeakTensorKeyDictionary()  # events


def _stream(device: torch.device, purpose: Literal["work", "reading"]) -> torch.cuda.Stream:
    if (device, purpose) not in _STREAMS:
        _STREAMS[device, purpose] = torch.cuda.Stream(device)
    return _STREAMS[device, purpose]


@contextmanager
def beside(device: torch.device, tensors: Iterable[Tensor]) -> Iterator[None]:
    """tensors: all that is read or written there and was made elsewhere; their memory is kept until it is done."""
    if device.type != "cuda":
        yield
        return
    stream = _stream(device, "work")
    stream.wait_stream(torch.cuda.current_stream(device))
    for t in tensors:
        t.record_stream(stream)
    with torch.cuda.stream(stream):
        yield


def written(tensors: Sequence[Tensor]) -> None:
    """Marks tensors, all of one device, as written by what is begun on the present stream so far."""
    if tensors and tensors[0].is_cuda:
        event = torch.cuda.current_stream(tensors[0].device).record_event()
        for t in tensors:
            _WRITTEN[t] = event


def join(tensors: Iterable[Tensor] | None = None) -> None:
    """The present stream, not the host, waits until these are written or (None) nothing goes on beside it."""
    if tensors is None:
        for (device, _), stream in _STREAMS.items():
            torch.cuda.current_stream(device).wait_stream(stream)
        return
    for t in tensors:
        if t in _WRITTEN:
            torch.cuda.current_stream(t.device).wait_event(_WRITTEN[t])


def read(tensors: Sequence[Tensor]) -> list[int]:
    """The numbers of integer tensors of one device, one after the other."""
    device = tensors[0].device
    if device.type != "cuda":
        return torch.cat(list(tensors)).tolist()
    stream = _stream(device, "reading")
    for t in tensors:
        if t in _WRITTEN:
            stream.wait_event(_WRITTEN[t])
        else:  # loaded, or new: on the present stream
            stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        there = torch.cat(list(tensors))
        here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
        here.copy_(there, non_blocking=True)
        stream.record_event().synchronize()
    return here.tolist()
