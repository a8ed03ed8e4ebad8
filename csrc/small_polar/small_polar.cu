// The Newton-Schulz iteration of small matrices, a block or a cluster of blocks each, all but X in shared memory.
//
// In 16 bits the Gram form of a small matrix is not bounded: rounding makes small eigenvalues of R negative, and R no
// longer belongs to Q. Here R and Q are kept to 22 bits, as a half and the half that is left, and Z is rounded once
// and then taken for exact: R <- (a I + Z) R (a I + Z) and Q <- (a I + Z) Q use the very same Z, so that R remains
// (Q X)(Q X)^T whatever Z's error. For that the products are not commuted either: (a I + Z) R and Q are computed in
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
//
// R and Q are advanced alike, S <- S (a I + Z)^T: Q^T once, R twice and transposed between. Rows of S go their own
// ways, and Z is the only matrix that a product reads whole. So a cluster shares a matrix: a block owns some rows of R
// and Q^T, Z is exchanged when it is new, as are R's high halves, of which Z is made, and transposing moves an entry
// once.
//
// For the room that Z takes there, Q is given 16 bits in a cluster and its diagonal fp32. Where most singular values
// vanish, Q is close to a multiple of I as large as the gain, beside which 16 bits hold little of what the others need.
// Distance from the exact polynomial and, log-uniform, off-diagonal part, simulated at 256 x 256, "auto":
//
//                                       rank 1   rank 2   1 / i^2   log-uniform
//     Q in 22 bits                      .002     .018     .009      .002
//     Q in 16 bits                      .22      .21      .038      .011
//     Q in 16 bits, diagonal in fp32    .023     .029     .011      .006
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/arguments.h"
#include "common/binary_search.h"
#include "common/check.h"
#include "common/device.h"
#include "common/shared.cuh"
#include "small_polar/elements.cuh"
#include "small_polar/formulas.cuh"
#include "small_polar/layout.h"
#include "small_polar/params.h"
#include "small_polar/tiles.cuh"

namespace steepest::small_polar {
namespace {

struct Item {
  Matrices matrices;
  int32_t first;  // of them in the launch
};

// A launch's matrices, handed over by value: a captured launch replays without any table in memory.
struct Batch {
  static constexpr int kCapacity = static_cast<int>((kArgumentBytes - sizeof(Numbers) - 16) / sizeof(Item));
  Numbers numbers;
  int32_t count;
  Item items[kCapacity];
};
static_assert(sizeof(Batch) <= kArgumentBytes);

__device__ inline const Item& find(const Batch& batch, int32_t matrix) {
  return batch.items[part_with([&](int i) { return batch.items[i].first; }, batch.count, matrix)];
}

// ---- sums ----------------------------------------------------------------------------------------------------------

// Sums over the blocks that share a matrix, always in the same order; every thread has them. Waits for all before it
// returns.
template <int kBlocks, int kCount>
__device__ inline void sum(float (&values)[kCount]) {
  auto* of_warp = reinterpret_cast<float*>(dynamic_shared());
  float* const of_all = of_warp + kCount * kWarps;
  static_assert(kCount * (kWarps + 1) * sizeof(float) <= kSums);
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) values[c] += __shfl_down_sync(0xffffffff, values[c], step);
    if (threadIdx.x % 32 == 0) of_warp[c * kWarps + threadIdx.x / 32] = values[c];
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    values[c] = of_warp[c * kWarps];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) values[c] += of_warp[c * kWarps + warp];
    if (kBlocks > 1 && threadIdx.x == 0) of_all[c] = values[c];
  }
  sync_blocks<kBlocks>();
  if constexpr (kBlocks > 1) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      values[c] = 0;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) values[c] += *of_block<kBlocks>(of_all + c, block);
    }
    sync_blocks<kBlocks>();
  }
}

// ---- one matrix ----------------------------------------------------------------------------------------------------

using Plain = Left<false>;
using Stored = Right<false>;
using Mirrored = Right<true>;  // stored as its transpose, or symmetric

// The same factor from all parts.
template <class Factor, int kParts>
struct Factors {
  Factor of[kParts];
  __device__ explicit Factors(const Halves (&parts)[kParts]) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) of[p] = {parts[p]};
  }
};

