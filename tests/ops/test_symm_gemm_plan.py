"""The grouped product of sm_90 without a GPU: its plan, the scheduler's arithmetic, and its epilogue on this CPU.

The epilogue is csrc/symm_gemm/epilogue.cuh as the device runs it, with fibers for a warpgroup's threads; the sums that
tensor cores would leave are computed here. Loads, tensor cores and barriers between blocks are for a GPU.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "g++")

KK, MNMN, KMN = range(3)  # Majors
WIDE, SMALL = range(2)  # Tile
BY_MODEL, NEVER, ALWAYS = range(3)  # Streams

HOST = r"""
#include <cuda_runtime.h>

#include "symm_gemm/update.cuh"

#include <cstdio>
#include <sstream>

namespace steepest::symm_gemm {
namespace {

std::vector<Shape> read_shapes(const int64_t* at, int count) {
  std::vector<Shape> shapes;
  for (int i = 0; i < count; ++i, at += 15)
    shapes.push_back({at[0], at[1], at[2], at[3], static_cast<Majors>(at[4]), at[5] != 0, {at[6], at[7]},
                      {at[8], at[9]}, {at[10], at[11]}, {at[12], at[13]}, at[14] != 0});
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

// A warpgroup whose threads are fibers.
struct Fibers {
  int warpgroup, thread;
  Dtype dtype;

  static inline uint32_t shown[128][4];
  static inline const void* rows[128];

  void sync(int line = __builtin_LINE()) const { emulation::wait(emulation::of_block[0], emulation::count, line); }
  void meet(int line) const { emulation::wait(emulation::of_warp[thread / 32], 32, line); }
  uint32_t pack(float first, float second) const {
    return dtype == Dtype::f16 ? to_f16(first) | uint32_t{to_f16(second)} << 16
                               : to_bf16(first) | uint32_t{to_bf16(second)} << 16;
  }
  void unpack(uint32_t word, float& first, float& second) const {
    const auto low = static_cast<uint16_t>(word), high = static_cast<uint16_t>(word >> 16);
    first = dtype == Dtype::f16 ? from_f16(low) : from_bf16(low);
    second = dtype == Dtype::f16 ? from_f16(high) : from_bf16(high);
  }
  // Lane l gives the address of row l % 8 of matrix l / 8, and holds word l % 4 of row l / 4 of all four.
  void load_matrices(const Vector& row, uint32_t (&words)[4], int line = __builtin_LINE()) const {
    const int warp = thread / 32 * 32, lane = thread % 32;
    rows[thread] = &row;
    meet(line);
    for (int i = 0; i < 4; ++i)
      words[i] = static_cast<const Vector*>(rows[warp + i * 8 + lane / 4])->words[lane % 4];
    meet(-line);
  }
  void store_matrices(const uint32_t (&words)[4], Vector& row, int line = __builtin_LINE()) const {
    const int warp = thread / 32 * 32, lane = thread % 32;
    std::copy(words, words + 4, shown[thread]);
    meet(line);
    for (int i = 0; i < 4; ++i) row.words[i] = shown[warp + lane % 8 * 4 + i][lane / 8];
    meet(-line);
  }
  // Lane l gives the address of column l % 8 of matrix l / 8.
  void store_transposed(const uint32_t (&words)[4], Vector& row, int line = __builtin_LINE()) const {
    const int warp = thread / 32 * 32, lane = thread % 32, column = lane % 8;
    std::copy(words, words + 4, shown[thread]);
    meet(line);
    const auto entry = [&](int r) {
      return shown[warp + r * 4 + column / 2][lane / 8] >> (column % 2 * 16) & 0xffff;
    };
    for (int i = 0; i < 4; ++i) row.words[i] = entry(2 * i) | entry(2 * i + 1) << 16;
    meet(-line);
  }
  float add_lanes(float value, int line = __builtin_LINE()) const {
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      shown[thread][0] = bits_of(value);
      meet(line);
      value += float_of(shown[thread ^ lanes][0]);
      meet(-line);
    }
    return value;
  }
  float add_row(float value, int line = __builtin_LINE()) const {
    for (int lanes = 4; lanes > 0; lanes /= 2) {
      shown[thread][0] = bits_of(value);
      meet(line);
      value += float_of(shown[thread ^ lanes][0]);
      meet(-line);
    }
    return value;
  }
  void publish() const {}
  void acquire() const {}
  uint32_t count(uint32_t* counter) const { return (*counter)++; }
  Vector load_shared(const float* at) const { return *reinterpret_cast<const Vector*>(at); }
  void store_shared(float* at, const Vector& value) const { *reinterpret_cast<Vector*>(at) = value; }
};

struct Run {
  const Problem* problem;
  const float *a, *b;  // as numbers, where the problem has them
  const Output* output;
  Work work;
  Workspace workspace;
  Dtype dtype;
  int rank, warpgroup;
};

template <Tile kTile, End kEnd>
void warpgroup_of(Run run) {
  using Store = std::conditional_t<kEnd == End::update, UpdateStore<Fibers, kTile>, TileStore<Fibers, kTile>>;
  static Staging staging;
  const Shape& shape = run.problem->shape;
  const Fibers team{run.warpgroup, static_cast<int>(threadIdx.x), run.dtype};
  if (team.thread == 0) std::memset(&staging, 0xff, sizeof staging);
  team.sync();
  Store store(*run.output, run.work, run.rank, team, staging);
  if constexpr (kEnd == End::update) store.weights = run.problem->update.weights[run.work.matrix];
  store.begin();
  const float *a = run.a + run.work.matrix * shape.a.matrix, *b = run.b + run.work.matrix * shape.b.matrix;
  const int64_t depth = shape_of(kTile).depth, begin = run.work.k_begin * depth;
  const int64_t end = std::min(shape.k, begin + run.work.k_tiles * depth);
  int64_t a_own = shape.a.row, a_k = 1, b_own = 1, b_k = shape.b.row;
  if (shape.majors == Majors::mnmn) std::swap(a_own, a_k);
  if (shape.majors == Majors::kk) std::swap(b_own, b_k);
  float sums[Store::kSums];
  for (int sum = 0; sum < Store::kSums; ++sum) {
    const int64_t row = store.row + fragment_row(team.thread, sum / 2 % 2);
    const int64_t column = store.column + fragment_column(team.thread, sum / 4) + sum % 2;
    sums[sum] = 0;
    if (row >= shape.m || column >= shape.n) continue;  // the loads fill in zeros
    for (int64_t k = begin; k < end; ++k)
      sums[sum] += a[row * a_own + k * a_k] * b[column * b_own + k * b_k];
  }
  store.finish(sums, run.workspace);
}

std::vector<float> numbers(const void* at, const Strides& strides, int64_t batch, int64_t rows, Dtype dtype) {
  std::vector<float> values((batch - 1) * strides.matrix + rows * strides.row);
  const auto* words = static_cast<const uint16_t*>(at);
  for (size_t i = 0; i < values.size(); ++i) values[i] = dtype == Dtype::f16 ? from_f16(words[i]) : from_bf16(words[i]);
  return values;
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
      if (!spread([&](int lane) {
            return staged(moved_row(phase * 8 + lane, q), moved_vector(phase * 8 + lane));
          }))
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

// Runs one problem's plan, warpgroups in the order of `seed`. pointers: the arrays of alpha, beta and gamma, A, B, C,
// D, partials, diagonal, row sums, the workspace's two; for an update the array of eta and then every matrix of
// weights, of type `weights`, which is -1 where there is none. Returns the most parts that a tile has, or an error.
const char* run_epilogue(const int64_t* at, int multiprocessors, int tiles, int streams, int dtype,
                         void* const* pointers, int weights, int seed, int order) {
  Problem problem{};
  problem.shape = read_shapes(at, 1)[0];
  const auto scalar = [&](int i) { return Scalar{static_cast<const float*>(pointers[i]), 1, 0}; };
  problem.alpha = scalar(0), problem.beta = scalar(1), problem.gamma = scalar(2);
  problem.a = pointers[3], problem.b = pointers[4], problem.c = pointers[5], problem.d = pointers[6];
  problem.partials = static_cast<float*>(pointers[7]), problem.diagonal = static_cast<float*>(pointers[8]);
  problem.row_sums = static_cast<float*>(pointers[9]);
  const Workspace workspace{static_cast<float*>(pointers[10]), static_cast<uint32_t*>(pointers[11])};
  if (weights >= 0) problem.update = {pointers + 13, static_cast<steepest::Dtype>(weights), scalar(12)};
  emulation::order = static_cast<emulation::Order>(order);
  try {
    const Plan plan = make_plan({problem.shape}, multiprocessors, read_options(1, tiles, streams));
    if (plan.launches.size() != 1) return answer("not taken: " + plan.reasons[0]);
    const Launch& launch = plan.launches[0];
    const Output output = output_of(problem, launch.problems[0]);
    const Shape& shape = problem.shape;
    const auto type = static_cast<Dtype>(dtype);
    const int64_t a_rows = shape.majors == Majors::mnmn ? shape.k : shape.m;
    const int64_t b_rows = shape.majors == Majors::kk ? shape.n : shape.k;
    const std::vector<float> a = numbers(problem.a, shape.a, shape.batch, a_rows, type);
    const std::vector<float> b = numbers(problem.b, shape.b, shape.batch, b_rows, type);
    std::vector<Run> runs;
    int parts = 0;
    for (const Work& work : all_work(launch)) {
      parts = std::max(parts, work.parts);
      for (int rank = 0; rank < shape_of(launch.tile).cluster; ++rank)
        for (int warpgroup = 0; warpgroup < kWarpgroups; ++warpgroup)
          runs.push_back({&problem, a.data(), b.data(), &output, work, workspace, type, rank, warpgroup});
    }
    std::mt19937 random(seed);
    if (seed != 0) std::shuffle(runs.begin(), runs.end(), random);
    const auto store = launch.tile == Tile::wide ? warpgroup_of<Tile::wide, End::store>
                                                 : warpgroup_of<Tile::small, End::store>;
    const auto update = launch.tile == Tile::wide ? warpgroup_of<Tile::wide, End::update>
                                                  : warpgroup_of<Tile::small, End::update>;
    for (const Run& run : runs) emulation::launch(weights >= 0 ? update : store, 1, 128, run);
    return answer(std::to_string(parts));
  } catch (const std::exception& error) {
    return answer(std::string("error: ") + error.what());
  }
}
}  // extern "C"
}  // namespace steepest::symm_gemm
"""


@dataclass(frozen=True)
class Shape:
    """As params.h has it; where no strides are given, rows in memory begin at multiples of 8 elements."""

    batch: int
    m: int
    n: int
    k: int
    majors: int = KK
    symmetric: bool = True
    a: tuple[int, int] | None = None
    b: tuple[int, int] | None = None
    c: tuple[int, int] | None = None
    d: tuple[int, int] | None = None
    has_c: bool = False

    def memory(self) -> dict[str, tuple[int, int]]:
        """Rows and columns in memory of each matrix."""
        a = (self.k, self.m) if self.majors == MNMN else (self.m, self.k)
        b = (self.n, self.k) if self.majors == KK else (self.k, self.n)
        return {"a": a, "b": b, "c": (self.m, self.n), "d": (self.m, self.n)}

    def strides(self, name: str) -> tuple[int, int]:
        rows, columns = self.memory()[name]
        given: tuple[int, int] | None = getattr(self, name)
        row = -(-columns // 8) * 8
        return given if given is not None else (row, rows * row)

    def numbers(self) -> list[int]:
        strides = [each for name in "abcd" for each in self.strides(name)]
        return [*map(int, astuple(self)[:6]), *strides, int(self.has_c)]


def pack(shapes: list[Shape]) -> Any:
    numbers = [number for shape in shapes for number in shape.numbers()]
    return (ctypes.c_int64 * len(numbers))(*numbers)


@dataclass(frozen=True)
class Options:
    capacity: int = 36
    tiles: int = 3
    streams: int = 0


FREE = Options()


class Host:
    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        for name in ("plan_text", "plan_fault", "run_epilogue"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.library.triangle_fault.restype = ctypes.c_int64
        self.library.entry_of.restype = ctypes.c_float
        self.library.entry_of.argtypes = [ctypes.c_float] * 5

    def plan(self, shapes: list[Shape], multiprocessors: int = 132, options: Options = FREE) -> dict[str, Any]:
        numbers = astuple(options)
        text = self.library.plan_text(pack(shapes), len(shapes), multiprocessors, *numbers).decode()
        assert not text.startswith("error"), text
        found: dict[str, Any] = json.loads(text)
        return found

    def fault(self, shapes: list[Shape], multiprocessors: int = 132, options: Options = FREE) -> str:
        numbers = astuple(options)
        return str(self.library.plan_fault(pack(shapes), len(shapes), multiprocessors, *numbers).decode())


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    if sys.platform != "linux":
        pytest.skip(f"fibers are those of Linux, not of {sys.platform}")
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler: {COMPILER} is not on PATH")
    folder = tmp_path_factory.mktemp("symm_gemm")
    (folder / "host.cpp").write_text(HOST)
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-ffp-contract=off"]
    # _FORTIFY_SOURCE takes a jump to another fiber's stack for an attack.
    flags += ["-U_FORTIFY_SOURCE", "-I", "tests/emulation", "-I", "csrc"]
    sources = [str(folder / "host.cpp"), "csrc/symm_gemm/plan.cpp"]
    built = subprocess.run(
        [COMPILER, *flags, *sources, "-o", str(folder / "host.so")], cwd=ROOT, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return Host(folder / "host.so")


# ---- plan ----------------------------------------------------------------------------------------------------------


def random_shape(rng: random.Random) -> Shape:
    symmetric = rng.random() < 0.6
    m = rng.choice([rng.randrange(1, 40), rng.randrange(1, 300)]) * 8
    n = m if symmetric else rng.randrange(1, 300) * 8
    k = rng.choice([rng.randrange(1, 80), rng.randrange(1, 3200), rng.randrange(1, 40) * 512])
    return Shape(rng.choice([1, 1, 2, rng.randrange(1, 20)]), m, n, k, rng.randrange(3), symmetric)


@pytest.mark.parametrize("seed", range(8))
def test_every_k_tile_of_every_tile_once(seed: int, host: Host) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        shapes = [random_shape(rng) for _ in range(rng.choice([1, 2, rng.randrange(1, 40)]))]
        options = Options(rng.choice([1, 5, 36]), rng.choice([1, 2, 3]), rng.randrange(3))
        multiprocessors = rng.choice([1, 2, 3, 78, 114, 132])
        assert host.fault(shapes, multiprocessors, options) == "", (shapes, multiprocessors, options)


def test_long_triangles(host: Host) -> None:
    """The root that finds a tile's row is exact where fp32 is not."""
    assert host.library.triangle_fault() == -1
    assert host.fault([Shape(1, 65536, 65536, 64)]) == ""


def test_large_lists_become_several_launches(host: Host) -> None:
    shapes = [Shape(2, 512, 512, 64 * (1 + i % 7), i % 3) for i in range(250)]
    plan = host.plan(shapes)
    assert [launch["majors"] for launch in plan["launches"]] == [KK] * 3 + [MNMN] * 3 + [KMN] * 3
    taken = sorted(problem["index"] for launch in plan["launches"] for problem in launch["problems"])
    assert taken == list(range(250))
    for launch in plan["launches"]:
        steps = [problem["k_tiles"] for problem in launch["problems"]]
        assert steps == sorted(steps, reverse=True)
        assert len(steps) <= 36


@pytest.mark.parametrize(
    "shape,streams",
    [
        (Shape(1, 1024, 1024, 4096), True),  # 10 cluster tiles for 66 clusters
        (Shape(1, 2048, 2048, 8192), True),  # 36
        (Shape(1, 4096, 4096, 4096), True),  # 136
        (Shape(1, 1024, 1024, 128), False),  # nothing to cut
        (Shape(1, 16384, 16384, 4096), False),  # the last of 32 waves
        (Shape(216, 2048, 7168, 2048, KMN, symmetric=False), False),
    ],
)
def test_streams_where_multiprocessors_would_idle(shape: Shape, streams: bool, host: Host) -> None:
    plan = host.plan([shape])
    (launch,) = plan["launches"]
    assert (launch["steps"] > 0) == (launch["whole"] < launch["tiles"]) == streams
    assert (plan["floats"] > 0) == (plan["counters"] > 0) == streams
    assert 0 < launch["efficiency"] <= 1
    assert launch["clusters"] <= (66 if launch["tile"] == WIDE else 132)


def test_small_matrices_take_the_small_tile(host: Host) -> None:
    assert host.plan([Shape(500, 128, 128, 512)])["launches"][0]["tile"] == SMALL
    assert host.plan([Shape(24, 1024, 1024, 4096)])["launches"][0]["tile"] == WIDE


def test_empty_list(host: Host) -> None:
    assert host.plan([]) == {"floats": 0, "counters": 0, "reasons": [], "launches": []}


@pytest.mark.parametrize(
    "shape,reason",
    [
        (Shape(1, 64, 72, 64), "a symmetric product has m = n"),
        (Shape(1, 64, 64, 0), "k 0; every one is from 1 to 1073741823"),
        (Shape(0, 64, 64, 8), "batch 0, m 64"),
        (Shape(1, 68, 68, 64), "n is 68; a multiple of 8 is accepted"),
        (Shape(1, 64, 64, 60, a=(60, 3840)), "A has strides 3840 and 60 elements; multiples of 8 (16 bytes)"),
        (Shape(2, 64, 64, 64, b=(64, 4100)), "B has strides 4100 and 64 elements; multiples of 8 (16 bytes)"),
        (Shape(1, 64, 64, 64, MNMN, a=(56, 4096)), "A has strides 4096 and 56 elements for 64 rows of 64"),
        (Shape(2, 64, 64, 64, d=(64, 64)), "D has strides 64 and 64 elements; its matrices overlap"),
        (Shape(2, 64, 64, 64, a=(64, 0)), "A has strides 0 and 64 elements; a batch of one matrix"),
        (Shape(1, 64, 64, 64, has_c=True, c=(12, 64)), "C has strides"),
    ],
)
def test_refusals_say_why(shape: Shape, reason: str, host: Host) -> None:
    plan = host.plan([Shape(1, 64, 64, 64), shape])
    assert plan["reasons"][0] == ""
    assert reason in plan["reasons"][1]
    assert [problem["index"] for problem in plan["launches"][0]["problems"]] == [0]


def test_odd_k_and_single_matrices_need_no_more_than_rows(host: Host) -> None:
    shapes = [
        Shape(3, 64, 64, 61, has_c=True),
        Shape(1, 64, 64, 64, a=(64, 1), b=(64, 0), d=(64, 3)),
        Shape(1, 61, 64, 24, KMN, symmetric=False),
        Shape(4, 64, 64, 64, a=(256, 64), c=(64, 0), has_c=True),
    ]
    assert host.plan(shapes)["reasons"] == [""] * 4


# ---- epilogue ------------------------------------------------------------------------------------------------------


def test_entry(host: Host) -> None:
    entry = host.library.entry_of
    assert entry(2, 3, 0.5, 8, 1) == 11
    assert entry(1, 1 + 2**-23, 1, -1, 0) == 2**-23


def test_shared_memory_without_conflicts(host: Host) -> None:
    assert host.library.conflict_free() == 1


DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


class Case:
    """One problem on guarded memory: what nobody may write is NaN before and after."""

