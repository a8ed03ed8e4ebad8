// Comparisons, and conversions between types.
#include <algorithm>
#include <cfenv>

#include "instructions.h"

namespace ptxsim {
namespace {
template <class T>
bool compare(int c, T a, T b) {
  const bool unordered = a != a || b != b;
  switch (c) {
    case kEq:
      return a == b;
    case kNe:
      return !unordered && a != b;
    case kLt:
      return a < b;
    case kLe:
      return a <= b;
    case kGt:
      return a > b;
    case kGe:
      return a >= b;
    case kEqu:
      return unordered || a == b;
    case kNeu:
      return unordered || a != b;
    case kLtu:
      return unordered || a < b;
    case kLeu:
      return unordered || a <= b;
    case kGtu:
      return unordered || a > b;
    case kGeu:
      return unordered || a >= b;
    case kNum:
      return !unordered;
    default:
      return unordered;
  }
}
bool compare_bits(const Instruction& in, Type t, u64 x, u64 y) {
  const int c = in.a;
  switch (t) {
    case F32: {
      const float a = from_bits<float>(x), b = from_bits<float>(y);
      return in.ftz ? compare(c, flush(a), flush(b)) : compare(c, a, b);
    }
    case F64:
      return compare(c, from_bits<double>(x), from_bits<double>(y));
    case F16:
      return compare(c, half_to(u16(x)), half_to(u16(y)));
    case BF16:
      return compare(c, bf_to(u16(x)), bf_to(u16(y)));
    case S16:
      return compare(c, s16(x), s16(y));
    case S32:
      return compare(c, s32(x), s32(y));
    case S64:
      return compare(c, s64(x), s64(y));
    case U16:
    case B16:
      return compare(c, u16(x), u16(y));
    case U32:
    case B32:
      return compare(c, u32(x), u32(y));
    default:
      return compare(c, x, y);
  }
}
}  // namespace
// a: Comparison; b: combined with a predicate by 1 and, 2 or, 3 xor
void run_setp(Warp& w, const Instruction& in, u32 mask) {
  const size_t first = in.two_results ? 2 : 1;
  if (in.t == F16X2 || in.t == BF16X2) {  // a predicate a half
    const Type t = in.t == F16X2 ? F16 : BF16;
    for (const int lane : lanes(mask)) {
      const u64 x = raw(w, in.ops[first], lane), y = raw(w, in.ops[first + 1], lane);
      put_raw(w, in.ops[0], lane, compare_bits(in, t, x, y));
      if (in.two_results) put_raw(w, in.ops[1], lane, compare_bits(in, t, x >> 16, y >> 16));
    }
    return;
  }
  for (const int lane : lanes(mask)) {
    bool p = compare_bits(in, in.t, raw(w, in.ops[first], lane), raw(w, in.ops[first + 1], lane)), q = !p;
    if (in.b) {
      const bool c = truth(w, in.ops[first + 2], lane);
      auto mix = [&](bool v) { return in.b == 1 ? v && c : in.b == 2 ? v || c : v != c; };
      p = mix(p), q = mix(q);
    }
    put_raw(w, in.ops[0], lane, p);
    if (in.two_results) put_raw(w, in.ops[1], lane, q);
  }
}
// t: of the result; t2: of what is compared
void run_set(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    const u64 x = raw(w, in.ops[1], lane), y = raw(w, in.ops[2], lane);
    if (in.t2 == F16X2 || in.t2 == BF16X2) {
      const Type t = in.t2 == F16X2 ? F16 : BF16;
      u32 r = 0;
      for (int h = 0; h < 32; h += 16)
        if (compare_bits(in, t, x >> h, y >> h))
          r |= (in.t == F16X2 ? 0x3c00u : in.t == BF16X2 ? 0x3f80u : 0xffffu) << h;
      put<u32>(w, in.ops[0], lane, r);
      continue;
    }
    const bool r = compare_bits(in, in.t2, x, y);
    switch (in.t) {
      case F32:
        put<float>(w, in.ops[0], lane, r ? 1.f : 0.f);
        break;
      case F16:
        put<u16>(w, in.ops[0], lane, r ? 0x3c00 : 0);
        break;
      case BF16:
        put<u16>(w, in.ops[0], lane, r ? 0x3f80 : 0);
        break;
      default:
        put<u32>(w, in.ops[0], lane, r ? ~0u : 0u);
    }
  }
}

