// A warp's matrix products on tensor cores, sm_80 and newer, and the shared memory they read, in PTX.
//
// One product is D = A B + C with A 16 x 16, B 16 x 8 in fp16, C and D 16 x 8 in fp32 (PTX ISA, "mma.m16n8k16"). With
// g = lane / 4 and t = lane % 4 a lane holds, two halves to a register, the lower index in the lower half,
//
//     a[0] = A[g    ][2t, 2t + 1]    a[2] = A[g    ][2t + 8, 2t + 9]    b[0] = B[2t    , 2t + 1][g]
//     a[1] = A[g + 8][2t, 2t + 1]    a[3] = A[g + 8][2t + 8, 2t + 9]    b[1] = B[2t + 8, 2t + 9][g]
//     c[0], c[1] = C[g][2t, 2t + 1]  c[2], c[3] = C[g + 8][2t, 2t + 1]
//
// and ldmatrix.x4 loads four 8 x 8 matrices of halves: lane 8 i + r says where row r of matrix i is, 8 halves at a
// multiple of 16 bytes, and every lane receives in register i the elements [g][2t, 2t + 1] of matrix i or, transposed,
// [2t, 2t + 1][g].
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/shared.cuh"

namespace steepest {

constexpr int kTile = 16;  // rows and columns of a tile, and what a product sums over

// Said as one instruction: an assignment is four stores to the compiler, which it does not always join again.
__device__ inline void store_16_bytes(uint16_t* at, uint4 words) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(at))),
               "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

template <bool kTransposed>
__device__ inline void load_matrices(uint32_t (&to)[4], const uint16_t* row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
}

// c += A B; tensor cores cut the sum off below fp32's last place instead of rounding it.
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace steepest
