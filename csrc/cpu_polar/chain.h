// A chain of products (polar/chain.h) on a CPU, whole matrices at a time; no torch in here.
#pragma once

#include <vector>

#include "cpu_polar/kernels.h"
#include "polar/chain.h"

namespace steepest::cpu_polar {

// Matrices of one shape, contiguous; nothing of them is written but out and slack.
struct Stack {
  int64_t matrices, rows, columns;
  const void* x;
  Dtype x_dtype;  // f32 or bf16
  void* out;
  Dtype out_dtype;
  float* slack;  // (matrices,)

  int64_t side() const { return rows < columns ? rows : columns; }
  int64_t size() const { return rows * columns; }
};

struct Chain {
  std::vector<polar::Node> nodes;  // after the first Gram product
  polar::Buffer result;
  polar::Numbering numbering;
  bool divides;  // X by its Frobenius norm before anything else; the numbers are constants then, and every slack is 1
};

// Every matrix of every stack, in parallel, at_once of them at most; dtype: of the products, f32 or bf16. A matrix has
// the same bits whatever else is in the call and however many threads there are.
void run(const Chain& chain, const std::vector<Stack>& stacks, Dtype dtype, const Kernels& kernels, int64_t at_once);

}  // namespace steepest::cpu_polar
