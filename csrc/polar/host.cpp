// The numbers of a chain and its sums on the host: the kernels' formulas, one matrix after another.
#include "common/floats.h"
#include "polar/formulas.cuh"
#include "polar/sum.cuh"

namespace steepest::polar {
namespace {

double entry(const NumbersParams& params, int64_t at) {
  if (params.dtype == Dtype::f32) return static_cast<const float*>(params.gram)[at];
  const uint16_t bits = static_cast<const uint16_t*>(params.gram)[at];
  return params.dtype == Dtype::bf16 ? from_bf16(bits) : from_f16(bits);
}

}  // namespace

void numbers_on_host(const NumbersParams& params) {
  const Numbering& numbering = params.numbering;
  for (int64_t i = 0; i < params.matrices; ++i) {
    Spread sums{};
    for (int64_t row = 0; row < params.m; ++row) {
      const int64_t begin = (i * params.m + row) * params.m;
      for (int64_t column = 0; column < row; ++column) {
        const double x = entry(params, begin + column);
        sums.below_sq += x * x;
      }
      const double x = entry(params, begin + row);
      sums.trace += x, sums.diagonal_sq += x * x;
    }
    const double square = squared_norm(numbering, sums, params.m), slack = std::sqrt(sums.trace / square);
    const int table = table_of(numbering, slack);
    params.slack[i] = static_cast<float>(slack);
    for (int j = 0; j < numbering.columns; ++j)
      params.numbers[i * numbering.columns + j] = number(numbering, table, j, 1 / std::sqrt(square));
  }
}

void sum_on_host(const Node& node, const Stack& stack, Dtype dtype) {
  const SumParams params = sum_params(node, stack);
  for (int64_t i = 0; i < params.matrices * params.side * params.side; ++i) {
    const uint16_t a[1] = {params.a[i]}, c[1] = {params.c != nullptr ? params.c[i] : uint16_t{0}};
    uint16_t out[1];
    sum_entries(params, dtype, i, a, c, out);
    params.out[i] = out[0];
  }
}

}  // namespace steepest::polar
