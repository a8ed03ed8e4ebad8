#include "symm_gemm/plan.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace steepest::symm_gemm {
namespace {

constexpr int64_t kAligned = 8;  // elements of 16 bytes: what tensor maps and vector stores step by
constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max() / 2;
constexpr int64_t kLeastSteps = 4;  // of a stream

// Clocks of a block, a model that orders the choices; not measured. A k tile takes 2 rows columns depth / 4096 clocks
// on the tensor cores at best; the small tile reads more shared memory for them.
struct Cost {
  double step, epilogue, part;  // of a k tile; of storing a tile; of moving an fp32 tile to or from the workspace
};
constexpr Cost kWideCost{1100, 7000, 4500}, kSmallCost{640, 3500, 2250};
constexpr double kWorthStreaming = 0.95, kWorthSmall = 0.97;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One tile for problems of one launch, before it is known what is streamed.
struct Candidate {
  Launch launch;
  double asked;   // clocks of one multiprocessor at its best
  double clocks;  // of the busiest cluster
  bool valid;
};

Candidate cut(const std::vector<Shape>& shapes, const std::vector<int>& some, Tile tile) {
  const TileShape shape = shape_of(tile);
  const int64_t side = shape.columns;  // of a cluster tile, either way
  Candidate candidate{{shapes[some.front()].majors, tile, {}, {}, 0, 0, 0, 0}, 0, 0, true};
  int64_t tiles = 0;
  for (int index : some) {
    const Shape& from = shapes[index];
    const int64_t rows = ceil_div(from.m, side), columns = ceil_div(from.n, side);
    const int64_t tiles_each = from.symmetric ? rows * (rows + 1) / 2 : rows * columns;
    const int64_t partials = tiles_each * shape.cluster * kConsumerWarps;
    if (partials > kMaxSize || tiles_each > kMaxSize / from.batch || tiles > kMaxSize - from.batch * tiles_each) {
      candidate.valid = false;
      return candidate;
    }
    const Tiling tiling{static_cast<int32_t>(rows),       static_cast<int32_t>(columns),
                        static_cast<int32_t>(tiles_each), static_cast<int32_t>(ceil_div(from.k, shape.depth)),
                        static_cast<int32_t>(partials),   from.symmetric};
    candidate.launch.problems.push_back({index, tiling, static_cast<int32_t>(tiles), 0});
    tiles += from.batch * tiles_each;
    const double outputs = from.symmetric ? 0.5 * from.m * (from.n + 1.0) : 1.0 * from.m * from.n;
    candidate.asked += from.batch * outputs * from.k * 2 / 4096;
  }
  candidate.launch.tiles = static_cast<int32_t>(tiles);
  return candidate;
}

// The candidate with all but `whole` tiles streamed over so many clusters.
Candidate share_out(Candidate candidate, int64_t whole, int64_t clusters, int multiprocessors) {
  Launch& launch = candidate.launch;
  const Cost& cost = launch.tile == Tile::wide ? kWideCost : kSmallCost;
  int64_t steps = 0;
  for (size_t i = 0; i < launch.problems.size(); ++i) {
    PlannedProblem& problem = launch.problems[i];
    const int64_t end = i + 1 < launch.problems.size() ? launch.problems[i + 1].first_tile : launch.tiles;
    problem.first_step = static_cast<int32_t>(steps);
    steps += std::max<int64_t>(end - std::max<int64_t>(problem.first_tile, whole), 0) * problem.tiling.k_tiles;
    candidate.valid = candidate.valid && steps <= kMaxSize;
  }
  candidate.valid =
      candidate.valid && (steps == 0 || (steps >= clusters * kLeastSteps && steps <= kMaxSize / clusters));
  if (!candidate.valid) return candidate;
  launch.schedule = {static_cast<int32_t>(whole), static_cast<int32_t>(steps), static_cast<int32_t>(clusters)};
  std::vector<int32_t> first_step, dealt;  // dealt: where a problem's tiles begin among those that are dealt out
  for (const PlannedProblem& problem : launch.problems) {
    first_step.push_back(problem.first_step);
    dealt.push_back(std::min(problem.first_tile, launch.schedule.whole));
  }
  dealt.push_back(launch.schedule.whole);
  const int32_t count = static_cast<int32_t>(first_step.size()), all = launch.schedule.clusters;
  double slowest_sum = 0;
  for (int32_t cluster = 0; cluster < all; ++cluster) {
    double clocks = 0;
    for (int32_t i = 0, before = 0; i < count; ++i) {
      const int32_t until = dealt[i + 1] <= cluster ? 0 : (dealt[i + 1] - cluster - 1) / all + 1;
      clocks += (until - before) * (launch.problems[i].tiling.k_tiles * cost.step + cost.epilogue);
      before = until;
    }
    // Streams, step by step of a tile: where each tile lies does not matter to the time.
    int32_t step = steps == 0 ? 0 : stream_begin(launch.schedule, cluster);
    const int32_t end = steps == 0 ? 0 : stream_begin(launch.schedule, cluster + 1);
    while (step < end) {
      const int32_t at = part_with([&](int32_t i) { return first_step[i]; }, count, step);
      const int32_t k_tiles = launch.problems[at].tiling.k_tiles, within = (step - first_step[at]) % k_tiles;
      const int32_t taken = std::min(k_tiles - within, end - step), tile = step - within;
      clocks += taken * cost.step;
      if (taken == k_tiles) {
        clocks += cost.epilogue;
      } else {
        clocks += cost.part;
        const int32_t opener = stream_of(launch.schedule, tile);
        const int32_t closer = stream_of(launch.schedule, tile + k_tiles - 1);
        slowest_sum = std::max(slowest_sum, (closer - opener + 1) * cost.part + cost.epilogue);
      }
      step += taken;
    }
    candidate.clocks = std::max(candidate.clocks, clocks);
  }
  candidate.clocks += slowest_sum;
  launch.clocks = candidate.clocks;
  launch.efficiency = candidate.asked / (candidate.clocks * multiprocessors);
  launch.waves = static_cast<double>(launch.tiles) / std::max(1, multiprocessors / shape_of(launch.tile).cluster);
  return candidate;
}

// The tile and the streams that the model likes best; simpler ones unless others gain enough.
Candidate choose(const std::vector<Shape>& shapes, const std::vector<int>& some, int multiprocessors,
                 const Options& options) {
  Candidate best{};
  for (const Tile tile : {Tile::wide, Tile::small}) {
    if (!(tile == Tile::wide ? options.wide : options.small)) continue;
    const Candidate plain = cut(shapes, some, tile);
    if (!plain.valid) continue;
    const int64_t tiles = plain.launch.tiles, slots = std::max(1, multiprocessors / shape_of(tile).cluster);
    Candidate of_tile = share_out(plain, tiles, std::min(tiles, slots), multiprocessors);
    double least = options.streams == Streams::never ? 0 : of_tile.clocks * kWorthStreaming;
    if (options.streams == Streams::always) least = std::numeric_limits<double>::infinity();
    const auto consider = [&](int64_t whole, int64_t clusters) {
      const Candidate candidate = share_out(plain, whole, clusters, multiprocessors);
      if (candidate.valid && candidate.clocks < least) of_tile = candidate, least = candidate.clocks;
    };
    // The last, unfilled wave, with a full one before it so that few tiles are cut into many parts; or fewer tiles than
    // clusters, each in the same number of parts or the machine full.
    const int64_t filled = tiles / slots * slots;
    if (filled < tiles) consider(filled, slots);
    if (filled > 0 && filled < tiles) consider(filled - slots, slots);
    for (int64_t parts = 2; tiles * parts < slots; ++parts) consider(0, tiles * parts);
    if (!best.valid || of_tile.clocks < best.clocks * kWorthSmall) best = of_tile;
  }
  return best;
}

}  // namespace

