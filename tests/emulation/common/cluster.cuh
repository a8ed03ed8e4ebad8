// csrc/common/cluster.cuh on a CPU: the blocks of a cluster run together, each with its own part of the shared memory.
#pragma once

#include <cuda_runtime.h>

#include "common/shared.cuh"

namespace steepest {

template <int kBlocks>
__device__ inline void sync_blocks(int line = __builtin_LINE()) {
  if constexpr (kBlocks == 1)
    __syncthreads(line);
  else
    emulation::wait(emulation::of_cluster, emulation::count, line);
}

template <int kBlocks, class T>
__device__ inline T* of_block(T* at, int block) {
  if constexpr (kBlocks == 1) return at;
  using namespace emulation;
  auto* own = reinterpret_cast<const unsigned char*>(at);
  if (block < 0 || block >= kBlocks || !is_shared(own, sizeof(T))) fail("an address of no block of the cluster");
  return const_cast<T*>(reinterpret_cast<const T*>(own + (block - rank()) * sizeof shared_memory[0]));
}

}  // namespace steepest
