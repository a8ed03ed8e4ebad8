// What a CUDA call that failed becomes.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace steepest {

// Throws, with `what` and CUDA's word for it, unless `error` is success. The runtime keeps an error until it is read,
// and the next op that asks how its launch went would report it as its own: so it is read here.
inline void check_cuda(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());
  throw std::runtime_error("steepest::" + what + " failed: " + cudaGetErrorString(error));
}

// Of the launch just made.
inline void check_launch(const char* op, int64_t blocks, size_t items) {
  check_cuda(cudaGetLastError(), std::string(op) + ": a launch of " + std::to_string(blocks) + " blocks over " +
                                     std::to_string(items) + " tensors");
}

}  // namespace steepest
