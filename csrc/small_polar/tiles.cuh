// Square matrices of halves in shared memory, and the products by which a block of warps computes one from others.
//
// A result is tiles of 16 x 16; every warp holds some of them in registers, in fp32, until all have read what they
// need. Only then are they written, so that a result may take the place of a factor.
//
// The blocks of a cluster hold some rows each, and row numbers are the whole matrix' everywhere.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/cluster.cuh"
#include "common/floats.h"
#include "common/mma.cuh"
#include "small_polar/elements.cuh"
#include "small_polar/layout.h"

namespace steepest::small_polar {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Halves in shared memory, rows of whole 16 bytes.
struct Halves {
  uint16_t* at;      // row 0, whether or not it is here
  int stride, mask;  // as in Layout

  __device__ uint16_t* chunk(int row, int number) const {
    return at + row * stride + (number ^ (row & mask)) * kVector;
  }
  __device__ uint16_t* element(int row, int column) const { return chunk(row, column >> 3) + (column & 7); }

  // The tile at (row, column) for load_matrices, quarters in the order  0 2 / 1 3  (kAcross false) or  0 1 / 2 3.
  template <bool kAcross>
  __device__ const uint16_t* lane_row(int row, int column) const {
    const int lane = threadIdx.x % 32, quarter = lane / 8;
    const int below = kAcross ? quarter / 2 : quarter % 2, beside = kAcross ? quarter % 2 : quarter / 2;
    const int inside = lane % 8 + below * 8;  // row is a multiple of 16
    return at + (row + inside) * stride +
           ((static_cast<unsigned>(column) / kVector + beside) ^ (inside & mask)) * kVector;
  }
};

// A factor of a product as it is stored, or transposed.
template <bool kTransposed>
struct Left {
  Halves x;
  __device__ void load(uint32_t (&to)[4], int row, int k) const {
    if constexpr (kTransposed)
      load_matrices<true>(to, x.lane_row<true>(k, row));
    else
      load_matrices<false>(to, x.lane_row<false>(row, k));
  }
};
template <bool kTransposed>  // true: stored as B^T
struct Right {
  Halves x;
  __device__ void load(uint32_t (&to)[4], int k, int column) const {
    if constexpr (kTransposed)
      load_matrices<false>(to, x.lane_row<true>(column, k));
    else
      load_matrices<true>(to, x.lane_row<false>(k, column));
  }
};

// The tiles of a result that a warp computes, all of one row of tiles: (row, (row + offset) mod columns) for every
// step-th offset from the first on. Of a symmetric one each pair (i, j), (j, i) is computed once, and the warps have
// equal shares. Made anew for every product: the compiler would keep all addresses that follow from it in registers
// through the whole iteration, a kilobyte more than there are.
struct Share {
  int row, columns, start, first, step, end;  // start: row mod columns

  // `rows` rows of tiles, at most one for each warp, below `above` others.
  __device__ static Share of(int rows, int columns, bool symmetric, int above = 0) {
    int warp = threadIdx.x / 32;
    hide(warp);
    const int step = kWarps / rows, row = above + warp / step;
    int end = columns;
    if (symmetric) end = columns / 2 + (columns % 2 == 1 || row < columns / 2 ? 1 : 0);
    return {row, columns, row % columns, warp % step, step, row < above + rows ? end : 0};
  }
  __device__ bool has(int i) const { return first + i * step < end; }
  __device__ int column(int i) const {
    const int at = start + first + i * step;
    return at < columns ? at : at - columns;
  }
};

template <int kTiles>
using Tiles = float[kTiles][2][4];

template <int kTiles>
__device__ inline void clear(Tiles<kTiles>& sums) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[i][j / 4][j % 4] = 0;
}

// sums += sum of a B over the parts of one factor; the other has one.   depth: tiles of what is summed over.
template <int kTiles, class A, int kA, class B, int kB>
__device__ inline void multiply(Tiles<kTiles>& sums, const Share& share, const A (&a)[kA], const B (&b)[kB],
                                int depth) {
  static_assert(kA == 1 || kB == 1);
  if (!share.has(0)) return;
  for (int k = 0; k < depth; ++k) {
    uint32_t left[kA][4];
#pragma unroll
    for (int p = 0; p < kA; ++p) a[p].load(left[p], share.row * kTile, k * kTile);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (!share.has(i)) break;
#pragma unroll
      for (int p = 0; p < kB; ++p) {
        uint32_t right[4];
        b[p].load(right, k * kTile, share.column(i) * kTile);
#pragma unroll
        for (int q = 0; q < kA; ++q) {
          multiply_add(sums[i][0], left[q], right[0], right[1]);
          multiply_add(sums[i][1], left[q], right[2], right[3]);
        }
      }
    }
  }
}

// Calls body(row, column, first, second) for every two neighbours that this lane holds.
template <int kTiles, class Body>
__device__ inline void for_each_pair(Tiles<kTiles>& sums, const Share& share, const Body& body) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    if (!share.has(i)) break;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = share.row * kTile + lane / 4 + j % 2 * 8;
      const int column = share.column(i) * kTile + j / 2 * 8 + lane % 4 * 2;
      body(row, column, sums[i][j / 2][j % 2 * 2], sums[i][j / 2][j % 2 * 2 + 1]);
    }
  }
}

