// The types of PTX, and 16-bit floating-point numbers on the host.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <map>
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
  TF32
};
inline const std::map<string, Type> kTypes = {
    {"u8", U8},     {"u16", U16}, {"u32", U32}, {"u64", U64},   {"s8", S8},       {"s16", S16},       {"s32", S32},
    {"s64", S64},   {"b8", B8},   {"b16", B16}, {"b32", B32},   {"b64", B64},     {"b128", B128},     {"f16", F16},
    {"bf16", BF16}, {"f32", F32}, {"f64", F64}, {"pred", PRED}, {"f16x2", F16X2}, {"bf16x2", BF16X2}, {"tf32", TF32}};
inline int size_of(Type t) {
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
inline bool is_signed(Type t) { return t == S8 || t == S16 || t == S32 || t == S64; }
inline bool is_float(Type t) { return t == F16 || t == BF16 || t == F32 || t == F64; }

inline float half_to(u16 h) { return _cvtsh_ss(h); }
inline u16 to_half(float f) { return _cvtss_sh(f, 0); }
inline u16 to_half_rz(float f) { return _cvtss_sh(f, 3); }
inline float bf_to(u16 h) {
  u32 b = u32(h) << 16;
  float f;
  memcpy(&f, &b, 4);
  return f;
}
inline u16 to_bf(float f) {
  u32 b;
  memcpy(&b, &f, 4);
  if ((b & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return u16((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
inline float to_tf32(float f) {
  u32 b;
  memcpy(&b, &f, 4);
  if ((b & 0x7f800000) == 0x7f800000) return f;
  b = (b + 0x1000) & ~0x1fffu;
  memcpy(&f, &b, 4);
  return f;
}
inline float tf32_bits(u32 b) {
  b &= ~0x1fffu;
  float f;
  memcpy(&f, &b, 4);
  return f;
}  // what the tensor cores read

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
}  // namespace ptxsim
