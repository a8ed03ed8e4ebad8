// The mathematics of `normalize_updates`, number by number; host and device.
#pragma once

#include <cmath>

#include "multi_tensor/formulas.cuh"
#include "multi_tensor/normalize.h"

namespace steepest::multi_tensor {
inline namespace STEEPEST_ISA {

template <class R>
struct Rates {
  R beta2, weight, eps;  // weight: of a sum of squares over so many entries

  STEEPEST_HD Rates(double beta2, double eps, double entries)
      : beta2(static_cast<R>(beta2)), weight(static_cast<R>((1 - beta2) / entries)), eps(static_cast<R>(eps)) {}
};

// A second moment after this sum of squares, as it was where that is not finite.
template <class R>
STEEPEST_HD inline R mean_square(const Rates<R>& rates, R second, R square_sum) {
  const R fresh = rates.beta2 * second + rates.weight * square_sum;
  return fresh <= most<R>() ? fresh : second;
}

// Of what has been nothing so far, where eps is 0 as well, 0.
template <class R>
STEEPEST_HD inline R inverse_root(const Rates<R>& rates, R second) {
  const R root = square_root(second) + rates.eps;
  return root == R(0) ? R(0) : R(1) / root;
}

// What gives a matrix its length again, or entries of root mean square `rms`: of nothing, and of what is too large to
// be squared, 0.
template <class R>
STEEPEST_HD inline R length_ratio(const double (&lengths)[kLengths], double rms, double entries) {
  if (rms == 0 && !(lengths[kBefore] <= most<R>())) return R(0);
  if (!(lengths[kAfter] <= most<R>())) return R(0);
  const double before = rms == 0 ? sqrt(lengths[kBefore]) : rms * sqrt(entries), ratio = before / sqrt(lengths[kAfter]);
  return ratio <= most<R>() ? static_cast<R>(ratio) : R(0);
}

}  // namespace STEEPEST_ISA
}  // namespace steepest::multi_tensor
