// Stacks of updates that are normalized, as the ops are given them.
#pragma once

#include "multi_tensor/normalize.h"
#include "ops/op_checks.h"

namespace steepest {

// What an op calls the updates and their second moments.
struct StackNames {
  const char *updates, *seconds;
};

// Contiguous numbers of the type of the arithmetic, which are written.
inline void* stack_numbers(const Tensor& tensor, const Place& place, const multi_tensor::Stack& stack, int64_t count,
                           const char* name, const char* seconds, size_t i) {
  place.check(tensor, name, i);
  STD_TORCH_CHECK(
      element_type(tensor, place, name, i) == stack.wide && tensor.is_contiguous() && tensor.numel() == count, name,
      "[", i, "] must be contiguous and hold ", count, " numbers of the dtype of ", seconds, "[", i, "]");
  return tensor.mutable_data_ptr();
}

// divided: nullptr where rows are normalized.
inline multi_tensor::Stack make_stack(const Tensor& updates, const Tensor& second, const Tensor* divided,
                                      const Tensor& factors, const Place& place, size_t i, const StackNames& names) {
  using namespace multi_tensor;
  place.check(updates, names.updates, i);
  STD_TORCH_CHECK(
      updates.dim() == 3 && updates.is_contiguous() && updates.size(1) <= kMostOfRow && updates.size(2) <= kMostOfRow,
      names.updates, "[", i, "] must be a contiguous stack of matrices with less than 2^31 rows and columns");
  Stack stack{};
  stack.dtype = element_type(updates, place, names.updates, i),
  stack.wide = element_type(second, place, names.seconds, i);
  stack.matrices = updates.size(0), stack.rows = updates.size(1), stack.columns = updates.size(2);
  STD_TORCH_CHECK(stack.dtype != Dtype::i16 &&
                      (stack.wide == Dtype::f64 || (stack.wide == Dtype::f32 && stack.dtype != Dtype::f64)),
                  names.updates, "[", i, "] and ", names.seconds, "[", i,
                  "] must be floating-point, the second float32 or on the CPU float64, and no narrower than the first");
  STD_TORCH_CHECK(divided == nullptr || stack.size() <= kMostOfRow, names.updates, "[", i,
                  "] must be matrices of less than 2^31 entries where these are divided");
  const int64_t rows = stack.matrices * stack.rows, all = rows * stack.columns;
  stack.updates = updates.const_data_ptr();
  stack.seconds = stack_numbers(second, place, stack, divided != nullptr ? all : rows, names.seconds, names.seconds, i);
  if (divided != nullptr) stack.divided = stack_numbers(*divided, place, stack, all, "divided", names.seconds, i);
  stack.factors =
      stack_numbers(factors, place, stack, divided != nullptr ? stack.matrices : rows, "factors", names.seconds, i);
  return stack;
}

// The scratch of so many matrices and blocks. Partials lie at its end, so that calls over any of the stacks that it was
// made for may share it: where one has counters another has no partials.
inline Scratch check_meeting(const Tensor& meeting, const Place& place, int64_t matrices, int64_t blocks,
                             const char* name) {
  Scratch scratch =
      check_scratch(meeting, place, multi_tensor::kLengths, multi_tensor::counters_of(matrices), blocks, name);
  scratch.partials = reinterpret_cast<double*>(scratch.counters) + meeting.numel() - blocks * multi_tensor::kLengths;
  return scratch;
}

inline void add_rates(multi_tensor::Stack& stack, double beta2, double eps, double rms) {
  STD_TORCH_CHECK(rms >= 0, "rms is ", rms, "; it is positive, or 0 where matrices keep their length");
  stack.beta2 = beta2, stack.eps = eps, stack.rms = rms;
}

}  // namespace steepest
