// The index of every op: its schema, and the importable module steepest._C.
//
// Schemas are registered through torch's stable ABI; implementations register themselves in csrc/ops, the fakes in
// Python (steepest/ops). The module itself offers what needs no tensor: what this binary is, and the host-only plans
// and formulas of the kernels, so that they are tested and printed without a GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "build_info.h"
#include "common/device.h"
#include "common/floats.h"
#include "eigh/cusolver.h"
#include "eigh/params.h"
#include "multi_tensor/layout.h"
#include "multi_tensor/params.h"
#include "multi_tensor/plan.h"
#include "polar/chain.h"
#include "polar/chunks.h"
#include "small_polar/params.h"
#include "symm_gemm/plan.h"

namespace py = pybind11;

STABLE_TORCH_LIBRARY(steepest, m) {
  m.def(
      "inspect(Tensor[] grads, Tensor(a!)[] steps, Tensor(b!) rows, Tensor sums, Tensor(c!) skipped, "
      "Tensor(d!) scratch, int[] programs, int[] first_sums, int[] hyper_of, float[] hyper, Tensor[] tensors, "
      "int[] tensor_at, Tensor? found_inf, Tensor? grad_scale) -> ()");
  m.def(
      "before(Tensor[] grads, Tensor(a!)[] momenta, Tensor(b!)[] seconds, Tensor(c!)[] inputs, Tensor(d!)[] params, "
      "Tensor(e!)[] mantissas, Tensor rows, Tensor(f!) sums, Tensor(g!) scratch, int[] programs, int[] row_of, "
      "int[] matrices, int[] first_sums, int[] places, float[] ratios) -> ()");
  m.def(
      "after(Tensor[] directions, Tensor[] seconds, Tensor(a!)[] params, Tensor(b!)[] mantissas, Tensor[] lengths, "
      "Tensor rows, Tensor(c!) sums, Tensor(d!) scratch, int[] programs, int[] row_of, int[] matrices, "
      "int[] first_sums, int[] places, float[] ratios) -> ()");
  m.def(
      "chain_numbers(Tensor gram, Tensor(a!) numbers, Tensor(b!) slack, Tensor(c!) scratch, float[] constants, "
      "int[] powers, float[] slacks, bool tight, float eps) -> ()");
  m.def(
      "polar_chain(Tensor(a!)[] xs, Tensor(b!)[] ys, Tensor(c!)[] slacks, Tensor(d!)[] row_sums, "
      "Tensor(e!)[] weights, Tensor[] etas, Tensor[] betas, int[] ints, float[] floats, float[] constants, "
      "int[] powers, float[] least, bool tight, float eps, int chunks=0, bool batch_invariant=False) -> ()");
  m.def(
      "grouped_gemm(Tensor[] a, Tensor[] b, Tensor[] c, Tensor(a!)[] out, Tensor(b!)[] row_sums, Tensor[] alphas, "
      "Tensor[] betas, float alpha, float beta, bool symmetric, int tile=0, int streams=0) -> ()");
  m.def("weight_update(Tensor a, Tensor b, Tensor(a!)[] weights, Tensor alpha, Tensor beta) -> ()");
  m.def(
      "small_polar(Tensor[] xs, Tensor(a!)[] outs, Tensor(b!)[] slacks, float[] coefficients, int tables, "
      "float[] least, bool tight, float eps) -> ()");
  m.def(
      "eigh_refresh(Tensor P, Tensor Q, Tensor(a!) basis, Tensor(b!) values, Tensor(c!) status, Tensor(d!) order, "
      "int method, int sweeps) -> ()");
  m.def("eigh_batched(Tensor(a!) A, Tensor(b!) W, Tensor(c!) info) -> ()");
}

