// Square fp32 matrices in shared memory, and the products by which a block of threads computes one from two others.
//
// A thread holds 2 x 2 elements of every 32 x 32 of a result until all have read what they need. Only then are they
// written, so that a result may take the place of a factor. Plain fp32 and no tensor cores: TF32 in three terms has at
// most 340 multiplications a clock and multiprocessor on sm_90 (not with the warp-wide instruction, and splitting comes
// on top) where fp32 has 128, on sm_80 170 and 64, and on sm_86, sm_89 and sm_120 it has 43 where fp32 has 128.
#pragma once

#include <cuda_runtime.h>

#include "common/block.cuh"
#include "common/shared.cuh"

namespace steepest::eigh {

constexpr int kSpan = 32, kWarps = kThreads / 32;
static_assert(kThreads == (kSpan / 2) * (kSpan / 2));

struct alignas(8) Two {
  float first, second;
};

struct Square {
  float* at;
  int even, stride;  // as in Layout

  __device__ float& operator()(int row, int column) const { return at[row * stride + column]; }
  __device__ Two& two(int row, int column) const { return reinterpret_cast<Two&>((*this)(row, column)); }

  // body(row, column) for every element of the first n rows and columns, a warp to a row.
  template <class Body>
  __device__ void for_each(int n, const Body& body) const {
#pragma unroll 1
    for (int row = threadIdx.x / 32; row < n; row += kWarps)
      for (int column = threadIdx.x % 32; column < n; column += 32) body(row, column);
  }

  // (S + S^T) / 2; returns the largest |S - S^T| that this thread saw. Waits for the block.
  __device__ float symmetrize() const {
    float skew = 0;
    for_each(even, [&](int row, int column) {
      if (column >= row) return;
      float &a = (*this)(row, column), &b = (*this)(column, row);
      const float difference = fabsf(a - b), mean = (a + b) * 0.5f;
      a = b = mean;
      skew = difference > skew ? difference : skew;
    });
    __syncthreads();
    return skew;
  }
};

template <int kSpans>
using Sums = float[2 * kSpans][2 * kSpans];

// Where this thread's elements of the first span begin. Found anew for every product: the compiler would keep all
// addresses that follow from them in registers through the whole refresh.
struct Corner {
  int row, column;

  __device__ static Corner of_thread() {
    int thread = threadIdx.x;
    hide(thread);
    return {thread / (kSpan / 2) * 2, thread % (kSpan / 2) * 2};
  }
};

// sums <- A B, or A^T B
template <bool kTransposed, int kSpans>
__device__ inline void multiply(Sums<kSpans>& sums, const Square& a, const Square& b) {
  const Corner corner = Corner::of_thread();
  int row[kSpans], column[kSpans];  // those beyond the matrix are computed as its last, and not written
#pragma unroll
  for (int i = 0; i < kSpans; ++i) {
    const int most = a.even - 2, down = corner.row + kSpan * i, along = corner.column + kSpan * i;
    row[i] = down < most ? down : most, column[i] = along < most ? along : most;
  }
#pragma unroll
  for (int i = 0; i < 2 * kSpans; ++i)
#pragma unroll
    for (int j = 0; j < 2 * kSpans; ++j) sums[i][j] = 0;
#pragma unroll 1
  for (int k = 0; k < a.even; k += 2) {
    Two left[2][kSpans], right[2][kSpans];  // of k and of k + 1
#pragma unroll
    for (int i = 0; i < kSpans; ++i) {
      if constexpr (kTransposed) {
        left[0][i] = a.two(k, row[i]), left[1][i] = a.two(k + 1, row[i]);
      } else {
        const Two upper = a.two(row[i], k), lower = a.two(row[i] + 1, k);
        left[0][i] = {upper.first, lower.first}, left[1][i] = {upper.second, lower.second};
      }
      right[0][i] = b.two(k, column[i]), right[1][i] = b.two(k + 1, column[i]);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < 2 * kSpans; ++i)
#pragma unroll
        for (int j = 0; j < 2 * kSpans; ++j) {
          const Two &x = left[h][i / 2], &y = right[h][j / 2];
          sums[i][j] += (i % 2 == 0 ? x.first : x.second) * (j % 2 == 0 ? y.first : y.second);
        }
  }
}

// to <- times sums + factor to. Waits before, for those that still read, and after.
template <int kSpans>
__device__ inline void store(const Square& to, const Sums<kSpans>& sums, float times = 1, float factor = 0) {
  const Corner corner = Corner::of_thread();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2 * kSpans; ++i)
#pragma unroll
    for (int j = 0; j < kSpans; ++j) {
      const int row = corner.row + kSpan * (i / 2) + i % 2, column = corner.column + kSpan * j;
      if (row >= to.even || column >= to.even) continue;
      Two& x = to.two(row, column);
      const Two old = factor == 0 ? Two{0, 0} : Two{factor * x.first, factor * x.second};
      x = {old.first + times * sums[i][2 * j], old.second + times * sums[i][2 * j + 1]};
    }
  __syncthreads();
}

}  // namespace steepest::eigh
