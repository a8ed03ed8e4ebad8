// The blocks of a cluster, sm_90 and newer: a barrier, and the shared memory of the others (PTX ISA, "barrier.cluster"
// and "mapa"). A cluster of one is a block of any architecture.
#pragma once

#include <cuda_runtime.h>

namespace steepest {

// Every thread of a cluster's blocks waits here for all others, and sees what they wrote to shared memory.
template <int kBlocks>
__device__ inline void sync_blocks() {
  if constexpr (kBlocks == 1) {
    __syncthreads();
  } else {
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
  }
}

// What lies at `at` of this block's shared memory in the cluster's block of this number.
template <int kBlocks, class T>
__device__ inline T* of_block(T* at, int block) {
  if constexpr (kBlocks > 1) asm("mapa.u64 %0, %1, %2;" : "=l"(at) : "l"(at), "r"(block));
  return at;
}

}  // namespace steepest
