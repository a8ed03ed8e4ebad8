// The host's half of the grouped product as a library for test_symm_gemm_plan.py: plans as JSON, what is wrong with
// one, and the arithmetic of triangles, entries and slots.
#include <cstdio>
#include <sstream>

#include "symm_gemm/update.cuh"

namespace steepest::symm_gemm {
namespace {

std::vector<Shape> read_shapes(const int64_t* at, int count) {
  std::vector<Shape> shapes;
  for (int i = 0; i < count; ++i, at += 15)
    shapes.push_back({at[0],
                      at[1],
                      at[2],
                      at[3],
                      static_cast<Majors>(at[4]),
                      at[5] != 0,
                      {at[6], at[7]},
                      {at[8], at[9]},
                      {at[10], at[11]},
                      {at[12], at[13]},
                      at[14] != 0});
  return shapes;
}

Options read_options(int capacity, int tiles, int streams) {
  return {capacity, (tiles & 1) != 0, (tiles & 2) != 0, static_cast<Streams>(streams)};
}

std::string text;
const char* answer(std::string words) { return (text = std::move(words)).c_str(); }

std::string describe(const Plan& plan) {
  std::ostringstream out;
  out << "{\"floats\":" << plan.workspace_floats << ",\"counters\":" << plan.workspace_counters << ",\"reasons\":[";
  for (size_t i = 0; i < plan.reasons.size(); ++i) out << (i ? "," : "") << '"' << plan.reasons[i] << '"';
  out << "],\"launches\":[";
  for (size_t i = 0; i < plan.launches.size(); ++i) {
    const Launch& launch = plan.launches[i];
    out << (i ? "," : "") << "{\"majors\":" << int(launch.majors) << ",\"tile\":" << int(launch.tile)
        << ",\"tiles\":" << launch.tiles << ",\"whole\":" << launch.schedule.whole
        << ",\"steps\":" << launch.schedule.steps << ",\"clusters\":" << launch.schedule.clusters
        << ",\"waves\":" << launch.waves << ",\"efficiency\":" << launch.efficiency << ",\"problems\":[";
    for (size_t j = 0; j < launch.problems.size(); ++j) {
      const PlannedProblem& p = launch.problems[j];
      out << (j ? "," : "") << "{\"index\":" << p.index << ",\"tiles\":" << p.tiling.tiles
          << ",\"k_tiles\":" << p.tiling.k_tiles << ",\"partials\":" << p.tiling.partials << "}";
    }
    out << "]}";
  }
  out << "]}";
  return out.str();
}

// Everything that a launch's clusters do, in order, cluster by cluster.
std::vector<Work> all_work(const Launch& launch) {
  std::vector<int32_t> first_tile, first_step;
  for (const PlannedProblem& p : launch.problems) {
    first_tile.push_back(p.first_tile);
    first_step.push_back(p.first_step);
  }
  const int count = static_cast<int>(launch.problems.size());
  const auto tiling_of = [&](int problem) -> const Tiling& { return launch.problems[problem].tiling; };
  std::vector<Work> all;
  for (int32_t cluster = 0; cluster < launch.schedule.clusters; ++cluster) {
    Walk walk(launch.schedule, cluster);
    for (Work work; walk.next(launch.schedule, first_tile.data(), first_step.data(), count, tiling_of, work);)
      all.push_back(work);
  }
  return all;
}

// What is wrong with a plan; empty where every k tile of every tile that counts is somebody's exactly once, longest
// sums come first, and no two parts of cut tiles share memory.
std::string fault(const std::vector<Shape>& shapes, const Plan& plan, int multiprocessors) {
  std::vector<int> times(shapes.size());
  for (const Launch& launch : plan.launches) {
    const TileShape tile = shape_of(launch.tile);
    std::vector<std::vector<std::vector<Work>>> parts;  // of each tile of each problem
    for (const PlannedProblem& p : launch.problems) {
      parts.emplace_back(shapes[p.index].batch * p.tiling.rows * p.tiling.columns);
      ++times[p.index];
      if (shapes[p.index].majors != launch.majors) return "a problem of other majors";
      const size_t at = parts.size() - 1;
      if (at > 0 && launch.problems[at - 1].tiling.k_tiles < p.tiling.k_tiles) return "order";
    }
    if (launch.schedule.clusters < 1 || launch.schedule.clusters > std::max(1, multiprocessors / tile.cluster))
      return "clusters";
    for (const Work& work : all_work(launch)) {
      const PlannedProblem& p = launch.problems.at(work.problem);
      const Tiling& tiling = p.tiling;
      const auto [row, column] = work.place;
      if (work.matrix < 0 || work.matrix >= shapes[p.index].batch || work.tile < 0 || work.tile >= tiling.tiles)
        return "no such matrix or tile";
      if (row < 0 || row >= tiling.rows || column < 0 || column >= tiling.columns) return "outside the matrix";
      if (tiling.symmetric && column > row) return "above the diagonal";
      if (work.k_tiles < 1) return "nothing to sum";
      parts[work.problem][(int64_t{work.matrix} * tiling.rows + row) * tiling.columns + column].push_back(work);
    }
    std::vector<char> slots(2 * launch.schedule.clusters), counters(launch.schedule.clusters);
    for (size_t at = 0; at < parts.size(); ++at) {
      const Tiling& tiling = launch.problems[at].tiling;
      const int64_t side = tile.columns;
      const Shape& shape = shapes[launch.problems[at].index];
      if (tiling.rows * side < shape.m || tiling.columns * side < shape.n || tiling.k_tiles * tile.depth < shape.k)
        return "tiles do not cover the matrix";
      for (size_t i = 0; i < parts[at].size(); ++i) {
        const int place = static_cast<int>(i), row = place / tiling.columns % tiling.rows;
        const int column = place % tiling.columns;
        const std::vector<Work>& of_tile = parts[at][i];  // clusters, hence parts, in order
        if (tiling.symmetric && column > row) continue;
        int32_t reached = 0, part = 0;
        for (const Work& work : of_tile) {
          if (work.k_begin != reached || work.part != part++) return "a k tile twice or never";
          reached += work.k_tiles;
          if (work.parts != static_cast<int32_t>(of_tile.size()) || work.opener != of_tile[0].opener)
            return "parts that do not know of each other";
          if (work.parts > 1 && slots.at(slot_of(work.opener, work.part))++) return "a slot twice";
        }
        if (reached != tiling.k_tiles) return "a tile not to its end";
        if (part > 1 && counters.at(of_tile[0].opener)++) return "a counter twice";
      }
    }
    if (launch.schedule.steps > 0 &&
        (plan.workspace_floats < int64_t{2} * launch.schedule.clusters * tile.cluster * tile.rows * tile.columns ||
         plan.workspace_counters < int64_t{launch.schedule.clusters} * tile.cluster * kWarpgroups))
      return "too small a workspace";
  }
  for (size_t i = 0; i < shapes.size(); ++i)
    if (times[i] != (plan.reasons[i].empty() ? 1 : 0)) return "a problem twice or never";
  return "";
}

}  // namespace

extern "C" {

const char* plan_text(const int64_t* shapes, int count, int multiprocessors, int capacity, int tiles, int streams) {
  try {
    const Options options = read_options(capacity, tiles, streams);
    return answer(describe(make_plan(read_shapes(shapes, count), multiprocessors, options)));
  } catch (const std::exception& error) {
    return answer(std::string("error: ") + error.what());
  }
}

const char* plan_fault(const int64_t* at, int count, int multiprocessors, int capacity, int tiles, int streams) {
  const Options options = read_options(capacity, tiles, streams);
  const std::vector<Shape> shapes = read_shapes(at, count);
  return answer(fault(shapes, make_plan(shapes, multiprocessors, options), multiprocessors));
}

// First index at which triangle_row is wrong, -1 if none: around the first and last entries of every row.
int64_t triangle_fault() {
  for (int64_t row = 0; row * (row + 3) / 2 < (int64_t{1} << 30); ++row)
    for (const int64_t index : {row * (row + 1) / 2, row * (row + 1) / 2 + row / 2, row * (row + 3) / 2})
      if (triangle_row(static_cast<int32_t>(index)) != row) return index;
  return -1;
}

float entry_of(float alpha, float product, float beta, float c, float gamma) {
  return entry(alpha, product, beta, c, gamma);
}

// Whether the eight 16-byte accesses of a phase touch eight different groups of four banks, for every access there is.
int conflict_free() {
  const auto spread = [](auto slot) {
    int seen = 0;
    for (int lane = 0; lane < 8; ++lane) seen |= 1 << slot(lane) % 8;
    return seen == 255;
  };
  for (int phase = 0; phase < 16; ++phase)
    for (int q = 0; q < 4; ++q) {
      if (!spread([&](int lane) { return direct_slot(phase * 8 + lane, q); })) return 0;
      if (!spread([&](int lane) { return mirrored_slot(phase * 8 + lane, q); })) return 0;
      if (!spread([&](int lane) { return staged(moved_row(phase * 8 + lane, q), moved_vector(phase * 8 + lane)); }))
        return 0;
      for (int odd = 0; odd < 2; ++odd)
        if (!spread([&](int lane) {
              return staged_wide(moved_row(phase * 8 + lane, q), 2 * moved_vector(phase * 8 + lane) + odd);
            }))
          return 0;
    }
  // Sixteen lanes write 8 bytes each: all 32 banks.
  for (int half = 0; half < 8; ++half)
    for (int h = 0; h < 2; ++h)
      for (int j = 0; j < kRowVectors; ++j) {
        uint32_t banks = 0;
        for (int thread = half * 16; thread < half * 16 + 16; ++thread) {
          const int column = fragment_column(thread, j);
          banks |= 3u << (staged_wide(fragment_row(thread, h), column / 4) % 8 * 4 + column % 4);
        }
        if (banks != 0xffffffffu) return 0;
      }
  return 1;
}
}  // extern "C"
}  // namespace steepest::symm_gemm
