// A word in memory by which a block tells others of its launch that what it wrote is there.
#pragma once

#include <cstdint>

namespace steepest {

// By one thread, behind a barrier of its block: what any of its threads wrote before is seen by who sees the flag.
__device__ inline void raise_flag(uint64_t* flag) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(flag)), "l"(uint64_t{1})
               : "memory");
}

constexpr uint32_t kMostPolls = 1 << 28;  // a minute and more: what is waited for takes microseconds

// By one thread, and a barrier of its block behind it. A flag that nobody raises ends the launch with an error.
__device__ inline void wait_for_flag(const uint64_t* flag) {
  for (uint32_t polls = 0; polls < kMostPolls; ++polls) {
    uint64_t raised;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(raised) : "l"(__cvta_generic_to_global(flag)) : "memory");
    if (raised != 0) return;
    __nanosleep(50);
  }
  __trap();
}

}  // namespace steepest
