"""What belongs to a stream: a handle of cuSOLVER, and the host memory that its solver may still read."""

from __future__ import annotations

import ctypes

import pytest
import torch

from support.host_libraries import shared_library

DOOR = """
#include <cstdlib>
#include <new>
#include <string>

#include "eigh/cusolver.h"

using namespace steepest::eigh;

namespace {
void* live[4096];  // what `new` has given in this library and `delete` has not taken back
void* give(std::size_t bytes) {
  void* const given = std::malloc(bytes);
  if (given == nullptr) throw std::bad_alloc();
  for (void*& each : live)
    if (each == nullptr) {
      each = given;
      return given;
    }
  std::abort();
}
void take_back(void* given) {
  for (void*& each : live)
    if (given != nullptr && each == given) each = nullptr;
  std::free(given);
}
}

void* operator new(std::size_t bytes) { return give(bytes); }
void* operator new[](std::size_t bytes) { return give(bytes); }
void operator delete(void* given) noexcept { take_back(given); }
void operator delete(void* given, std::size_t) noexcept { take_back(given); }
void operator delete[](void* given) noexcept { take_back(given); }
void operator delete[](void* given, std::size_t) noexcept { take_back(given); }

extern "C" {
int is_live(const void* given) {
  for (const void* each : live)
    if (each == given) return 1;
  return 0;
}
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
    sources = ["csrc/eigh/cusolver.cpp", str(folder / "door.cpp"), "-Wl,-Bsymbolic"]  # with the door's new and delete
    ours = ctypes.CDLL(str(shared_library(folder / "ours.so", sources)))
    assert ours.load(str(stand_in).encode()) == 0
    theirs = ctypes.CDLL(str(stand_in))
    theirs.cusolver_host_memory.restype = ctypes.c_void_p
    return ours, theirs


def solve(libraries: Libraries, n: int, device: int, stream: int) -> int | None:
    """Solves the identity; where the host memory lies that the solver was given, None where a call failed."""
    ours, theirs = libraries
    a, w = torch.eye(n, dtype=torch.float64), torch.empty(n, dtype=torch.float64)
    info, zeroed = torch.full((1,), -1, dtype=torch.int32), torch.zeros(1000, dtype=torch.uint8)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, w, info)]
    sizes = (ctypes.c_int64(1), ctypes.c_int64(n), ctypes.c_int(device))
    if ours.solve(*pointers, *sizes, ctypes.c_void_p(stream), ctypes.c_void_p(zeroed.data_ptr())) != 0:
        return None
    assert info.item() == 0
    assert w.tolist() == [1.0] * n
    memory = int(theirs.cusolver_host_memory())
    assert ours.is_live(ctypes.c_void_p(memory)), "the solver may still read it when its call has returned"
    return memory


MAIN, SIDE = 64, 128  # addresses of streams


@pytest.mark.slow
def test_streams_share_neither_a_handle_nor_host_memory(libraries: Libraries) -> None:
    ours, theirs = libraries
    first = solve(libraries, 3, 0, MAIN)
    assert theirs.cusolver_handles() == 1
    beside = solve(libraries, 3, 0, SIDE)
    assert theirs.cusolver_handles() == 2
    assert beside != first
    assert solve(libraries, 2, 0, MAIN) == first
    larger = solve(libraries, 5, 0, MAIN)
    assert len({first, beside, larger}) == 3
    assert ours.is_live(ctypes.c_void_p(first)), "was given back while the first call's solver may still read it"
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
