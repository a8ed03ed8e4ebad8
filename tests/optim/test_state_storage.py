"""State tensors in stacks: the same numbers in fewer pieces of memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steepest.ops.backend import extension, extension_reason
from steepest.recipe import State
from steepest.step.state_storage import ALIGNMENT, stack
from support.training import noise, same_bits

DENSE: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT,
    "channels_last": lambda t: t.reshape(1, 7, 5, 1).repeat(2, 1, 1, 3).contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.reshape(7, 5, 1).repeat(1, 1, 2).permute(2, 0, 1),
    "scalar": lambda t: t[0, 0].clone(),
    "one": lambda t: t[:1, :1].clone(),
    "aligned by itself": lambda t: t.flatten().repeat(4)[:128].reshape(8, 16),
}
LOOSE: dict[str, Callable[[Tensor], Tensor]] = {
    "row slice": lambda t: t[1:, :3],
    "every other": lambda t: t[::2],
    "expanded": lambda t: t[:1].expand(7, 5),
    "empty": lambda t: t[:0],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int16]


def tensor(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return noise((7, 5), seed).mul(100).to(dtype)


def memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", DENSE)
def test_a_stack_holds_the_same_numbers_in_one_piece(layout: str, dtype: torch.dtype) -> None:
    states: list[State] = [{"m": DENSE[layout](tensor(i, dtype))} for i in range(5)]
    before = [(state["m"], state["m"].clone()) for state in states]
    stack(states)
    for state, (own, value) in zip(states, before):
        view = state["m"]
        assert same_bits(view, value)
        assert view.stride() == own.stride()
        assert memory(view) != memory(own)
        assert (view.data_ptr() - memory(view)) % ALIGNMENT == 0
        view.zero_()  # written through one view, the others stay: they do not overlap
    assert len({memory(state["m"]) for state in states}) == 1
    for own, value in before:
        assert same_bits(own, value), "the old tensor is left as it was"
    fresh = [{"m": value.clone()} for _, value in before]
    stack(fresh)
    fresh[2]["m"].zero_()
    assert all(same_bits(state["m"], before[i][1]) for i, state in enumerate(fresh) if i != 2)


def test_each_key_shape_stride_and_dtype_has_its_own_stack() -> None:
    kinds: list[Callable[[int], Tensor]] = [
        tensor,
        lambda i: tensor(i).mT,
        lambda i: tensor(i).mT.contiguous(),
        lambda i: tensor(i).flatten(),
        lambda i: tensor(i, torch.bfloat16),
        lambda i: tensor(i, torch.int16),
    ]
    states: list[State] = [{"m": make(2 * j + i), "v": make(50 + i)} for j, make in enumerate(kinds) for i in range(2)]
    wanted = [{key: t.clone() for key, t in state.items()} for state in states]
    stack(states)
    stacks: dict[int, list[tuple[str, int]]] = {}
    for n, state in enumerate(states):
        for key in ("m", "v"):
            assert same_bits(state[key], wanted[n][key])
            stacks.setdefault(memory(state[key]), []).append((key, n))
    pairs = [[(key, 2 * j), (key, 2 * j + 1)] for j in range(len(kinds)) for key in ("m", "v")]
    assert sorted(stacks.values()) == sorted(pairs)


def test_each_device_has_its_own_stack() -> None:
    states: list[State] = [{"m": torch.zeros(3, device=device)} for device in ("cpu", "meta", "cpu", "meta")]
    stack(states)
    assert [state["m"].device.type for state in states] == ["cpu", "meta", "cpu", "meta"]
    assert memory(states[0]["m"]) == memory(states[2]["m"])


@pytest.mark.parametrize("layout", LOOSE)
def test_what_is_not_dense_stays(layout: str) -> None:
    states: list[State] = [{"m": LOOSE[layout](tensor(i)), "v": tensor(10 + i)} for i in range(3)]
    own = [state["m"] for state in states]
    stack(states)
    assert all(state["m"] is t for state, t in zip(states, own))
    assert len({memory(state["v"]) for state in states}) == 1, "its neighbours move"


def test_sparse_tensors_stay() -> None:
    states: list[State] = [{"m": torch.eye(3).to_sparse()} for _ in range(2)]
    own = [state["m"] for state in states]
    stack(states)
    assert all(state["m"] is t for state, t in zip(states, own))


def test_a_lone_tensor_stays() -> None:
    states: list[State] = [{"m": tensor(0), "step": torch.tensor(3.0)}, {"v": tensor(1)}, {}]
    own = [dict(state) for state in states]
    stack(states)
    assert all(state[key] is t for state, kept in zip(states, own) for key, t in kept.items())
    stack([])


def test_counters_lie_apart() -> None:
    """Of one element each; counting one leaves the next alone."""
    states: list[State] = [{"step": torch.tensor(float(i))} for i in range(4)]
    stack(states)
    states[1]["step"] += 1
    assert [float(state["step"]) for state in states] == [0, 2, 2, 3]
    offsets = [state["step"].storage_offset() for state in states]
    assert offsets == [i * ALIGNMENT // 4 for i in range(4)]


@pytest.mark.skipif(extension is None, reason=f"{extension_reason}")
def test_a_large_state_asks_for_huge_pages() -> None:
    """What the system was asked for stands among the flags of its memory, granted or not."""
    alone: State = {"m": noise((1 << 21,), 0)}
    several: list[State] = [{"m": noise((3, 1 << 18), i)} for i in range(2)]
    small: list[State] = [{"m": noise((1 << 10,), i)} for i in range(2)]
    before = [state["m"].clone() for state in (alone, *several)]
    stack([alone, *several, *small])
    for state, value in zip((alone, *several), before, strict=True):
        t = state["m"]
        assert same_bits(t, value)
        flags = flags_of_memory(t.data_ptr() + t.nbytes // 2)
        if flags is None or not Path("/sys/kernel/mm/transparent_hugepage").exists():
            pytest.skip("this system has no huge pages, or does not say how memory is mapped")
        assert "hg" in flags
    assert alone["m"].untyped_storage().nbytes() == alone["m"].nbytes


def flags_of_memory(address: int) -> list[str] | None:
    try:
        with open("/proc/self/smaps") as lines:
            inside = False
            for line in lines:
                first = line.split()[0]
                if "-" in first and not first.endswith(":"):
                    begin, end = (int(number, 16) for number in first.split("-"))
                    inside = begin <= address < end
                elif inside and first == "VmFlags:":
                    return line.split()[1:]
    except OSError:
        pass
    return None
