// One step of orthogonal iteration of eigenbases on a CPU; no torch in here.
#pragma once

#include <cstdint>
#include <vector>

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

// Factors of one side of a stack of matrices, (matrices, n, n), with their bases, (matrices, n, n), and statuses, which
// the step overwrites where it is taken; p is nullptr of a side without a factor.   left: 1 where it is not.
struct Side {
  const float* p;
  float* basis;
  int32_t *status, *left;
  float* values;  // (matrices, n), one for a column; nullptr where there are none
};

// Factors of both sides of a stack of rows x columns matrices, and second moments in their bases, nullptr where there
// are none. Of a side with columns that are sorted anew values and second moments are sorted with them.
struct Tracked {
  int64_t matrices, rows, columns;
  Side sides[2];
  float* second;

  int64_t length(int64_t side) const { return side == 0 ? rows : columns; }
};

// When steps are taken: the error was at most `near`, and fell by the factor `progress`, to `settled` or to what
// rounding makes, in so many steps at most, of which no more are taken than that needs. accepted: the status of the
// basis then.
struct Limits {
  double near, progress, settled;
  int32_t accepted;
  int64_t steps;
};

// Steps of all of these, in place.
void track(const std::vector<Tracked>& stacks, const Limits& limits, const cpu_polar::Kernels& kernels);

}  // namespace steepest::eigh
