// The door of a batched product that is taken into weights: check -> problem -> device guard, stream -> launch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <utility>
#include <vector>

#include "common/device.h"
#include "ops/door.h"
#include "polar/chain.h"
#include "symm_gemm/plan.h"

namespace steepest {
namespace {

using symm_gemm::Majors;
using symm_gemm::Problem;
using symm_gemm::Scalar;
using symm_gemm::Shape;

Scalar scalar(const Tensor& tensor, const Place& place, int64_t batch, const char* name) {
  place.check(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 1 && tensor.size(0) == batch, name,
                  " must be a float32 tensor of ", batch, " elements");
  return {static_cast<const float*>(tensor.const_data_ptr()), tensor.stride(0), 0};
}

#ifdef STEEPEST_HAS_HOPPER
void run_on_hopper(const Problem& problem, Dtype dtype, const Tensor& a, const Place& place) {
  const torch::stable::accelerator::DeviceGuard guard(place.index);
  const symm_gemm::Plan plan = make_plan({problem.shape}, multiprocessors_of(place.index), symm_gemm::options_of(true));
  STD_TORCH_CHECK(plan.reasons[0].empty(), "weight_update: ", plan.reasons[0]);
  const Tensor partials = torch::stable::new_empty(a, {plan.workspace_floats}, ScalarType::Float);
  const Tensor counts = torch::stable::new_zeros(a, {plan.workspace_counters}, ScalarType::Int);
  const auto type = dtype == Dtype::f16 ? symm_gemm::Dtype::f16 : symm_gemm::Dtype::bf16;
  run_on_sm90(plan, {problem}, type, {pointer<float>(partials), pointer<uint32_t>(counts)},
              current_stream(place.index));
}
#endif

void weight_update(const Tensor& a, const Tensor& b, const std::vector<Tensor>& weights, const Tensor& alpha,
                   const Tensor& beta) {
  const Place place(a);
  place.check(b, "b");
  const Dtype dtype = element_type(a, place, "a", 0);
  STD_TORCH_CHECK((dtype == Dtype::f16 || dtype == Dtype::bf16) && element_type(b, place, "b", 0) == dtype,
                  "a and b must be float16 or bfloat16, both of one type");
  STD_TORCH_CHECK(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(2) == b.size(1),
                  "a and b must be stacks of matrices that make products");
  Problem problem{};
  Shape& shape = problem.shape;
  shape.batch = a.size(0), shape.m = a.size(1), shape.n = b.size(2), shape.k = a.size(2);
  STD_TORCH_CHECK(static_cast<int64_t>(weights.size()) == shape.batch && shape.batch <= symm_gemm::kMostWeights,
                  "weights has ", weights.size(), " matrices for ", shape.batch, " products; at most ",
                  symm_gemm::kMostWeights, " are taken");
  if (shape.batch == 0) return;
  const bool by_rows = b.stride(2) == 1;
  STD_TORCH_CHECK(a.stride(2) == 1 && (by_rows || b.stride(1) == 1),
                  "the rows of a, and the rows or the columns of b must be contiguous");
  shape.majors = by_rows ? Majors::kmn : Majors::kk;
  shape.a = {a.stride(1), a.stride(0)}, shape.b = {b.stride(by_rows ? 1 : 2), b.stride(0)};
  shape.d = {shape.n, shape.m * shape.n};
  problem.a = a.const_data_ptr(), problem.b = b.const_data_ptr();
  problem.alpha = scalar(alpha, place, shape.batch, "alpha"), problem.beta = scalar(beta, place, shape.batch, "beta");
  const Dtype stored = element_type(weights[0], place, "weights", 0);
  std::vector<void*> addresses;
  for (size_t i = 0; i < weights.size(); ++i)
    addresses.push_back(weight_address(weights[i], place, i, shape.m, shape.n, stored));
  problem.update = {addresses.data(), stored, {nullptr, 0, 1}};
#ifdef STEEPEST_HAS_HOPPER
  if (place.cuda) return run_on_hopper(problem, dtype, a, place);
#endif
  polar::products_on_host({problem}, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(steepest, CPU, m) { m.impl("weight_update", TORCH_BOX(&weight_update)); }

#ifdef STEEPEST_HAS_HOPPER
STABLE_TORCH_LIBRARY_IMPL(steepest, CUDA, m) { m.impl("weight_update", TORCH_BOX(&weight_update)); }
#endif

}  // namespace steepest
