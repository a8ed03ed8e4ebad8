// Arithmetic, logic and moves of one lane.
//
// Floating-point results are rounded once, as IEEE 754 has it; .approx results are those too (a GPU's are within the
// few units of the last place that the PTX manual states), computed in double precision.
#include <algorithm>
#include <cfenv>
#include <type_traits>

#include "instructions.h"

namespace ptxsim {
namespace {
// d = f(a, b, ...) in the lanes of the mask; values of type T, which ftz and sat reach if it is float.
template <class T>
T in_value(const Instruction& in, u64 bits) {
  const T v = from_bits<T>(bits);
  if constexpr (std::is_same_v<T, float>)
    if (in.ftz) return flush(v);
  return v;
}
template <class T>
u64 out_value(const Instruction& in, T v) {
  if constexpr (std::is_floating_point_v<T>) {
    if constexpr (std::is_same_v<T, float>)
      if (in.ftz) v = flush(v);
    if (in.saturates) v = v > 0 ? std::min<T>(v, 1) : T(0);
    if (v != v) return sizeof(T) == 4 ? 0x7fffffff : 0x7fffffffffffffff;  // the one NaN that instructions make
  }
  return to_bits(v);
}
template <class F>
void each_lane(u32 mask, F f) {
  if (mask == kAllLanes) {
#pragma GCC ivdep
    for (int lane = 0; lane < 32; ++lane) f(lane);
  } else
    for (const int lane : lanes(mask)) f(lane);
}
template <class T, class F>
void map(Warp& w, const Instruction& in, u32 mask, F f) {
  u64* d = lanes_of(w, in.ops[0]);
  const u64* a = lanes_of(w, in.ops[1]);
  if constexpr (std::is_invocable_v<F, T>) {
    if (std::is_integral_v<T> || (!in.ftz && !in.saturates))
      each_lane(mask, [=](int i) { d[i] = to_bits<T>(f(from_bits<T>(a[i]))); });
    else
      each_lane(mask, [&](int i) { d[i] = out_value<T>(in, f(in_value<T>(in, a[i]))); });
  } else if constexpr (std::is_invocable_v<F, T, T>) {
    const u64* b = lanes_of(w, in.ops[2]);
    if (std::is_integral_v<T> || (!in.ftz && !in.saturates))
      each_lane(mask, [=](int i) { d[i] = to_bits<T>(f(from_bits<T>(a[i]), from_bits<T>(b[i]))); });
    else
      each_lane(mask, [&](int i) { d[i] = out_value<T>(in, f(in_value<T>(in, a[i]), in_value<T>(in, b[i]))); });
  } else {
    const u64* b = lanes_of(w, in.ops[2]);
    const u64* c = lanes_of(w, in.ops[3]);
    if (std::is_integral_v<T> || (!in.ftz && !in.saturates))
      each_lane(mask, [=](int i) { d[i] = to_bits<T>(f(from_bits<T>(a[i]), from_bits<T>(b[i]), from_bits<T>(c[i]))); });
    else
      each_lane(mask, [&](int i) {
        d[i] = out_value<T>(in, f(in_value<T>(in, a[i]), in_value<T>(in, b[i]), in_value<T>(in, c[i])));
      });
  }
}
// Of one or two 16-bit floats: f of three floats gives a float that is rounded to 16 bits.
template <class F>
void map_halves(Warp& w, const Instruction& in, u32 mask, F f) {
  const bool bf16 = in.t == BF16 || in.t == BF16X2;
  const int count = in.t == F16X2 || in.t == BF16X2 ? 2 : 1;
  for (const int lane : lanes(mask)) {
    const u64 a = raw(w, in.ops[1], lane);
    const u64 b = in.ops.size() > 2 ? raw(w, in.ops[2], lane) : 0;
    const u64 c = in.ops.size() > 3 ? raw(w, in.ops[3], lane) : 0;
    u64 out = 0;
    for (int h = 0; h < count; ++h) {
      auto up = [&](u64 x) { return widen(u16(x >> (16 * h)), bf16); };
      out |= u64(narrow(f(up(a), up(b), up(c)), bf16)) << (16 * h);
    }
    put_raw(w, in.ops[0], lane, out);
  }
}

// Calls f with a value of the instruction's integer (or floating-point) type; false where it has another.
template <class F>
bool with_integer(Type t, F f) {
  switch (t) {
    case U16:
    case B16:
      f(u16{});
      return true;
    case S16:
      f(s16{});
      return true;
    case U32:
    case B32:
      f(u32{});
      return true;
    case S32:
      f(s32{});
      return true;
    case U64:
    case B64:
      f(u64{});
      return true;
    case S64:
      f(s64{});
      return true;
    default:
      return false;
  }
}
template <class F>
bool with_float(Type t, F f) {
  if (t == F32)
    f(float{});
  else if (t == F64)
    f(double{});
  else
    return false;
  return true;
}

// The host's rounding mode while an instruction of another one runs.
class Rounding {
 public:
  explicit Rounding(u8 mode) : before_(fegetround()) {
    constexpr int kModes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
    if (mode) fesetround(kModes[mode]);
    asm volatile("" ::: "memory");
  }
  ~Rounding() {
    asm volatile("" ::: "memory");
    fesetround(before_);
  }
  Rounding(const Rounding&) = delete;
  Rounding& operator=(const Rounding&) = delete;

