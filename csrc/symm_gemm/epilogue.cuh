// From a warpgroup's sums to D: the parts of a cut tile together, then chunk by chunk through shared memory, C in, the
// formula, D and its mirror image out. Host and device; what only the machine can do is the Team's:
//   - warpgroup, thread: which one of a block, and which thread of its 128
//   - sync(): all 128 meet, and see what each wrote
//   - pack, unpack: two 16-bit entries in a word, the first in its lower half
//   - load_matrices, store_matrices, store_transposed: a warp's four 8 x 8 matrices, every lane giving a row's address
//   - add_lanes: over the warp, always in the same order
//   - publish, acquire: before and after a counter says that something is in memory
//   - count: adds 1 to a counter, returns what was there
//   - load_shared, store_shared: 16 bytes that other blocks write or read
#pragma once

#include "common/floats.h"
#include "symm_gemm/formulas.cuh"
#include "symm_gemm/params.h"
#include "symm_gemm/plan.h"
#include "symm_gemm/scheduler.cuh"

// The device's compiler is told; a host compiler does not know these.
#ifdef __CUDA_ARCH__
#define STEEPEST_UNROLL _Pragma("unroll")
#define STEEPEST_LOOP _Pragma("unroll 1")
#else
#define STEEPEST_UNROLL
#define STEEPEST_LOOP
#endif
#ifdef __CUDACC__
#define STEEPEST_FLAT __host__ __device__ __forceinline__  // arrays of sums stay in registers
#else
#define STEEPEST_FLAT inline
#endif

namespace steepest::symm_gemm {

struct alignas(16) Vector {
  uint32_t words[4];
};

// What a problem's tiles are stored to, and with what.
struct Output {
  const void* c;
  void* d;
  int64_t c_row, c_matrix, d_row, d_matrix;
  Scalar alpha, beta, gamma;
  float *partials, *diagonal;
  int32_t m, n;
  Tiling tiling;
  Scalar eta;
  Dtype weights;         // of an update
  int32_t first_weight;  // among the addresses of a launch
};

inline Output output_of(const Problem& problem, const PlannedProblem& planned) {
  const Shape& shape = problem.shape;
  return {shape.has_c ? problem.c : nullptr,
          problem.d,
          shape.c.row,
          shape.c.matrix,
          shape.d.row,
          shape.d.matrix,
          problem.alpha,
          problem.beta,
          problem.gamma,
          problem.partials,
          problem.diagonal,
          static_cast<int32_t>(shape.m),
          static_cast<int32_t>(shape.n),
          planned.tiling,
          problem.update.eta,
          problem.update.dtype,
          0};
}

// A warpgroup's shared memory.
struct alignas(128) Staging {
  Vector direct[kChunkVectors], mirrored[kChunkVectors];
  uint32_t last;  // whether this warpgroup is the one to sum a cut tile
};

constexpr int kChunkSums = kChunk * kChunk / 128;  // of a thread

STEEPEST_HD inline float value_of(const Scalar& scalar, int matrix) {
  return scalar.at != nullptr ? scalar.at[matrix * scalar.stride] : scalar.value;
}

// The lower triangle of one, the upper triangle of the other: vector `vector` of row `row` of a chunk on the diagonal.
STEEPEST_HD inline Vector join(const Vector& lower, const Vector& upper, int row, int vector) {
  Vector out;
  for (int i = 0; i < 4; ++i) {
    const int column = vector * kVector + 2 * i;
    const uint32_t mask = column + 1 <= row ? 0xffffffffu : column <= row ? 0xffffu : 0u;
    out.words[i] = (lower.words[i] & mask) | (upper.words[i] & ~mask);
  }
  return out;
}

// Leaves this part of a cut tile in memory. The last warpgroup to arrive, whichever it is, adds all parts in their
// order and has the sum in `sums`; the others get false.
template <Tile kTile, class Team, int kSums>
STEEPEST_FLAT bool combine(const Work& work, int rank, const Team& team, Staging& staging, float (&sums)[kSums],
                           const Workspace& workspace) {
  constexpr int64_t kHalf = kSums * 128;  // of the warpgroup
  // Counts halves of blocks' tiles where a cluster tile has this number.
  const auto half = [&](int32_t number) -> int64_t {
    return (number * shape_of(kTile).cluster + rank) * kWarpgroups + team.warpgroup;
  };
  const auto at = [&](int32_t part) {
    return workspace.partials + half(slot_of(work.opener, part)) * kHalf + team.thread * 4;
  };
  uint32_t* const counter = workspace.counters + half(work.opener);
  float* const partials = at(work.part);
  STEEPEST_UNROLL
  for (int i = 0; i < kSums / 4; ++i) {
    Vector part;
    STEEPEST_UNROLL
    for (int j = 0; j < 4; ++j) part.words[j] = bits_of(sums[4 * i + j]);
    team.store_shared(partials + i * 512, part);
  }
  team.publish();
  team.sync();
  if (team.thread == 0) {
    staging.last = team.count(counter) == static_cast<uint32_t>(work.parts) - 1;
    if (staging.last) *counter = 0;  // for the next launch
  }
  team.sync();
  if (!staging.last) return false;
  team.acquire();
  STEEPEST_UNROLL
  for (int i = 0; i < kSums; ++i) sums[i] = 0;
  STEEPEST_LOOP
  for (int32_t each = 0; each < work.parts; ++each) {
    const float* const from = at(each);
    STEEPEST_UNROLL
    for (int i = 0; i < kSums / 4; ++i) {
      const Vector part = team.load_shared(from + i * 512);
      STEEPEST_UNROLL
      for (int j = 0; j < 4; ++j) sums[4 * i + j] += float_of(part.words[j]);
    }
  }
  return true;
}

// First row of a warpgroup's half of a block's tile.
template <Tile kTile>
STEEPEST_HD inline int first_row(const Work& work, int rank, int warpgroup) {
  constexpr TileShape kShape = shape_of(kTile);
  return (work.place.row * kShape.cluster + rank) * kShape.rows + warpgroup * kChunk;
}

// Stores one warpgroup's half of a block's tile: 64 rows of `columns / 64` chunks.
template <class Team, Tile kTile>
struct TileStore {
  static constexpr TileShape kShape = shape_of(kTile);
  static constexpr int kChunks = kShape.columns / kChunk;
  static constexpr int kSums = kChunks * kChunkSums;  // of a thread

