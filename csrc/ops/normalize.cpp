// The op that normalizes updates: check -> params -> device guard, stream -> launch.
#include "multi_tensor/normalize.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <vector>

#include "ops/op_checks.h"

namespace steepest {
namespace {

using namespace multi_tensor;
using Tensors = std::vector<Tensor>;

// Contiguous numbers of the type of the arithmetic, which are written.
void* numbers(const Tensor& tensor, const Place& place, const Stack& stack, int64_t count, const char* name, size_t i) {
  place.check(tensor, name, i);
  STD_TORCH_CHECK(
      element_type(tensor, place, name, i) == stack.wide && tensor.is_contiguous() && tensor.numel() == count, name,
      "[", i, "] must be contiguous and hold ", count, " numbers of the dtype of seconds[", i, "]");
  return tensor.mutable_data_ptr();
}

// divided: nullptr where rows are normalized.
Stack make_stack(const Tensor& updates, const Tensor& second, const Tensor* divided, const Tensor& factors,
                 const Place& place, size_t i) {
  place.check(updates, "updates", i);
  STD_TORCH_CHECK(
      updates.dim() == 3 && updates.is_contiguous() && updates.size(1) <= kMostOfRow && updates.size(2) <= kMostOfRow,
      "updates[", i, "] must be a contiguous stack of matrices with less than 2^31 rows and columns");
  Stack stack{};
  stack.dtype = element_type(updates, place, "updates", i), stack.wide = element_type(second, place, "seconds", i);
  stack.matrices = updates.size(0), stack.rows = updates.size(1), stack.columns = updates.size(2);
  STD_TORCH_CHECK(stack.dtype != Dtype::i16 &&
                      (stack.wide == Dtype::f64 || (stack.wide == Dtype::f32 && stack.dtype != Dtype::f64)),
                  "updates[", i, "] and seconds[", i,
                  "] must be floating-point, the second float32 or on the CPU float64, and no narrower than the first");
  const int64_t rows = stack.matrices * stack.rows, all = rows * stack.columns;
  stack.updates = updates.const_data_ptr();
  stack.seconds = numbers(second, place, stack, divided != nullptr ? all : rows, "seconds", i);
  if (divided != nullptr) stack.divided = numbers(*divided, place, stack, all, "divided", i);
  stack.factors = numbers(factors, place, stack, divided != nullptr ? stack.matrices : rows, "factors", i);
  return stack;
}

void normalize_updates(const Tensors& updates, const Tensors& seconds, const Tensors& divided, const Tensors& factors,
                       const Tensors& taken, const Tensor& scratch, const std::vector<double>& beta2, double eps,
                       double rms) {
  const Place place(scratch);
  const size_t count = updates.size();
  check_lengths(seconds.size(), count, "seconds"), check_lengths(factors.size(), count, "factors");
  check_lengths(beta2.size(), count, "beta2");
  if (!divided.empty()) check_lengths(divided.size(), count, "divided");
  if (!taken.empty()) check_lengths(taken.size(), count, "taken");
  STD_TORCH_CHECK(rms >= 0, "rms is ", rms, "; it is positive, or 0 where matrices keep their length");

  NormalizeParams params{};
  params.eps = eps, params.rms = rms;
  int64_t matrices = 0, blocks = 0;
  for (size_t i = 0; i < count; ++i) {
    Stack stack = make_stack(updates[i], seconds[i], divided.empty() ? nullptr : &divided[i], factors[i], place, i);
    stack.beta2 = beta2[i];
    if (!taken.empty()) {
      place.check(taken[i], "taken", i);
      STD_TORCH_CHECK(taken[i].scalar_type() == ScalarType::Bool && taken[i].numel() == 1, "taken[", i,
                      "] must be one bool");
      stack.taken = static_cast<const bool*>(taken[i].const_data_ptr());
    }
    if (updates[i].numel() == 0) continue;
    matrices += stack.matrices, blocks += stack.matrices * blocks_of(stack);
    params.stacks.push_back(stack);
  }
  if (params.stacks.empty()) return;
  params.scratch = check_scratch(scratch, place, kLengths, matrices, blocks);
#ifdef STEEPEST_HAS_CUDA
  if (place.cuda) {
    const torch::stable::accelerator::DeviceGuard guard(place.index);
    return normalize_on_device(params, current_stream(place.index));
  }
#endif
  normalize_on_host(params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(steepest, CPU, m) { m.impl("normalize_updates", TORCH_BOX(&normalize_updates)); }

#ifdef STEEPEST_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(steepest, CUDA, m) { m.impl("normalize_updates", TORCH_BOX(&normalize_updates)); }
#endif

}  // namespace steepest
