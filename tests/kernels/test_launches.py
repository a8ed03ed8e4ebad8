"""What launches have in common, against a CUDA runtime that notes what it is asked: device.cu and check.h in common."""

from __future__ import annotations

import ctypes
import re
import threading

import pytest

from support.host_libraries import COMPILER, ROOT, require_compiler, run

RUNTIME = """
#pragma once
#include <mutex>
#include <tuple>
#include <vector>

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount, cudaDevAttrL2CacheSize, cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor, cudaDevAttrClusterLaunch
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace runtime {
inline thread_local cudaError_t last = cudaSuccess;  // kept until it is read, a thread's own
inline thread_local int device = 0;
inline bool fails = false;
inline std::mutex mutex;
inline std::vector<std::tuple<const void*, int, int>> limits;
inline cudaError_t answer() { return fails ? last = cudaErrorInvalidValue : cudaSuccess; }
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = runtime::last;
  runtime::last = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = runtime::device, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int device) {
  *value = name == cudaDevAttrClusterLaunch ? device == 1 : 7;
  return runtime::answer();
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  const std::lock_guard<std::mutex> lock(runtime::mutex);
  runtime::limits.emplace_back(kernel, runtime::device, bytes);
  return runtime::answer();
}
"""
DOOR = """
#include <cuda_runtime.h>

#include <functional>

#include "common/check.h"
#include "common/device.h"

namespace {
std::string message;
int guarded(const std::function<void()>& body) {
  try {
    body();
  } catch (const std::exception& error) {
    message = error.what();
    return 1;
  }
  return 0;
}
}

extern "C" {
const char* last_message() { return message.c_str(); }
void fail(int fails) { runtime::fails = fails != 0; }
void on_device(int device) { runtime::device = device; }
int left_over() { return runtime::last; }
int limits() { return static_cast<int>(runtime::limits.size()); }
int allow(const void* kernel, int bytes) { return guarded([&] { steepest::allow_shared_memory(kernel, bytes); }); }
int clusters(int device) { return steepest::has_clusters(device); }
int ask(int device) { return guarded([&] { steepest::multiprocessors_of(device); }); }
int launch(int fails) {  // cudaLaunchKernel with <<<>>> leaves its error behind
  if (fails) runtime::last = cudaErrorInvalidValue;
  return guarded([] { steepest::check_launch("an_op", 3, 2); });
}
}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    require_compiler()
    folder = tmp_path_factory.mktemp("launches")
    (folder / "cuda_runtime.h").write_text(RUNTIME)
    (folder / "door.cpp").write_text(DOOR)
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-I", str(folder), "-I", "csrc", "-x", "c++"]
    run([[COMPILER, *flags, "csrc/common/device.cu", str(folder / "door.cpp"), "-o", str(folder / "launches.so")]])
    loaded = ctypes.CDLL(str(folder / "launches.so"))
    loaded.last_message.restype = ctypes.c_char_p
    return loaded


def test_a_kernels_limit_is_set_once_on_every_device(host: ctypes.CDLL) -> None:
    """By whichever of many threads comes first, and not lowered by a smaller launch."""
    kernels, before = [ctypes.c_void_p(address) for address in (16, 32)], host.limits()

    def launches(device: int) -> None:
        host.on_device(device)
        for _ in range(50):
            for kernel in kernels:
                assert host.allow(kernel, 1000) == 0

    threads = [threading.Thread(target=launches, args=(device % 2,)) for device in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert host.limits() == before + 4


def test_a_failure_is_reported_once_and_tried_again(host: ctypes.CDLL) -> None:
    kernel, before = ctypes.c_void_p(48), host.limits()
    host.fail(1)
    assert host.allow(kernel, 232448) == 1
    message = b"steepest::device: cudaFuncSetAttribute for 232448 bytes of shared memory failed: invalid value"
    assert host.last_message() == message
    assert host.left_over() == 0, "the next op would report it as its own"
    assert host.ask(0) == 1
    assert host.left_over() == 0
    host.fail(0)
    assert host.allow(kernel, 232448) == 0
    assert host.limits() == before + 2
    assert host.ask(0) == 0


def test_a_failed_launch_leaves_nothing_behind(host: ctypes.CDLL) -> None:
    assert host.launch(1) == 1
    wanted = b"steepest::an_op: a launch of 3 blocks over 2 tensors failed: invalid value"
    assert host.last_message() == wanted
    assert host.left_over() == 0
    assert host.launch(0) == 0


def test_clusters_are_the_devices_word(host: ctypes.CDLL) -> None:
    assert [host.clusters(device) for device in (0, 1)] == [0, 1]


def test_no_source_asks_the_runtime_past_these() -> None:
    """An error is read where it is cleared, and a limit set where it is known to be set."""
    allowed = {"cudaGetErrorString": {"check.h"}, "cudaFuncSetAttribute": {"device.cu"}}
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".cpp", ".h")]
    texts = {path.name: re.sub(r"//.*", "", path.read_text()) for path in sources}
    for name, where in allowed.items():
        assert {file for file, text in texts.items() if name in text} == where
    for file, text in texts.items():
        if re.search(r"<<<|cudaLaunchKernelEx", text):
            assert re.search(r"check_launch\(|check_cuda\(", text), f"{file} launches and does not look how it went"
