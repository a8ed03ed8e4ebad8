"""The grouped product of sm_90 on the host: its plan, the scheduler's arithmetic, slots of shared memory.

tests/kernels/ptx runs the kernels themselves.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import subprocess
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pytest

from ptx.products import KK, KMN, MNMN, Shape

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "g++")

WIDE, SMALL = range(2)  # Tile
BY_MODEL, NEVER, ALWAYS = range(3)  # Streams

HOST = r"""
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
}  // extern "C"
}  // namespace steepest::symm_gemm
"""


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
        for name in ("plan_text", "plan_fault"):
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
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler: {COMPILER} is not on PATH")
    folder = tmp_path_factory.mktemp("symm_gemm")
    (folder / "host.cpp").write_text(HOST)
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-ffp-contract=off"]
    flags += ["-I", "csrc"]
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
