// The types of PTX, and 16-bit floating-point numbers on the host.
#pragma once
#ifdef __F16C__
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptxsim {
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using std::string;
using std::vector;

[[noreturn]] inline void fail(const string& what) { throw std::runtime_error(what); }

enum Type : u8 {
  NONE,
  U8,
  U16,
  U32,
  U64,
  S8,
  S16,
  S32,
  S64,
  B8,
  B16,
  B32,
  B64,
  B128,
  F16,
  BF16,
  F32,
  F64,
  PRED,
  F16X2,
  BF16X2,
  TF32,
  E4M3X2,
  E5M2X2
};
// The type of a modifier such as "u32", NONE for other modifiers.
Type type_of(const string& modifier);

constexpr int size_of(Type t) {
  switch (t) {
    case U8:
    case S8:
    case B8:
      return 1;
    case U16:
    case S16:
    case B16:
    case F16:
    case BF16:
    case E4M3X2:
    case E5M2X2:
      return 2;
    case U64:
    case S64:
    case B64:
    case F64:
      return 8;
    case B128:
      return 16;
    default:
      return 4;
  }
}
constexpr bool is_signed(Type t) { return t == S8 || t == S16 || t == S32 || t == S64; }
constexpr bool is_float(Type t) { return t == F16 || t == BF16 || t == F32 || t == F64; }
constexpr bool is_half(Type t) { return t == F16 || t == BF16 || t == F16X2 || t == BF16X2; }

// A register has 64 bits; a value lies in its lowest.
template <class T>
inline T from_bits(u64 bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
inline u64 to_bits(T value) {
  if constexpr (sizeof(T) == 4) {
    u32 bits;
    memcpy(&bits, &value, 4);
    return bits;
  } else {
    u64 bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
  }
}
inline u64 low_bits(int bits) { return bits >= 64 ? ~0ull : (1ull << bits) - 1; }
// A narrow signed integer of a register, in 64 bits.
inline u64 extend(u64 v, Type t) {
  switch (t) {
    case S8:
      return u64(s64(s8(v)));
    case S16:
      return u64(s64(s16(v)));
    case S32:
      return u64(s64(s32(v)));
    default:
      return v;
  }
}

inline float half_to(u16 h) {
#ifdef __F16C__
  return _cvtsh_ss(h);
#else
  __fp16 value;
  memcpy(&value, &h, 2);
  return value;
#endif
}
inline u16 to_half(float f) {
#ifdef __F16C__
  return _cvtss_sh(f, 0);
#else
  const __fp16 value = f;
  u16 h;
  memcpy(&h, &value, 2);
  return h;
#endif
}
inline u16 to_half_rz(float f) {
  const u16 h = to_half(f);
  const bool away = std::fabs(half_to(h)) > std::fabs(f);
  return away ? u16(h - 1) : h;  // the next number towards zero; from infinity the largest
}
inline float bf_to(u16 h) { return from_bits<float>(u64(h) << 16); }
inline u16 to_bf(float f) {
  const u32 b = u32(to_bits(f));
  if ((b & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return u16((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
// To the nearest of 10 bits, ties away from zero (cvt.rna.tf32).
inline float to_tf32(float f) {
  const u32 b = u32(to_bits(f));
  if ((b & 0x7f800000) == 0x7f800000) return f;
  return from_bits<float>((b + 0x1000) & ~0x1fffu);
}
// What the tensor cores read of a word.
inline float tf32_bits(u32 b) { return from_bits<float>(b & ~0x1fffu); }

inline float widen(u16 bits, bool bf16) { return bf16 ? bf_to(bits) : half_to(bits); }
inline u16 narrow(float value, bool bf16) { return bf16 ? to_bf(value) : to_half(value); }

// hi + lo (lo a rounding error of hi, or 0) as a float of which another rounding to 16 bits is right: the last bit says
// whether something was cut off.
inline float round_to_odd(double hi, double lo) {
  float f = float(hi);
  double rest = (hi - double(f)) + lo;
  if (!std::isfinite(f) || rest == 0) return f;
  if ((rest < 0) != (f < 0) && f != 0) f = std::nextafterf(f, 0);  // towards zero, then sticky
  return from_bits<float>(to_bits(f) | 1);
}
// a * b + c of 16-bit floats, to be rounded once.
inline float fma_to_odd(float a, float b, float c) {
  const double product = double(a) * b, sum = product + c;
  if (!std::isfinite(sum)) return float(sum);
  const double t = sum - product, error = (product - (sum - t)) + (double(c) - t);
  return round_to_odd(sum, error);
}
inline float flush(float f) { return std::fpclassify(f) == FP_SUBNORMAL ? std::copysign(0.f, f) : f; }
}  // namespace ptxsim
