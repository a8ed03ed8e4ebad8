"""Who waits for whom, with stand-ins for streams and tensors that are on a GPU by name only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from steepest.ops import streams

GPU = torch.device("cuda", 0)


class Event:
    def __init__(self, after: set[str]) -> None:
        self.after, self.synchronized = after, False

    def synchronize(self) -> None:
        self.synchronized = True


class Stream:
    """Knows what it has done or will have waited for."""

    def __init__(self, device: Any = GPU) -> None:
        self.done: set[str] = set()

    def wait_stream(self, other: Stream) -> None:
        self.done |= other.done

    def wait_event(self, event: Event) -> None:
        self.done |= event.after

    def record_event(self) -> Event:
        return Event(set(self.done))


class World:
    """A first stream, the present one, and the memory that was kept for others."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.first = self.present = Stream()
        self.kept: list[tuple[int, Stream]] = []
        patch.setattr(streams, "_STREAMS", {})
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.present)
        patch.setattr(torch.cuda, "stream", self.on)
        patch.setattr(Tensor, "record_stream", lambda t, stream: self.kept.append((id(t), stream)))

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.present = self.present, stream
        yield
        self.present = before


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with FakeTensorMode():
        yield World(monkeypatch)


def test_work_follows_what_was_begun_and_nothing_waits_for_it(world: World) -> None:
    given, made = torch.empty(3, device=GPU), torch.empty(3, device=GPU)
    world.first.done.add("gathered")
    with streams.beside(GPU, (given, made)):
        assert world.present is not world.first
        assert world.present.done == {"gathered"}
        world.present.done.add("refreshed")
        streams.written([made])
    assert world.present is world.first
    assert world.first.done == {"gathered"}
    assert [t for t, _ in world.kept] == [id(given), id(made)]
    streams.join([given])
    assert "refreshed" not in world.first.done
    streams.join([made])
    assert "refreshed" in world.first.done


def test_a_join_is_for_the_writing_and_not_for_what_came_after(world: World) -> None:
    one, other = torch.empty(3, device=GPU), torch.empty(3, device=GPU)
    for t, name in ((one, "one"), (other, "other")):
        with streams.beside(GPU, (t,)):
            world.present.done.add(name)
            streams.written([t])
    streams.join([one])
    assert world.first.done == {"one"}
    streams.join()
    assert world.first.done == {"one", "other"}


def test_reading_waits_for_the_writing_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    status, loaded = (torch.zeros(2, dtype=torch.int32, device=GPU) for _ in range(2))
    events: list[Event] = []
    record = Stream.record_event
    monkeypatch.setattr(Stream, "record_event", lambda self: events.append(record(self)) or events[-1])
    monkeypatch.setattr(torch, "cat", lambda tensors: tensors[0])
    pinned = SimpleNamespace(copy_=lambda *_, **__: None, tolist=lambda: [5, 7])
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pinned)
    world.first.done.add("status")
    streams.written([status])
    world.first.done.add("next step")
    assert streams.read([status]) == [5, 7]
    assert events[-1].after == {"status"}
    assert events[-1].synchronized
    streams.read([loaded])
    assert events[-1].after == {"status", "next step"}


def test_elsewhere_everything_is_done_at_once() -> None:
    t = torch.tensor([3, 4], dtype=torch.int32)
    with streams.beside(t.device, (t,)):
        t += 1
        streams.written([t])
    streams.join([t])
    streams.join()
    assert streams.read([t, t[:1]]) == [4, 5, 4]
    assert t not in streams._WRITTEN
