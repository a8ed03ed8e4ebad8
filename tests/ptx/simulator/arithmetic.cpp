// Arithmetic and logic of one lane.
#include <algorithm>
#include <cmath>

#include "instructions.h"

namespace ptxsim {
namespace {
// With .ftz a subnormal number of fp32 is zero, where it is read and where it would be the result.
template <class T>
T flushed(const Instruction& in, T x) {
  if constexpr (std::is_same_v<T, float>)
    if (in.ftz && std::fpclassify(x) == FP_SUBNORMAL) return std::copysign(0.f, x);
  return x;
}
template <class T>
T source(Warp& w, const Instruction& in, int i, int lane) {
  return flushed(in, get<T>(w, in.ops[i], lane));
}
template <class T, class F>
void unary(Warp& w, const Instruction& in, u32 mask, F f) {
  for (const int lane : lanes(mask)) put<T>(w, in.ops[0], lane, flushed<T>(in, f(source<T>(w, in, 1, lane))));
}
template <class T, class F>
void binary(Warp& w, const Instruction& in, u32 mask, F f) {
  for (const int lane : lanes(mask))
    put<T>(w, in.ops[0], lane, flushed<T>(in, f(source<T>(w, in, 1, lane), source<T>(w, in, 2, lane))));
}

// 16-bit floats through float
template <class F>
void binary_half(Warp& w, const Instruction& in, u32 mask, F f) {
  const bool packed = in.t == F16X2 || in.t == BF16X2, bf = in.t == BF16 || in.t == BF16X2;
  for (const int lane : lanes(mask)) {
    const u32 a = raw(w, in.ops[1], lane), b = in.ops.size() > 2 ? raw(w, in.ops[2], lane) : 0,
              c = in.ops.size() > 3 ? raw(w, in.ops[3], lane) : 0;
    u32 out = 0;
    for (int h = 0; h < (packed ? 2 : 1); ++h) {
      auto up = [&](u32 x) {
        const u16 v = x >> (16 * h);
        return bf ? bf_to(v) : half_to(v);
      };
      const float r = f(up(a), up(b), up(c));
      out |= u32(bf ? to_bf(r) : to_half(r)) << (16 * h);
    }
    put<u32>(w, in.ops[0], lane, out);
  }
}

#define INT_SWITCH(F) \
  switch (in.t) {     \
    case U16:         \
    case B16:         \
      return F(u16);  \
    case S16:         \
      return F(s16);  \
    case U32:         \
    case B32:         \
      return F(u32);  \
    case S32:         \
      return F(s32);  \
    case U64:         \
    case B64:         \
      return F(u64);  \
    case S64:         \
      return F(s64);  \
    default:          \
      break;          \
  }
#define FLOAT_SWITCH(F) \
  switch (in.t) {       \
    case F32:           \
      return F(float);  \
    case F64:           \
      return F(double); \
    default:            \
      break;            \
  }
#define BAD fail(w, in, "an instruction or a type that is not known")

bool is_half(Type t) { return t == F16 || t == BF16 || t == F16X2 || t == BF16X2; }
}  // namespace
void run_add(Warp& w, const Instruction& in, u32 mask) {
#define F(T) binary<T>(w, in, mask, [](T a, T b) { return T(a + b); })
  INT_SWITCH(F)
  FLOAT_SWITCH(F)
#undef F
  if (is_half(in.t)) return binary_half(w, in, mask, [](float a, float b, float) { return a + b; });
  BAD;
}
void run_sub(Warp& w, const Instruction& in, u32 mask) {
#define F(T) binary<T>(w, in, mask, [](T a, T b) { return T(a - b); })
  INT_SWITCH(F)
  FLOAT_SWITCH(F)
#undef F
  if (is_half(in.t)) return binary_half(w, in, mask, [](float a, float b, float) { return a - b; });
  BAD;
}
// a: 0 lo, 1 hi, 2 wide
void run_mul(Warp& w, const Instruction& in, u32 mask) {
#define F(T) binary<T>(w, in, mask, [](T a, T b) { return T(a * b); })
  FLOAT_SWITCH(F)
#undef F
  if (is_half(in.t)) return binary_half(w, in, mask, [](float a, float b, float) { return a * b; });
  const bool sg = is_signed(in.t);
  for (const int lane : lanes(mask)) {
    const u64 ra = raw(w, in.ops[1], lane), rb = raw(w, in.ops[2], lane);
    const int bits = 8 * size_of(in.t);
    __int128 x, y;
    if (sg)
      x = s64(extend(ra, in.t)), y = s64(extend(rb, in.t));
    else {
      const u64 m = bits == 64 ? ~0ull : (1ull << bits) - 1;
      x = __int128(ra & m), y = __int128(rb & m);
    }
    const unsigned __int128 p = (unsigned __int128)(x * y);
    u64 out;
    if (in.a == 0)
      out = bits == 64 ? u64(p) : u64(p) & ((1ull << bits) - 1);
    else if (in.a == 1)
      out = u64(p >> bits) & (bits == 64 ? ~0ull : (1ull << bits) - 1);
    else
      out = u64(p) & (bits == 32 ? ~0ull : (1ull << (2 * bits)) - 1);
    put_raw(w, in.ops[0], lane, out);
  }
}
void run_mad(Warp& w, const Instruction& in, u32 mask) {
  const bool sg = is_signed(in.t);
  for (const int lane : lanes(mask)) {
    const u64 ra = raw(w, in.ops[1], lane), rb = raw(w, in.ops[2], lane), rc = raw(w, in.ops[3], lane);
    const int bits = 8 * size_of(in.t);
    __int128 x, y;
    if (sg)
      x = s64(extend(ra, in.t)), y = s64(extend(rb, in.t));
    else {
      const u64 m = bits == 64 ? ~0ull : (1ull << bits) - 1;
      x = __int128(ra & m), y = __int128(rb & m);
    }
    const unsigned __int128 p = (unsigned __int128)(x * y);
    u64 out;
    if (in.a == 0)
      out = u64(p) + rc;
    else if (in.a == 1)
      out = u64(p >> bits) + rc;
    else
      out = u64(p) + rc;
    const int wide = in.a == 2 ? 2 * bits : bits;
    put_raw(w, in.ops[0], lane, wide == 64 ? out : out & ((1ull << wide) - 1));
  }
}
void run_fma(Warp& w, const Instruction& in, u32 mask) {
  if (in.t == F32) {
    for (const int lane : lanes(mask))
      put<float>(w, in.ops[0], lane,
                 flushed(in, fmaf(source<float>(w, in, 1, lane), source<float>(w, in, 2, lane),
                                  source<float>(w, in, 3, lane))));
    return;
  }
  if (in.t == F64) {
    for (const int lane : lanes(mask))
      put<double>(
          w, in.ops[0], lane,
          fma(get<double>(w, in.ops[1], lane), get<double>(w, in.ops[2], lane), get<double>(w, in.ops[3], lane)));
    return;
  }
  if (is_half(in.t)) return binary_half(w, in, mask, [](float a, float b, float c) { return fmaf(a, b, c); });
  BAD;
}
void run_div(Warp& w, const Instruction& in, u32 mask) {
#define F(T) binary<T>(w, in, mask, [](T a, T b) { return T(a / b); })
  FLOAT_SWITCH(F)
#undef F
#define F(T) binary<T>(w, in, mask, [](T a, T b) { return b == 0 ? T(~T(0)) : T(a / b); })
  INT_SWITCH(F)
#undef F
  BAD;
}
void run_rem(Warp& w, const Instruction& in, u32 mask) {
#define F(T) binary<T>(w, in, mask, [](T a, T b) { return b == 0 ? a : T(a % b); })
  INT_SWITCH(F)
#undef F
  BAD;
}
// c: .NaN
void run_min(Warp& w, const Instruction& in, u32 mask) {
  const bool nan = in.c;
#define F(T)                               \
  binary<T>(w, in, mask, [nan](T a, T b) { \
    if (a != a) return nan ? a : b;        \
    if (b != b) return nan ? b : a;        \
    return a < b ? a : b;                  \
  })
  INT_SWITCH(F)
  FLOAT_SWITCH(F)
#undef F
  if (is_half(in.t))
    return binary_half(w, in, mask, [nan](float a, float b, float) {
      if (a != a) return nan ? a : b;
      if (b != b) return nan ? b : a;
      return a < b ? a : b;
    });
  BAD;
}
void run_max(Warp& w, const Instruction& in, u32 mask) {
  const bool nan = in.c;
#define F(T)                               \
  binary<T>(w, in, mask, [nan](T a, T b) { \
    if (a != a) return nan ? a : b;        \
    if (b != b) return nan ? b : a;        \
    return a > b ? a : b;                  \
  })
  INT_SWITCH(F)
  FLOAT_SWITCH(F)
#undef F
  if (is_half(in.t))
    return binary_half(w, in, mask, [nan](float a, float b, float) {
      if (a != a) return nan ? a : b;
      if (b != b) return nan ? b : a;
      return a > b ? a : b;
    });
  BAD;
}
void run_abs(Warp& w, const Instruction& in, u32 mask) {
  if (in.t == F32 && in.ftz) return unary<float>(w, in, mask, [](float a) { return std::fabs(a); });
  if (in.t == F32) return unary<u32>(w, in, mask, [](u32 a) { return a & 0x7fffffffu; });
  if (in.t == F64) return unary<u64>(w, in, mask, [](u64 a) { return a & ~(1ull << 63); });
  if (is_half(in.t)) return unary<u32>(w, in, mask, [](u32 a) { return a & 0x7fff7fffu; });
  if (in.t == S32) return unary<s32>(w, in, mask, [](s32 a) { return a < 0 ? -a : a; });
  if (in.t == S64) return unary<s64>(w, in, mask, [](s64 a) { return a < 0 ? -a : a; });
  BAD;
}
void run_neg(Warp& w, const Instruction& in, u32 mask) {
  if (in.t == F32) return unary<u32>(w, in, mask, [](u32 a) { return a ^ 0x80000000u; });
  if (in.t == F64) return unary<u64>(w, in, mask, [](u64 a) { return a ^ (1ull << 63); });
  if (is_half(in.t)) return unary<u32>(w, in, mask, [](u32 a) { return a ^ 0x80008000u; });
  if (in.t == S16) return unary<s16>(w, in, mask, [](s16 a) { return s16(-a); });
  if (in.t == S32) return unary<s32>(w, in, mask, [](s32 a) { return -a; });
  if (in.t == S64) return unary<s64>(w, in, mask, [](s64 a) { return -a; });
  BAD;
}
namespace {
template <class T>
T fn(int which, T x) {
  switch (which) {
    case kSqrt:
      return std::sqrt(x);
    case kRsqrt:
      return T(1) / std::sqrt(x);
    case kRcp:
      return T(1) / x;
    case kSin:
      return std::sin(x);
    case kCos:
      return std::cos(x);
    case kEx2:
      return std::exp2(x);
    case kLg2:
      return std::log2(x);
    case kTanh:
      return std::tanh(x);
  }
  return x;
}
// rcp and rsqrt.approx.ftz.f64 read and make the upper half of a number; subnormal numbers are zero.
double rough(double x) {
  u64 bits;
  memcpy(&bits, &x, 8);
  if (std::fpclassify(x) == FP_SUBNORMAL) bits &= 1ull << 63;
  if (x == x) bits &= ~0xffffffffull;
  memcpy(&x, &bits, 8);
  return x;
}
}  // namespace
void run_fn(Warp& w, const Instruction& in, u32 mask) {
  const int which = in.a;
  if (in.t == F32) return unary<float>(w, in, mask, [which](float x) { return fn(which, x); });
  if (in.t == F64 && in.ftz)
    return unary<double>(w, in, mask, [which](double x) { return rough(fn(which, rough(x))); });
  if (in.t == F64) return unary<double>(w, in, mask, [which](double x) { return fn(which, x); });
  if (is_half(in.t)) return binary_half(w, in, mask, [which](float x, float, float) { return fn(which, x); });
  BAD;
}
void run_copysign(Warp& w, const Instruction& in, u32 mask) {
  if (in.t == F32) {
    for (const int lane : lanes(mask))
      put<float>(w, in.ops[0], lane, copysignf(get<float>(w, in.ops[2], lane), get<float>(w, in.ops[1], lane)));
    return;
  }
  for (const int lane : lanes(mask))
    put<double>(w, in.ops[0], lane, copysign(get<double>(w, in.ops[2], lane), get<double>(w, in.ops[1], lane)));
}
void run_bits(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    u64 a, b = 0;
    if (in.t == PRED) {
      a = truth(w, in.ops[1], lane);
      if (in.a != kBNot) b = truth(w, in.ops[2], lane);
    } else {
      a = raw(w, in.ops[1], lane);
      if (in.a != kBNot) b = raw(w, in.ops[2], lane);
    }
    u64 r = in.a == kBAnd ? a & b : in.a == kBOr ? a | b : in.a == kBXor ? a ^ b : (in.t == PRED ? !a : ~a);
    if (in.t == PRED)
      r &= 1;
    else if (size_of(in.t) < 8)
      r &= (1ull << (8 * size_of(in.t))) - 1;
    put_raw(w, in.ops[0], lane, r);
  }
}
void run_shl(Warp& w, const Instruction& in, u32 mask) {
  const int bits = 8 * size_of(in.t);
  for (const int lane : lanes(mask)) {
    const u32 n = raw(w, in.ops[2], lane);
    u64 v = raw(w, in.ops[1], lane);
    v = n >= u32(bits) ? 0 : v << n;
    if (bits < 64) v &= (1ull << bits) - 1;
    put_raw(w, in.ops[0], lane, v);
  }
}
void run_shr(Warp& w, const Instruction& in, u32 mask) {
  const int bits = 8 * size_of(in.t);
  for (const int lane : lanes(mask)) {
    const u32 n = raw(w, in.ops[2], lane);
    u64 v = raw(w, in.ops[1], lane);
    if (is_signed(in.t))
      v = u64(s64(extend(v, in.t)) >> std::min<u32>(n, 63));
    else {
      if (bits < 64) v &= (1ull << bits) - 1;
      v = n >= u32(bits) ? 0 : v >> n;
    }
    if (bits < 64) v &= (1ull << bits) - 1;
    put_raw(w, in.ops[0], lane, v);
  }
}
// a: left, b: wrap
void run_shf(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    const u64 v = u64(u32(raw(w, in.ops[1], lane))) | u64(u32(raw(w, in.ops[2], lane))) << 32;
    u32 n = raw(w, in.ops[3], lane);
    n = in.b ? n & 31 : std::min<u32>(n, 32);
    put<u32>(w, in.ops[0], lane, in.a ? u32((v << n) >> 32) : u32(v >> n));
  }
}
void run_lop3(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    const u32 a = raw(w, in.ops[1], lane), b = raw(w, in.ops[2], lane), c = raw(w, in.ops[3], lane),
              lut = raw(w, in.ops[4], lane);
    u32 r = 0;
    for (int i = 0; i < 8; ++i)
      if (lut >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    put<u32>(w, in.ops[0], lane, r);
  }
}
void run_prmt(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    const u64 v = u64(u32(raw(w, in.ops[1], lane))) | u64(u32(raw(w, in.ops[2], lane))) << 32;
    const u32 sel = raw(w, in.ops[3], lane);
    u32 r = 0;
    for (int i = 0; i < 4; ++i) {
      const u32 s = sel >> (4 * i) & 15;
      u8 byte = v >> (8 * (s & 7));
      if (s & 8) byte = byte & 0x80 ? 0xff : 0;
      r |= u32(byte) << (8 * i);
    }
    put<u32>(w, in.ops[0], lane, r);
  }
}
void run_bfe(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    const int bits = 8 * size_of(in.t);
    u64 a = raw(w, in.ops[1], lane);
    const u32 pos = raw(w, in.ops[2], lane) & 255, len = raw(w, in.ops[3], lane) & 255;
    if (bits == 32) a = is_signed(in.t) ? u64(s64(s32(a))) : u64(u32(a));
    u64 r = len == 0 ? 0 : (pos >= 64 ? 0 : a >> pos) & (len >= 64 ? ~0ull : (1ull << len) - 1);
    if (is_signed(in.t) && len > 0 && len < 64 && (r >> (len - 1) & 1)) r |= ~0ull << len;
    put_raw(w, in.ops[0], lane, bits == 32 ? u32(r) : r);
  }
}
void run_bfi(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    const int bits = 8 * size_of(in.t);
    const u64 a = raw(w, in.ops[1], lane), b = raw(w, in.ops[2], lane);
    const u32 pos = raw(w, in.ops[3], lane) & 255, len = raw(w, in.ops[4], lane) & 255;
    u64 r = b;
    for (u32 i = 0; i < len && pos + i < u32(bits); ++i) r = (r & ~(1ull << (pos + i))) | (a >> i & 1) << (pos + i);
    put_raw(w, in.ops[0], lane, bits == 32 ? u32(r) : r);
  }
}
void run_count(Warp& w, const Instruction& in, u32 mask) {  // a: 0 popc, 1 clz, 2 brev, 3 bfind
  for (const int lane : lanes(mask)) {
    const bool wide = size_of(in.t) == 8;
    const u64 v = wide ? raw(w, in.ops[1], lane) : u32(raw(w, in.ops[1], lane));
    u64 r = 0;
    if (in.a == 0) r = __builtin_popcountll(v);
    if (in.a == 1) r = v == 0 ? (wide ? 64 : 32) : (wide ? __builtin_clzll(v) : __builtin_clz(u32(v)));
    if (in.a == 2)
      for (int i = 0; i < (wide ? 64 : 32); ++i) r |= (v >> i & 1) << ((wide ? 63 : 31) - i);
    if (in.a == 3) r = v == 0 ? 0xffffffffu : 63 - __builtin_clzll(v);
    put_raw(w, in.ops[0], lane, r);
  }
}
void run_mov(Warp& w, const Instruction& in, u32 mask) {
  const Operand &d = in.ops[0], &s = in.ops[1];
  for (const int lane : lanes(mask)) {
    if (d.kind == Operand::Vec) {
      const u64 v = raw(w, s, lane);
      const int bits = 8 * size_of(in.t) / int(d.parts.size());
      for (size_t i = 0; i < d.parts.size(); ++i)
        put_raw(w, d.parts[i], lane, (v >> (bits * i)) & (bits == 64 ? ~0ull : (1ull << bits) - 1));
    } else if (s.kind == Operand::Vec) {
      u64 v = 0;
      const int bits = 8 * size_of(in.t) / int(s.parts.size());
      for (size_t i = 0; i < s.parts.size(); ++i) v |= (raw(w, s.parts[i], lane) & ((1ull << bits) - 1)) << (bits * i);
      put_raw(w, d, lane, v);
    } else if (in.t == PRED)
      put_raw(w, d, lane, truth(w, s, lane));
    else
      put_raw(w, d, lane, raw(w, s, lane));
  }
}
void run_selp(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask))
    put_raw(w, in.ops[0], lane, truth(w, in.ops[3], lane) ? raw(w, in.ops[1], lane) : raw(w, in.ops[2], lane));
}
}  // namespace ptxsim
