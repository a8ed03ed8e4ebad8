// The Newton-Schulz iteration of small matrices, a block each, everything but X in shared memory.
//
// In 16 bits the Gram form of a small matrix is not bounded: rounding makes small eigenvalues of R negative, and R no
// longer belongs to Q. Here R and Q are kept to 22 bits, as a half and the half that is left, and Z is rounded once
// and then taken for exact: R <- (a I + Z) R (a I + Z) and Q <- (a I + Z) Q use the very same Z, so that R remains
// (Q X)(Q X)^T whatever Z's error. For that the products are not commuted either: R (a I + Z) and Q are computed in
// full and only R and Z mirrored. Largest singular value / off-diagonal part, simulated over thousands of matrices with
// log-uniform singular values (1 to 1e-4), "auto":
//
//                                                          products  4 x 5        16 x 20     32 x 40     128 x 130
//     R, Z, Q in 16 bits, all mirrored                     4         inf          330 / 87    120 / 21    30 / 2.7
//     R, Q in 22 bits, all mirrored                        7         2000 / 900   250 / 58    140 / 23    40 / 3.5
//     R, Q in 22 bits, R (a I + Z) mirrored                7         39 / 8.5     3.8 / .77   2.4 / .28   1.4 / .04
//     R, Q in 22 bits, Q mirrored                          7         12 / 5.4     4.7 / 1.0   3.1 / .52   1.5 / .07
//     R in 22 bits, Q in 16, R and Z mirrored              6         1.28 / .15   1.30 / .05  1.27 / .04  1.23 / .02
//     R, Q in 22 bits, R and Z mirrored (this one)         7         1.23 / .04   1.23 / .02  1.23 / .01  1.23 / .01
//     R, Z, Q in 22 bits, all mirrored                     12        1.29 / .08   1.29 / .03  1.25 / .03  1.23 / .01
//     restart before every step: the standard form, fp16   2 + 4 a   1.23 / .04   1.23 / .02  1.23 / .02  1.22 / .01
//     as this one, in bf16                                 7         1.31 / .63   1.25 / .16  1.24 / .11  1.23 / .05
//
// (products of m^3 in a quintic step, mirrored ones counted whole; a = long side / short side). The exact polynomial
// ends at 1.225, so this arrangement adds nothing to it, as little as the standard form and without touching X. bf16
// loses X itself: the kernel has no such variant, and bf16 input, brought into fp16's range, is exact in it but for
// entries 2^-14 times smaller than the mean.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "small_polar/elements.cuh"
#include "small_polar/formulas.cuh"
#include "small_polar/layout.h"
#include "small_polar/params.h"
#include "small_polar/tiles.cuh"

namespace steepest::small_polar {
namespace {

// What a launch can be told: 32764 bytes where toolkit and driver are of CUDA 12.1 or newer, else 4 KB.
#if CUDART_VERSION >= 12010
constexpr size_t kArgumentBytes = 32764;
#else
constexpr size_t kArgumentBytes = 4096;
#endif

struct Item {
  Matrices matrices;
  int32_t first;  // block
};

// A launch's matrices, handed over by value: a captured launch replays without any table in memory.
struct Batch {
  static constexpr int kCapacity = static_cast<int>((kArgumentBytes - sizeof(Numbers) - 16) / sizeof(Item));
  Numbers numbers;
  int32_t count;
  Item items[kCapacity];
};
static_assert(sizeof(Batch) <= kArgumentBytes);

__device__ inline const Item& find(const Batch& batch, int32_t block) {
  int low = 0, high = batch.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (batch.items[middle].first <= block ? low : high) = middle;
  }
  return batch.items[low];
}

// ---- sums ----------------------------------------------------------------------------------------------------------

// Sums over the block, always in the same order; every thread has them. Waits for the block before it returns.
template <int kCount>
__device__ inline void sum_block(float (&values)[kCount]) {
  __shared__ float of_warp[kCount][kWarps];
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) values[c] += __shfl_down_sync(0xffffffff, values[c], step);
    if (threadIdx.x % 32 == 0) of_warp[c][threadIdx.x / 32] = values[c];
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    values[c] = of_warp[c][0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) values[c] += of_warp[c][warp];
  }
  __syncthreads();  // of_warp may be used again
}

// ---- one matrix ----------------------------------------------------------------------------------------------------

using Plain = Left<false>;
using Stored = Right<false>;
using Mirrored = Right<true>;  // stored as its transpose, or symmetric

// kMost: the longest short side. Half of it takes less than half the registers, and so several blocks share a
// multiprocessor.
template <int kMost>
struct Block {
  static_assert(kMost == kMostRows || kMost == kMostRows / 2);
  // Tiles of a warp: its row of a square, its share of each pair once, and of a panel's result.
  static constexpr int kFull = kMost == kMostRows ? 8 : 2;
  static constexpr int kHalf = kMost == kMostRows ? 5 : 2;
  static constexpr int kPass = kMost == kMostRows ? 4 : 2;