 private:
  int before_;
};

template <class F>
void arithmetic(Warp& w, const Instruction& in, u32 mask, F f) {
  auto run = [&](auto zero) { map<decltype(zero)>(w, in, mask, f); };
  if (with_integer(in.t, run)) return;
  if (in.rounding) {
    const Rounding mode(in.rounding);
    if (with_float(in.t, run)) return;
  }
  if (with_float(in.t, run)) return;
  if (!is_half(in.t)) unknown(w, in);
  map_halves(w, in, mask, [&](float a, float b, float) { return float(f(a, b)); });
}

struct Factors {
  __int128 a, b;
};
Factors factors(const Instruction& in, u64 a, u64 b) {
  if (is_signed(in.t)) return {s64(extend(a, in.t)), s64(extend(b, in.t))};
  const u64 m = low_bits(8 * size_of(in.t));
  return {__int128(a & m), __int128(b & m)};
}
enum Half { kLow, kHigh, kWide };
u64 product(const Instruction& in, u64 a, u64 b) {
  const int bits = 8 * size_of(in.t);
  const Factors f = factors(in, a, b);
  const auto p = (unsigned __int128)(f.a * f.b);
  return in.a == kHigh ? u64(p >> bits) : u64(p);
}
}  // namespace

void run_add(Warp& w, const Instruction& in, u32 mask) {
  arithmetic(w, in, mask, [](auto a, auto b) { return decltype(a)(a + b); });
}
void run_sub(Warp& w, const Instruction& in, u32 mask) {
  arithmetic(w, in, mask, [](auto a, auto b) { return decltype(a)(a - b); });
}
// a: Half
void run_mul(Warp& w, const Instruction& in, u32 mask) {
  if (is_float(in.t) || is_half(in.t))
    return arithmetic(w, in, mask, [](auto a, auto b) { return decltype(a)(a * b); });
  if (in.a == kLow && size_of(in.t) >= 4) {
    with_integer(in.t, [&](auto zero) {
      using T = std::make_unsigned_t<decltype(zero)>;
      map<T>(w, in, mask, [](T a, T b) { return T(a * b); });
    });
    return;
  }
  const u64 kept = low_bits(8 * size_of(in.t) * (in.a == kWide ? 2 : 1));
  for (const int lane : lanes(mask))
    put_raw(w, in.ops[0], lane, product(in, raw(w, in.ops[1], lane), raw(w, in.ops[2], lane)) & kept);
}
void run_mad(Warp& w, const Instruction& in, u32 mask) {
  if (is_float(in.t)) return run_fma(w, in, mask);
  if (in.a == kLow && in.t != U16 && in.t != S16) {
    with_integer(in.t, [&](auto zero) {
      using T = std::make_unsigned_t<decltype(zero)>;
      map<T>(w, in, mask, [](T a, T b, T c) { return T(a * b + c); });
    });
    return;
  }
  const u64 kept = low_bits(8 * size_of(in.t) * (in.a == kWide ? 2 : 1));
  for (const int lane : lanes(mask)) {
    const u64 p = product(in, raw(w, in.ops[1], lane), raw(w, in.ops[2], lane));
    put_raw(w, in.ops[0], lane, (p + raw(w, in.ops[3], lane)) & kept);
  }
}
// 24 bits of each factor.
void run_mul24(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    auto low = [&](const Operand& o) {
      const u32 v = u32(raw(w, o, lane)) << 8;
      return is_signed(in.t) ? s64(s32(v) >> 8) : s64(v >> 8);
    };
    s64 r = low(in.ops[1]) * low(in.ops[2]);
    if (in.a == kHigh) r >>= 16;
    if (in.ops.size() > 3) r += s64(u32(raw(w, in.ops[3], lane)));
    put<u32>(w, in.ops[0], lane, u32(r));
  }
}
void run_fma(Warp& w, const Instruction& in, u32 mask) {
  const Rounding mode(in.rounding);
  if (with_float(in.t, [&](auto zero) {
        using T = decltype(zero);
        map<T>(w, in, mask, [](T a, T b, T c) { return std::fma(a, b, c); });
      }))
    return;
  if (!is_half(in.t)) unknown(w, in);
  map_halves(w, in, mask, [&](float a, float b, float c) {
    const float r = fma_to_odd(a, b, c);
    return in.c ? (r > 0 || r != r ? r : 0.f) : r;  // c: .relu
  });
}
void run_div(Warp& w, const Instruction& in, u32 mask) {
  arithmetic(w, in, mask, [](auto a, auto b) {
    using T = decltype(a);
    if constexpr (std::is_integral_v<T>) {
      if (b == 0) return T(~T(0));
      if constexpr (std::is_signed_v<T>)
        if (b == T(-1)) return T(0 - std::make_unsigned_t<T>(a));
    }
    return T(a / b);
  });
}
void run_rem(Warp& w, const Instruction& in, u32 mask) {
  if (!with_integer(in.t, [&](auto zero) {
        using T = decltype(zero);
        map<T>(w, in, mask, [](T a, T b) { return b == 0 ? a : b == T(-1) && std::is_signed_v<T> ? T(0) : T(a % b); });
      }))
    unknown(w, in);
}
namespace {
template <bool kSmaller>
void extreme(Warp& w, const Instruction& in, u32 mask) {
  const bool nan = in.c;
  arithmetic(w, in, mask, [nan](auto a, auto b) {
    using T = decltype(a);
    if constexpr (std::is_floating_point_v<T>) {
      if (a != a || b != b) return nan || (a != a && b != b) ? T(NAN) : a != a ? b : a;
      if (a == b) return std::signbit(a) == kSmaller ? a : b;  // -0 is less than 0
    }
    return (a < b) == kSmaller ? a : b;
  });
}
}  // namespace
// c: .NaN
void run_min(Warp& w, const Instruction& in, u32 mask) { extreme<true>(w, in, mask); }
void run_max(Warp& w, const Instruction& in, u32 mask) { extreme<false>(w, in, mask); }

