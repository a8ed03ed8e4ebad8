// Matrix products on a CPU, panel by panel, compiled for several instruction sets; no torch in here.
//
//   D = alpha A B + beta C      A: (m, k), B: (k, n), C, D: (m, n) of contiguous rows
//
// fp32, or bf16 whose products are summed in fp32 and rounded once when D is stored. A factor is packed before it is
// multiplied: sixteen of A's rows, or of B's columns, are a panel, and a panel is a list of vectors of 16 words, one
// for each k in fp32 and one for two in bf16. So a factor that stands on both sides is packed once, but for tiles
// (AMX).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace steepest::cpu_polar {

constexpr int kPanel = 16;

inline int64_t panels_of(int64_t size) { return (size + kPanel - 1) / kPanel; }

// A factor with `size` rows of A or columns of B. along_k: a memory row is one of these and runs along k; else memory
// holds k rows of `size`. Memory rows are contiguous.
struct Factor {
  const void* at;
  int64_t size, k;
  bool along_k;
};

struct Product {
  const uint32_t *a, *b;  // packed, A unless it has a `row`
  int64_t m, n, k;
  // The caller's word that A B is symmetric: what lies above the diagonal is copied from below. same: A = B^T, whose
  // product is symmetric to the bit by itself.
  bool symmetric, same;
  const void* c;  // nullptr, D itself or another matrix
  void* d;
  float alpha, beta;
  int64_t row;  // not 0, fp32 alone: A's rows run along k, so many numbers apart, and D is apart from A
};

// A tensor's elements from `first` on; f32 or bf16.
struct Source {
  const void* at;
  Dtype dtype;
  int64_t first;
};

struct Kernels {
  int64_t depth;     // numbers of k of which a panel has a multiple
  int64_t together;  // panels of B that a task is best given
  bool alike;        // A's rows are packed as B's columns are
  // Panels [begin, end) of a factor to their place in `to`: of B's columns, and of A's rows.
  void (*pack)(const Factor& factor, int64_t begin, int64_t end, uint32_t* to);
  void (*pack_rows)(const Factor& factor, int64_t begin, int64_t end, uint32_t* to);
  // D's rows [begin, end), a multiple of kPanel and one or m, in columns of the panels [left, right).
  void (*multiply)(const Product& product, int64_t begin, int64_t end, int64_t left, int64_t right);
  // alpha A + beta C + gamma I of squares; c may be nullptr, out may be either.
  void (*sum)(const void* a, const void* c, void* out, int64_t side, float alpha, float beta, float gamma);
  // Sums of squares and of the diagonal of a square.
  void (*spread)(const void* gram, int64_t side, double& square, double& trace, double& diagonal_square);
  // Of `count` elements from `begin` on: the largest magnitude, NaN or infinite where one is; x first second into a
  // buffer; a buffer's sum of squares; the buffer over a number; and the buffer into a tensor.
  double (*largest)(const Source& x, int64_t begin, int64_t count);
  void (*load)(const Source& x, int64_t begin, int64_t count, float first, float second, void* to);
  double (*square)(const void* x, int64_t begin, int64_t count);
  void (*divide)(void* x, int64_t begin, int64_t count, float by);
  void (*store)(const void* from, int64_t begin, int64_t count, void* to, Dtype dtype);
  void (*fill)(void* to, Dtype dtype, int64_t count, float value);
  float (*round)(float x);  // as a buffer holds it
  // Of fp32 squares: whether one is symmetric to the bit, and its transpose.
  bool (*symmetric)(const float* x, int64_t side);
  void (*transpose)(const float* from, int64_t side, float* to);
  // fp32 rows made orthonormal one after the other (modified Gram-Schmidt), and their lengths when it was their turn; a
  // row of length 0 stays.
  void (*orthonormalize)(float* rows, int64_t count, int64_t length, float* lengths);
  // Of `count` fp32 elements: v beta + (1 - beta) x^2 into v; and x over the root of sqrt(v) over + eps, once or
  // twice, or 0 where that is 0, into x.
  void (*mix_squares)(const float* x, int64_t count, float beta, float* v);
  void (*over_roots)(const float* v, int64_t count, float over, float eps, bool twice, float* x);
};

// Words of a factor that is packed; element: bytes of a number.
inline int64_t packed_words(const Kernels& kernels, int64_t element, int64_t size, int64_t k) {
  return panels_of(size) * kPanel * ((k + kernels.depth - 1) / kernels.depth * kernels.depth) * element / 4;
}

// What is compiled for this processor, nullptr where nothing is: products of the dtype are torch's then.
const Kernels* kernels_for(Dtype dtype);

// Whether fp32 products here are the faster ones on this processor. Torch's are MKL's, whose loops for AVX-512 are for
// Intel's alone: it takes 1.0 to 1.15 times as long on a core of others with AVX2 and 2.2 times on one with AVX-512.
bool is_faster_than_blas();

#ifdef STEEPEST_HAS_X86_SETS
namespace avx2 {
extern const Kernels f32;
}
namespace avx512 {
extern const Kernels f32;
}
#ifdef STEEPEST_HAS_AVX512_BF16
namespace avx512_bf16 {
extern const Kernels bf16;
}
#endif
#ifdef STEEPEST_HAS_AMX
namespace amx_bf16 {
extern const Kernels bf16;
}
#endif
#endif

}  // namespace steepest::cpu_polar
