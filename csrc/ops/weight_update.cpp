// The op of a batched product that is taken into weights: check -> problem -> device guard, stream -> launch.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "ops/products.h"

namespace steepest {
namespace {

using symm_gemm::Problem;
using symm_gemm::Shape;

void weight_update(const Tensor& a, const Tensor& b, const std::vector<Tensor>& weights, const Tensor& alpha,
                   const Tensor& beta) {
  const Place place(a);
  const Dtype dtype = element_type(a, place, "a", 0);
  Problem problem = product_of(a, b, place, dtype);
  Shape& shape = problem.shape;
  STD_TORCH_CHECK(static_cast<int64_t>(weights.size()) == shape.batch && shape.batch <= symm_gemm::kMostWeights,
                  "weights has ", weights.size(), " matrices for ", shape.batch, " products; at most ",
                  symm_gemm::kMostWeights, " are taken");
  if (shape.batch == 0) return;
  STD_TORCH_CHECK(by_rows(a), "the rows of a must be contiguous");
  shape.d = {shape.n, shape.m * shape.n};
  problem.alpha = scalar(alpha, place, shape.batch, "alpha"), problem.beta = scalar(beta, place, shape.batch, "beta");
  const Dtype stored = element_type(weights[0], place, "weights", 0);
  std::vector<void*> addresses;
  for (size_t i = 0; i < weights.size(); ++i)
    addresses.push_back(weight_address(weights[i], place, i, shape.m, shape.n, stored));
  problem.update = {addresses.data(), stored, {nullptr, 0, 1}};
  const OnDevice device(place);
  run_products({problem}, dtype, place, a, symm_gemm::options_of(true), "weight_update");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(steepest, CPU, m) { m.impl("weight_update", TORCH_BOX(&weight_update)); }

#ifdef STEEPEST_HAS_HOPPER
STABLE_TORCH_LIBRARY_IMPL(steepest, CUDA, m) { m.impl("weight_update", TORCH_BOX(&weight_update)); }
#endif

}  // namespace steepest
