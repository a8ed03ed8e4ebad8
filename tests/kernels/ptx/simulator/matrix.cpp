// ldmatrix, stmatrix and mma.
#include "matrix.h"

#include "memory.h"

namespace ptxsim {
// a: transposed, b: how many matrices
void run_ldmatrix(Warp& w, const Instruction& in, u32) {
  u16 rows[4][8][8];
  for (int i = 0; i < in.b; ++i)
    for (int r = 0; r < 8; ++r) {
      const Place p = place_of(w, in, in.ops[1], kShared, 8 * i + r, 16, false);
      check_written(w, in, p, 16);
      memcpy(rows[i][r], p.at, 16);
    }
  for (int i = 0; i < in.b; ++i) {
    u64* d = lanes_of(w, part(in.ops[0], i));
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      d[lane] =
          in.a ? u32(rows[i][t][g]) | u32(rows[i][t + 1][g]) << 16 : u32(rows[i][g][t]) | u32(rows[i][g][t + 1]) << 16;
    }
  }
}
void run_stmatrix(Warp& w, const Instruction& in, u32) {
  u16 rows[4][8][8];
  for (int i = 0; i < in.b; ++i) {
    const u64* s = lanes_of(w, part(in.ops[1], i));
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      const u16 low = u16(s[lane]), high = u16(s[lane] >> 16);
      if (in.a)
        rows[i][t][g] = low, rows[i][t + 1][g] = high;
      else
        rows[i][g][t] = low, rows[i][g][t + 1] = high;
    }
  }
  for (int i = 0; i < in.b; ++i)
    for (int r = 0; r < 8; ++r)
      store_shared(w, place_of(w, in, in.ops[0], kShared, 8 * i + r, 16, true), rows[i][r], 16);
}

namespace {
// m8n8k4 of doubles
void mma_f64(Warp& w, const Instruction& in) {
  double A[8 * 4], B[4 * 8], C[8 * 8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    A[g * 4 + t] = get<double>(w, part(in.ops[1], 0), lane);
    B[t * 8 + g] = get<double>(w, part(in.ops[2], 0), lane);
    for (int i = 0; i < 2; ++i) C[g * 8 + 2 * t + i] = get<double>(w, part(in.ops[3], i), lane);
  }
  for (int r = 0; r < 8; ++r)
    for (int c = 0; c < 8; ++c)
      for (int k = 0; k < 4; ++k) C[r * 8 + c] = std::fma(A[r * 4 + k], B[k * 8 + c], C[r * 8 + c]);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 2; ++i) put<double>(w, part(in.ops[0], i), lane, C[lane / 4 * 8 + 2 * (lane % 4) + i]);
}
}  // namespace

// m16n8: a: k, t: type of the factors; d, a, b, c
void run_mma(Warp& w, const Instruction& in, u32) {
  if (in.t == F64) return mma_f64(w, in);
  double A[16 * 16], B[16 * 8], C[16 * 8];
  const int k = in.a;
  const bool bf16 = in.t == BF16;
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    auto word = [&](int op, int i) { return u32(raw(w, part(in.ops[size_t(op)], i), lane)); };
    if (in.t == TF32) {
      for (int i = 0; i < k / 2; ++i) A[(g + 8 * (i & 1)) * k + t + 4 * (i >> 1)] = double(tf32_bits(word(1, i)));
      for (int i = 0; i < k / 4; ++i) B[(t + 4 * i) * 8 + g] = double(tf32_bits(word(2, i)));
    } else {
      for (int i = 0; i < k / 4; ++i) {
        const u32 v = word(1, i);
        double* to = A + (g + 8 * (i & 1)) * k + 2 * t + 8 * (i >> 1);
        to[0] = double(widen(u16(v), bf16)), to[1] = double(widen(u16(v >> 16), bf16));
      }
      for (int i = 0; i < k / 8; ++i) {
        const u32 v = word(2, i);
        double* to = B + (2 * t + 8 * i) * 8 + g;
        to[0] = double(widen(u16(v), bf16)), to[8] = double(widen(u16(v >> 16), bf16));
      }
    }
    for (int i = 0; i < 4; ++i)
      C[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = double(get<float>(w, part(in.ops[3], i), lane));
  }
  multiply(A, B, C, 16, 8, k);
  const bool truncates = settings().truncates;
  for (int i = 0; i < 4; ++i) {
    u64* d = lanes_of(w, part(in.ops[0], i));
    for (int lane = 0; lane < 32; ++lane)
      d[lane] = to_bits(rounded_sum(C[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2], truncates));
  }
}
}  // namespace ptxsim
