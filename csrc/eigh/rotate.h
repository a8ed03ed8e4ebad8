// Matrices in two bases, and second moments there, on a CPU; no torch in here.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu_polar/kernels.h"

namespace steepest::eigh {

enum class Way : int64_t { kInto, kBack, kObserve };

// A stack of rows x columns matrices X with bases L and R, nullptr: the identity, and second moments V, contiguous
// fp32:
//
//   kInto     out = (L^T X R) / D        kBack   out = L (X / D) R^T       D^2 = sqrt(V) over + eps;  V nullptr: D = 1
//   kObserve  out = V beta + (1 - beta) (L^T X R)^2
//
// with 1/0 = 0. out is apart from all else; in kObserve it may be V.
struct Rotation {
  int64_t matrices, rows, columns;
  const float *x, *left, *right, *second;
  float over, eps;
  float* out;
};

// over and eps of Adam's D, V an average with the rate beta of `*step` terms, which corrects it for its start, nullptr:
// not. inside: D^2 = (sqrt(V) + eps) over.
inline void set_divisor(Rotation& rotation, const float* step, double beta, double eps, bool inside) {
  const double over = step == nullptr ? 1 : 1 / std::sqrt(1 - std::pow(beta, double{*step}));
  rotation.over = static_cast<float>(over), rotation.eps = static_cast<float>(inside ? eps * over : eps);
}

// A matrix has the same bits whatever else is in the call and however many threads there are: products are sums from
// the first to the last of k.
void rotate(const std::vector<Rotation>& rotations, Way way, float beta, const cpu_polar::Kernels& kernels);

// kObserve of gradients into V, which is `updated`, nullptr where it stays, and with it kInto and kBack of X. The bits
// are those of the three one after another. out may be X.
struct AdamStep : Rotation {
  const float* grads;
  float* updated;
  float beta;
};

void adam(const std::vector<AdamStep>& steps, const cpu_polar::Kernels& kernels);

}  // namespace steepest::eigh