void run_abs(Warp& w, const Instruction& in, u32 mask) {
  if (is_half(in.t)) return map<u32>(w, in, mask, [](u32 a) { return a & 0x7fff7fffu; });
  if (!with_float(in.t, [&](auto zero) { map<decltype(zero)>(w, in, mask, [](auto a) { return std::fabs(a); }); }) &&
      !with_integer(in.t, [&](auto zero) {
        using T = decltype(zero);
        map<T>(w, in, mask, [](T a) { return std::is_signed_v<T> && a < T(1) ? T(T(0) - a) : a; });
      }))
    unknown(w, in);
}
void run_neg(Warp& w, const Instruction& in, u32 mask) {
  if (is_half(in.t)) {
    const u32 signs = size_of(in.t) == 2 ? 0x8000u : 0x80008000u;
    return map<u32>(w, in, mask, [signs](u32 a) { return a ^ signs; });
  }
  if (!with_float(in.t, [&](auto zero) { map<decltype(zero)>(w, in, mask, [](auto a) { return -a; }); }) &&
      !with_integer(in.t, [&](auto zero) {
        using T = decltype(zero);
        map<T>(w, in, mask, [](T a) { return T(T(0) - a); });
      }))
    unknown(w, in);
}
namespace {
double function(int which, double x) {
  switch (which) {
    case kSqrt:
      return std::sqrt(x);
    case kRsqrt:
      return 1 / std::sqrt(x);
    case kRcp:
      return 1 / x;
    case kSin:
      return std::sin(x);
    case kCos:
      return std::cos(x);
    case kEx2:
      return std::exp2(x);
    case kLg2:
      return std::log2(x);
    default:
      return std::tanh(x);
  }
}
}  // namespace
// a: Function
void run_function(Warp& w, const Instruction& in, u32 mask) {
  const int which = in.a;
  if (in.t == F32) {
    if (in.rounding && (which == kSqrt || which == kRcp)) {
      const Rounding mode(in.rounding);
      return map<float>(w, in, mask, [which](float x) { return which == kSqrt ? std::sqrt(x) : 1 / x; });
    }
    if (which == kSqrt) return map<float>(w, in, mask, [](float x) { return std::sqrt(x); });
    return map<float>(w, in, mask, [which](float x) { return float(function(which, x)); });
  }
  if (in.t == F64) {
    map<double>(w, in, mask, [which](double x) { return function(which, x); });
    if (in.c)  // .approx.ftz.f64: the upper half of the result
      for (const int lane : lanes(mask)) put_raw(w, in.ops[0], lane, raw(w, in.ops[0], lane) & ~0xffffffffull);
    return;
  }
  if (!is_half(in.t)) unknown(w, in);
  map_halves(w, in, mask, [which](float x, float, float) { return float(function(which, x)); });
}
void run_copysign(Warp& w, const Instruction& in, u32 mask) {
  if (!with_float(in.t, [&](auto zero) {
        using T = decltype(zero);
        map<T>(w, in, mask, [](T a, T b) { return std::copysign(b, a); });
      }))
    unknown(w, in);
}
// testp: a is the class
void run_testp(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    const double x = in.t == F32 ? get<float>(w, in.ops[1], lane) : get<double>(w, in.ops[1], lane);
    const int c = in.t == F32 ? std::fpclassify(get<float>(w, in.ops[1], lane)) : std::fpclassify(x);
    const bool is[] = {
        c != FP_NAN && c != FP_INFINITE, c == FP_INFINITE, c != FP_NAN, c == FP_NAN, c == FP_NORMAL, c == FP_SUBNORMAL};
    put_raw(w, in.ops[0], lane, is[in.a]);
  }
}

