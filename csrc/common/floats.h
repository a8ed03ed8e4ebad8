// 16-bit floating-point numbers as their bits, on the host and on the device: nothing here knows CUDA's or torch's
// types.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

#ifdef __CUDA_ARCH__
#include <cuda_fp16.h>
#endif

namespace steepest {
inline namespace STEEPEST_ISA {

STEEPEST_HD inline uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

STEEPEST_HD inline float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

STEEPEST_HD inline float from_bf16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

// To nearest, ties to even; every NaN becomes a quiet one.
STEEPEST_HD inline uint16_t to_bf16(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t half;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(value));  // one instruction for eight
  return half;
#else
  const uint32_t bits = bits_of(value);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}

// Up with probability `noise` / 2^16 of the remainder below bf16; noise is uniform in [0, 2^16). Not finite: as it is.
STEEPEST_HD inline uint16_t to_bf16(float value, uint32_t noise) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7f800000) == 0x7f800000) return to_bf16(value);
  return static_cast<uint16_t>((bits + noise) >> 16);
}

STEEPEST_HD inline float from_f16(uint16_t bits) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(bits));
#else
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // Below the normal range the exponent field is 0: build 2^-14 (1 + f) and take 2^-14 off again.
  if (rest < 0x400) return float_of(sign | bits_of(float_of(0x38800000 | rest << 13) - float_of(0x38800000)));
  return float_of(sign | ((rest << 13) + 0x38000000));
#endif
}

// To nearest, ties to even; beyond the range infinite.
STEEPEST_HD inline uint16_t to_f16(float value) {
#ifdef __CUDA_ARCH__
  return __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 2^16 or beyond
  // Below 2^-14 the last place is 2^-24: adding 2^-1 (its last place is 2^-24) rounds there.
  if (rest < 0x38800000) return static_cast<uint16_t>(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000));
  return static_cast<uint16_t>(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
#endif
}

// An fp32 weight as bf16, to nearest with ties away from zero, and the 16 bits that bring it back: together they are
// the fp32 number. (Ties to even would leave a remainder of +2^15, one more than 16 bits hold.)
struct Split {
  uint16_t high;
  int16_t low;
};
STEEPEST_HD inline Split split(float value) {
  if (value != value) return {0x7fc0, 0};  // rounding up a NaN could carry into its sign
  const uint32_t bits = bits_of(value);
  const uint16_t high = static_cast<uint16_t>((bits + 0x8000) >> 16);
  return {high, static_cast<int16_t>(bits - (static_cast<uint32_t>(high) << 16))};
}
STEEPEST_HD inline float join(Split parts) {
  return float_of((static_cast<uint32_t>(parts.high) << 16) + static_cast<uint32_t>(static_cast<int32_t>(parts.low)));
}

}  // namespace STEEPEST_ISA
}  // namespace steepest
