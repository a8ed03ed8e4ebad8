// One step of orthogonal iteration of eigenbases on a CPU; no torch in here.
#pragma once

#include <cstdint>

#include "cpu_polar/kernels.h"

namespace steepest::eigh {

// What is measured of a matrix: whether it was done at all; the whitening errors of the bases that came in and go out,
// and ||Q^T Q - I||_F / sqrt n of the one that goes out, the three from kProbes vectors of signs; and the
// whitening error before that rounding alone can make.
enum Measured { kDone, kErrorBefore, kErrorAfter, kResidual, kRounding, kMeasured };
constexpr int64_t kProbes = 8;

// Stacks of so many n x n matrices, contiguous. The columns of a new basis are sorted by diag(Q^T P Q), descending, and
// order says where each was. A matrix that is not done (P is not finite, zero or not symmetric to the bit, Q is not
// orthonormal, or columns of P Q are dependent) has no basis and no order.
struct Iteration {
  int64_t matrices, n;
  const float *p, *q;
  float* basis;
  int64_t* order;
  float* measured;  // (matrices, kMeasured)
};

// A matrix has the same bits whatever else is in the call and however many threads there are.
void iterate(const Iteration& iteration, const cpu_polar::Kernels& kernels);

}  // namespace steepest::eigh
