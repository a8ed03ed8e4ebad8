// The index of every op: its schema, and the importable module steepest._C.
//
// Schemas are registered through torch's stable ABI; CUDA implementations register themselves in csrc/ops, the CPU
// reference and the fakes in Python (steepest/ops). The module itself offers what needs no tensor: what this binary
// is, and the host-only plans of the kernels, so that both are tested and printed without a GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "build_info.h"
#include "multi_tensor/layout.h"
#include "multi_tensor/plan.h"

namespace py = pybind11;

STABLE_TORCH_LIBRARY(steepest, m) {
  m.def("after(Tensor(a!)[] params, Tensor[] updates, Tensor keep, Tensor step) -> ()");
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
  out["compiler"] = info.compiler;
  return out;
}

// The blocks of each launch as (tensor, start, stop), found the way a kernel finds them.
using Block = std::tuple<int, int64_t, int64_t>;
std::vector<std::vector<Block>> plan_chunks(const std::vector<int64_t>& sizes, int64_t chunk, int capacity) {
  std::vector<std::vector<Block>> launches;
  for (const auto& launch : steepest::multi_tensor::plan_launches(sizes, chunk, capacity)) {
    const auto first_chunk = [&](int i) { return launch.first_chunk[i]; };
    std::vector<Block> blocks;
    for (int32_t b = 0; b < launch.chunks; ++b) {
      const int at = steepest::multi_tensor::owner(first_chunk, static_cast<int>(launch.tensors.size()), b);
      const int64_t start = (b - int64_t{launch.first_chunk[at]}) * chunk;
      blocks.emplace_back(launch.tensors[at], start, std::min(start + chunk, sizes[launch.tensors[at]]));
    }
    launches.push_back(std::move(blocks));
  }
  return launches;
}

// [(size, p_stride, u_stride), ...] after merging, or None when more dimensions are left than a kernel walks.
std::optional<std::vector<std::tuple<int64_t, int64_t, int64_t>>> merge_dims(
    const steepest::multi_tensor::Ints& sizes, const steepest::multi_tensor::Ints& p_strides,
    const steepest::multi_tensor::Ints& u_strides) {
  steepest::multi_tensor::Walk walk;
  if (!steepest::multi_tensor::merge_dims(sizes, p_strides, u_strides, walk)) return std::nullopt;
  std::vector<std::tuple<int64_t, int64_t, int64_t>> out;
  for (int d = 0; d < walk.dims; ++d) out.emplace_back(walk.size[d], walk.p_stride[d], walk.u_stride[d]);
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of steepest: ops in torch.ops.steepest, build facts and host-only plans here.";
  m.def("build_info", &build_info);
  m.def("plan_chunks", &plan_chunks, py::arg("sizes"), py::arg("chunk"), py::arg("capacity"));
  m.def("is_flat", &steepest::multi_tensor::is_flat, py::arg("sizes"), py::arg("p_strides"), py::arg("u_strides"));
  m.def("may_overlap", &steepest::multi_tensor::may_overlap, py::arg("sizes"), py::arg("strides"));
  m.def("merge_dims", &merge_dims, py::arg("sizes"), py::arg("p_strides"), py::arg("u_strides"));
}