  const Source& x;
  Scale scale;  // brings X's elements into the range of fp16
  Layout layout;
  bool tall;
  int32_t lengths;  // the long side
  Square<2> q, r;
  Square<1> z;
  uint16_t* panels;

  __device__ Block(const Source& x, int32_t m)
      : x(x), layout(m), tall(x.rows > x.columns), lengths(tall ? x.rows : x.columns) {
    auto* at = reinterpret_cast<uint16_t*>(dynamic_shared());
    const auto square = [&] {
      const Halves halves{at, layout.stride, layout.mask};
      at += layout.square();
      return halves;
    };
    q.part[0] = square(), q.part[1] = square();
    panels = at;
    r.part[0] = square(), r.part[1] = square();
    z.part[0] = square();
  }

  // ---- X in passing

  // A panel in registers: kPanel of the long side and all of the short one.
  static constexpr int kLoads = kMost * kPanel / kVector / kThreads;
  struct Load {
    Eight eights[kLoads];
  };

  // body(i, row, column): this thread's i-th eight elements of a panel.
  template <class Body>
  __device__ void for_each_eight(const Body& body) const {
    const int across = tall ? 2 * layout.tiles : kPanel / kVector;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int number = threadIdx.x + i * kThreads;
      if (number >= kPanel / kVector * kTile * layout.tiles) break;
      body(i, number / across, number % across * kVector);
    }
  }
  __device__ void fetch(Load& load, int32_t begin) const {
    for_each_eight([&](int i, int row, int column) {
      if (tall)
        load.eights[i].fetch(x, begin + row, column);
      else
        load.eights[i].fetch(x, row, begin + column);
    });
  }
  // The first pass, which finds the factor.
  __device__ void find_scale(int32_t m) {
    float bins[kBins] = {};
#pragma unroll 1
    for (int32_t begin = 0; begin < lengths; begin += kPanel) {
      Load load;
      fetch(load, begin);
      for_each_eight([&](int i, int, int) {
        float values[kVector];
        load.eights[i].convert(x.dtype, values);
#pragma unroll
        for (int j = 0; j < kVector; ++j) add_square(values[j], bins);
      });
    }
    sum_block(bins);
    scale = range(bins, m);
  }

  __device__ Halves panel(int number) const { return {panels + number * layout.panel(), layout.panel_stride(tall), 0}; }
  __device__ void put(const Load& load, const Halves& to) const {
    for_each_eight([&](int i, int row, int column) {
      float v[kVector];
      load.eights[i].convert(x.dtype, v);
#pragma unroll
      for (int j = 0; j < kVector; ++j) v[j] = v[j] * scale.first * scale.second;
      store_16_bytes(to.chunk(row, column / kVector),
                     {pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7])});
    });
  }

  // body(panel, begin) for every panel of X; the next is under way meanwhile. No panel may be read before, and the
  // last may still be read after.
  template <class Body>
  __device__ void for_each_panel(const Body& body) const {
    Load load;
#pragma unroll 1
    for (int32_t begin = -kPanel, number = 1; begin < lengths; begin += kPanel, number ^= 1) {
      const bool fetched = begin >= 0;  // not so in the first turn
      if (fetched) {
        put(load, panel(number));
        __syncthreads();  // written; and the other one is read no longer, so that the next turn may write it
      }
      if (begin + kPanel < lengths) fetch(load, begin + kPanel);
      if (fetched) body(panel(number), begin);
    }
  }

  // R = X X^T, in fp32. Each panel's sum begins at zero and is added to the others' by the ordinary, rounding addition:
  // tensor cores cut sums off, and over a long side that alone makes R's small eigenvalues negative. Emulated, one sum
  // over 30000 columns took 16 x 30000 to singular values of 3.3 ("auto") and 17 ("polar_express").
  __device__ void gram(Tiles<kHalf>& sums, const Share& share) const {
    clear(sums);
    for_each_panel([&](const Halves& panel, int32_t) {
      Tiles<kHalf> part;
      clear(part);
      if (tall)
        multiply(part, share, {Left<true>{panel}}, {Stored{panel}}, kPanel / kTile);
      else
        multiply(part, share, {Plain{panel}}, {Mirrored{panel}}, kPanel / kTile);
#pragma unroll
      for (int i = 0; i < kHalf; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[i][j / 4][j % 4] += part[i][j / 4][j % 4];
    });
  }

  // factor Q X, or factor X^T Q^T of a tall matrix as it lies: body(row, column, first, second) for every two elements.
  template <class Body>
  __device__ void apply(float factor, const Body& body) const {
    const int along = kPanel / kTile;
    const Share share = tall ? Share::of(along, layout.tiles, false) : Share::of(layout.tiles, along, false);
    for_each_panel([&](const Halves& panel, int32_t begin) {
      Tiles<kPass> sums;
      clear(sums);
      if (tall)
        multiply(sums, share, {Plain{panel}}, {Mirrored{q.part[0]}, Mirrored{q.part[1]}}, layout.tiles);
      else
        multiply(sums, share, {Plain{q.part[0]}, Plain{q.part[1]}}, {Stored{panel}}, layout.tiles);
      for_each_pair(sums, share, [&](int row, int column, float first, float second) {
        (tall ? row : column) += begin;
        body(row, column, factor * first, factor * second);
      });
    });
  }

  // ---- steps

  // Z = b R + c R^2 + ...;  `step` as in Numbers, from its second number on. From degree 7 on in two rounds, the first
  // of which leaves  T = c R + d R^2  or  T = u R + R^2  where Z will be.
  __device__ void polynomial(const float* step, int terms) const {
    const Halves high = r.part[0], t = z.part[0];
    const int rounds = terms > 3 ? 2 : 1;
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
      const Share share = Share::of(layout.tiles, layout.tiles, true);
      const bool second = round == 1, square_of_t = second && terms == 5;
      Tiles<kHalf> sums;
      clear(sums);
      if (terms > 2)
        multiply(sums, share, {Plain{square_of_t ? t : high}}, {Mirrored{second ? t : high}}, layout.tiles);
      float product = terms == 3 ? step[1] : 1, linear = step[0];
      if (terms == 4 && !second) product = step[2], linear = step[1];
      if (square_of_t) {
        combine(sums, share, step[1], step[2], z);
        linear = step[3];
      }
      combine(sums, share, product, linear, r);
      z.store<true>(sums, share);
    }
  }

  // Q <- (a I + Z) Q, and a I + Z at first.
  __device__ void advance_q(float a, bool first) const {
    const Share share = Share::of(layout.tiles, layout.tiles, false);
    Tiles<kFull> sums;
    clear(sums);
    if (first) {
      combine(sums, share, 0, 1, z);
      for_each_pair(sums, share, [a](int row, int column, float& one, float& other) {
        if (row == column) one += a;
        if (row == column + 1) other += a;
      });
    } else {
      multiply(sums, share, {Plain{z.part[0]}}, {Stored{q.part[0]}, Stored{q.part[1]}}, layout.tiles);
      combine(sums, share, 1, a, q);
    }
    q.store<false>(sums, share);
  }

  // R <- R (a I + Z), in full, then (a I + Z) R.
  __device__ void advance_r(float a) const {
    const Share full = Share::of(layout.tiles, layout.tiles, false);
    Tiles<kFull> right;
    clear(right);
    multiply(right, full, {Plain{r.part[0]}, Plain{r.part[1]}}, {Mirrored{z.part[0]}}, layout.tiles);
    combine(right, full, 1, a, r);
    r.store<false>(right, full);
    const Share half = Share::of(layout.tiles, layout.tiles, true);
    Tiles<kHalf> both;
    clear(both);
    multiply(both, half, {Plain{z.part[0]}}, {Stored{r.part[0]}, Stored{r.part[1]}}, layout.tiles);
    combine(both, half, 1, a, r);
    r.store<true>(both, half);
  }
};

