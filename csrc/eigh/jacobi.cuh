// Jacobi's method on a symmetric matrix in shared memory: sweeps of rounds of rotations of disjoint pairs.
#pragma once

#include <cuda_runtime.h>

#include "common/block.cuh"
#include "eigh/formulas.cuh"
#include "eigh/layout.h"
#include "eigh/square.cuh"

namespace steepest::eigh {

// One round: B <- J^T B J and V <- V J for the rotations J of all its pairs. Returns the largest entry that this
// thread's pair had, on the scale of the whitening error. Waits for the block.
__device__ inline float jacobi_round(const Square& b, const Square& v, Rotation* rotations, int n, int round,
                                     float floor) {
  const int pairs = b.even / 2, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float size = 0;
  if (static_cast<int>(threadIdx.x) < pairs) {
    const Players players = pair(round, threadIdx.x, b.even);
    const float d_p = b(players.p, players.p), d_q = b(players.q, players.q), between = b(players.p, players.q);
    size = fabsf(between) * whitening_scale(d_p, floor) * whitening_scale(d_q, floor);
    const Angle turn = angle(d_p, d_q, between);
    rotations[threadIdx.x] = {turn.c, turn.s, d_p - turn.t * between, d_q + turn.t * between};
  }
  __syncthreads();
#pragma unroll 1
  for (int l = lane; l < pairs; l += 32) {
    const Players right = pair(round, l, b.even);
    const Rotation turn = rotations[l];
#pragma unroll 2
    for (int k = warp; k < pairs; k += kWarps) {
      const Players left = pair(round, k, b.even);
      const Rotation other = rotations[k];
      float &pp = b(left.p, right.p), &pq = b(left.p, right.q), &qp = b(left.q, right.p), &qq = b(left.q, right.q);
      if (k == l) {
        pp = turn.p, pq = qp = 0, qq = turn.q;
        continue;
      }
      // The pair of the lower number turns first: (k, l) and (l, k) remain transposes to the bit.
      const bool swapped = k > l;
      const Rotation first = swapped ? turn : other, second = swapped ? other : turn;
      const float across = swapped ? qp : pq, down = swapped ? pq : qp;
      const float p0 = first.c * pp - first.s * down, q0 = first.s * pp + first.c * down;
      const float p1 = first.c * across - first.s * qq, q1 = first.s * across + first.c * qq;
      pp = second.c * p0 - second.s * p1;
      const float upper = second.s * p0 + second.c * p1, lower = second.c * q0 - second.s * q1;
      qq = second.s * q0 + second.c * q1;
      pq = swapped ? lower : upper, qp = swapped ? upper : lower;
    }
#pragma unroll 4
    for (int row = warp; row < n; row += kWarps) {
      float &p = v(row, right.p), &q = v(row, right.q);
      const float before = p;
      p = turn.c * before - turn.s * q, q = turn.s * before + turn.c * q;
    }
  }
  __syncthreads();
  return size;
}

// Sweeps until one met nothing to turn. `largest` is the largest diagonal entry.
__device__ inline void jacobi(const Square& b, const Square& v, Rotation* rotations, int n, float largest) {
  float met[1] = {1};
#pragma unroll 1
  for (int sweep = 0; sweep < kMostSweeps && met[0] > kConverged; ++sweep) {
    met[0] = 0;
#pragma unroll 1
    for (int round = 0; round < b.even - 1; ++round) {
      const float size = jacobi_round(b, v, rotations, n, round, value_floor(largest));
      met[0] = size > met[0] ? size : met[0];
    }
    reduce_block<1>(met);
  }
}

}  // namespace steepest::eigh
