// Products of stacks of fp32 matrices on a CPU; no torch in here.
#pragma once

#include <cstdint>

#include "cpu_polar/kernels.h"

namespace steepest::cpu_polar {

// One factor of every product of a stack: rows of memory are its rows, or else its columns; contiguous.
struct StackedFactor {
  const float* at;
  bool by_rows;
};

// out = alpha A B + beta C of so many matrices: A (m, k), B (k, n), C and out (m, n) of contiguous rows; C is out,
// apart from it, or not read where beta is 0. symmetric: as of `Product`.
struct Gemm {
  int64_t matrices, m, n, k;
  StackedFactor a, b;
  const float* c;
  float* out;
  float alpha, beta;
  bool symmetric;
};

// An entry is summed from the first to the last of k, whatever else is in the call and however many threads there are.
void multiply(const Gemm& gemm, const Kernels& kernels);

}  // namespace steepest::cpu_polar