namespace {

py::object or_none(const std::string& text) { return text.empty() ? py::object(py::none()) : py::str(text); }

py::dict build_info() {
  const steepest::BuildInfo info = steepest::build_info();
  py::dict out;
  out["version"] = info.version;
  out["commit"] = or_none(info.commit);
  out["torch"] = info.torch;
  out["cuda"] = or_none(info.cuda);
  out["architectures"] = info.architectures;
  out["cutlass"] = or_none(info.cutlass);
  out["hopper"] = info.hopper;
  out["compiler"] = info.compiler;
  out["interface"] = info.interface;
  return out;
}

namespace mt = steepest::multi_tensor;

// The blocks of each launch as (item, matrix, start, stop), found the way a kernel finds them; items are (matrices,
// elements of each).
using Block = std::tuple<int, int64_t, int64_t, int64_t>;
std::vector<std::vector<Block>> plan_chunks(const std::vector<std::pair<int64_t, int64_t>>& items, int64_t chunk,
                                            int capacity) {
  std::vector<mt::Extent> extents;
  for (const auto& [matrices, size] : items) extents.push_back({matrices, size});
  std::vector<std::vector<Block>> launches;
  for (const mt::Launch& launch : mt::plan_launches(extents, chunk, capacity)) {
    const auto first_chunk = [&](int i) { return launch.first_chunk[i]; };
    std::vector<Block> blocks;
    for (int32_t b = 0; b < launch.chunks; ++b) {
      const int at = mt::owner(first_chunk, static_cast<int>(launch.items.size()), b), item = launch.items[at];
      const mt::Span span = mt::span(items[item].second, chunk, b - int64_t{launch.first_chunk[at]});
      blocks.emplace_back(item, span.matrix, span.start, span.start + span.length);
    }
    launches.push_back(std::move(blocks));
  }
  return launches;
}

// [(size, strides), ...] after merging, or None when more dimensions are left than a kernel walks.
std::optional<std::vector<std::pair<int64_t, mt::Ints>>> merge_dims(const mt::Ints& sizes,
                                                                    const std::vector<mt::Ints>& strides) {
  if (strides.size() > mt::kMaxTensors)
    throw std::invalid_argument("at most " + std::to_string(mt::kMaxTensors) + " tensors meet in an item");
  mt::Walk walk;
  if (!mt::merge_dims(sizes, strides, walk)) return std::nullopt;
  std::vector<std::pair<int64_t, mt::Ints>> out;
  for (int d = 0; d < walk.dims; ++d) {
    mt::Ints each;
    for (size_t t = 0; t < strides.size(); ++t) each.push_back(walk.stride[t][d]);
    out.emplace_back(walk.size[d], each);
  }
  return out;
}

// The bits of a float32 number (float64 argument, exactly representable) as `to_bf16`, `to_f16` and back see them.
py::dict float_formats(double value) {
  const float x = static_cast<float>(value);
  const steepest::Split parts = steepest::split(x);
  py::dict out;
  out["bf16"] = steepest::to_bf16(x);
  out["f16"] = steepest::to_f16(x);
  out["from_f16"] = steepest::from_f16(steepest::to_f16(x));
  out["split"] = std::pair<int, int>(parts.high, parts.low);
  out["join"] = steepest::join(parts);
  return out;
}

std::optional<std::string> small_polar_refusal(const std::vector<steepest::small_polar::Table>& tables,
                                               const std::vector<double>& least) {
  try {
    steepest::small_polar::numbers({tables, least, false, 0});
    return std::nullopt;
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
}

namespace sg = steepest::symm_gemm;

constexpr const char* kMajors[] = {"kk", "mnmn", "kmn"};  // by sg::Majors

// (batch, m, n, k, majors, symmetric) of contiguous factors.
using Product = std::tuple<int64_t, int64_t, int64_t, int64_t, std::string, bool>;

sg::Shape to_shape(const Product& product) {
  const auto& [batch, m, n, k, name, symmetric] = product;
  const auto found = std::find(std::begin(kMajors), std::end(kMajors), name);
  if (found == std::end(kMajors)) throw std::invalid_argument("majors are kk, mnmn or kmn, got '" + name + "'");
  const auto majors = static_cast<sg::Majors>(found - std::begin(kMajors));
  const int64_t a = majors == sg::Majors::mnmn ? m : k, b = majors == sg::Majors::kk ? k : n;
  return {batch, m, n, k, majors, symmetric, {a, m * k}, {b, n * k}, {n, m * n}, {n, m * n}, false};
}

// What a node of a chain multiplies for matrices of this shape.
Product chain_product(const std::string& kind, int64_t matrices, int64_t rows, int64_t columns) {
  using steepest::polar::Kind;
  const Kind of = kind == "gram" ? Kind::gram : kind == "product" ? Kind::product : Kind::apply;
  if (of == Kind::apply && kind != "apply")
    throw std::invalid_argument("kind is gram, product or apply, got '" + kind + "'");
  const steepest::polar::Node node{of, 0, 0, 0, 0, {-1, 1}, {-1, 0}, 0};
  steepest::polar::Stack stack{};
  stack.matrices = matrices, stack.rows = rows, stack.columns = columns;
  const sg::Shape shape = products_of(node, {stack})[0].shape;
  return {shape.batch, shape.m, shape.n, shape.k, kMajors[static_cast<int>(shape.majors)], shape.symmetric};
}

// The launches of a list of products, why products are refused, and the memory that all launches share, in bytes.
py::dict symm_gemm_plan(const std::vector<Product>& products, int multiprocessors) {
  std::vector<sg::Shape> shapes;
  for (const Product& product : products) shapes.push_back(to_shape(product));
  const sg::Plan plan = sg::make_plan(shapes, multiprocessors);
  py::list launches, reasons;
  for (const std::string& reason : plan.reasons) reasons.append(or_none(reason));
  for (const sg::Launch& launch : plan.launches) {
    const sg::TileShape tile = sg::shape_of(launch.tile);
    py::list problems;
    for (const sg::PlannedProblem& problem : launch.problems) {
      py::dict each;
      each["index"] = problem.index;
      each["tiles"] = problem.tiling.tiles;
      each["k_tiles"] = problem.tiling.k_tiles;
      problems.append(each);
    }
    py::dict out;
    out["majors"] = kMajors[static_cast<int>(launch.majors)];
    out["tile"] = std::tuple<int, int, int>(tile.rows, tile.columns, tile.depth);
    out["cluster"] = tile.cluster;
    out["clusters"] = launch.schedule.clusters;
    out["tiles"] = launch.tiles;
    out["whole"] = launch.schedule.whole;
    out["steps"] = launch.schedule.steps;
    out["waves"] = launch.waves;
    out["efficiency"] = launch.efficiency;
    out["problems"] = problems;
    launches.append(out);
  }
  py::dict out;
  out["launches"] = launches;
  out["reasons"] = reasons;
  out["workspace_bytes"] = 4 * (plan.workspace_floats + plan.workspace_counters);
  return out;
}

// How a chain (nodes as polar_chain takes them) cuts stacks of (matrices, rows, columns): for every chunk (first,
// count) of each stack, and the model's bytes and clocks of these chunks and of all matrices at once.
py::dict polar_chunks(const std::vector<int64_t>& ints, const std::vector<double>& floats,
                      const std::vector<std::tuple<int64_t, int64_t, int64_t>>& shapes, int multiprocessors,
                      int64_t l2_bytes) {
  std::vector<steepest::polar::Node> nodes;
  for (size_t i = 0; 7 * i + 6 < ints.size(); ++i) {
    const int64_t* own = &ints[7 * i];
    const auto at = [&](int k) { return static_cast<int8_t>(own[k]); };
    nodes.push_back({static_cast<steepest::polar::Kind>(own[0]),
                     at(1),
                     at(2),
                     at(3),
                     at(4),
                     {-1, 1},
                     {static_cast<int32_t>(own[6]), static_cast<float>(floats[3 * i + 1])},
                     0});
  }
  std::vector<steepest::polar::Stack> stacks;
  for (const auto& [matrices, rows, columns] : shapes) {
    stacks.push_back({});
    stacks.back().matrices = matrices, stacks.back().rows = rows, stacks.back().columns = columns;
  }
  const steepest::polar::Chunking found = make_chunks(nodes, stacks, {multiprocessors, l2_bytes});
  std::vector<std::vector<std::pair<int64_t, int64_t>>> chunks;
  for (const steepest::polar::Chunk& chunk : found.chunks) {
    chunks.emplace_back();
    for (const auto& [first, count] : chunk) chunks.back().emplace_back(first, count);
  }
  py::dict out;
  out["chunks"] = chunks;
  out["bytes"] = found.cost.traffic, out["bytes_whole"] = found.whole.traffic;
  out["clocks"] = found.cost.clocks, out["clocks_whole"] = found.whole.clocks;
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of steepest: ops in torch.ops.steepest, build facts and host-only plans here.";
  m.def("build_info", &build_info);
  m.attr("CHUNK") = mt::kChunk;
  m.attr("COLUMNS") = static_cast<int>(mt::kColumns);
  m.attr("SUMS") = static_cast<int>(mt::kSums);
  m.attr("STRIDED_DIMS") = mt::kMaxDims;
  m.def("plan_chunks", &plan_chunks, py::arg("items"), py::arg("chunk"), py::arg("capacity"));
  m.def("is_flat", &mt::is_flat, py::arg("sizes"), py::arg("strides"));
  m.def("may_overlap", &mt::may_overlap, py::arg("sizes"), py::arg("strides"));
  m.def("merge_dims", &merge_dims, py::arg("sizes"), py::arg("strides"));
  m.def(
      "small_polar_rows",
      [](int capability) { return steepest::small_polar::most_rows(steepest::small_polar::room_of(capability)); },
      py::arg("capability"));
  m.def(
      "small_polar_blocks",
      [](int64_t rows, int capability) {
        return steepest::small_polar::blocks_for(rows, steepest::small_polar::room_of(capability));
      },
      py::arg("rows"), py::arg("capability"));
  m.def(
      "eigh_rows", [](int capability) { return steepest::eigh::most_rows(steepest::shared_limit(capability)); },
      py::arg("capability"));
  m.def(
      "load_cusolver",
      [](const std::vector<std::string>& names) { return or_none(steepest::eigh::load_cusolver(names)); },
      py::arg("names"));
  m.def("small_polar_refusal", &small_polar_refusal, py::arg("tables"), py::arg("least"));
  m.def("chain_product", &chain_product, py::arg("kind"), py::arg("matrices"), py::arg("rows"), py::arg("columns"));
  m.def("polar_chunks", &polar_chunks, py::arg("ints"), py::arg("floats"), py::arg("shapes"),
        py::arg("multiprocessors"), py::arg("l2_bytes"));
  m.def("symm_gemm_plan", &symm_gemm_plan, py::arg("products"), py::arg("multiprocessors"));
  m.def("float_formats", &float_formats, py::arg("value"));
}
