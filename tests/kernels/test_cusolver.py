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


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """Our side, and the stand-in for cuSOLVER that it has loaded."""
    folder = tmp_path_factory.mktemp("cusolver")
    (folder / "door.cpp").write_text(DOOR)
    stand_in = shared_library(folder / "libcusolver.so", ["tests/kernels/ptx/cusolver.cpp"])
    ours = ctypes.CDLL(str(shared_library(folder / "ours.so", ["csrc/eigh/cusolver.cpp", str(folder / "door.cpp")])))
    assert ours.load(str(stand_in).encode()) == 0
    theirs = ctypes.CDLL(str(stand_in))
    theirs.cusolver_host_memory.restype = ctypes.c_void_p
    return ours, theirs


def test_streams_share_neither_a_handle_nor_host_memory(libraries: tuple[ctypes.CDLL, ctypes.CDLL]) -> None:
    ours, theirs = libraries

    def solve(n: int, device: int, stream: int) -> int:
        a, w = torch.eye(n, dtype=torch.float64), torch.empty(n, dtype=torch.float64)
        info, zeroed = torch.full((1,), -1, dtype=torch.int32), torch.zeros(1000, dtype=torch.uint8)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, w, info)]
        sizes = (ctypes.c_int64(1), ctypes.c_int64(n), ctypes.c_int(device))
        last = (ctypes.c_void_p(stream), ctypes.c_void_p(zeroed.data_ptr()))
        assert ours.solve(*pointers, *sizes, *last) == 0
        assert info.item() == 0
        assert w.tolist() == [1.0] * n
        return int(theirs.cusolver_host_memory())

    main, side = 64, 128  # addresses of streams
    first = solve(3, 0, main)
    assert theirs.cusolver_handles() == 1
    beside = solve(3, 0, side)
    assert theirs.cusolver_handles() == 2
    assert beside != first
    assert solve(2, 0, main) == first
    larger = solve(5, 0, main)
    assert len({first, beside, larger}) == 3  # what the first call was given is not given back while it may be read
    assert solve(3, 0, main) == larger
    assert theirs.cusolver_handles() == 2
    solve(3, 1, main)
    assert theirs.cusolver_handles() == 3
