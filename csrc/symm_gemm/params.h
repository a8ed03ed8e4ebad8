// What a grouped product is told; no torch and no CUDA in here. Sizes and strides are in elements.
//
//   D[i] = alpha[i] A[i] B[i] + beta[i] C[i] + gamma[i] I      A: (m, k), B: (k, n), C, D: (m, n), i < batch
//
// fp16 or bf16, all of one type; the sum, the scalars and the epilogue are fp32, rounded once when D is stored.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/dtype.h"

namespace steepest::symm_gemm {

// Along which of its dimensions a factor lies contiguous in memory: k, or the other one.
//   A   k: memory rows are A's rows           mn: memory holds A^T, k rows of m
//   B   k: memory holds B^T, n rows of k      mn: memory rows are B's rows
// X X^T is kk with B = A = X; X^T X is mnmn with B = A = X; Q X is kmn; X Q, and products of symmetric matrices, are
// kk.
enum class Majors : uint8_t { kk, mnmn, kmn };

// A stack of matrices: `row` elements from one memory row to the next, `matrix` from one matrix to the next.
struct Strides {
  int64_t row, matrix;
  bool operator==(const Strides& other) const { return row == other.row && matrix == other.matrix; }
};

struct Shape {
  int64_t batch, m, n, k;
  Majors majors;
  bool symmetric;  // the caller's word; tiles above the diagonal are mirrored, and of C only the lower triangle is read
  Strides a, b, c, d;
  bool has_c;
  bool operator==(const Shape& o) const {
    return batch == o.batch && m == o.m && n == o.n && k == o.k && majors == o.majors && symmetric == o.symmetric &&
           a == o.a && b == o.b && c == o.c && d == o.d && has_c == o.has_c;
  }
};

// at[i * stride] for matrix i where `at` is not null, else `value`.
struct Scalar {
  const float* at;
  int64_t stride;
  float value;
};

// Where `weights` is not null, a list's products are not stored but taken into matrices that lie anywhere:
//
//   W[i] <- beta[i] W[i] + alpha[i] eta[i] A[i] B[i]        W[i]: (m, n) from weights[i] on, rows d.row elements apart
//
// fp32, bf16 or fp16, read once and rounded once. Where eta or alpha is 0 the product does not count, NaN or not.
struct Update {
  void* const* weights;  // `batch` addresses, in host memory
  Dtype dtype;
  Scalar eta;
};
constexpr int kMostWeights = 1024;  // matrices of a list of updates: their addresses go into the launch

struct Problem {
  Shape shape;
  const void *a, *b, *c;  // c: nullptr, or D itself, or another matrix; a and b do not overlap D
  void* d;
  Scalar alpha, beta, gamma;  // where beta is 0, C is as good as absent, NaN or not
  // nullptr, or Tiling::partials floats for each matrix: sums of squares of what is off D's diagonal, before rounding;
  // their sum in any fixed order is the matrix'.
  float* partials;
  float* diagonal;  // nullptr, or m floats for each matrix: D's diagonal before rounding, min(m, n) of them written
  Update update;
};

// Memory for the parts of cut tiles: `counters` are 0 between launches.
struct Workspace {
  float* partials;
  uint32_t* counters;
};

struct Plan;

// `stream` is a cudaStream_t on the current device, which has compute capability 9.0. dtype: f16 or bf16, of the
// matrices. Throws when a launch fails.
void run_on_sm90(const Plan& plan, const std::vector<Problem>& problems, Dtype dtype, const Workspace& workspace,
                 void* stream);

}  // namespace steepest::symm_gemm
