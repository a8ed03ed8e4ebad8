// The numbers of steepest/linalg/basis.py, one line of mathematics each.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/floats.h"

namespace steepest::eigh {
inline namespace STEEPEST_ISA {

constexpr float kEps = 1.1920928955078125e-7f;  // 2^-23

// ---- scale ---------------------------------------------------------------------------------------------------------

// 2^-k for the k with `largest` in [2^(k-1), 2^k), as far as fp32 holds it; 0 for 0.
STEEPEST_HD inline float inverse_power_of_two(float largest) {
  if (largest == 0) return 0;
  int exponent = 126 - static_cast<int>(bits_of(largest) >> 23);
  exponent = exponent < -126 ? -126 : exponent;
  return float_of(static_cast<uint32_t>(exponent + 127) << 23);
}

// ---- whitening error -----------------------------------------------------------------------------------------------

// Eigenvalues below it are rounding.
STEEPEST_HD inline float value_floor(float largest) { return 8 * kEps * largest; }

STEEPEST_HD inline float floored(float value, float floor) { return value < floor ? floor : value; }

STEEPEST_HD inline float whitening_scale(float value, float floor) {
  const float d = floored(value, floor);
  return d == 0 ? 0.0f : 1 / sqrtf(d);
}

// A whitening error that rounding alone can make; `ratios` is the sum of max d / d.
STEEPEST_HD inline float rounding_error(float ratios, int n) {
  return kEps / 32 * ratios / sqrtf(static_cast<float>(n));
}

constexpr float kTracked = 0.1f, kProgress = 0.95f, kSettled = 1e-2f;

// Whether a stage has done its work.
STEEPEST_HD inline bool progress(float error, float old_error, float old_rounding) {
  return (error <= kTracked && error <= kProgress * old_error) || old_error <= kSettled || old_error <= old_rounding;
}

// ---- one simultaneous Jacobi rotation ------------------------------------------------------------------------------

constexpr float kSmallestEta = 0.025f, kLargestEta = 0.4f, kLongestRow = 0.5f;
constexpr int kEtas = 11;

// X_ij for B_ij between the values d_i and d_j.
STEEPEST_HD inline float generator(float b, float d_i, float d_j, float floor, float eta) {
  const float gap = d_j - d_i;
  const float denominator = gap * gap + eta * eta * ((d_i + floor) * (d_j + floor));
  return b * gap / (denominator == 0 ? 1.0f : denominator);
}

// ---- orthonormality ------------------------------------------------------------------------------------------------

constexpr float kOrthonormalOnEntry = 1e-2f, kOrthonormal = 1e-5f;
constexpr int kSteps = 4, kPowerSteps = 6;
// Newton-Schulz steps end here, which is near what rounding leaves.
constexpr float kOrthonormalEnough = 1e-6f;

// ||Y^T Y - I||_F / sqrt n after a Newton-Schulz step, from the same before it.
STEEPEST_HD inline float residual_after_step(float residual, int n) {
  const float norm = sqrtf(static_cast<float>(n)) * residual;
  return norm * residual * (3 + norm) / 4 + kEps * residual + 4 * kEps;
}

constexpr float kSymmetric = 1e-3f;

// ---- Jacobi sweeps -------------------------------------------------------------------------------------------------

// Every two of `even` players meet once in even - 1 rounds, even / 2 pairs in each: the last sits, the others go round
// him. Neighbouring pairs of a round have neighbouring players.
struct Players {
  int p, q;
};
STEEPEST_HD inline Players pair(int round, int k, int even) {
  const int others = even - 1;
  if (k == 0) return {others, round};
  const int p = round + k, q = round - k;
  return {p < others ? p : p - others, q < 0 ? q + others : q};
}

// The rotation that makes b = 0 by an angle of at most 45 degrees: column p becomes c p - s q, column q s p + c q.
struct Angle {
  float c, s, t;
};
STEEPEST_HD inline Angle angle(float d_p, float d_q, float b) {
  if (b == 0) return {1, 0, 0};
  const float tau = (d_q - d_p) / (2 * b);
  const float t = (tau < 0 ? -1.0f : 1.0f) / (fabsf(tau) + sqrtf(1 + tau * tau));
  const float c = 1 / sqrtf(1 + t * t);
  return {c, t * c, t};
}

// Sweeps end after one that met no entry larger than this, on the scale of the whitening error.
constexpr float kConverged = 1e-5f;
constexpr int kMostSweeps = 16;
// Sweeps and a polish of the basis are repeated where the whitening error is larger than this after them.
constexpr float kSolved = 1e-3f;
constexpr int kPasses = 2;

}  // namespace STEEPEST_ISA
}  // namespace steepest::eigh