std::string refusal(const Shape& shape) {
  const auto text = [](int64_t value) { return std::to_string(value); };
  const auto sizes = [&] {
    return "batch " + text(shape.batch) + ", m " + text(shape.m) + ", n " + text(shape.n) + ", k " + text(shape.k);
  };
  for (const int64_t size : {shape.batch, shape.m, shape.n, shape.k})
    if (size < 1 || size > kMaxSize) return sizes() + "; every one is from 1 to " + text(kMaxSize);
  if (shape.symmetric && shape.m != shape.n) return "a symmetric product has m = n, got " + sizes();
  if (shape.n % kAligned != 0) return "n is " + text(shape.n) + "; a multiple of " + text(kAligned) + " is accepted";
  struct Named {
    const char* name;
    Strides strides;
    int64_t rows, columns;  // in memory
    bool written;
  };
  const bool a_by_rows = shape.majors != Majors::mnmn, b_by_rows = shape.majors != Majors::kk;
  const Named all[] = {
      {"A", shape.a, a_by_rows ? shape.m : shape.k, a_by_rows ? shape.k : shape.m, false},
      {"B", shape.b, b_by_rows ? shape.k : shape.n, b_by_rows ? shape.n : shape.k, false},
      {"C", shape.c, shape.m, shape.n, false},
      {"D", shape.d, shape.m, shape.n, true},
  };
  for (const auto& [name, strides, rows, columns, written] : all) {
    if (name[0] == 'C' && !shape.has_c) continue;
    const std::string of = std::string(name) + " has strides " + text(strides.matrix) + " and " + text(strides.row);
    if (strides.row % kAligned != 0 || (shape.batch > 1 && strides.matrix % kAligned != 0))
      return of + " elements; multiples of " + text(kAligned) + " (16 bytes) are accepted";
    constexpr int64_t kMaxStride = int64_t{1} << 38;  // elements; a tensor map has 40 bits for bytes
    if (strides.row < columns || strides.row > kMaxStride || strides.matrix < 0 || strides.matrix > kMaxStride)
      return of + " elements for " + text(rows) + " rows of " + text(columns);
    if (!written && name[0] != 'C' && shape.batch > 1 && strides.matrix == 0)
      return of + " elements; a batch of one matrix is a copy or a batch of 1";
    if (written && shape.batch > 1 && strides.matrix < (rows - 1) * strides.row + columns)
      return of + " elements; its matrices overlap";
  }
  return "";
}

