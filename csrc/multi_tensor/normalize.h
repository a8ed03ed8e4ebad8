// What is told of updates that are normalized, by `normalize_updates` or on the way into the weights by
// `normalize_and_apply_update`, and which block takes which rows or elements; no torch in here.
//
// A stack is matrices of one shape, one after another, whose rows or elements have a running second moment. Updates are
// read once. Of rows, what each is to be multiplied by follows from its second moment and, once all are known, from the
// length of its matrix; whoever reads the updates next multiplies by it, so that they are not written. Elements are
// divided at once, and what remains is a factor for each matrix.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "common/host_device.h"
#include "common/scratch.h"
#include "multi_tensor/params.h"
#include "multi_tensor/plan.h"

namespace steepest::multi_tensor {

struct Stack {
  const void* updates;  // (matrices, rows, columns)
  void* seconds;        // (matrices, rows), or where there is `divided` (matrices, rows, columns)
  void* divided;        // nullptr, or where updates by the roots of `seconds` go: may be `updates`
  void* factors;        // (matrices, rows), or where there is `divided` (matrices,)
  Dtype dtype;          // of the updates
  Dtype wide;           // of all others, and of the arithmetic: f32, or on the host f64
  int64_t matrices, rows, columns;
  double beta2, eps;
  double rms;  // root mean square of the entries of what is made; 0: the matrix keeps its length

  int64_t size() const { return rows * columns; }
};

// Of scratch, the first counter hands out the work, the next are counters of matrices, and behind them are their flags;
// the partials of a block are kLengths.
struct NormalizeParams {
  std::vector<Stack> stacks;  // with elements
  Scratch scratch;
};

// Items of `apply_update`, and what becomes of the directions of some.
struct NormalizedItemsParams : ItemsParams {
  std::vector<Stack> stacks;  // the i-th is item i's, and has no matrices where its direction is taken as it is
  Scratch meeting;            // of the stacks, as above
};

enum Length : int { kBefore, kAfter, kLengths };  // sums of squares of a matrix, before and after it is divided

constexpr int64_t kMostOfRow = INT32_MAX;  // elements that share a factor, and rows of a matrix
constexpr int64_t kRowsAtOnce = 8;         // warps of a block
constexpr int64_t kLongRow = 8192;         // elements from which all of a block takes a row

// Rows of a block, all of one matrix. Less than kLongRow elements are a warp's.
STEEPEST_HD inline int64_t rows_of_block(int64_t columns) {
  const int64_t fit = kChunk / columns;
  if (columns >= kLongRow) return fit < 1 ? 1 : fit;
  const int64_t turns = fit / kRowsAtOnce;
  return kRowsAtOnce * (turns < 1 ? 1 : turns > 8 ? 8 : turns);
}

// Blocks of a matrix.
inline int64_t blocks_of(const Stack& stack) {
  if (stack.divided != nullptr) return (stack.size() - 1) / kChunk + 1;
  return (stack.rows - 1) / rows_of_block(stack.columns) + 1;
}

constexpr int64_t counters_of(int64_t matrices) { return 1 + 2 * matrices; }

// `stream` is a cudaStream_t on the current device. Throw when a launch fails.
void normalize_on_device(const NormalizeParams& params, void* stream);
void normalize_and_apply_on_device(const NormalizedItemsParams& params, void* stream);
void normalize_on_host(const NormalizeParams& params);
void normalize_and_apply_on_host(const NormalizedItemsParams& params);

}  // namespace steepest::multi_tensor