template <int kMost>
constexpr int kBlocksFor = kMost > kMostAlone ? kCluster : 1;

// kMost: the longest short side. Half of what one block bears takes less than half the registers, and so several blocks
// share a multiprocessor; beyond it a cluster takes the matrix.
template <int kMost>
struct Block {
  static_assert(kMost == kMostRows || kMost == kMostAlone || kMost == kMostAlone / 2);
  static constexpr int kBlocks = kBlocksFor<kMost>;
  static constexpr bool kAlone = kBlocks == 1;
  // Tiles of a warp: its row of a square, its share of each pair once, and of a panel's result.
  static constexpr int kFull = kMost >= kMostAlone ? 8 : 2;
  static constexpr int kHalf = kMost >= kMostAlone ? 5 : 2;
  static constexpr int kPass = kMost > kMostAlone ? 8 : kMost == kMostAlone ? 4 : 2;
  static constexpr int kParts = kAlone ? 2 : 1;  // of Q

  const Source& x;
  Scale scale;  // brings X's elements into the range of fp16
  Layout layout;
  bool tall;
  int32_t lengths;  // the long side
  Owners<kBlocks> owners;
  Square<2, kBlocks> r;
  Square<kParts, kBlocks> q;  // transposed
  Square<1, kBlocks, true> z;
  float* diagonal;  // of Q, in a cluster
  uint16_t* panels;

  __device__ Block(const Source& x, int32_t m, int rank)
      : x(x),
        layout(m, kBlocks),
        tall(x.rows > x.columns),
        lengths(tall ? x.rows : x.columns),
        owners{layout.tiles, rank},
        r{{}, owners},
        q{{}, owners},
        z{{}, owners},
        diagonal(reinterpret_cast<float*>(dynamic_shared() + kSums)) {
    auto* at = reinterpret_cast<uint16_t*>(dynamic_shared() + kSums + layout.diagonal());
    const auto take = [&](int first, int size) {
      const Halves halves{at - first * layout.stride, layout.stride, layout.mask};
      at += size;
      return halves;
    };
    const int first = owners.first(rank), share = layout.share();
    if constexpr (kAlone)
      q.part[0] = take(0, share), q.part[1] = take(0, share);
    else
      z.part[0] = take(0, layout.square());
    panels = at;
    r.part[0] = take(first, share), r.part[1] = take(first, share);
    if constexpr (kAlone)
      z.part[0] = take(0, share);
    else
      q.part[0] = take(first, share);
  }
  Block(const Block&) = delete;