// The trace of R and ||R - mean I||_F^2, from the half of it that the block holds.
struct Moments {
  float trace, centred;
};

template <int kTiles>
__device__ inline Moments moments(Tiles<kTiles>& gram, const Share& share, int32_t m) {
  float trace[1] = {};
  for_each_pair(gram, share, [&](int row, int column, float first, float second) {
    trace[0] += (row == column ? first : 0) + (row == column + 1 ? second : 0);
  });
  sum_block(trace);
  const float mean = trace[0] / static_cast<float>(m);
  float centred[1] = {};
  for_each_pair(gram, share, [&](int row, int column, float first, float second) {
    const bool own_mirror = row / kTile == column / kTile;  // a tile on the diagonal holds both halves
    if (row == column && row < m) first -= mean;
    if (row == column + 1 && row < m) second -= mean;
    centred[0] += (own_mirror ? 1.0f : 2.0f) * (first * first + second * second);
  });
  sum_block(centred);
  return {trace[0], centred[0]};
}

__device__ inline void fill(const Target& to, float value) {
  for (int64_t i = threadIdx.x; i < int64_t{to.rows} * to.columns; i += kThreads)
    to.one(i / to.columns * to.row + i % to.columns, value);
}

__device__ inline int width(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

template <int kMost>
__global__ void __launch_bounds__(kThreads, kMost == kMostRows ? 1 : 2)
    small_polar(const __grid_constant__ Batch batch) {
  const Numbers& numbers = batch.numbers;
  const Item& item = find(batch, static_cast<int32_t>(blockIdx.x));
  const Matrices& all = item.matrices;
  const int64_t index = static_cast<int32_t>(blockIdx.x) - item.first;
  const auto* from = static_cast<const char*>(all.x) + index * all.x_matrix * width(all.x_dtype);
  auto* to = static_cast<char*>(all.out) + index * all.out_matrix * width(all.out_dtype);
  const Source x{from,        all.x_row,
                 all.rows,    all.columns,
                 all.x_dtype, reinterpret_cast<uintptr_t>(from) % 16 == 0 && all.x_row * width(all.x_dtype) % 16 == 0};
  const Target target{to,
                      all.out_row,
                      all.rows,
                      all.columns,
                      all.out_dtype,
                      reinterpret_cast<uintptr_t>(to) % (2 * width(all.out_dtype)) == 0 && all.out_row % 2 == 0};
  const int32_t m = all.rows < all.columns ? all.rows : all.columns;

  using Work = Block<kMost>;
  Work block(x, m);
  block.find_scale(m);
  if (block.scale.first != block.scale.first) {
    fill(target, NAN);
    if (all.slack != nullptr && threadIdx.x == 0) all.slack[index] = NAN;
    return;
  }
  const Share half = Share::of(block.layout.tiles, block.layout.tiles, true);
  Tiles<Work::kHalf> gram;
  block.gram(gram, half);
  const Moments moment = moments(gram, half, m);
  const float square = squared_norm(numbers, moment.trace, moment.centred, m), slack = sqrtf(moment.trace / square);
  if (all.slack != nullptr && threadIdx.x == 0) all.slack[index] = slack;
  const int table = choose_table(numbers, slack);
  const float inverse = 1 / square;
  for_each_pair(gram, half, [inverse](int, int, float& first, float& second) { first *= inverse, second *= inverse; });
  block.r.template store<true>(gram, half);

#pragma unroll 1
  for (int k = 0; k < numbers.count; ++k) {
    const float* step = numbers.steps[table][k];
    block.polynomial(step + 1, numbers.terms[table][k]);
    block.advance_q(step[0], k == 0);
    if (k + 1 < numbers.count) block.advance_r(step[0]);
  }
  block.apply(1 / sqrtf(square), target);
}

template <int kMost>
void launch(const Batch& batch, int32_t blocks, size_t bytes, cudaStream_t stream) {
#ifdef __CUDACC__
  cudaError_t error =
      cudaFuncSetAttribute(small_polar<kMost>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) {
    small_polar<kMost><<<blocks, kThreads, bytes, stream>>>(batch);
    error = cudaGetLastError();
  }
#else
  emulation::ask_for_shared(bytes);  // this source on a CPU: tests/emulation
  emulation::launch(small_polar<kMost>, blocks, kThreads, batch);
  emulation::check_shared();
  const cudaError_t error = cudaGetLastError();
  static_cast<void>(stream);
#endif
  if (error != cudaSuccess)
    throw std::runtime_error("steepest::small_polar: a launch of " + std::to_string(blocks) + " blocks with " +
                             std::to_string(bytes) + " bytes of shared memory failed: " + cudaGetErrorString(error));
}

}  // namespace

