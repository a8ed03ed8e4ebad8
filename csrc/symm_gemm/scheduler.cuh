// Which cluster of blocks works on which tile of which matrix, over which part of the sum; host and device.
//
// A problem's matrices are cut into cluster tiles; of a symmetric one only those at or below the diagonal count. Tiles
// are numbered through problem by problem and matrix by matrix. The first `whole` of them are dealt out: cluster c of C
// takes tiles c, c + C, c + 2 C, ... What is left would fill the machine badly, so its k tiles are put in one row, tile
// after tile, and cut into C equal streams, cluster c taking the c-th: a tile that is cut has parts, summed in order by
// whoever finishes last. (Stream-K, arXiv 2301.03598, with the remainder of the tiles last.) Every block of a cluster
// takes the same parts, hence the same number of k tiles: multicast needs no more than that.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/binary_search.h"
#include "common/host_device.h"

namespace steepest::symm_gemm {

// How one problem is cut.
struct Tiling {
  int32_t rows, columns;  // cluster tiles down and across; equal for a symmetric one
  int32_t tiles;          // that are computed, of one matrix
  int32_t k_tiles;        // steps of the sum
  int32_t partials;       // sums of squares left for one matrix
  bool symmetric;
};

// How the tiles of a launch are shared out. The k tiles of the streamed ones are numbered through as steps.
struct Schedule {
  int32_t whole, steps;  // tiles dealt out; steps of the rest, 0 or at least `clusters`
  int32_t clusters;      // times steps less than 2^31
};

struct TileCoord {
  int32_t row, column;  // of a cluster tile, counted in cluster tiles
};

// A tile's sum, or a part of it.
struct Work {
  int32_t problem, matrix, tile;
  int32_t k_begin, k_tiles;
  int32_t part, parts, opener;  // parts of the tile, and the cluster that has part 0; opener + i has part i
  TileCoord place;
};

// Tile rows that are walked together, column by column: eight rows and the columns in flight stay in the L2 cache,
// where row by row every tile of the other factor would be read again.
constexpr int32_t kRowsTogether = 8;

STEEPEST_HD inline float about_root(float value) {
#ifdef __CUDA_ARCH__
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(value));  // the exact one is a function call
  return root;
#else
  return sqrtf(value);
#endif
}

// Row of the index-th entry of a lower triangle that is numbered row by row.
STEEPEST_HD inline int32_t triangle_row(int32_t index) {
  int64_t row = static_cast<int64_t>((about_root(8.0f * static_cast<float>(index) + 1.0f) - 1.0f) * 0.5f);
  while (row > 0 && row * (row + 1) / 2 > index) --row;
  while ((row + 1) * (row + 2) / 2 <= index) ++row;
  return static_cast<int32_t>(row);
}

STEEPEST_HD inline TileCoord place_of(const Tiling& tiling, int32_t tile) {
  if (!tiling.symmetric) {
    const int32_t band = tile / (kRowsTogether * tiling.columns), first = band * kRowsTogether;
    const int32_t left = tiling.rows - first, height = left < kRowsTogether ? left : kRowsTogether;
    const int32_t rest = tile - first * tiling.columns;
    return {first + rest % height, rest / height};
  }
  const int32_t first = triangle_row(tile) / kRowsTogether * kRowsTogether;
  const int32_t left = tiling.rows - first, height = left < kRowsTogether ? left : kRowsTogether;
  const int32_t rest = tile - static_cast<int32_t>(int64_t{first} * (first + 1) / 2);
  if (rest < first * height) return {first + rest % height, rest / height};
  const int32_t corner = rest - first * height, row = triangle_row(corner);
  return {first + row, first + corner - row * (row + 1) / 2};
}

// The first step of a cluster's stream, and the cluster whose stream has a step. As many streams as some number of
// parts times the tiles of one problem begin where tiles do.
STEEPEST_HD inline int32_t stream_begin(const Schedule& schedule, int32_t cluster) {
  return schedule.steps * cluster / schedule.clusters;
}
STEEPEST_HD inline int32_t stream_of(const Schedule& schedule, int32_t step) {
  return ((step + 1) * schedule.clusters - 1) / schedule.steps;
}

// One cluster's way through a launch. `first_tile` and `first_step`: of each problem, among all tiles and among the
// streamed steps; first_step is 0 up to the problem that has tile `whole`.
class Walk {
 public:
  STEEPEST_HD Walk(const Schedule& schedule, int32_t cluster) : cluster_(cluster), tile_(cluster), step_(0), end_(0) {
    if (schedule.steps == 0) return;
    step_ = stream_begin(schedule, cluster), end_ = stream_begin(schedule, cluster + 1);
  }

  // tiling_of(p): of problem p. Returns false when there is no more.
  template <class TilingOf>
  STEEPEST_HD bool next(const Schedule& schedule, const int32_t* first_tile, const int32_t* first_step, int32_t count,
                        const TilingOf& tiling_of, Work& work) {
    int32_t tile;  // among the problem's
    work.part = 0, work.parts = 1, work.opener = cluster_;
    if (tile_ < schedule.whole) {
      work.problem = part_with([&](int32_t i) { return first_tile[i]; }, count, tile_);
      tile = tile_ - first_tile[work.problem];
      work.k_begin = 0, work.k_tiles = tiling_of(work.problem).k_tiles;
      tile_ += schedule.clusters;
    } else if (step_ < end_) {
      work.problem = part_with([&](int32_t i) { return first_step[i]; }, count, step_);
      const int32_t k_tiles = tiling_of(work.problem).k_tiles, at = step_ - first_step[work.problem];
      const int32_t dealt = schedule.whole - first_tile[work.problem];
      tile = at / k_tiles;
      work.k_begin = at - tile * k_tiles;
      if (dealt > 0) tile += dealt;
      const int32_t begin = step_ - work.k_begin, end = begin + k_tiles;
      work.k_tiles = (end < end_ ? end : end_) - step_;
      if (work.k_tiles < k_tiles) {
        work.opener = stream_of(schedule, begin);
        work.part = cluster_ - work.opener;
        work.parts = stream_of(schedule, end - 1) - work.opener + 1;
      }
      step_ += work.k_tiles;
    } else {
      return false;
    }
    const Tiling& tiling = tiling_of(work.problem);
    work.matrix = tile / tiling.tiles;
    work.tile = tile - work.matrix * tiling.tiles;
    work.place = place_of(tiling, work.tile);
    return true;
  }

 private:
  int32_t cluster_, tile_, step_, end_;
};

// Where a part of a cut tile waits, counted in cluster tiles: a stream opens one cut tile at most, and continues one.
STEEPEST_HD inline int32_t slot_of(int32_t opener, int32_t part) {
  return part == 0 ? 2 * opener + 1 : 2 * (opener + part);
}

}  // namespace steepest::symm_gemm
