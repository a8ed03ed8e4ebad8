// What the ops of products share: how factors lie, numbers of each matrix, and the run of a list.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <vector>

#include "common/device.h"
#include "ops/op_checks.h"
#include "polar/chain.h"
#include "symm_gemm/plan.h"

namespace steepest {

// Makes the device of an op the current one while it lives; on the host it is nothing.
class OnDevice {
 public:
  explicit OnDevice(const Place& place) {
    if (place.cuda) guard_.emplace(place.index);
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// One for each matrix, of any stride.
inline symm_gemm::Scalar scalar(const Tensor& tensor, const Place& place, int64_t batch, const char* name) {
  place.check(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 1 && tensor.size(0) == batch, name,
                  " must be a float32 tensor of ", batch, " elements");
  return {static_cast<const float*>(tensor.const_data_ptr()), tensor.stride(0), 0};
}

// Of a factor whose rows, or else whose columns, are contiguous.
inline bool by_rows(const Tensor& factor) { return factor.stride(2) == 1; }
inline symm_gemm::Strides strides_of(const Tensor& factor) {
  return {factor.stride(by_rows(factor) ? 1 : 2), factor.stride(0)};
}

// A B of two stacks (batch, m, k) and (batch, k, n) on one device, both fp16 or both bf16; nothing yet of where it
// goes.
inline symm_gemm::Problem product_of(const Tensor& a, const Tensor& b, const Place& place, Dtype dtype) {
  using symm_gemm::Majors;
  place.check(a, "a"), place.check(b, "b");
  STD_TORCH_CHECK((dtype == Dtype::f16 || dtype == Dtype::bf16) && element_type(a, place, "a", 0) == dtype &&
                      element_type(b, place, "b", 0) == dtype,
                  "a and b must be float16 or bfloat16, both of one type");
  STD_TORCH_CHECK(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(2) == b.size(1),
                  "a and b must be stacks of matrices that make products");
  const bool a_by_rows = by_rows(a), b_by_rows = by_rows(b);
  STD_TORCH_CHECK((a_by_rows && (b_by_rows || b.stride(1) == 1)) || (b_by_rows && a.stride(1) == 1),
                  "the rows of a, and the rows or the columns of b must be contiguous, or a's columns and b's rows");
  symm_gemm::Problem problem{};
  problem.shape.batch = a.size(0), problem.shape.m = a.size(1), problem.shape.n = b.size(2);
  problem.shape.k = a.size(2);
  problem.shape.majors = !a_by_rows ? Majors::mnmn : b_by_rows ? Majors::kmn : Majors::kk;
  problem.shape.a = strides_of(a), problem.shape.b = strides_of(b);
  problem.a = a.const_data_ptr(), problem.b = b.const_data_ptr();
  return problem;
}

// On the host or, with a workspace of its own, on the current stream of the device; `like` is a tensor there.
inline void run_products(const std::vector<symm_gemm::Problem>& problems, Dtype dtype, const Place& place,
                         [[maybe_unused]] const Tensor& like, [[maybe_unused]] const symm_gemm::Options& options,
                         [[maybe_unused]] const std::string& op) {
  if (!place.cuda) return polar::products_on_host(problems, dtype);
#ifdef STEEPEST_HAS_HOPPER
  std::vector<symm_gemm::Shape> shapes;
  for (const symm_gemm::Problem& problem : problems) shapes.push_back(problem.shape);
  const symm_gemm::Plan plan = make_plan(shapes, multiprocessors_of(place.index), options);
  for (const std::string& reason : plan.reasons) STD_TORCH_CHECK(reason.empty(), op, ": ", reason);
  const Tensor partials = torch::stable::new_empty(like, {plan.workspace_floats}, ScalarType::Float);
  const Tensor counts = torch::stable::new_zeros(like, {plan.workspace_counters}, ScalarType::Int);
  run_on_sm90(plan, problems, dtype, {pointer<float>(partials), pointer<uint32_t>(counts)},
              current_stream(place.index));
#endif
}

}  // namespace steepest
