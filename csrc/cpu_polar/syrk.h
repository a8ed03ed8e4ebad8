// Averages of Gram matrices on a CPU; no torch in here.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu_polar/kernels.h"

namespace steepest::cpu_polar {

// out = alpha X X^T + beta C of so many matrices, fp32: X (m, k), C and out (m, m), contiguous, C where it is out or
// apart from it; by_rows: rows of X are contiguous, else its columns are. Half of a product is computed, and the result
// is symmetric to the bit if C is.
struct Averages {
  int64_t matrices, m, k;
  const float* x;
  bool by_rows;
  const float* c;
  float* out;
  const float *alpha, *beta;  // one for each matrix; C is not read where beta is 0
};

// The weight of the newest of the terms of an average with the rate beta, of which so many are in it.
inline float newest_weight(float terms, double beta) {
  return static_cast<float>((1 - beta) / (1 - std::pow(beta, double{terms} + 1)));
}

// A matrix has the same bits whatever else is in the call and however many threads there are.
void average(const std::vector<Averages>& averages, const Kernels& kernels);

// The factors of stacks of m x n matrices: left (m, m) takes X X^T, right (n, n) takes Y^T Y, with this weight, each
// nullptr where there is none.
class FactorAverages {
 public:
  void add(int64_t matrices, int64_t m, int64_t n, const float* x, const float* y, float* left, float* right,
           float weight);
  void take(const Kernels& kernels) const { average(averages_, kernels); }

 private:
  std::vector<Averages> averages_;
  std::vector<std::vector<float>> weights_;
};

}  // namespace steepest::cpu_polar
