// From the sums over a Gram product R = X X^T to the norm of X, and from there to the numbers of a chain.
#pragma once

#include <cmath>

#include "common/host_device.h"
#include "polar/params.h"

namespace steepest::polar {

// In fp64, which squares the entries of 16-bit numbers exactly: nothing is lost where sums are nearly equal.
struct Spread {
  double below_sq;     // sum of squares of the entries below the diagonal
  double trace;        // ||X||_F^2
  double diagonal_sq;  // sum of squares of the diagonal
};

// The square of the norm that X is divided by; 1 for a zero matrix. Tight: the eigenvalues' mean and their spread times
// sqrt(m - 1), above every eigenvalue (Wolkowicz and Styan, 1980).
STEEPEST_HD inline double squared_norm(const Numbering& numbering, const Spread& sums, int64_t m) {
  double square = sums.trace;
  if (numbering.tight) {
    const double mean = sums.trace / m, centred = sums.diagonal_sq - sums.trace * mean;
    square = mean + sqrt((2 * sums.below_sq + (centred < 0 ? 0 : centred)) / m * (m - 1));
  }
  if (square < numbering.eps * numbering.eps) square = numbering.eps * numbering.eps;
  return square == 0 ? 1 : square;
}

STEEPEST_HD inline int table_of(const Numbering& numbering, double slack) {
  for (int t = 0; t < numbering.tables - 1; ++t)
    if (slack >= numbering.least[t]) return t;
  return numbering.tables - 1;
}

// constant inverse^power
STEEPEST_HD inline float number(const Numbering& numbering, int table, int column, double inverse) {
  double value = numbering.constants[table * numbering.columns + column];
  for (int power = numbering.powers[column]; power > 0; --power) value *= inverse;
  return static_cast<float>(value);
}

}  // namespace steepest::polar
