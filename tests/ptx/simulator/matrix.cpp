// ldmatrix, stmatrix and mma.
#include "matrix.h"

#include "memory.h"

namespace ptxsim {
// b: matrices, a: transposed
void run_ldmatrix(Warp& w, const Instruction& in, u32) {
  const int count = in.b;
  u16 rows[4][8][8];
  for (int i = 0; i < count; ++i)
    for (int r = 0; r < 8; ++r) {
      Block* block_at = nullptr;
      const u8* p = address_of(w, in, in.ops[1], kSh, 8 * i + r, 16, &block_at);
      check_written(w, in, block_at, p, 16);
      memcpy(rows[i][r], p, 16);
    }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < count; ++i) {
      const int g = lane / 4, t = lane % 4 * 2;
      const u32 v =
          in.a ? u32(rows[i][t][g]) | u32(rows[i][t + 1][g]) << 16 : u32(rows[i][g][t]) | u32(rows[i][g][t + 1]) << 16;
      put<u32>(w, in.ops[0].kind == Operand::Vec ? in.ops[0].parts[i] : in.ops[0], lane, v);
    }
}
void run_stmatrix(Warp& w, const Instruction& in, u32) {
  const int count = in.b;
  u16 rows[4][8][8];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < count; ++i) {
      const u32 v = raw(w, in.ops[1].kind == Operand::Vec ? in.ops[1].parts[i] : in.ops[1], lane);
      const int g = lane / 4, t = lane % 4 * 2;
      if (in.a)
        rows[i][t][g] = v, rows[i][t + 1][g] = v >> 16;
      else
        rows[i][g][t] = v, rows[i][g][t + 1] = v >> 16;
    }
  for (int i = 0; i < count; ++i)
    for (int r = 0; r < 8; ++r) {
      Block* block_at = nullptr;
      u8* p = address_of(w, in, in.ops[0], kSh, 8 * i + r, 16, &block_at);
      mark(block_at, p, 16);
      memcpy(p, rows[i][r], 16);
    }
}
// a: k (8 or 16); t: type of factors; d, a, b, c
void run_mma(Warp& w, const Instruction& in, u32) {
  float A[16][16], B[16][8], C[16][8];
  const int k = in.a;
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    auto word = [&](int op, int i) {
      return u32(raw(w, in.ops[op].kind == Operand::Vec ? in.ops[op].parts[i] : in.ops[op], lane));
    };
    if (in.t == TF32) {
      A[g][t] = tf32_bits(word(1, 0)), A[g + 8][t] = tf32_bits(word(1, 1));
      if (k == 8) A[g][t + 4] = tf32_bits(word(1, 2)), A[g + 8][t + 4] = tf32_bits(word(1, 3));
      B[t][g] = tf32_bits(word(2, 0));
      if (k == 8) B[t + 4][g] = tf32_bits(word(2, 1));
    } else
      for (int i = 0; i < (k == 16 ? 4 : 2); ++i)
        for (int h = 0; h < 2; ++h) {
          A[g + 8 * (i & 1)][2 * t + h + 8 * (i >> 1)] = element(word(1, i), h, in.t);
          if (i < k / 8) B[2 * t + h + 8 * i][g] = element(word(2, i), h, in.t);
        }
    for (int i = 0; i < 4; ++i) {
      const u32 b = word(3, i);
      float f;
      memcpy(&f, &b, 4);
      C[g + 8 * (i / 2)][2 * t + i % 2] = f;
    }
  }
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 8; ++c) {
      double s = C[r][c];
      for (int i = 0; i < k; ++i) s += double(A[r][i]) * B[i][c];
      C[r][c] = float(s);
    }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      put<float>(w, in.ops[0].parts[i], lane, C[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]);
}
}  // namespace ptxsim
