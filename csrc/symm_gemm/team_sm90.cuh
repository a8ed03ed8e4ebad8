// A warpgroup of an sm_90 GPU, as epilogue.cuh needs it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cute/arch/copy_sm75.hpp"
#include "cute/arch/copy_sm90.hpp"
#include "cutlass/arch/barrier.h"
#include "symm_gemm/update.cuh"

namespace steepest::symm_gemm {

template <Dtype kDtype>
struct Warpgroup {
  int warpgroup, thread;

  // One named barrier for each warpgroup, after those that CUTLASS keeps for itself.
  __device__ void sync() const { cutlass::arch::NamedBarrier::sync(128, static_cast<uint32_t>(warpgroup)); }

  __device__ static uint32_t pack(float first, float second) {
    if constexpr (kDtype == Dtype::f16) {
      const __half2 pair = __floats2half2_rn(first, second);
      return reinterpret_cast<const uint32_t&>(pair);
    } else {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
      return reinterpret_cast<const uint32_t&>(pair);
    }
  }
  __device__ static void unpack(uint32_t pair, float& first, float& second) {
    if constexpr (kDtype == Dtype::f16) {
      const float2 both = __half22float2(reinterpret_cast<const __half2&>(pair));
      first = both.x, second = both.y;
    } else {
      first = __uint_as_float(pair << 16), second = __uint_as_float(pair & 0xffff0000u);
    }
  }

  __device__ static void load_matrices(const Vector& row, uint32_t (&words)[4]) {
    const auto& at = reinterpret_cast<const cute::uint128_t&>(row);
    cute::SM75_U32x4_LDSM_N::copy(at, words[0], words[1], words[2], words[3]);
  }
  __device__ static void store_matrices(const uint32_t (&words)[4], Vector& row) {
    auto& at = reinterpret_cast<cute::uint128_t&>(row);
    cute::SM90_U32x4_STSM_N::copy(words[0], words[1], words[2], words[3], at);
  }
  __device__ static void store_transposed(const uint32_t (&words)[4], Vector& row) {
    auto& at = reinterpret_cast<cute::uint128_t&>(row);
    cute::SM90_U16x8_STSM_T::copy(words[0], words[1], words[2], words[3], at);
  }

  __device__ static float add_lanes(float value) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
    return value;
  }

  __device__ static void publish() { __threadfence(); }
  __device__ static void acquire() { __threadfence(); }
  __device__ static uint32_t count(uint32_t* counter) { return atomicAdd(counter, 1u); }
  // Past the L1 cache, which other multiprocessors do not see.
  __device__ static Vector load_shared(const float* at) {
    const uint4 value = __ldcg(reinterpret_cast<const uint4*>(at));
    return {value.x, value.y, value.z, value.w};
  }
  __device__ static void store_shared(float* at, const Vector& value) {
    __stcg(reinterpret_cast<uint4*>(at), make_uint4(value.words[0], value.words[1], value.words[2], value.words[3]));
  }
};

}  // namespace steepest::symm_gemm
