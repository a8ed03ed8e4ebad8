// The module steepest._C, for developers: host-only plans and formulas of the kernels, tested and printed without a
// GPU.
//
// Part of an editable build alone. It is made for one Python and links neither torch nor the library; the package runs
// without it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "build_info.h"
#include "common/binary_search.h"
#include "common/floats.h"
#include "multi_tensor/layout.h"
#include "multi_tensor/params.h"
#include "multi_tensor/plan.h"
#include "polar/chain.h"

namespace py = pybind11;
namespace mt = steepest::multi_tensor;

namespace {

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
      const int at = steepest::part_with(first_chunk, static_cast<int>(launch.items.size()), b),
                item = launch.items[at];
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

// (batch, m, n, k, Majors, symmetric) of what a node of this polar::Kind multiplies for matrices of this shape.
std::tuple<int64_t, int64_t, int64_t, int64_t, int, bool> chain_product(int kind, int64_t matrices, int64_t rows,
                                                                        int64_t columns) {
  namespace polar = steepest::polar;
  const polar::Node node{static_cast<polar::Kind>(kind), 0, 0, 0, 0, {-1, 1}, {-1, 0}, 0};
  polar::Stack stack{};
  stack.matrices = matrices, stack.rows = rows, stack.columns = columns;
  const steepest::symm_gemm::Shape shape = polar::products_of(node, {stack})[0].shape;
  return {shape.batch, shape.m, shape.n, shape.k, static_cast<int>(shape.majors), shape.symmetric};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host-only plans and formulas of the kernels, for tests and developers.";
  m.def("build_info", [] { return py::module_::import("json").attr("loads")(steepest::build_info()); });
  m.attr("CHUNK") = mt::kChunk;
  m.attr("COLUMNS") = static_cast<int>(mt::kColumns);
  m.attr("SUMS") = static_cast<int>(mt::kSums);
  m.attr("STRIDED_DIMS") = mt::kMaxDims;
  m.def("plan_chunks", &plan_chunks, py::arg("items"), py::arg("chunk"), py::arg("capacity"));
  m.def("is_flat", &mt::is_flat, py::arg("sizes"), py::arg("strides"));
  m.def("may_overlap", &mt::may_overlap, py::arg("sizes"), py::arg("strides"));
  m.def("merge_dims", &merge_dims, py::arg("sizes"), py::arg("strides"));
  m.def("float_formats", &float_formats, py::arg("value"));
  m.def("chain_product", &chain_product, py::arg("kind"), py::arg("matrices"), py::arg("rows"), py::arg("columns"));
}