namespace {
enum Mode { kNearest, kZero, kMinus, kPlus };
enum Flags { kSat = 1, kRelu = 2, kSatFinite = 4 };

double to_integral(double x, int how) {  // 1 nearest, 2 zero, 3 down, 4 up
  switch (how) {
    case 1:
      return std::nearbyint(x);
    case 2:
      return std::trunc(x);
    case 3:
      return std::floor(x);
    case 4:
      return std::ceil(x);
    default:
      return x;
  }
}
// To the float on the side of x that the mode says.
float rounded(double x, int mode) {
  const float r = float(x);
  if (mode == kNearest || double(r) == x || x != x) return r;
  if (mode == kZero) return std::fabs(double(r)) > std::fabs(x) ? std::nextafterf(r, 0) : r;
  if (mode == kMinus) return double(r) > x ? std::nextafterf(r, -INFINITY) : r;
  return double(r) < x ? std::nextafterf(r, INFINITY) : r;
}
u16 rounded_half(double x, bool bf16, const Instruction& in) {
  u16 h;
  if (in.rounding == kZero) {
    const float f = rounded(x, kZero);
    h = bf16 ? (f != f ? u16(0x7fff) : u16(to_bits(f) >> 16)) : to_half_rz(f);
  } else if (in.rounding == kNearest)
    h = narrow(round_to_odd(x, 0), bf16);
  else
    fail("a conversion to 16 bits that rounds up or down: " + in.text);
  if (in.c & kSatFinite) {
    const u16 largest = bf16 ? 0x7f7f : 0x7bff;
    if ((h & 0x7fff) == largest + 1) h = u16((h & 0x8000) | largest);
  }
  return h;
}
// To 8 bits with `mantissa` bits of fraction, the nearest, ties to even; beyond the largest to it.
u8 to_float8(float x, bool e4m3) {
  const int mantissa = e4m3 ? 3 : 2, bias = e4m3 ? 7 : 15;
  const u8 sign = std::signbit(x) ? 0x80 : 0;
  if (x != x) return 0x7f;
  const double largest = e4m3 ? 448 : 57344, a = std::min<double>(std::fabs(x), largest);
  int e = a == 0 ? 1 - bias : std::max(std::ilogb(a), 1 - bias);
  s64 units = s64(std::nearbyint(std::ldexp(a, mantissa - e)));  // with the leading one
  if (units == 2ll << mantissa) units >>= 1, ++e;
  const bool normal = units >= 1ll << mantissa;
  const u8 bits = normal ? u8((e + bias) << mantissa | (units & ((1 << mantissa) - 1))) : u8(units);
  return sign | std::min<u8>(bits, e4m3 ? 0x7e : 0x7b);
}
float from_float8(u8 b, bool e4m3) {
  const int mantissa = e4m3 ? 3 : 2, bias = e4m3 ? 7 : 15, e = (b & 0x7f) >> mantissa, m = b & ((1 << mantissa) - 1);
  const float sign = b & 0x80 ? -1.f : 1.f;
  if (e4m3 ? (b & 0x7f) == 0x7f : (b & 0x7f) > 0x7c) return NAN;
  if (!e4m3 && (b & 0x7f) == 0x7c) return sign * INFINITY;
  return sign * float(std::ldexp(e ? m + (1 << mantissa) : m, (e ? e : 1) - bias - mantissa));
}

// Integers of the register's lowest bits, beyond the type's range the nearest (cvt of a float saturates).
u64 saturated(const Warp& w, const Instruction& in, double x) {
  if (x != x) return in.t == S64 || in.t == U64 ? 1ull << 63 : 0;
  const int bits = 8 * size_of(in.t);
  const double most = std::ldexp(1, is_signed(in.t) ? bits - 1 : bits), least = is_signed(in.t) ? -most : 0;
  if (is_float(in.t)) unknown(w, in);
  if (x >= most) return is_signed(in.t) ? low_bits(bits - 1) : low_bits(bits);
  if (x <= least) return is_signed(in.t) ? 1ull << (bits - 1) : 0;
  return (is_signed(in.t) ? u64(s64(x)) : u64(x)) & low_bits(bits);
}

void to_packed(Warp& w, const Instruction& in, u32 mask) {  // two floats to one word, the first above
  for (const int lane : lanes(mask)) {
    if (in.t == E4M3X2 || in.t == E5M2X2) {
      float hi, lo;
      if (in.t2 == F16X2) {
        const u32 v = u32(raw(w, in.ops[1], lane));
        hi = half_to(u16(v >> 16)), lo = half_to(u16(v));
      } else
        hi = get<float>(w, in.ops[1], lane), lo = get<float>(w, in.ops[2], lane);
      put<u16>(w, in.ops[0], lane, u16(to_float8(hi, in.t == E4M3X2) << 8 | to_float8(lo, in.t == E4M3X2)));
      continue;
    }
    if (in.t2 == E4M3X2 || in.t2 == E5M2X2) {
      const u16 v = u16(raw(w, in.ops[1], lane));
      const u32 hi = to_half(from_float8(u8(v >> 8), in.t2 == E4M3X2)),
                lo = to_half(from_float8(u8(v), in.t2 == E4M3X2));
      put<u32>(w, in.ops[0], lane, hi << 16 | lo);
      continue;
    }
    const bool bf16 = in.t == BF16X2;
    u32 r = 0;
    for (int h = 0; h < 2; ++h) {
      float x = get<float>(w, in.ops[h ? 1 : 2], lane);
      if (in.c & kRelu) x = x > 0 || x != x ? x : 0;
      r |= u32(rounded_half(x, bf16, in)) << (16 * h);
    }
    put<u32>(w, in.ops[0], lane, r);
  }
}

void from_integer(Warp& w, const Instruction& in, u32 mask) {
  const bool from_signed = is_signed(in.t2);
  const u64 kept = low_bits(8 * size_of(in.t2));
  constexpr int kModes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  for (const int lane : lanes(mask)) {
    const u64 v = raw(w, in.ops[1], lane);
    const s64 s = s64(extend(v, in.t2));
    const u64 u = v & kept;
    if (!is_float(in.t)) {
      u64 r = from_signed ? u64(s) : u;
      if (in.c & kSat) {
        const __int128 x = from_signed ? __int128(s) : __int128(u);
        const int bits = 8 * size_of(in.t);
        const __int128 most = is_signed(in.t) ? (__int128(1) << (bits - 1)) - 1 : (__int128(1) << bits) - 1;
        const __int128 least = is_signed(in.t) ? -most - 1 : 0;
        r = u64(std::min(std::max(x, least), most));
      }
      put_raw(w, in.ops[0], lane, extend(r & low_bits(8 * size_of(in.t)), in.t));
      continue;
    }
    fesetround(kModes[in.rounding]);
    const volatile s64 vs = s;
    const volatile u64 vu = u;
    const double d = from_signed ? double(vs) : double(vu);
    const float f = from_signed ? float(vs) : float(vu);
    fesetround(FE_TONEAREST);
    switch (in.t) {
      case F32:
        put<float>(w, in.ops[0], lane, f);
        break;
      case F64:
        put<double>(w, in.ops[0], lane, d);
        break;
      case F16:
        put<u16>(w, in.ops[0], lane, rounded_half(d, false, in));
        break;
      default:
        put<u16>(w, in.ops[0], lane, rounded_half(d, true, in));
    }
  }
}
}  // namespace

