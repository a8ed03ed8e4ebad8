// The numbers of a matrix, one line of mathematics each; every thread of a block computes them for itself.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/floats.h"
#include "small_polar/params.h"

namespace steepest::small_polar {
inline namespace STEEPEST_ISA {

// ---- range ---------------------------------------------------------------------------------------------------------

// ||X||_F^2 at any scale of fp32: squares of large, small and other entries apart, each times a power of two, so that
// none over- or underflows.
enum { kLarge, kMiddle, kSmall, kBins };
constexpr float kEdge = 281474976710656.0f;  // 2^48; entries from here on are large, below 1 / kEdge small
constexpr int kLargeExponent = -80, kSmallExponent = 86;

STEEPEST_HD inline float power_of_two(int exponent) {  // -126 .. 127
  return float_of(static_cast<uint32_t>(exponent + 127) << 23);
}

STEEPEST_HD inline void add_square(float value, float (&bins)[kBins]) {
  const float size = fabsf(value);
  const bool small = size < 1 / kEdge, large = !(size < kEdge);  // so is NaN
  const float scaled = value * (large ? power_of_two(kLargeExponent) : small ? power_of_two(kSmallExponent) : 1.0f);
  const float square = scaled * scaled;
  bins[kLarge] += large ? square : 0.0f;
  bins[kSmall] += small ? square : 0.0f;
  bins[kMiddle] += large || small ? 0.0f : square;
}

// A power of two in two factors, because one fp32 does not hold them all.
struct Scale {
  float first, second;
};

// Brings the root of the mean eigenvalue of X X^T, ||X||_F / sqrt(m), into [1/2, 1): no entry is then above sqrt(m) and
// R's largest eigenvalue is at most m.  1 for a zero matrix, NaN where an entry is not finite.
STEEPEST_HD inline Scale range(const float (&bins)[kBins], int32_t m) {
  if (!(bins[kLarge] < INFINITY)) return {NAN, NAN};
  // What lies in the bins below the largest that is not empty is too little for a factor of two.
  const bool large = bins[kLarge] > 0, middle = bins[kMiddle] > 0;
  const float root = sqrtf((large ? bins[kLarge] : middle ? bins[kMiddle] : bins[kSmall]) / static_cast<float>(m));
  if (root == 0) return {1.0f, 1.0f};
  const int scaled_by = large ? kLargeExponent : middle ? 0 : kSmallExponent;
  // root is far from the subnormals: its exponent field is the k with root in [2^(k-1), 2^k), plus 126.
  const int exponent = scaled_by - (static_cast<int>(bits_of(root) >> 23) - 126);
  const int half = exponent / 2;
  return {power_of_two(half), power_of_two(exponent - half)};
}

// ---- norm ----------------------------------------------------------------------------------------------------------

// The square of the norm that X is divided by, from tr R and ||R - mean I||_F^2: linalg/norm_bound.py.
STEEPEST_HD inline float squared_norm(const Numbers& numbers, float trace, float centred, int32_t m) {
  const float rows = static_cast<float>(m);
  const float bound = trace / rows + sqrtf(centred / rows) * sqrtf(rows - 1);
  const float norm = numbers.tight ? bound : trace;
  const float square = norm < numbers.least_square ? numbers.least_square : norm;  // NaN stays
  return square == 0 ? 1.0f : square;
}

STEEPEST_HD inline int choose_table(const Numbers& numbers, float slack) {
  int table = 0;
  while (table + 1 < numbers.tables && !(slack >= numbers.slacks[table])) ++table;
  return table;
}

}  // namespace STEEPEST_ISA
}  // namespace steepest::small_polar
