// `normalize_updates` and `normalize_and_apply_update` on the host, in parallel over what a block of the kernels takes.
#include <algorithm>
#include <vector>

#include "common/threads.h"
#include "multi_tensor/host.h"
#include "multi_tensor/normalize.cuh"

namespace steepest::multi_tensor {
namespace {

// A block of a matrix of a stack.
struct Part {
  const Stack* stack;
  int64_t matrix, number;
};

template <class R>
void normalize_rows(const Part& part, double* lengths) {
  const Stack& stack = *part.stack;
  const Rates<R> rates(stack.beta2, stack.eps, static_cast<double>(stack.columns));
  const int64_t some = rows_of_block(stack.columns), first_row = part.matrix * stack.rows;
  const int64_t begin = first_row + part.number * some, end = std::min(begin + some, first_row + stack.rows);
  R* const seconds = static_cast<R*>(stack.seconds);
  R* const factors = static_cast<R*>(stack.factors);
  lengths[kBefore] = lengths[kAfter] = 0;
  for (int64_t row = begin; row < end; ++row) {
    const char* const at = static_cast<const char*>(stack.updates) + row * stack.columns * bytes_of(stack.dtype);
    const bool in_double = sizeof(R) == sizeof(double);
    const R sum = static_cast<R>(best_chunks().square_sum(at, stack.dtype, stack.columns, in_double));
    seconds[row] = mean_square(rates, seconds[row], sum);
    factors[row] = inverse_root(rates, seconds[row]);
    lengths[kBefore] += sum;
    lengths[kAfter] += static_cast<double>(sum) * factors[row] * factors[row];
  }
}

void normalize_part(const Part& part, double* lengths) {
  const Stack& stack = *part.stack;
  const bool wide = stack.wide == Dtype::f64;
  if (stack.divided == nullptr) return (wide ? normalize_rows<double> : normalize_rows<float>)(part, lengths);
  const Span chunk = span(stack.size(), kChunk, part.matrix * blocks_of(stack) + part.number);
  best_chunks().normalize(stack, chunk.start, chunk.length, stack.eps, lengths);
}

// What is left once the lengths of a matrix are known.
template <class R>
void finish(const Stack& stack, int64_t matrix, const double (&lengths)[kLengths]) {
  const double entries = static_cast<double>(stack.rows) * static_cast<double>(stack.columns);
  const R ratio = length_ratio<R>(lengths, stack.rms, entries);
  R* const factors = static_cast<R*>(stack.factors);
  if (stack.divided != nullptr)
    factors[matrix] = ratio;
  else
    for (int64_t row = 0; row < stack.rows; ++row) factors[matrix * stack.rows + row] *= ratio;
}

}  // namespace

void normalize_on_host(const NormalizeParams& params) {
  std::vector<Part> parts;
  for (const Stack& stack : params.stacks)
    for (int64_t matrix = 0; matrix < stack.matrices; ++matrix)
      for (int64_t number = 0; number < blocks_of(stack); ++number) parts.push_back({&stack, matrix, number});
  double* const partials = params.scratch.partials;
  parallel_for(static_cast<int64_t>(parts.size()),
               [&](int64_t i) { normalize_part(parts[i], partials + i * kLengths); });
  // Parts of a matrix follow one another, so that its lengths are added up in their order.
  for (size_t i = 0; i < parts.size();) {
    const Part part = parts[i];
    double lengths[kLengths] = {};
    for (const size_t end = i + blocks_of(*part.stack); i < end; ++i)
      for (int l = 0; l < kLengths; ++l) lengths[l] += partials[i * kLengths + l];
    const bool wide = part.stack->wide == Dtype::f64;
    (wide ? finish<double> : finish<float>)(*part.stack, part.matrix, lengths);
  }
}

void normalize_and_apply_on_host(const NormalizedItemsParams& params) {
  NormalizeParams some{{}, params.meeting};
  for (size_t i = 0; i < params.items.size(); ++i) {
    const bool taken = params.rows[int64_t{params.items[i].row} * kColumns + kFinite] != 0;
    if (taken && params.stacks[i].matrices != 0) some.stacks.push_back(params.stacks[i]);
  }
  normalize_on_host(some);
  run_on_host(Stage::apply_update, params);
}

}  // namespace steepest::multi_tensor
