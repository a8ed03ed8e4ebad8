"""What belongs to a stream: a handle of cuSOLVER, and the host memory that its solver may still read."""

from __future__ import annotations

import ctypes

import pytest
import torch

from support.host_libraries import shared_library

DOOR = """
#include <string>

#include "eigh/cusolver.h"

using namespace steepest::eigh;

extern "C" {
int load(const char* name) { return load_cusolver({name}).empty() ? 0 : 1; }
int solve(double* a, double* w, int* info, int64_t count, int64_t n, int device, void* stream, void* zeroed) {
  const Solve all{a, w, info, count, n, true};
  try {
    solve_on_device(all, workspace_of(all, device, stream), zeroed, device, stream);
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}
}
"""

Libraries = tuple[ctypes.CDLL, ctypes.CDLL]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Libraries:
    """Our side, and the stand-in for cuSOLVER that it has loaded."""
    folder = tmp_path_factory.mktemp("cusolver")
    (folder / "door.cpp").write_text(DOOR)
    stand_in = shared_library(folder / "libcusolver.so", ["tests/kernels/ptx/cusolver.cpp"])
    ours = ctypes.CDLL(str(shared_library(folder / "ours.so", ["csrc/eigh/cusolver.cpp", str(folder / "door.cpp")])))
    assert ours.load(str(stand_in).encode()) == 0
    theirs = ctypes.CDLL(str(stand_in))
    theirs.cusolver_host_memory.restype = ctypes.c_void_p
    return ours, theirs


def solve(libraries: Libraries, n: int, device: int, stream: int) -> int | None:
    """Solves the identity; where the host memory lay that the solver was given, None where a call failed."""
    ours, theirs = libraries
    a, w = torch.eye(n, dtype=torch.float64), torch.empty(n, dtype=torch.float64)
    info, zeroed = torch.full((1,), -1, dtype=torch.int32), torch.zeros(1000, dtype=torch.uint8)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, w, info)]
    sizes = (ctypes.c_int64(1), ctypes.c_int64(n), ctypes.c_int(device))
    if ours.solve(*pointers, *sizes, ctypes.c_void_p(stream), ctypes.c_void_p(zeroed.data_ptr())) != 0:
        return None
    assert info.item() == 0
    assert w.tolist() == [1.0] * n
    return int(theirs.cusolver_host_memory())


MAIN, SIDE = 64, 128  # addresses of streams


def test_streams_share_neither_a_handle_nor_host_memory(libraries: Libraries) -> None:
    _, theirs = libraries
    first = solve(libraries, 3, 0, MAIN)
    assert theirs.cusolver_handles() == 1
    beside = solve(libraries, 3, 0, SIDE)
    assert theirs.cusolver_handles() == 2
    assert beside != first
    assert solve(libraries, 2, 0, MAIN) == first
    larger = solve(libraries, 5, 0, MAIN)
    assert len({first, beside, larger}) == 3
    assert first is not None
    assert ctypes.string_at(first, 300) == b"\xab" * 300, "was given back, while the first call's solver may read it"
    assert solve(libraries, 3, 0, MAIN) == larger
    assert theirs.cusolver_handles() == 2
    solve(libraries, 3, 1, MAIN)
    assert theirs.cusolver_handles() == 3


def test_what_was_made_before_a_failure_is_destroyed(libraries: Libraries) -> None:
    """Or every attempt would leave a handle, with its memory on the device."""
    _, theirs = libraries

    def alive() -> tuple[int, int]:
        return theirs.cusolver_handles(), theirs.cusolver_params()

    handles, params = alive()
    for refused in ((1, 0), (0, 1)):  # parameters, a stream
        theirs.cusolver_refuse(*refused)
        for _ in range(2):
            assert solve(libraries, 3, 2, MAIN) is None
            assert alive() == (handles, params)
    theirs.cusolver_refuse(0, 0)
    assert solve(libraries, 3, 2, MAIN) is not None
    assert alive() == (handles + 1, params + 1)
