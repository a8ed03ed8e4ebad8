// Sums of matrices: bound by memory, a pass over squares where a product writes as much.
#include <algorithm>

#include "common/block.cuh"
#include "common/check.h"
#include "polar/sum.cuh"

namespace steepest::polar {
namespace {

struct Arguments {
  SumParams params;
  Dtype dtype;
};

constexpr int kVector = 8;  // entries of 16 bytes; sides are multiples of it, as the products want them

__device__ void unpack(const uint16_t* from, uint16_t (&to)[kVector]) {
  const uint4 words = *reinterpret_cast<const uint4*>(from);
  const unsigned each[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int j = 0; j < kVector; ++j) to[j] = static_cast<uint16_t>(each[j / 2] >> 16 * (j % 2));
}

__global__ void __launch_bounds__(kThreads) matrix_sum(const __grid_constant__ Arguments arguments) {
  const SumParams& params = arguments.params;
  const int64_t end = params.matrices * params.side * params.side, step = int64_t{gridDim.x} * kThreads * kVector;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kVector; i < end; i += step) {
    uint16_t a[kVector], c[kVector] = {}, out[kVector];
    unpack(params.a + i, a);
    if (params.c != nullptr) unpack(params.c + i, c);
    sum_entries(params, arguments.dtype, i, a, c, out);
    unsigned each[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) each[j] = out[2 * j] | static_cast<unsigned>(out[2 * j + 1]) << 16;
    *reinterpret_cast<uint4*>(params.out + i) = uint4{each[0], each[1], each[2], each[3]};
  }
}

}  // namespace

void sum_on_device(const Node& node, const Stack& stack, Dtype dtype, void* stream) {
  const Arguments arguments{sum_params(node, stack), dtype};
  const int64_t vectors = stack.matrices * stack.side() * stack.side() / kVector;
  if (vectors == 0) return;
  if (stack.side() % kVector != 0) throw std::invalid_argument("steepest::matrix_sum: a side is no multiple of 8");
  const int blocks = static_cast<int>(std::min<int64_t>((vectors - 1) / kThreads + 1, 1 << 16));
  matrix_sum<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
  check_launch("matrix_sum", blocks, stack.matrices);
}

}  // namespace steepest::polar