// t: to, t2: from; a: to an integral value (1 nearest, 2 zero, 3 down, 4 up); c: Flags
void run_cvt(Warp& w, const Instruction& in, u32 mask) {
  if (in.t == F16X2 || in.t == BF16X2 || in.t == E4M3X2 || in.t == E5M2X2) return to_packed(w, in, mask);
  if (!is_float(in.t2) && in.t2 != TF32) return from_integer(w, in, mask);
  for (const int lane : lanes(mask)) {
    const u64 v = raw(w, in.ops[1], lane);
    double x = in.t2 == F64                    ? from_bits<double>(v)
               : in.t2 == F32 || in.t2 == TF32 ? double(from_bits<float>(v))
                                               : double(widen(u16(v), in.t2 == BF16));
    if (in.ftz && in.t2 == F32) x = flush(float(x));
    x = to_integral(x, in.a);
    if (!is_float(in.t) && in.t != TF32) {
      put_raw(w, in.ops[0], lane, extend(saturated(w, in, x), in.t));
      continue;
    }
    if (in.c & kSat) x = x > 0 ? std::min(x, 1.0) : 0;
    if (in.c & kRelu) x = x > 0 || x != x ? x : 0;
    switch (in.t) {
      case F64:
        put<double>(w, in.ops[0], lane, x);
        break;
      case F32: {
        const float r = rounded(x, in.rounding);
        put<float>(w, in.ops[0], lane, in.ftz ? flush(r) : r);
        break;
      }
      case TF32:
        put<float>(w, in.ops[0], lane, to_tf32(float(x)));
        break;
      default:
        put<u16>(w, in.ops[0], lane, rounded_half(x, in.t == BF16, in));
    }
  }
}
}  // namespace ptxsim
