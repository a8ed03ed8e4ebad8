// out = alpha A + beta C + gamma I of square matrices, entry by entry; host and device.
#pragma once

#include "common/floats.h"
#include "common/host_device.h"
#include "polar/chain.h"

namespace steepest::polar {

struct SumParams {
  const uint16_t *a, *c;  // c: nullptr where it is not read
  uint16_t* out;
  int64_t matrices, side;
  Number alpha, beta;
  float gamma;
  const float* numbers;
  int64_t number_columns;
};

inline SumParams sum_params(const Node& node, const Stack& stack) {
  const bool reads_c = node.beta.column >= 0 || node.beta.value != 0;
  return {static_cast<const uint16_t*>(stack.at[node.a]),
          reads_c ? static_cast<const uint16_t*>(stack.at[node.c]) : nullptr,
          static_cast<uint16_t*>(stack.at[node.out]),
          stack.matrices,
          stack.side(),
          node.alpha,
          node.beta,
          node.gamma,
          stack.numbers,
          stack.number_columns};
}

STEEPEST_HD inline float number_of(const SumParams& params, const Number& number, int64_t matrix) {
  return number.column < 0 ? number.value : params.numbers[matrix * params.number_columns + number.column];
}

STEEPEST_HD inline float wide(uint16_t bits, Dtype dtype) {
  return dtype == Dtype::bf16 ? from_bf16(bits) : from_f16(bits);
}

// N entries from `index` on, all of one matrix; its numbers are read once.
template <int N>
STEEPEST_HD inline void sum_entries(const SumParams& params, Dtype dtype, int64_t index, const uint16_t (&a)[N],
                                    const uint16_t (&c)[N], uint16_t (&out)[N]) {
  const int64_t size = params.side * params.side, matrix = index / size;
  const int64_t row = (index - matrix * size) / params.side, diagonal = matrix * size + row * (params.side + 1);
  const float alpha = number_of(params, params.alpha, matrix);
  const float beta = params.c != nullptr ? number_of(params, params.beta, matrix) : 0.0f;
  for (int j = 0; j < N; ++j) {
    float value = alpha * wide(a[j], dtype);
    if (params.c != nullptr) value += beta * wide(c[j], dtype);
    if (index + j == diagonal) value += params.gamma;
    out[j] = dtype == Dtype::bf16 ? to_bf16(value) : to_f16(value);
  }
}

}  // namespace steepest::polar