// ---- squares -------------------------------------------------------------------------------------------------------

// Which block of a cluster owns which rows of so many tiles.
template <int kBlocks>
struct Owners {
  int tiles, rank;  // this block's

  __device__ int first(int block) const { return tiles * block / kBlocks * kTile; }
  __device__ int of(int row) const {
    int block = 0;
#pragma unroll
    for (int next = 1; next < kBlocks; ++next) block += row >= first(next);
    return block;
  }
};

enum class StoreAs { plain, transposed, both };  // where entry (i, j) of a result goes: (i, j), (j, i), or either

// A square matrix in one part or in two: the nearest half and the half nearest to the rest. `kWhole`: every block has
// room for all rows, else for its own.
template <int kParts, int kBlocks, bool kWhole = false>
struct Square {
  Halves part[kParts];
  Owners<kBlocks> owners;

  __device__ void read(int row, int column, float& first, float& second) const {
    first = second = 0;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const uint32_t both = *reinterpret_cast<const uint32_t*>(part[p].element(row, column));
      first += from_f16(static_cast<uint16_t>(both)), second += from_f16(static_cast<uint16_t>(both >> 16));
    }
  }

  __device__ void write(int row, int column, float first, float second) const {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const uint32_t both = pack(first, second);
      *reinterpret_cast<uint32_t*>(part[p].element(row, column)) = both;
      first -= from_f16(static_cast<uint16_t>(both)), second -= from_f16(static_cast<uint16_t>(both >> 16));
    }
  }

  // How much further down a row lies in this block than in that one.
  __device__ int shift(int block) const { return kWhole ? 0 : owners.first(owners.rank) - owners.first(block); }

  // At (column, row) and (column + 1, row) of the block that owns them; column is even.
  __device__ void write_transposed(int row, int column, float first, float second) const {
    const int owner = owners.of(column), to = column + shift(owner);
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const uint16_t low = to_f16(first), high = to_f16(second);
      *of_block<kBlocks>(part[p].element(to, row), owner) = low;
      *of_block<kBlocks>(part[p].element(to + 1, row), owner) = high;
      first -= from_f16(low), second -= from_f16(high);
    }
  }

  // Every thread of the block writes its tiles, and waits before, for those that still read, and after: in a cluster
  // for the other blocks too where they own the entries. Both: but for the tiles on the diagonal. Those are as
  // symmetric as the formula that computed them, which is enough, for nobody relies on it: (a I + Z) R (a I + Z)^T and
  // (a I + Z) Q belong together whatever Z is.
  template <StoreAs kAs, int kTiles>
  __device__ void store(Tiles<kTiles>& sums, const Share& share) const {
    constexpr int kWaiting = kAs == StoreAs::plain ? 1 : kBlocks;
    sync_blocks<kWaiting>();
    for_each_pair(sums, share, [this](int row, int column, float first, float second) {
      if (kAs != StoreAs::transposed) write(row, column, first, second);
      if (kAs == StoreAs::transposed || (kAs == StoreAs::both && (row ^ column) >= kTile))
        write_transposed(row, column, first, second);
    });
    sync_blocks<kWaiting>();
  }
};

// sums <- alpha sums + beta S
template <int kTiles, class S>
__device__ inline void combine(Tiles<kTiles>& sums, const Share& share, float alpha, float beta, const S& s) {
  for_each_pair(sums, share, [&](int row, int column, float& first, float& second) {
    float one, other;
    s.read(row, column, one, other);
    first = alpha * first + beta * one, second = alpha * second + beta * other;
  });
}

// The first part of the rows that the blocks of a cluster own, all of them in every block. Each begins with its own, so
// that they do not all ask the same one, and has several loads under way.
template <int kParts, int kBlocks, bool kWhole>
__device__ inline void collect(const Square<kParts, kBlocks, kWhole>& from, const Square<1, kBlocks, true>& to) {
  constexpr int kLoads = 8;
  const Owners<kBlocks> owners = from.owners;
  const int rows = owners.tiles * kTile, first_row = owners.first(owners.rank);
  const int begin = kWhole ? owners.first(owners.rank + 1) - first_row : 0;  // its own rows are there
  const int chunk = threadIdx.x % 32;
  const int end = chunk < rows / kVector ? rows : 0;
#pragma unroll 1
  for (int some = begin + static_cast<int>(threadIdx.x) / 32; some < end; some += kLoads * kWarps) {
    uint4 loaded[kLoads];
    const auto for_each_row = [&](const auto& body) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int row = some + i * kWarps;
        if (row < end) body(loaded[i], first_row + row < rows ? first_row + row : first_row + row - rows);
      }
    };
    for_each_row([&](uint4& words, int row) {
      const int owner = owners.of(row);
      const uint16_t* at = from.part[0].chunk(row + from.shift(owner), chunk);
      words = *reinterpret_cast<const uint4*>(of_block<kBlocks>(at, owner));
    });
    for_each_row([&](const uint4& words, int row) { store_16_bytes(to.part[0].chunk(row, chunk), words); });
  }
  __syncthreads();
}

}  // namespace steepest::small_polar
