// Sums over the threads of a block and over the blocks that share a matrix, in an order that is always the same.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/scratch.h"

namespace steepest {

constexpr int kThreads = 256;

template <class R>
__device__ inline R combine(bool largest, R a, R b) {
  return largest ? (a > b ? a : b) : a + b;
}

// Combines `count` values over a block, in an order that is always the same; the result is thread 0's. The columns in
// `largest`, a bit each, take the maximum and the others the sum.
template <int kCount, uint32_t kLargest, class R>
__device__ inline void combine_block(R (&values)[kCount]) {
  __shared__ R of_warp[kCount][kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
      values[c] = combine(kLargest >> c & 1, values[c], __shfl_down_sync(0xffffffff, values[c], step));
    if (lane == 0) of_warp[c][warp] = values[c];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      values[c] = of_warp[c][0];
      for (int w = 1; w < kThreads / 32; ++w) values[c] = combine(kLargest >> c & 1, values[c], of_warp[c][w]);
    }
  }
  __syncthreads();  // of_warp may be used again
}

// The same, and every thread has the result.
template <uint32_t kLargest, int kCount>
__device__ inline void reduce_block(float (&values)[kCount]) {
  __shared__ float of_warp[kCount][kThreads / 32];
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
      values[c] = combine(kLargest >> c & 1, values[c], __shfl_down_sync(0xffffffff, values[c], step));
    if (threadIdx.x % 32 == 0) of_warp[c][threadIdx.x / 32] = values[c];
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    values[c] = of_warp[c][0];
#pragma unroll
    for (int warp = 1; warp < kThreads / 32; ++warp)
      values[c] = combine(kLargest >> c & 1, values[c], of_warp[c][warp]);
  }
  __syncthreads();  // of_warp may be used again
}

// A chunk's values become its line of partials, `kWidth` numbers wide; the block that comes last combines all `chunks`
// lines, from `first_line` on, in their order, and returns true with the totals in thread 0's values. Every thread of a
// block calls it; `values` are thread 0's.
template <int kWidth, int kCount, uint32_t kLargest>
__device__ inline bool combine_chunks(const Scratch& scratch, int64_t counter, int32_t chunks, int64_t first_line,
                                      int64_t line, double (&values)[kCount]) {
  if (chunks == 1) return true;
  __shared__ bool last;
  if (threadIdx.x == 0) {
    for (int c = 0; c < kCount; ++c) scratch.partials[line * kWidth + c] = values[c];
    __threadfence();  // the partials are visible before the count is
    auto* done = reinterpret_cast<unsigned long long*>(scratch.counters + counter);
    last = atomicAdd(done, 1ull) == static_cast<unsigned long long>(chunks) - 1;
    if (last) *done = 0;
  }
  __syncthreads();
  if (!last) return false;
  __threadfence();
  for (int c = 0; c < kCount; ++c) values[c] = 0;
  for (int i = threadIdx.x; i < chunks; i += kThreads)
    for (int c = 0; c < kCount; ++c)
      values[c] = combine(kLargest >> c & 1, values[c], __ldcg(scratch.partials + (first_line + i) * kWidth + c));
  combine_block<kCount, kLargest>(values);
  return true;
}

}  // namespace steepest
