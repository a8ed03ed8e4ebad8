// How a list of products becomes launches: tile, order, streams and grid. Host only, no CUDA.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "symm_gemm/params.h"
#include "symm_gemm/scheduler.cuh"

namespace steepest::symm_gemm {

enum class Tile : uint8_t { wide, small };
enum class End : uint8_t { store, update };  // of a tile: stored as D, or taken into weights

// A block's tile and the blocks of a cluster, one below the other: a cluster tile is square, so that none of its blocks
// lies wholly above the diagonal.
struct TileShape {
  int rows, columns, depth, cluster;
};
constexpr TileShape kWide{128, 256, 64, 2};
constexpr TileShape kSmall{128, 128, 64, 1};
constexpr TileShape shape_of(Tile tile) { return tile == Tile::wide ? kWide : kSmall; }
constexpr int kConsumerWarps = 8;  // of a block; each leaves one sum of squares
constexpr int kWarpgroups = 2;     // that share a block's tile, upper and lower half

struct PlannedProblem {
  int index;  // in the caller's list
  Tiling tiling;
  int32_t first_tile, first_step;  // see Walk
};

struct Launch {
  Majors majors;
  Tile tile;
  Schedule schedule;
  std::vector<PlannedProblem> problems;  // longest sums first
  int32_t tiles;                         // of clusters
  double waves;                          // tiles for each cluster that the machine could hold
  double clocks;                         // of the model: of the busiest cluster, with the wait for cut tiles
  double efficiency;  // of the model: arithmetic that is asked for over what the busiest cluster's time would hold
};

struct Plan {
  std::vector<Launch> launches;
  std::vector<std::string> reasons;  // for each problem of the list: empty where it is taken, else why not
  int64_t workspace_floats;          // at least; all launches of a plan share it; begins at a multiple of 16 bytes
  int64_t workspace_counters;        // all 0 at first, and again after every launch
};

// Why the kernel cannot take a product, empty where it can; alignments of addresses are the caller's to check.
std::string refusal(const Shape& shape);

// What a plan may choose from; by itself it goes by a model of time.
enum class Streams : uint8_t { by_model, never, always };
constexpr int kCapacity = 36;        // problems that the kernel's arguments hold
constexpr int kUpdateCapacity = 24;  // beside the addresses of weights
struct Options {
  int capacity = kCapacity;  // problems of one launch
  bool wide = true, small = true;
  Streams streams = Streams::by_model;  // always: wherever a sum is long enough
};

// For a list of products that are stored, or taken into weights.
inline Options options_of(bool updates) {
  Options options;
  if (updates) options.capacity = kUpdateCapacity;
  return options;
}

Plan make_plan(const std::vector<Shape>& shapes, int multiprocessors, const Options& options = {});

}  // namespace steepest::symm_gemm
