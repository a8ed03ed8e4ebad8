// What a CUDA call that failed becomes.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace steepest {

// Throws, with `what`, put together, and CUDA's word for it, unless `error` is success, which costs nothing. The
// runtime keeps an error until it is read, and the next op that asks how its launch went would report it as its own: so
// it is read here.
template <class... What>
void check_cuda(cudaError_t error, const What&... what) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());
  std::ostringstream text;
  ((text << "steepest::") << ... << what) << " failed: " << cudaGetErrorString(error);
  throw std::runtime_error(text.str());
}

// Of the launch just made.
inline void check_launch(const char* op, int64_t blocks, size_t items) {
  check_cuda(cudaGetLastError(), op, ": a launch of ", blocks, " blocks over ", items, " tensors");
}

}  // namespace steepest
