// Kronecker factors that are measured in the metric of each other, on a CPU; no torch in here.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu_polar/kernels.h"

namespace steepest::eigh {

// A stack of rows x columns gradients G with factors L and R, their bases Q_L and Q_R, and values l and r in these,
// contiguous fp32; all three of a side are nullptr where it has no factor.   S = Q_L^T G Q_R
//
//   L <- L + weight (G Q_R D_R^2 Q_R^T G^T / columns - L)     l_i <- beta l_i + (1 - beta) mean_j (S D_R)_ij^2
//   R <- R + weight (G^T Q_L D_L^2 Q_L^T G / rows - R)        r_j <- beta r_j + (1 - beta) mean_i (D_L S)_ij^2
//
// D: 1 / sqrt of the values before, 0 of 0, and 1 of a side without a factor. limited: D is at most max(10, min(n,
// 4000)) of a side of length n, and values above 0 are kept where it is that. Until it has `started` D is 1, and values
// stay.
struct Coupled {
  int64_t matrices, rows, columns;
  const float* grads;
  const float* bases[2];
  float *factors[2], *values[2];
  float weight, beta;
  bool started, limited;
};

// A matrix has the same bits whatever else is in the call and however many threads there are.
void update_coupled(const std::vector<Coupled>& stacks, const cpu_polar::Kernels& kernels);

}  // namespace steepest::eigh