    def __init__(self, shape: Shape, dtype: str, seed: int, in_place: bool, tallies: bool) -> None:
        self.shape, self.dtype = shape, DTYPES[dtype]
        generator = torch.Generator().manual_seed(seed)

        def draw(name: str) -> tuple[Tensor, Tensor]:
            rows, columns = shape.memory()[name]
            row, matrix = shape.strides(name)
            length = 64 + (shape.batch - 1) * matrix + (rows - 1) * row + columns + 64
            room = torch.full((length,), float("nan"), dtype=self.dtype)
            inside = room.as_strided((shape.batch, rows, columns), (matrix, row, 1), 64)
            return room, inside.copy_(torch.randn(inside.shape, generator=generator))

        self.rooms = {name: draw(name) for name in "abcd"}
        a, b = self.rooms["a"][1], self.rooms["b"][1]
        self.A = a.mT if shape.majors == MNMN else a
        if shape.symmetric:  # A B is a Gram product
            b.copy_(self.A if shape.majors == KK else self.A.mT)
        self.B = b.mT if shape.majors == KK else b
        self.D = self.rooms["d"][1]
        self.C = self.D if in_place else self.rooms["c"][1]
        if shape.symmetric:
            self.C.copy_(self.C.tril() + self.C.tril(-1).mT)
        self.before = self.C.double().clone()
        if shape.symmetric:  # above the diagonal nobody looks
            self.C.masked_fill_(torch.ones(self.C.shape[1:], dtype=torch.bool).triu(1), float("nan"))
        if not in_place:
            self.D.fill_(float("nan"))
        self.outside = torch.ones_like(self.rooms["d"][0], dtype=torch.bool)
        self.outside.as_strided(self.D.shape, self.D.stride(), 64).fill_(False)
        self.scalars = [torch.randn(shape.batch, generator=generator) for _ in range(3)]
        self.tallies = tallies

