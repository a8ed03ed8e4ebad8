// From a warpgroup's sums to weights: W <- beta W + alpha A B, chunk by chunk through shared memory in fp32, so that a
// weight is read and written in 16 bytes whatever its type. Host and device; see epilogue.cuh for the Team.
#pragma once

#include <cstddef>

#include "symm_gemm/epilogue.cuh"

namespace steepest::symm_gemm {

static_assert(sizeof(Staging::direct) + sizeof(Staging::mirrored) == kChunk * kChunk * sizeof(float) &&
              offsetof(Staging, mirrored) == sizeof(Staging::direct));

// Takes one warpgroup's half of a block's tile into a matrix of weights.
template <class Team, Tile kTile>
struct UpdateStore {
  static constexpr TileShape kShape = shape_of(kTile);
  static constexpr int kChunks = kShape.columns / kChunk;
  static constexpr int kSums = kChunks * kChunkSums;  // of a thread

  const Output& out;
  const Work& work;
  const Team& team;
  Staging& staging;
  void* weights = nullptr;
  const int row, column;                // of the first chunk's first entry
  const int rank;                       // of the block in its cluster
  Vector ahead[2 * kVectorsPerThread];  // weights of the chunk that is next

  STEEPEST_HD UpdateStore(const Output& out, const Work& work, int rank, const Team& team, Staging& staging)
      : out(out),
        work(work),
        team(team),
        staging(staging),
        row(first_row<kTile>(work, rank, team.warpgroup)),
        column(work.place.column * kShape.columns),
        rank(rank) {}

  // To be called before the sums are there: weights arrive while the tensor cores are at work.
  STEEPEST_HD void begin() {
    if (work.parts == 1) fetch(0);
  }

  // `sums`: this thread's, as the tensor cores leave them.
  STEEPEST_HD void finish(float (&sums)[kSums], const Workspace& workspace) {
    if (work.parts > 1) {
      if (!combine<kTile>(work, rank, team, staging, sums, workspace)) return;
      fetch(0);
    }
    const float alpha = factor(value_of(out.alpha, work.matrix), value_of(out.eta, work.matrix));
    const float beta = value_of(out.beta, work.matrix);
    STEEPEST_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (!stores(chunk)) continue;
      team.sync();  // the chunk before has been read
      stage(sums + chunk * kChunkSums);
      Vector loaded[2 * kVectorsPerThread];
      STEEPEST_UNROLL
      for (int i = 0; i < 2 * kVectorsPerThread; ++i) loaded[i] = ahead[i];
      if (chunk + 1 < kChunks) fetch(chunk + 1);
      team.sync();
      STEEPEST_UNROLL
      for (int i = 0; i < kVectorsPerThread; ++i) move(chunk, i, alpha, beta, loaded[2 * i], loaded[2 * i + 1]);
    }
  }

 private:
  STEEPEST_HD bool wide() const { return out.weights == Dtype::f32; }
  STEEPEST_HD int chunk_column(int chunk) const { return column + chunk * kChunk; }
  STEEPEST_HD bool stores(int chunk) const { return row < out.m && chunk_column(chunk) < out.n; }

  // The i-th eight entries of a thread: one vector of 16 bits, two of 32. nullptr outside of the matrix.
  STEEPEST_HD Vector* place(int chunk, int i) const {
    const int at_row = row + moved_row(team.thread, i);
    const int at_column = chunk_column(chunk) + moved_vector(team.thread) * kVector;
    if (at_row >= out.m || at_column >= out.n) return nullptr;
    const int64_t at = at_row * out.d_row + at_column;
    return static_cast<Vector*>(weights) + at / kVector * (wide() ? 2 : 1);
  }

  STEEPEST_HD void fetch(int chunk) {
    if (!stores(chunk)) return;
    STEEPEST_UNROLL
    for (int i = 0; i < kVectorsPerThread; ++i) {
      const Vector* const at = place(chunk, i);
      if (at == nullptr) continue;
      ahead[2 * i] = at[0];
      if (wide()) ahead[2 * i + 1] = at[1];
    }
  }

  STEEPEST_HD Vector* staged_chunk() const { return staging.direct; }  // and on into `mirrored`

  STEEPEST_FLAT void stage(const float* sums) const {
    STEEPEST_UNROLL
    for (int h = 0; h < 2; ++h) {
      STEEPEST_UNROLL
      for (int j = 0; j < kRowVectors; ++j) {
        const int at_column = fragment_column(team.thread, j);
        Vector& to = staged_chunk()[staged_wide(fragment_row(team.thread, h), at_column / 4)];
        auto& pair = reinterpret_cast<Pair&>(to.words[at_column % 4]);
        pair = {{bits_of(sums[j * 4 + h * 2]), bits_of(sums[j * 4 + h * 2 + 1])}};
      }
    }
  }

  STEEPEST_FLAT void move(int chunk, int i, float alpha, float beta, const Vector& first, const Vector& second) const {
    Vector* const to = place(chunk, i);
    if (to == nullptr) return;
    const int r = moved_row(team.thread, i), v = 2 * moved_vector(team.thread);
    const Vector products[2] = {staged_chunk()[staged_wide(r, v)], staged_chunk()[staged_wide(r, v + 1)]};
    const auto entry = [&](int k, float weight) {
      return moved(beta, weight, alpha, float_of(products[k / 4].words[k % 4]));
    };
    Vector fresh[2];
    if (wide()) {
      STEEPEST_UNROLL
      for (int k = 0; k < kVector; ++k)
        fresh[k / 4].words[k % 4] = bits_of(entry(k, float_of((k < 4 ? first : second).words[k % 4])));
      to[0] = fresh[0], to[1] = fresh[1];
      return;
    }
    const bool bf16 = out.weights == Dtype::bf16;
    STEEPEST_UNROLL
    for (int k = 0; k < 4; ++k) {
      const auto low = static_cast<uint16_t>(first.words[k]), high = static_cast<uint16_t>(first.words[k] >> 16);
      const float a = entry(2 * k, bf16 ? from_bf16(low) : from_f16(low));
      const float b = entry(2 * k + 1, bf16 ? from_bf16(high) : from_f16(high));
      fresh[0].words[k] = (bf16 ? to_bf16(a) : to_f16(a)) | uint32_t{bf16 ? to_bf16(b) : to_f16(b)} << 16;
    }
    to[0] = fresh[0];
  }

  struct alignas(8) Pair {
    uint32_t words[2];
  };
};

}  // namespace steepest::symm_gemm