Plan make_plan(const std::vector<Shape>& shapes, int multiprocessors, const Options& options) {
  const int capacity = options.capacity;
  if (multiprocessors < 1 || capacity < 1)
    throw std::invalid_argument("multiprocessors and capacity must be at least 1, got " +
                                std::to_string(multiprocessors) + " and " + std::to_string(capacity));
  if (!options.wide && !options.small) throw std::invalid_argument("a plan needs one of the tiles");
  Plan plan{};
  for (const Shape& shape : shapes) plan.reasons.push_back(refusal(shape));
  std::vector<int> order(shapes.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return shapes[a].k > shapes[b].k; });
  for (const Majors majors : {Majors::kk, Majors::mnmn, Majors::kmn}) {
    std::vector<int> taken;
    for (int index : order)
      if (plan.reasons[index].empty() && shapes[index].majors == majors) taken.push_back(index);
    for (size_t begin = 0; begin < taken.size(); begin += capacity) {
      const auto first = taken.begin() + begin;
      std::vector<int> some(first, first + std::min<size_t>(capacity, taken.size() - begin));
      const Candidate best = choose(shapes, some, multiprocessors, options);
      if (!best.valid) {
        for (int index : some) plan.reasons[index] = "the list has more tiles than a launch can number";
        continue;
      }
      if (best.launch.schedule.steps > 0) {
        const TileShape shape = shape_of(best.launch.tile);
        const int64_t blocks = int64_t{best.launch.schedule.clusters} * shape.cluster;
        plan.workspace_floats = std::max(plan.workspace_floats, 2 * blocks * shape.rows * shape.columns);
        plan.workspace_counters = std::max(plan.workspace_counters, blocks * kWarpgroups);
      }
      plan.launches.push_back(best.launch);
    }
  }
  return plan;
}

}  // namespace steepest::symm_gemm