  const Output& out;
  const Work& work;
  const Team& team;
  Staging& staging;
  const uint16_t* c;  // nullptr: there is none
  uint16_t* d;
  const int row, column;            // of the first chunk's first entry
  const int rank;                   // of the block in its cluster
  Vector ahead[kVectorsPerThread];  // C of the chunk that is next

  STEEPEST_HD TileStore(const Output& out, const Work& work, int rank, const Team& team, Staging& staging)
      : out(out),
        work(work),
        team(team),
        staging(staging),
        c(out.c == nullptr ? nullptr : static_cast<const uint16_t*>(out.c) + work.matrix * out.c_matrix),
        d(static_cast<uint16_t*>(out.d) + work.matrix * out.d_matrix),
        row(first_row<kTile>(work, rank, team.warpgroup)),
        column(work.place.column * kShape.columns),
        rank(rank) {}

  STEEPEST_HD bool symmetric() const { return out.tiling.symmetric; }
  STEEPEST_HD int chunk_column(int chunk) const { return column + chunk * kChunk; }

  // Chunks are aligned squares, so one lies below the diagonal, on it, or above it. The same for the whole warpgroup.
  STEEPEST_HD bool stores(int chunk) const {
    return row < out.m && chunk_column(chunk) < out.n && !(symmetric() && chunk_column(chunk) > row);
  }

  // To be called before the sums are there: C arrives while the tensor cores are at work.
  STEEPEST_HD void begin() {
    if (work.parts == 1) fetch(0);
  }

  // `sums`: this thread's, as the tensor cores leave them.
  STEEPEST_HD void finish(float (&sums)[kSums], const Workspace& workspace) {
    if (work.parts > 1) {
      if (!combine<kTile>(work, rank, team, staging, sums, workspace)) return;
      fetch(0);
    }
    const float squares = store(sums);
    if (out.partials == nullptr || team.thread % 32 != 0) return;
    const int64_t block = (int64_t{work.matrix} * out.tiling.tiles + work.tile) * kShape.cluster + rank;
    out.partials[block * kConsumerWarps + team.warpgroup * 4 + team.thread / 32] = squares;
  }

 private:
  STEEPEST_HD void fetch(int chunk) {
    if (c == nullptr || !stores(chunk)) return;
    STEEPEST_UNROLL
    for (int i = 0; i < kVectorsPerThread; ++i) {
      const int at_row = row + moved_row(team.thread, i);
      const int at_column = chunk_column(chunk) + moved_vector(team.thread) * kVector;
      const bool inside = at_row < out.m && at_column < out.n;
      ahead[i] = inside ? *reinterpret_cast<const Vector*>(c + at_row * out.c_row + at_column) : Vector{};
    }
  }