void polar_on_device(const std::vector<Matrices>& matrices, const Schedule& schedule, size_t limit, void* stream) {
  static thread_local Batch batch;  // 32 KB: not on the stack; the launch copies what it is given
  batch.numbers = numbers(schedule);
  const int64_t most = most_rows(limit);
  for (size_t next = 0; next < matrices.size();) {
    int64_t blocks = 0;
    size_t bytes = 0;
    batch.count = 0;
    for (; next < matrices.size() && batch.count < Batch::kCapacity; ++next) {
      const Matrices& one = matrices[next];
      const int64_t m = one.rows < one.columns ? one.rows : one.columns;
      if (m == 0 || one.count == 0) continue;
      if (m > most)
        throw std::invalid_argument("steepest::small_polar: the shorter side must be at most " + std::to_string(most) +
                                    " with " + std::to_string(limit) + " bytes of shared memory, got " +
                                    std::to_string(m));
      if (blocks + one.count > INT32_MAX) break;
      batch.items[batch.count++] = {one, static_cast<int32_t>(blocks)};
      blocks += one.count;
      if (shared_bytes(m) > bytes) bytes = shared_bytes(m);
    }
    if (batch.count == 0) return;
    const auto start = bytes <= shared_bytes(kMostRows / 2) ? launch<kMostRows / 2> : launch<kMostRows>;
    start(batch, static_cast<int32_t>(blocks), bytes, static_cast<cudaStream_t>(stream));
  }
}

}  // namespace steepest::small_polar