namespace {
template <class F>
void logic(Warp& w, const Instruction& in, u32 mask, F f) {
  if (in.t == PRED) {
    for (const int lane : lanes(mask))
      put_raw(w, in.ops[0], lane, f(u64(truth(w, in.ops[1], lane)), u64(truth(w, part(in.ops.back(), 0), lane))) & 1);
    return;
  }
  u64* d = lanes_of(w, in.ops[0]);
  const u64 *a = lanes_of(w, in.ops[1]), *b = lanes_of(w, in.ops.back()), kept = low_bits(8 * size_of(in.t));
  each_lane(mask, [=](int i) { d[i] = f(a[i], b[i]) & kept; });
}
}  // namespace
void run_and(Warp& w, const Instruction& in, u32 mask) {
  logic(w, in, mask, [](u64 a, u64 b) { return a & b; });
}
void run_or(Warp& w, const Instruction& in, u32 mask) {
  logic(w, in, mask, [](u64 a, u64 b) { return a | b; });
}
void run_xor(Warp& w, const Instruction& in, u32 mask) {
  logic(w, in, mask, [](u64 a, u64 b) { return a ^ b; });
}
void run_not(Warp& w, const Instruction& in, u32 mask) {
  logic(w, in, mask, [](u64 a, u64) { return ~a; });
}
void run_cnot(Warp& w, const Instruction& in, u32 mask) {
  logic(w, in, mask, [](u64 a, u64) { return u64(a == 0); });
}
void run_shl(Warp& w, const Instruction& in, u32 mask) {
  const u32 bits = u32(8 * size_of(in.t));
  u64* d = lanes_of(w, in.ops[0]);
  const u64 *a = lanes_of(w, in.ops[1]), *b = lanes_of(w, in.ops[2]), kept = low_bits(int(bits));
  each_lane(mask, [=](int i) { d[i] = u32(b[i]) >= bits ? 0 : a[i] << (b[i] & 63) & kept; });
}
void run_shr(Warp& w, const Instruction& in, u32 mask) {
  const u32 bits = u32(8 * size_of(in.t));
  const u64 kept = low_bits(int(bits));
  u64* d = lanes_of(w, in.ops[0]);
  const u64 *a = lanes_of(w, in.ops[1]), *b = lanes_of(w, in.ops[2]);
  if (is_signed(in.t))
    each_lane(mask, [=, &in](int i) { d[i] = u64(s64(extend(a[i], in.t)) >> std::min<u32>(u32(b[i]), 63)) & kept; });
  else
    each_lane(mask, [=](int i) { d[i] = u32(b[i]) >= bits ? 0 : (a[i] & kept) >> (b[i] & 63); });
}
// a: left, b: wrap
void run_shf(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    const u64 v = (raw(w, in.ops[1], lane) & 0xffffffff) | raw(w, in.ops[2], lane) << 32;
    u32 n = u32(raw(w, in.ops[3], lane));
    n = in.b ? n & 31 : std::min<u32>(n, 32);
    put<u32>(w, in.ops[0], lane, in.a ? u32(v << n >> 32) : u32(v >> n));
  }
}
void run_lop3(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    const u32 a = u32(raw(w, in.ops[1], lane)), b = u32(raw(w, in.ops[2], lane)), c = u32(raw(w, in.ops[3], lane));
    const u32 table = u32(raw(w, in.ops[4], lane));
    u32 r = 0;
    for (int i = 0; i < 8; ++i)
      if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    put<u32>(w, in.ops[0], lane, r);
  }
}
void run_prmt(Warp& w, const Instruction& in, u32 mask) {
  if (in.a) unknown(w, in);  // .f4e and the like
  for (const int lane : lanes(mask)) {
    const u64 v = (raw(w, in.ops[1], lane) & 0xffffffff) | raw(w, in.ops[2], lane) << 32;
    const u32 selectors = u32(raw(w, in.ops[3], lane));
    u32 r = 0;
    for (int i = 0; i < 4; ++i) {
      const u32 s = selectors >> (4 * i) & 15;
      u8 byte = u8(v >> (8 * (s & 7)));
      if (s & 8) byte = byte & 0x80 ? 0xff : 0;
      r |= u32(byte) << (8 * i);
    }
    put<u32>(w, in.ops[0], lane, r);
  }
}
void run_bfe(Warp& w, const Instruction& in, u32 mask) {
  const u32 bits = u32(8 * size_of(in.t));
  for (const int lane : lanes(mask)) {
    const u64 a = raw(w, in.ops[1], lane) & low_bits(int(bits));
    const u32 pos = raw(w, in.ops[2], lane) & 255, len = raw(w, in.ops[3], lane) & 255;
    u64 r = len == 0 || pos >= bits ? 0 : (a >> pos) & low_bits(int(len));
    if (is_signed(in.t) && len > 0) {
      const u32 top = std::min(pos + len - 1, bits - 1);
      if (a >> top & 1) r |= pos >= bits ? ~0ull : ~low_bits(int(top - pos + 1));
    }
    put_raw(w, in.ops[0], lane, r & low_bits(int(bits)));
  }
}
void run_bfi(Warp& w, const Instruction& in, u32 mask) {
  const u32 bits = u32(8 * size_of(in.t));
  for (const int lane : lanes(mask)) {
    const u64 a = raw(w, in.ops[1], lane), b = raw(w, in.ops[2], lane);
    const u32 pos = raw(w, in.ops[3], lane) & 255, len = raw(w, in.ops[4], lane) & 255;
    const u64 field = pos >= bits ? 0 : low_bits(int(len)) << pos;
    put_raw(w, in.ops[0], lane, ((b & ~field) | (pos >= bits ? 0 : a << pos & field)) & low_bits(int(bits)));
  }
}
void run_bmsk(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    const u32 pos = u32(raw(w, in.ops[1], lane)), len = u32(raw(w, in.ops[2], lane));
    put<u32>(w, in.ops[0], lane, pos > 31 ? 0 : u32(low_bits(int(std::min<u32>(len, 32))) << pos));
  }
}
// a: 0 popc, 1 clz, 2 brev, 3 bfind
void run_count(Warp& w, const Instruction& in, u32 mask) {
  const int bits = 8 * size_of(in.t);
  for (const int lane : lanes(mask)) {
    u64 v = raw(w, in.ops[1], lane) & low_bits(bits);
    u64 r = 0;
    switch (in.a) {
      case 0:
        r = u64(__builtin_popcountll(v));
        break;
      case 1:
        r = v == 0 ? u64(bits) : u64(__builtin_clzll(v) - (64 - bits));
        break;
      case 2:
        for (int i = 0; i < bits; ++i) r |= (v >> i & 1) << (bits - 1 - i);
        break;
      default:
        if (is_signed(in.t) && s64(extend(v, in.t)) < 0) v = ~v & low_bits(bits);
        r = v == 0 ? 0xffffffffu : u64(63 - __builtin_clzll(v));
        if (in.b && v) r = u64(bits - 1) - r;  // .shiftamt
    }
    put_raw(w, in.ops[0], lane, r);
  }
}
void run_mov(Warp& w, const Instruction& in, u32 mask) {
  const Operand &d = in.ops[0], &s = in.ops[1];
  if (d.kind == Operand::Vector || s.kind == Operand::Vector) {
    const int count = int(d.kind == Operand::Vector ? d.parts.size() : s.parts.size());
    const int bits = 8 * size_of(in.t) / count;
    for (const int lane : lanes(mask)) {
      u64 v = 0;
      if (s.kind == Operand::Vector)
        for (int i = 0; i < count; ++i) v |= (raw(w, s.parts[size_t(i)], lane) & low_bits(bits)) << (bits * i);
      else
        v = raw(w, s, lane);
      if (d.kind == Operand::Vector)
        for (int i = 0; i < count; ++i) put_raw(w, d.parts[size_t(i)], lane, v >> (bits * i) & low_bits(bits));
      else
        put_raw(w, d, lane, v);
    }
    return;
  }
  u64* to = lanes_of(w, d);
  const u64* from = lanes_of(w, s);
  if (in.t == PRED) {
    each_lane(mask, [=, &s](int i) { to[i] = (from[i] != 0) != s.negated; });
  } else
    each_lane(mask, [=](int i) { to[i] = from[i]; });
}
void run_selp(Warp& w, const Instruction& in, u32 mask) {
  u64* d = lanes_of(w, in.ops[0]);
  const u64 *a = lanes_of(w, in.ops[1]), *b = lanes_of(w, in.ops[2]), *p = lanes_of(w, in.ops[3]);
  const bool negated = in.ops[3].negated;
  each_lane(mask, [=](int i) { d[i] = (p[i] != 0) != negated ? a[i] : b[i]; });
}
void run_slct(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    const bool first = in.t2 == F32 ? get<float>(w, in.ops[3], lane) >= 0 : get<s32>(w, in.ops[3], lane) >= 0;
    put_raw(w, in.ops[0], lane, raw(w, in.ops[first ? 1 : 2], lane));
  }
}
// Four bytes times four bytes; t, t2: of the factors
void run_dp4a(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    u32 sum = u32(raw(w, in.ops[3], lane));
    for (int i = 0; i < 4; ++i) {
      auto byte = [&](const Operand& o, Type t) {
        const u8 b = u8(raw(w, o, lane) >> (8 * i));
        return t == S32 ? s32(s8(b)) : s32(b);
      };
      sum += u32(byte(in.ops[1], in.t) * byte(in.ops[2], in.t2));
    }
    put<u32>(w, in.ops[0], lane, sum);
  }
}
// Functions of CUDA's library that the compiler leaves as calls.
void run_call(Warp& w, const Instruction& in, u32 mask) {
  const string& name = in.mods.back();
  if (name != "__internal_accurate_pow") fail(w, in, "a call of " + name);
  for (const int lane : lanes(mask))  // of the absolute value; the caller mends signs
    put<double>(w, in.ops[0], lane,
                std::pow(std::fabs(get<double>(w, in.ops[1], lane)), get<double>(w, in.ops[2], lane)));
}
void run_nothing(Warp&, const Instruction&, u32) {}
void run_sleep(Warp& w, const Instruction&, u32) { w.polled = true; }
}  // namespace ptxsim
