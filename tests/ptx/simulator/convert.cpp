// Comparisons and conversions between types.
#include <algorithm>
#include <cmath>

#include "memory.h"

namespace ptxsim {
#define BAD fail(w, in, "an instruction or a type that is not known")
const std::map<string, int> kCmps = {{"eq", kEq},   {"ne", kNe},   {"lt", kLt},   {"le", kLe},   {"gt", kGt},
                                     {"ge", kGe},   {"lo", kLt},   {"ls", kLe},   {"hi", kGt},   {"hs", kGe},
                                     {"equ", kEqu}, {"neu", kNeu}, {"ltu", kLtu}, {"leu", kLeu}, {"gtu", kGtu},
                                     {"geu", kGeu}, {"num", kNum}, {"nan", kNan}};
namespace {
template <class T>
bool compare(int c, T a, T b) {
  const bool un = a != a || b != b;
  switch (c) {
    case kEq:
      return a == b;
    case kNe:
      return !un && a != b;
    case kLt:
      return a < b;
    case kLe:
      return a <= b;
    case kGt:
      return a > b;
    case kGe:
      return a >= b;
    case kEqu:
      return un || a == b;
    case kNeu:
      return un || a != b;
    case kLtu:
      return un || a < b;
    case kLeu:
      return un || a <= b;
    case kGtu:
      return un || a > b;
    case kGeu:
      return un || a >= b;
    case kNum:
      return !un;
    case kNan:
      return un;
  }
  return false;
}
bool compare_raw(Type t, int c, u64 x, u64 y) {
  auto f32 = [](u64 v) {
    float f;
    memcpy(&f, &v, 4);
    return f;
  };
  auto f64 = [](u64 v) {
    double f;
    memcpy(&f, &v, 8);
    return f;
  };
  switch (t) {
    case F32:
      return compare(c, f32(x), f32(y));
    case F64:
      return compare(c, f64(x), f64(y));
    case F16:
      return compare(c, half_to(x), half_to(y));
    case BF16:
      return compare(c, bf_to(x), bf_to(y));
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
// a: cmp, b: 0 none, 1 and, 2 or, 3 xor
void run_setp(Warp& w, const Instruction& in, u32 mask) {
  const bool two = in.c;
  for (const int lane : lanes(mask)) {
    bool r = compare_raw(in.t, in.a, raw(w, in.ops[two ? 2 : 1], lane), raw(w, in.ops[two ? 3 : 2], lane)), q = !r;
    if (in.b) {
      const bool c = truth(w, in.ops[two ? 4 : 3], lane);
      auto mix = [&](bool v) { return in.b == 1 ? v && c : in.b == 2 ? v || c : v != c; };
      r = mix(r), q = mix(q);
    }
    put_raw(w, in.ops[0], lane, r);
    if (two) put_raw(w, in.ops[1], lane, q);
  }
}
// set.cmp.dtype.stype
void run_set(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    const bool r = compare_raw(in.t2, in.a, raw(w, in.ops[1], lane), raw(w, in.ops[2], lane));
    if (in.t == F32)
      put<float>(w, in.ops[0], lane, r ? 1.f : 0.f);
    else
      put<u32>(w, in.ops[0], lane, r ? ~0u : 0u);
  }
}
// t: to, t2: from; a: integer rounding (0 none, 1 rni, 2 rzi, 3 rmi, 4 rpi), b: 1 rz 2 rm 3 rp, c: 1 sat, 2 relu
void run_cvt(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    if (in.t == F16X2 || in.t == BF16X2) {
      float hi = get<float>(w, in.ops[1], lane), lo = get<float>(w, in.ops[2], lane);
      if (in.c & 2) hi = hi > 0 ? hi : 0, lo = lo > 0 ? lo : 0;
      const u32 r = in.t == F16X2 ? u32(to_half(hi)) << 16 | to_half(lo) : u32(to_bf(hi)) << 16 | to_bf(lo);
      put<u32>(w, in.ops[0], lane, r);
      continue;
    }
    const u64 v = raw(w, in.ops[1], lane);
    if (!is_float(in.t2) && in.t2 != TF32) {  // from an integer
      const int bits = 8 * size_of(in.t2);
      const bool sg = is_signed(in.t2);
      const s64 si = sg ? s64(extend(v, in.t2)) : 0;
      const u64 ui = sg ? 0 : bits == 64 ? v : v & ((1ull << bits) - 1);
      if (in.t == F32) {
        float f = sg ? float(si) : float(ui);
        if (in.b == 1) {
          f = float(sg ? double(si) : double(ui));
        }
        put<float>(w, in.ops[0], lane, f);
      } else if (in.t == F64)
        put<double>(w, in.ops[0], lane, sg ? double(si) : double(ui));
      else if (in.t == F16)
        put<u16>(w, in.ops[0], lane, to_half(sg ? float(si) : float(ui)));
      else if (in.t == BF16)
        put<u16>(w, in.ops[0], lane, to_bf(sg ? float(si) : float(ui)));
      else {
        u64 r = sg ? u64(si) : ui;
        const int to = 8 * size_of(in.t);
        if (in.c & 1) fail(w, in, "cvt.sat of integers");
        if (to < 64) r &= (1ull << to) - 1;
        put_raw(w, in.ops[0], lane, extend(r, in.t));
      }
      continue;
    }
    double x;
    float f32 = 0;
    if (in.t2 == F64)
      memcpy(&x, &v, 8);
    else {
      if (in.t2 == F32 || in.t2 == TF32) {
        u32 b = v;
        memcpy(&f32, &b, 4);
      } else
        f32 = in.t2 == F16 ? half_to(v) : bf_to(v);
      x = f32;
    }
    x = in.a == 1 ? nearbyint(x) : in.a == 2 ? trunc(x) : in.a == 3 ? floor(x) : in.a == 4 ? ceil(x) : x;
    if (is_float(in.t) || in.t == TF32) {
      if (in.c & 1) x = x != x ? 0 : x < 0 ? 0 : x > 1 ? 1 : x;
      if (in.c & 2) x = x > 0 ? x : 0;
      switch (in.t) {
        case F64:
          put<double>(w, in.ops[0], lane, x);
          break;
        case F32: {
          float r = float(x);
          if (in.b == 1 && std::fabs(double(r)) > std::fabs(x)) r = nextafterf(r, 0);
          put<float>(w, in.ops[0], lane, r);
          break;
        }
        case F16:
          put<u16>(w, in.ops[0], lane, in.b == 1 ? to_half_rz(float(x)) : to_half(float(x)));
          break;
        case BF16: {
          float r = float(x);
          u32 b;
          memcpy(&b, &r, 4);
          put<u16>(w, in.ops[0], lane, in.b == 1 ? u16(b >> 16) : to_bf(r));
          break;
        }
        case TF32:
          put<float>(w, in.ops[0], lane, to_tf32(float(x)));
          break;
        default:
          BAD;
      }
      continue;
    }
    u64 r;
    if (x != x)
      r = 0;
    else
      switch (in.t) {
        case S32:
          r = u32(s32(std::min(std::max(x, -2147483648.0), 2147483647.0)));
          break;
        case U32:
          r = u32(std::min(std::max(x, 0.0), 4294967295.0));
          break;
        case S64:
          r = x >= 9223372036854775807.0 ? u64(INT64_MAX) : x <= -9223372036854775808.0 ? u64(INT64_MIN) : u64(s64(x));
          break;
        case U64:
          r = x <= 0 ? 0 : x >= 18446744073709551615.0 ? ~0ull : u64(x);
          break;
        case S16:
          r = u16(s16(std::min(std::max(x, -32768.0), 32767.0)));
          break;
        case U16:
          r = u16(std::min(std::max(x, 0.0), 65535.0));
          break;
        case U8:
          r = u8(std::min(std::max(x, 0.0), 255.0));
          break;
        default:
          BAD;
      }
    put_raw(w, in.ops[0], lane, r);
  }
}
}  // namespace ptxsim