  STEEPEST_HD void stage_c() {
    STEEPEST_UNROLL
    for (int i = 0; i < kVectorsPerThread; ++i)
      staging.direct[staged(moved_row(team.thread, i), moved_vector(team.thread))] = ahead[i];
  }

  // One vector of D; n is a multiple of its 8 entries.
  STEEPEST_HD void put(int at_row, int at_column, const Vector& vector) const {
    if (at_row < out.m && at_column < out.n) *reinterpret_cast<Vector*>(d + at_row * out.d_row + at_column) = vector;
  }

  STEEPEST_HD void put_chunk(int chunk) const {
    const int first = chunk_column(chunk), vector = moved_vector(team.thread);
    STEEPEST_UNROLL
    for (int i = 0; i < kVectorsPerThread; ++i) {
      const int r = moved_row(team.thread, i), slot = staged(r, vector);
      const Vector direct = staging.direct[slot];
      if (!symmetric()) {
        put(row + r, first + vector * kVector, direct);
        continue;
      }
      const Vector mirrored = staging.mirrored[slot];
      if (first == row) {
        put(row + r, first + vector * kVector, join(direct, mirrored, r, vector));
      } else {
        put(row + r, first + vector * kVector, direct);
        put(first + r, row + vector * kVector, mirrored);
      }
    }
  }

  struct Factors {
    float alpha, beta, gamma;
    bool reads_c;  // where beta is not 0
  };

  // A chunk's entries, from its sums (and C, in shared memory) to shared memory. Adds to `squares` those off the
  // diagonal, of a symmetric matrix those below it; what lies outside the matrix is 0.
  template <bool kOnDiagonal>
  STEEPEST_FLAT void form(const float* sums, const Factors& by, float& squares) const {
    float diagonal[2] = {};  // in either of a thread's rows, where this thread has it
    STEEPEST_UNROLL
    for (int quarter = 0; quarter < 4; ++quarter) {
      // A warp reads C from the very slots that it then writes D to.
      Vector& slot = staging.direct[direct_slot(team.thread, quarter)];
      uint32_t words[4] = {};
      if (by.reads_c) team.load_matrices(slot, words);
      STEEPEST_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int h = matrix_h(i), j = matrix_j(quarter, i);
        float values[2];
        team.unpack(words[i], values[0], values[1]);
        STEEPEST_UNROLL
        for (int p = 0; p < 2; ++p) {
          const float sum = sums[j * 4 + h * 2 + p];
          if constexpr (!kOnDiagonal) {
            values[p] = entry(by.alpha, sum, by.beta, values[p], 0.0f);
            squares = fmaf(values[p], values[p], squares);
          } else {
            const int below = fragment_row(team.thread, h) - fragment_column(team.thread, j) - p;
            values[p] = entry(by.alpha, sum, by.beta, values[p], below == 0 ? by.gamma : 0.0f);
            if (below == 0)
              diagonal[h] = values[p];
            else if (!symmetric() || below > 0)
              squares = fmaf(values[p], values[p], squares);
          }
        }
        words[i] = team.pack(values[0], values[1]);
      }
      team.store_matrices(words, slot);
      if (symmetric()) team.store_transposed(words, staging.mirrored[mirrored_slot(team.thread, quarter)]);
    }
    if constexpr (kOnDiagonal) leave(diagonal);
  }

  // The diagonal of a chunk, as far as it is this thread's.
  STEEPEST_HD void leave(const float (&values)[2]) const {
    if (out.diagonal == nullptr || !has_diagonal(team.thread)) return;
    STEEPEST_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int at = row + fragment_row(team.thread, h);
      if (at < out.m && at < out.n) out.diagonal[int64_t{work.matrix} * out.m + at] = values[h];
    }
  }

  // Returns the warp's sum of squares off the diagonal, mirrored entries included.
  STEEPEST_HD float store(const float (&sums)[kSums]) {
    Factors by{value_of(out.alpha, work.matrix), 0, value_of(out.gamma, work.matrix), false};
    if (c != nullptr) by.beta = value_of(out.beta, work.matrix), by.reads_c = by.beta != 0;
    float squares = 0;
    STEEPEST_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (!stores(chunk)) continue;
      team.sync();  // the chunk before has been read
      if (by.reads_c) {
        stage_c();
        if (chunk + 1 < kChunks) fetch(chunk + 1);
        team.sync();
      }
      if (chunk_column(chunk) == row)
        form<true>(sums + chunk * kChunkSums, by, squares);
      else
        form<false>(sums + chunk * kChunkSums, by, squares);
      team.sync();
      put_chunk(chunk);
    }
    squares = team.add_lanes(squares);
    return symmetric() ? 2 * squares : squares;
  }
};

}  // namespace steepest::symm_gemm
