// The shared memory that a launch asked for, and what keeps addresses in it from filling the registers.
#pragma once

#include <cuda_runtime.h>

namespace steepest {

// 16 bytes aligned.
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Nothing that follows from the value is known, or computed, before.
__device__ inline void hide(int& value) { asm volatile("" : "+r"(value)); }

}  // namespace steepest