  // This block's share of a square.
  __device__ Share share(bool symmetric) const {
    const int above = owners.first(owners.rank) / kTile, end = owners.first(owners.rank + 1) / kTile;
    return Share::of(end - above, layout.tiles, symmetric, above);
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
    for (int32_t begin = owners.rank * kPanel; begin < lengths; begin += kBlocks * kPanel) {
      Load load;
      fetch(load, begin);
      for_each_eight([&](int i, int, int) {
        float values[kVector];
        load.eights[i].convert(x.dtype, values);
#pragma unroll
        for (int j = 0; j < kVector; ++j) add_square(values[j], bins);
      });
    }
    sum<kBlocks>(bins);
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

  // body(panel, begin) for panels of X, every `blocks`-th from number `first` < blocks on; the next is under way
  // meanwhile. No panel may be read before, and the last may still be read after.
  template <class Body>
  __device__ void for_each_panel(int first, int blocks, const Body& body) const {
    const int32_t step = blocks * kPanel;
    Load load;
#pragma unroll 1
    for (int32_t begin = first * kPanel - step, number = 1; begin < lengths; begin += step, number ^= 1) {
      const bool fetched = begin >= 0;  // not so in the first turn
      if (fetched) {
        put(load, panel(number));
        __syncthreads();  // written; and the other one is read no longer, so that the next turn may write it
      }
      if (begin + step < lengths) fetch(load, begin + step);
      if (fetched) body(panel(number), begin);
    }
  }

  // R = X X^T, in fp32. Each panel's sum begins at zero and is added to the others' by the ordinary, rounding addition:
  // tensor cores cut sums off, and over a long side that alone makes R's small eigenvalues negative. Emulated, one sum
  // over 30000 columns took 16 x 30000 to singular values of 3.3 ("auto") and 17 ("polar_express"). Every block of a
  // cluster reads all of X, for its rows of R.
  __device__ void gram(Tiles<kHalf>& sums, const Share& share) const {
    clear(sums);
    for_each_panel(0, 1, [&](const Halves& panel, int32_t) {
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

  // Q, of which the blocks of a cluster own rows, in all of them: in Z's place and on the diagonal.
  __device__ void collect_q() const {
    sync_blocks<kBlocks>();  // all have stored theirs
    for (int row = threadIdx.x; row < layout.tiles * kTile; row += kThreads)
      if (const int owner = owners.of(row); owner != owners.rank)
        diagonal[row] = *of_block<kBlocks>(diagonal + row, owner);
    collect(q, z);
    sync_blocks<kBlocks>();  // all have read them
  }

  // factor Q X, or factor X^T Q^T of a tall matrix as it lies: body(row, column, first, second) for every two elements.
  // The blocks of a cluster take turns at panels.
  template <class Body>
  __device__ void apply(float factor, const Body& body) const {
    if constexpr (!kAlone) collect_q();
    Halves whole[kParts];
#pragma unroll
    for (int p = 0; p < kParts; ++p) whole[p] = kAlone ? q.part[p] : z.part[0];
    const int along = kPanel / kTile, rows = tall ? along : layout.tiles;
    for_each_panel(owners.rank, kBlocks, [&](const Halves& panel, int32_t begin) {
#pragma unroll 1
      for (int above = 0; above < rows; above += kWarps) {
        const int below = rows - above < kWarps ? rows - above : kWarps;
        const Share share = Share::of(below, tall ? layout.tiles : along, false, above);
        Tiles<kPass> sums;
        clear(sums);
        if (tall)
          multiply(sums, share, {Plain{panel}}, Factors<Stored, kParts>(whole).of, layout.tiles);
        else
          multiply(sums, share, Factors<Left<true>, kParts>(whole).of, {Stored{panel}}, layout.tiles);
        for_each_pair(sums, share, [&](int row, int column, float& first, float& second) {
          if constexpr (!kAlone) {
            const uint32_t both = *reinterpret_cast<const uint32_t*>(panel.element(row, column));
            first += diagonal[tall ? column : row] * from_f16(static_cast<uint16_t>(both));
            second += diagonal[tall ? column + 1 : row] * from_f16(static_cast<uint16_t>(both >> 16));
          }
          (tall ? row : column) += begin;
          body(row, column, factor * first, factor * second);
        });
      }
    });
  }

  // ---- steps

  // What R is multiplied by, every row of it: its own high halves, or a copy where Z will be.
  __device__ Halves whole_r() const { return kAlone ? r.part[0] : z.part[0]; }

  __device__ void store_z(Tiles<kHalf>& sums, const Share& share) const {
    z.template store<StoreAs::both>(sums, share);
    if constexpr (!kAlone) collect(z, z);
  }
  __device__ void store_r(Tiles<kHalf>& sums, const Share& share) const {
    r.template store<StoreAs::both>(sums, share);
    if constexpr (!kAlone) collect(r, z);
  }

  // Z = b R + c R^2 + ...;  `step` as in Numbers, from its second number on. From degree 7 on in two rounds, the first
  // of which leaves  T = c R + d R^2  or  T = u R + R^2  where Z will be.
  __device__ void polynomial(const float* step, int terms) const {
    const Halves high = r.part[0], t = z.part[0];
    const int rounds = terms > 3 ? 2 : 1;
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
      const Share share = this->share(true);
      const bool second = round == 1, square_of_t = second && terms == 5;
      Tiles<kHalf> sums;
      clear(sums);
      if (terms > 2)
        multiply(sums, share, {Plain{square_of_t ? t : high}}, {Mirrored{second ? t : whole_r()}}, layout.tiles);
      float product = terms == 3 ? step[1] : 1, linear = step[0];
      if (terms == 4 && !second) product = step[2], linear = step[1];
      if (square_of_t) {
        combine(sums, share, step[1], step[2], z);
        linear = step[3];
      }
      combine(sums, share, product, linear, r);
      store_z(sums, share);
    }
  }

  // sums = S (a I + Z)^T
  template <int kTiles, int kParts>
  __device__ void advance(Tiles<kTiles>& sums, const Share& share, const Square<kParts, kBlocks>& s, float a) const {
    clear(sums);
    multiply(sums, share, Factors<Plain, kParts>(s.part).of, {Mirrored{z.part[0]}}, layout.tiles);
    combine(sums, share, 1, a, s);
  }

  // Q <- (a I + Z) Q, and a I + Z at first; with Q = P + D in a cluster, where D is the diagonal.
  __device__ void advance_q(float a, bool first) const {
    const Share share = this->share(false);
    Tiles<kFull> sums;
    if (first)
      clear(sums);
    else
      advance(sums, share, q, a);
    if (first || !kAlone)
      for_each_pair(sums, share, [this, a, first](int row, int column, float& one, float& other) {
        const float d = first ? 1 : diagonal[row];
        one += d * (from_f16(*z.part[0].element(column, row)) + (row == column ? a : 0));
        other += d * (from_f16(*z.part[0].element(column + 1, row)) + (row == column + 1 ? a : 0));
      });
    if constexpr (!kAlone) {
      __syncthreads();  // all have read the diagonal
      for_each_pair(sums, share, [this](int row, int column, float& one, float& other) {
        if (row == column) diagonal[row] = one, one = 0;
        if (row == column + 1) diagonal[row] = other, other = 0;
      });
    }
    q.template store<StoreAs::plain>(sums, share);
  }

  // R <- (a I + Z) R, in full, then ((a I + Z) R) (a I + Z)^T.
  __device__ void advance_r(float a) const {
    const Share full = share(false);
    Tiles<kFull> left;
    advance(left, full, r, a);
    r.template store<StoreAs::transposed>(left, full);
    const Share half = share(true);
    Tiles<kHalf> both;
    advance(both, half, r, a);
    store_r(both, half);
  }
};

// The trace of R and ||R - mean I||_F^2, from the half of it that the blocks hold.
struct Moments {
  float trace, centred;
};

template <int kBlocks, int kTiles>
__device__ inline Moments moments(Tiles<kTiles>& gram, const Share& share, int32_t m) {
  float trace[1] = {};
  for_each_pair(gram, share, [&](int row, int column, float first, float second) {
    trace[0] += (row == column ? first : 0) + (row == column + 1 ? second : 0);
  });
  sum<kBlocks>(trace);
  const float mean = trace[0] / static_cast<float>(m);
  float centred[1] = {};
  for_each_pair(gram, share, [&](int row, int column, float first, float second) {
    const bool own_mirror = row / kTile == column / kTile;  // a tile on the diagonal holds both halves
    if (row == column && row < m) first -= mean;
    if (row == column + 1 && row < m) second -= mean;
    centred[0] += (own_mirror ? 1.0f : 2.0f) * (first * first + second * second);
  });
  sum<kBlocks>(centred);
  return {trace[0], centred[0]};
}

__device__ inline void fill(const Target& to, float value, int first, int blocks) {
  for (int64_t i = first * kThreads + threadIdx.x; i < int64_t{to.rows} * to.columns; i += blocks * kThreads)
    to.one(i / to.columns * to.row + i % to.columns, value);
}

__device__ inline int width(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

template <int kMost>
__device__ inline void polar(const Batch& batch) {
  using Work = Block<kMost>;
  constexpr int kBlocks = kBlocksFor<kMost>;
  const Numbers& numbers = batch.numbers;
  const int32_t matrix = static_cast<int32_t>(blockIdx.x) / kBlocks, rank = static_cast<int32_t>(blockIdx.x) % kBlocks;
  const Item& item = find(batch, matrix);
  const Matrices& all = item.matrices;
  const int64_t index = matrix - item.first;
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

  Work block(x, m, rank);
  block.find_scale(m);
  if (block.scale.first != block.scale.first) {
    fill(target, NAN, rank, kBlocks);
    if (all.slack != nullptr && rank == 0 && threadIdx.x == 0) all.slack[index] = NAN;
    return;
  }
  const Share half = block.share(true);
  Tiles<Work::kHalf> gram;
  block.gram(gram, half);
  const Moments moment = moments<kBlocks>(gram, half, m);
  const float square = squared_norm(numbers, moment.trace, moment.centred, m), slack = sqrtf(moment.trace / square);
  if (all.slack != nullptr && rank == 0 && threadIdx.x == 0) all.slack[index] = slack;
  const int table = choose_table(numbers, slack);
  const float inverse = 1 / square;
  for_each_pair(gram, half, [inverse](int, int, float& first, float& second) { first *= inverse, second *= inverse; });
  block.store_r(gram, half);

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
__global__ void __launch_bounds__(kThreads, kMost == kMostAlone / 2 ? 2 : 1)
    small_polar(const __grid_constant__ Batch batch) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  polar<kMost>(batch);
#else
  if constexpr (kBlocksFor<kMost> == 1)
    polar<kMost>(batch);
  else
    __trap();  // code for devices without clusters
#endif
}

template <int kMost>
void launch(const Batch& batch, int32_t matrices, size_t bytes, const Room& room, cudaStream_t stream) {
  constexpr int kBlocks = kBlocksFor<kMost>;
  const int32_t blocks = matrices * kBlocks;
  allow_shared_memory(reinterpret_cast<const void*>(small_polar<kMost>),
                      std::min(shared_bytes(kMost, kBlocks), room.bytes));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kBlocks, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks), config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes, config.stream = stream;
  config.attrs = &cluster, config.numAttrs = kBlocks > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, small_polar<kMost>, batch);
  check_cuda(error, "small_polar: a launch of ", blocks, " blocks with ", bytes, " bytes of shared memory");
}

int64_t short_side(const Matrices& all) {  // 0 where there are none
  return all.count == 0 ? 0 : all.rows < all.columns ? all.rows : all.columns;
}

// `count` of the matrices, from the one of this number on.
Matrices part_of(Matrices all, int64_t first, int64_t count) {
  all.x = static_cast<const char*>(all.x) + first * all.x_matrix * bytes_of(all.x_dtype);
  all.out = static_cast<char*>(all.out) + first * all.out_matrix * bytes_of(all.out_dtype);
  if (all.slack != nullptr) all.slack += first;
  all.count = count;
  return all;
}

}  // namespace

void polar_on_device(const std::vector<Matrices>& matrices, const Schedule& schedule, const Room& room, void* stream,
                     int32_t most_blocks) {
  static thread_local Batch batch;  // 32 KB: not on the stack; the launch copies what it is given
  batch.numbers = numbers(schedule);
  for (const Matrices& one : matrices) {
    const int64_t m = short_side(one);
    if (m > 0 && blocks_for(m, room) == 0)
      throw std::invalid_argument("steepest::small_polar: the shorter side must be at most " +
                                  std::to_string(most_rows(room)) + " with " + std::to_string(room.bytes) +
                                  " bytes of shared memory" + (room.clusters ? "" : " and no clusters") + ", got " +
                                  std::to_string(m));
  }
  for (const int blocks : {1, kCluster}) {
    const int64_t most = most_blocks / blocks;
    int64_t taken = 0;  // of the matrices at `next`
    for (size_t next = 0; next < matrices.size();) {
      int64_t count = 0;
      size_t bytes = 0;
      batch.count = 0;
      while (next < matrices.size() && batch.count < Batch::kCapacity && count < most) {
        const Matrices& one = matrices[next];
        const int64_t m = short_side(one);
        if (m > 0 && blocks_for(m, room) == blocks) {
          const int64_t part = std::min(one.count - taken, most - count);
          batch.items[batch.count++] = {part_of(one, taken, part), static_cast<int32_t>(count)};
          count += part, taken += part;
          bytes = std::max(bytes, shared_bytes(m, blocks));
          if (taken < one.count) break;
        }
        ++next, taken = 0;
      }
      if (batch.count == 0) break;
      const auto start = blocks > 1                                 ? launch<kMostRows>
                         : bytes <= shared_bytes(kMostAlone / 2, 1) ? launch<kMostAlone / 2>
                                                                    : launch<kMostAlone>;
      start(batch, static_cast<int32_t>(count), bytes, room, static_cast<cudaStream_t>(stream));
    }
  }
}

}  // namespace steepest::small_polar
