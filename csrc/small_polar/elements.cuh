// A matrix in memory: eight neighbours in, two out, whatever its element type and alignment.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/floats.h"
#include "small_polar/params.h"

namespace steepest::small_polar {

constexpr int kVector = 8;  // halves in 16 bytes

// One matrix as it lies in memory, rows of neighbours.
struct Source {
  const void* at;
  int64_t row;  // from one to the next
  int32_t rows, columns;
  Dtype dtype;
  bool aligned;  // eight elements from a multiple of eight on lie at a multiple of 16 bytes
};

// Eight elements as they lie in memory, zeros outside. Fetching and converting are apart so that loads are under way
// while products are computed.
struct Eight {
  uint4 low, high;  // high: elements 4 to 7 of fp32

  __device__ void fetch(const Source& x, int32_t row, int32_t column) {
    low = high = {0, 0, 0, 0};
    if (row >= x.rows || column >= x.columns) return;
    const int64_t index = row * x.row + column;
    if (x.aligned && column + kVector <= x.columns) {
      if (x.dtype == Dtype::f32) {
        const uint4* from = reinterpret_cast<const uint4*>(static_cast<const float*>(x.at) + index);
        low = from[0], high = from[1];
      } else {
        low = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(x.at) + index);
      }
      return;
    }
    const bool wide = x.dtype == Dtype::f32;
    uint32_t words[kVector] = {};
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (column + j >= x.columns) break;
      if (wide)
        words[j] = static_cast<const uint32_t*>(x.at)[index + j];
      else
        words[j / 2] |= static_cast<uint32_t>(static_cast<const uint16_t*>(x.at)[index + j]) << 16 * (j % 2);
    }
    low = {words[0], words[1], words[2], words[3]}, high = {words[4], words[5], words[6], words[7]};
  }

  __device__ void convert(Dtype dtype, float (&to)[kVector]) const {
    const uint32_t words[kVector] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    if (dtype == Dtype::f32) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) to[j] = float_of(words[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const uint16_t half = static_cast<uint16_t>(words[j / 2] >> 16 * (j % 2));
        to[j] = dtype == Dtype::bf16 ? from_bf16(half) : from_f16(half);
      }
    }
  }
};

__device__ inline uint32_t pack(float low, float high) {
  return to_f16(low) | static_cast<uint32_t>(to_f16(high)) << 16;
}

struct alignas(8) Pair {
  float first, second;
};

// Where the result goes; two neighbours at once.
struct Target {
  void* at;
  int64_t row;
  int32_t rows, columns;
  Dtype dtype;
  bool paired;  // an even column lies at a multiple of two elements

  __device__ void one(int64_t index, float value) const {
    if (dtype == Dtype::f32)
      static_cast<float*>(at)[index] = value;
    else
      static_cast<uint16_t*>(at)[index] = dtype == Dtype::bf16 ? to_bf16(value) : to_f16(value);
  }
  __device__ void operator()(int32_t i, int32_t j, float first, float second) const {
    if (i >= rows || j >= columns) return;
    const int64_t index = i * row + j;
    if (paired && j + 1 < columns) {
      if (dtype == Dtype::f32) {
        reinterpret_cast<Pair*>(at)[index / 2] = {first, second};
      } else {
        const bool bf16 = dtype == Dtype::bf16;
        reinterpret_cast<uint32_t*>(at)[index / 2] =
            bf16 ? to_bf16(first) | static_cast<uint32_t>(to_bf16(second)) << 16 : pack(first, second);
      }
      return;
    }
    one(index, first);
    if (j + 1 < columns) one(index + 1, second);
  }
};

}  // namespace steepest::small_polar