    def run(self, host: Host, tile: int, multiprocessors: int, streams: int, order: int) -> int:
        """On D, warpgroups and threads in this order; the most parts that a sum was cut into."""
        shape, options = self.shape, Options(1, 1 << tile, streams)
        plan = host.plan([shape], multiprocessors, options)
        (problem,) = plan["launches"][0]["problems"]
        self.partials = torch.full((shape.batch, problem["partials"]), float("nan"))
        self.diagonal = torch.full((shape.batch, shape.m), float("nan"))
        self.row_sums = torch.full((shape.batch, -(-shape.n // 64), shape.m), float("nan"))
        workspace = torch.full((plan["floats"] + 4,), float("nan"))
        counters = torch.zeros(plan["counters"] + 1, dtype=torch.int32)
        tensors: list[Tensor | None] = [*self.scalars, *(self.rooms[name][1] for name in "ab")]
        tensors += [self.C if shape.has_c else None, self.D]
        tensors += [self.partials, self.diagonal, self.row_sums] if self.tallies else [None] * 3
        tensors += [workspace[-workspace.data_ptr() // 4 % 4 :], counters]
        pointers = [None if each is None else each.data_ptr() for each in tensors]
        answer = host.library.run_epilogue(
            pack([shape]),
            multiprocessors,
            options.tiles,
            options.streams,
            list(DTYPES.values()).index(self.dtype),
            (ctypes.c_void_p * len(pointers))(*pointers),
            -1,
            order,  # seeds the order of warpgroups; 0: as they come
            order,
        ).decode()
        assert answer.isdigit(), answer
        assert (counters == 0).all(), "the next launch counts from there"
        return int(answer)

    def check(self) -> None:
        shape = self.shape
        alpha, beta, gamma = (each.double()[:, None, None] for each in self.scalars)
        product = self.A.double() @ self.B.double()
        exact = alpha * product + gamma * torch.eye(shape.m, shape.n, dtype=torch.float64)
        size = alpha.abs() * (self.A.double().abs() @ self.B.double().abs()) + gamma.abs()
        if shape.has_c:
            exact, size = exact + beta * self.before, size + (beta * self.before).abs()
        # One rounding of D, and fp32 for the sums.
        bound = exact.abs() * torch.finfo(self.dtype).eps * 0.5 + size * shape.k**0.5 * 2**-23 + 1e-7
        assert ((self.D.double() - exact).abs() <= bound).all()
        assert self.rooms["d"][0][self.outside].isnan().all(), "written beside D"
        if shape.symmetric:
            assert torch.equal(self.D, self.D.mT), "symmetric to the bit"
        if self.tallies:
            diagonal = exact.diagonal(dim1=-2, dim2=-1)
            length = diagonal.shape[-1]
            torch.testing.assert_close(self.diagonal[:, :length].double(), diagonal, rtol=1e-5, atol=1e-3)
            off = exact.square().sum((-2, -1)) - diagonal.square().sum(-1)
            torch.testing.assert_close(self.partials.double().sum(-1), off, rtol=1e-5, atol=1e-6)
            blocks = torch.nn.functional.pad(self.D.double().abs(), (0, -shape.n % 64)).unflatten(-1, (-1, 64))
            torch.testing.assert_close(self.row_sums.double(), blocks.sum(-1).mT, rtol=1e-6, atol=0)


CASES = {
    "one tile": Shape(1, 128, 128, 16),
    "less than a chunk": Shape(2, 40, 40, 24, MNMN, has_c=True),
    "ragged": Shape(2, 328, 328, 40, KK, has_c=True),
    "padded": Shape(2, 136, 136, 24, KMN, c=(144, 20000), d=(152, 21000), has_c=True),
    "three rows of tiles": Shape(1, 712, 712, 16, KK, has_c=True),
    "tall": Shape(1, 403, 72, 33, KK, symmetric=False, has_c=True),
    "flat": Shape(2, 72, 520, 33, KMN, symmetric=False),
    "many": Shape(3, 393, 512, 20, KMN, symmetric=False, has_c=True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [WIDE, SMALL], ids=["wide", "small"])
@pytest.mark.parametrize("case", CASES)
def test_epilogue(case: str, tile: int, dtype: str, host: Host) -> None:
    run = Case(CASES[case], dtype, seed=1, in_place=False, tallies=True)
    assert run.run(host, tile, 132, NEVER, order=2) == 1
    run.check()


@pytest.mark.parametrize("tile", [WIDE, SMALL], ids=["wide", "small"])
@pytest.mark.parametrize("case", [case for case, shape in CASES.items() if shape.has_c])
def test_epilogue_in_place(case: str, tile: int, host: Host) -> None:
    shape = replace(CASES[case], c=CASES[case].d)
    run = Case(shape, "f16", seed=2, in_place=True, tallies=False)
    assert run.run(host, tile, 132, NEVER, order=1) == 1
    run.check()


#: Products whose tiles are cut, the multiprocessors, and the most parts of a tile.
CUT = {
    "fewer tiles than clusters": (Shape(1, 200, 200, 1500, KK, has_c=True), SMALL, 16, 3),
    "streams within a tile": (Shape(1, 64, 64, 3000, MNMN), SMALL, 5, 4),
    "a wave and a half": (Shape(2, 328, 328, 1100, MNMN, has_c=True), SMALL, 5, 2),
    "wide": (Shape(1, 512, 512, 1024, KK), WIDE, 4, 2),
    "not symmetric": (Shape(1, 300, 136, 1000, KMN, symmetric=False, has_c=True), SMALL, 4, 2),
}


@pytest.mark.parametrize("case", CUT)
def test_cut_tiles_do_not_depend_on_who_is_last(case: str, host: Host) -> None:
    shape, tile, multiprocessors, parts = CUT[case]
    found = []
    for order in (0, 1, 2):
        run = Case(shape, "f16", seed=3, in_place=False, tallies=True)
        assert run.run(host, tile, multiprocessors, ALWAYS, order) == parts
        run.check()
        found.append((run.D.clone(), run.partials, run.diagonal, run.row_sums))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_c_does_not_count_where_beta_is_zero(beta: float, host: Host) -> None:
    run = Case(Shape(1, 64, 64, 16, has_c=True), "bf16", seed=4, in_place=False, tallies=False)
    run.scalars[1].fill_(beta)
    run.C.fill_(float("nan"))
    run.run(host, SMALL, 132, NEVER, order=0)
    assert bool(run.D.isnan().all()) == (beta != 0)
    assert bool(run.D.isnan().any()) == (beta != 0)


# ---- updates -------------------------------------------------------------------------------------------------------

WEIGHTS = {"f32": (torch.float32, 0), "bf16": (torch.bfloat16, 1), "f16": (torch.float16, 2)}  # steepest::Dtype
UPDATES = {
    "ragged": Shape(2, 403, 72, 33, KK, symmetric=False),
    "tiles across": Shape(2, 72, 520, 40, KMN, symmetric=False),
    "padded": Shape(3, 130, 136, 64, KMN, symmetric=False, d=(152, 152 * 130)),
    "cut": Shape(1, 300, 136, 1000, KMN, symmetric=False),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("tile", [WIDE, SMALL], ids=["wide", "small"])
@pytest.mark.parametrize("case", UPDATES)
def test_update(case: str, tile: int, weights: str, host: Host) -> None:
    """W <- beta W + alpha eta A B in place, each W in memory of its own; nothing beside it is written."""
    shape, (dtype, number) = UPDATES[case], WEIGHTS[weights]
    run = Case(shape, "bf16", seed=5, in_place=False, tallies=False)
    row, _ = shape.strides("d")
    rooms = [torch.full((64 + shape.m * row + 64,), float("nan"), dtype=dtype) for _ in range(shape.batch)]
    inside = [room.as_strided((shape.m, shape.n), (row, 1), 64) for room in rooms]
    generator = torch.Generator().manual_seed(6)
    for w in inside:
        w.copy_(torch.randn(w.shape, generator=generator))
    before = torch.stack(inside).double()
    eta = torch.randn(shape.batch, generator=generator)
    eta[-1] = 0 if shape.batch > 1 else eta[-1]
    alpha, beta = run.scalars[:2]
    if shape.batch > 1:  # not taken, whatever the product is
        run.rooms["a"][1][-1] = float("nan")
        beta[-1] = 1
    options = Options(1, 1 << tile, ALWAYS if case == "cut" else NEVER)
    multiprocessors = (8 if tile == WIDE else 4) if case == "cut" else 132
    plan = host.plan([shape], multiprocessors, options)
    workspace = torch.full((plan["floats"] + 4,), float("nan"))
    counters = torch.zeros(plan["counters"] + 1, dtype=torch.int32)
    tensors: list[Tensor | None] = [*run.scalars, run.rooms["a"][1], run.rooms["b"][1], None, None, None, None, None]
    tensors += [workspace[-workspace.data_ptr() // 4 % 4 :], counters, eta, *inside]
    pointers = [None if each is None else each.data_ptr() for each in tensors]
    packed = (ctypes.c_void_p * len(pointers))(*pointers)
    answer = host.library.run_epilogue(
        pack([shape]), multiprocessors, options.tiles, options.streams, 1, packed, number, 2, 2
    ).decode()
    assert answer.isdigit(), answer
    assert int(answer) == (2 if case == "cut" else 1)
    found = torch.stack(inside)
    if shape.batch > 1:
        assert torch.equal(found[-1].double(), before[-1])
    taken = slice(0, max(1, shape.batch - 1))
    factor = (alpha * eta).double()[taken, None, None]
    product = run.A.double()[taken] @ run.B.double()[taken]
    size = factor.abs() * (run.A.double()[taken].abs() @ run.B.double()[taken].abs()) + before[taken].abs()
    exact = beta.double()[taken, None, None] * before[taken] + factor * product
    bound = exact.abs() * torch.finfo(dtype).eps * 0.5 + size * shape.k**0.5 * 2**-22 + 1e-7
    assert ((found[taken].double() - exact).abs() <= bound).all()
    outside = torch.ones_like(rooms[0], dtype=torch.bool)
    outside.as_strided((shape.m, shape.n), (row, 1), 64).fill_(False)
    assert all(bool(room[outside].isnan().all()) for room in rooms), "written beside the weights"
