// The numbers of a chain: one read of the lower triangle of every Gram product, and what follows from its sums.
#include "common/block.cuh"
#include "common/check.h"
#include "common/floats.h"
#include "polar/formulas.cuh"

namespace steepest::polar {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kVector = 8;

// Passed by value, so that a captured launch replays without any table in memory.
struct Arguments {
  NumbersParams params;
  int32_t blocks;  // that share a matrix
};
static_assert(sizeof(Arguments) <= 4096);

__device__ float entry(const void* gram, Dtype dtype, int64_t at) {
  if (dtype == Dtype::f32) return static_cast<const float*>(gram)[at];
  const uint16_t bits = static_cast<const uint16_t*>(gram)[at];
  return dtype == Dtype::bf16 ? from_bf16(bits) : from_f16(bits);
}

// Sum of squares of the first `row` entries of a row that begins at `begin`, this lane's share of it.
__device__ float squares(const void* gram, Dtype dtype, int64_t begin, int64_t row, int lane) {
  float sum = 0;
  int64_t cut = 0;
  if (dtype != Dtype::f32 && begin % kVector == 0 && reinterpret_cast<uintptr_t>(gram) % 16 == 0) {
    cut = row / kVector * kVector;
    for (int64_t column = lane * kVector; column < cut; column += 32 * kVector) {
      const uint4 words = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(gram) + begin + column);
      const unsigned each[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const uint16_t bits = static_cast<uint16_t>(each[j / 2] >> 16 * (j % 2));
        const float x = dtype == Dtype::bf16 ? from_bf16(bits) : from_f16(bits);
        sum += x * x;
      }
    }
  }
  for (int64_t column = cut + lane; column < row; column += 32) {
    const float x = entry(gram, dtype, begin + column);
    sum += x * x;
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads) chain_numbers(const __grid_constant__ Arguments arguments) {
  const NumbersParams& params = arguments.params;
  const Numbering& numbering = params.numbering;
  const int64_t matrix = blockIdx.x / arguments.blocks, block = blockIdx.x % arguments.blocks, m = params.m;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  double sums[kSpreadSums] = {};
  for (int64_t row = block * kWarps + warp; row < m; row += int64_t{arguments.blocks} * kWarps) {
    const int64_t begin = (matrix * m + row) * m;
    sums[0] += squares(params.gram, params.dtype, begin, row, lane);
    if (lane == 0) {
      const double x = entry(params.gram, params.dtype, begin + row);
      sums[1] += x, sums[2] += x * x;
    }
  }
  combine_block<kSpreadSums, 0>(sums);
  if (!combine_chunks<kSpreadSums, kSpreadSums, 0>(params.scratch, matrix, arguments.blocks, matrix * arguments.blocks,
                                                   blockIdx.x, sums))
    return;
  __shared__ double inverse;
  __shared__ int table;
  if (threadIdx.x == 0) {
    const double square = squared_norm(numbering, {sums[0], sums[1], sums[2]}, m), slack = sqrt(sums[1] / square);
    inverse = 1 / sqrt(square);
    table = table_of(numbering, slack);
    params.slack[matrix] = static_cast<float>(slack);
  }
  __syncthreads();
  for (int j = threadIdx.x; j < numbering.columns; j += kThreads)
    params.numbers[matrix * numbering.columns + j] = number(numbering, table, j, inverse);
}

}  // namespace

void numbers_on_device(const NumbersParams& params, void* stream) {
  const Arguments arguments{params, static_cast<int32_t>(blocks_of(params.m))};
  const int64_t blocks = params.matrices * arguments.blocks;
  if (blocks > INT32_MAX)
    throw std::invalid_argument("steepest::chain_numbers: more than 2^31 blocks; split the batch");
  chain_numbers<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
  check_launch("chain_numbers", static_cast<int32_t>(blocks), params.matrices);
}

}  // namespace steepest::polar
