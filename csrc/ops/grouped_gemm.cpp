// The op of a list of products: check -> problems -> device guard, plan -> launch.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "ops/products.h"

namespace steepest {
namespace {

using symm_gemm::Options;
using symm_gemm::Problem;
using symm_gemm::Scalar;
using symm_gemm::Shape;
using symm_gemm::Streams;

enum TileChoice : int64_t { kByModel, kWideTile, kSmallTile };

Options options_of(int64_t tile, int64_t streams) {
  STD_TORCH_CHECK(tile >= kByModel && tile <= kSmallTile, "tile is ", tile, "; 0 by the model, 1 wide, 2 small");
  STD_TORCH_CHECK(streams >= 0 && streams <= static_cast<int64_t>(Streams::always), "streams is ", streams,
                  "; 0 by the model, 1 never, 2 always");
  Options options;
  options.wide = tile != kSmallTile, options.small = tile != kWideTile;
  options.streams = static_cast<Streams>(streams);
  return options;
}

// D or C of a product.
symm_gemm::Strides check_matrices(const Tensor& x, const Place& place, Dtype dtype, const Shape& shape,
                                  const char* name, size_t i) {
  place.check(x, name, i);
  STD_TORCH_CHECK(element_type(x, place, name, i) == dtype && x.dim() == 3 && x.size(0) == shape.batch &&
                      x.size(1) == shape.m && x.size(2) == shape.n && x.stride(2) == 1,
                  name, "[", i, "] must be of the type of a, of shape (", shape.batch, ", ", shape.m, ", ", shape.n,
                  "), its rows contiguous");
  return {x.stride(1), x.stride(0)};
}

void grouped_gemm(const std::vector<Tensor>& a, const std::vector<Tensor>& b, const std::vector<Tensor>& c,
                  const std::vector<Tensor>& out, const std::vector<Tensor>& alphas, const std::vector<Tensor>& betas,
                  double alpha, double beta, bool symmetric, int64_t tile, int64_t streams) {
  const size_t count = a.size();
  const auto fits = [&](const std::vector<Tensor>& list) { return list.empty() || list.size() == count; };
  STD_TORCH_CHECK(b.size() == count && out.size() == count && fits(c) && fits(alphas) && fits(betas),
                  "a, b and out go by one another, and so do c, alphas and betas where there are any");
  const Options options = options_of(tile, streams);
  if (count == 0) return;
  const Place place(a[0]);
  const OnDevice device(place);
  const Dtype dtype = element_type(a[0], place, "a", 0);
  std::vector<Problem> problems;
  for (size_t i = 0; i < count; ++i) {
    Problem problem = product_of(a[i], b[i], place, dtype);
    Shape& shape = problem.shape;
    STD_TORCH_CHECK(shape.batch > 0 && shape.m > 0 && shape.n > 0 && shape.k > 0, "a[", i, "] or b[", i, "] is empty");
    STD_TORCH_CHECK(!symmetric || shape.m == shape.n, "a symmetric product is square; of a[", i, "] and b[", i,
                    "] it has ", shape.m, " rows and ", shape.n, " columns");
    shape.symmetric = symmetric;
    shape.d = check_matrices(out[i], place, dtype, shape, "out", i), problem.d = out[i].mutable_data_ptr();
    if (!c.empty()) {
      shape.c = check_matrices(c[i], place, dtype, shape, "c", i), shape.has_c = true;
      problem.c = c[i].const_data_ptr();
    }
    problem.alpha = {nullptr, 0, static_cast<float>(alpha)}, problem.beta = {nullptr, 0, static_cast<float>(beta)};
    if (!alphas.empty()) problem.alpha = scalar(alphas[i], place, shape.batch, "alphas");
    if (!betas.empty()) problem.beta = scalar(betas[i], place, shape.batch, "betas");
    problems.push_back(problem);
  }
  run_products(problems, dtype, place, a[0], options, "grouped_gemm");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(steepest, CPU, m) { m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm)); }

#ifdef STEEPEST_HAS_HOPPER
STABLE_TORCH_LIBRARY_IMPL(steepest, CUDA, m) { m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm)); }
#endif

}  // namespace steepest
