// What mma, wgmma and copies of tiles share.
#pragma once
#include "machine.h"

namespace ptxsim {
// The address of a byte of a tile that is swizzled over 128 (kind 1), 64 (2) or 32 (3) bytes.
inline u32 swizzled(u32 address, int kind) {
  constexpr u32 kMasks[4] = {0, 7, 3, 1};
  return address ^ (address >> 7 & kMasks[kind]) << 4;
}
// 16 bytes of factors as numbers: eight of 16 bits or four of tf32.
inline void widen_16_bytes(const u8* from, Type t, double* to) {
  if (t == TF32) {
    for (int i = 0; i < 4; ++i) {
      u32 word;
      memcpy(&word, from + 4 * i, 4);
      to[i] = double(tf32_bits(word));
    }
    return;
  }
#ifdef __F16C__
  if (t == F16) {
    const __m256 f = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    _mm256_storeu_pd(to, _mm256_cvtps_pd(_mm256_castps256_ps128(f)));
    _mm256_storeu_pd(to + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(f, 1)));
    return;
  }
#endif
  u16 halves[8];
  memcpy(halves, from, 16);
  for (int i = 0; i < 8; ++i) to[i] = double(widen(halves[i], t == BF16));
}
// c[rows][columns] += a[rows][k] * b[k][columns]: products are exact, the sum is in double precision.
inline void multiply(const double* a, const double* b, double* c, int rows, int columns, int k) {
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < k; ++i) {
      const double x = a[r * k + i];
      const double* row = b + i * columns;
      double* out = c + r * columns;
#pragma GCC ivdep
      for (int j = 0; j < columns; ++j) out[j] += x * row[j];
    }
}
// The sum of a product in fp32: the nearest number, or, where tensor cores are told to cut off, the one towards zero.
inline float rounded_sum(double s, bool truncates) {
  const float f = float(s);
  return truncates && std::isfinite(f) && std::fabs(double(f)) > std::fabs(s) ? std::nextafterf(f, 0) : f;
}
}  // namespace ptxsim
