// What a launch can be told.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace steepest {

// Bytes of a kernel's arguments where toolkit and driver are of CUDA 12.1 or newer, else 4 KB.
#if CUDART_VERSION >= 12010
constexpr size_t kArgumentBytes = 32764;
#else
constexpr size_t kArgumentBytes = 4096;
#endif

}  // namespace steepest
