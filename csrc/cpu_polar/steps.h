// Steps along polar factors (Muon's), whole, on the host; no tensor of torch is asked for anything.
//
//   look at G, and decide       M takes G, and gives X       D = X (X^T X)^-1/2       W moves by D
//
// One after the other what `grad_stats`, `update_moments`, `cpu_chain` and `apply_update` do, by the same functions,
// and so with their bits.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu_polar/chain.h"
#include "multi_tensor/params.h"

namespace steepest::cpu_polar {

// A row of the table that Python makes once (python/steepest/ops/polar_steps.py): a parameter that is one stack of
// matrices, contiguous. Types are Dtype, input_type that of X and D; an address is 0 where there is no such tensor.
struct PolarStep {
  int64_t matrices, rows, columns;
  int64_t grad_type, param_type, momentum_type, second_type, input_type;
  int64_t momentum, second, mantissa, step, slack;
  int64_t program, group;
  int64_t chain;  // which of the chains makes its polar factors
  int64_t place[3];
};

// A chain, the type of its products, and how many matrices may have buffers at a time.
struct ChainOfSteps {
  Chain chain;
  Dtype dtype;
  int64_t at_once;
};

// Chains as Python hands them over, one after another. Of each the integers are how many nodes, tables and columns of
// numbers it has, tight, result, divides, dtype and at_once, then those of nodes and the powers; the others those of
// nodes, the constants, the least slacks and eps. Throws for what is no chain.
std::vector<ChainOfSteps> chains_of(const int64_t* ints, const double* floats, int64_t count);

struct PolarSteps {
  const PolarStep* steps;  // the i-th has row i, and lines of the sums behind those of the steps before it
  const double* ratios;    // on the learning rate, for the shape
  int64_t count;
  std::vector<ChainOfSteps> chains;
  const int64_t *grads, *params;  // addresses of this step
  const double* hypers;           // kHypers for each group
  multi_tensor::Scaling scaling;
  double *rows, *sums;
  int64_t* skipped;
  int64_t workspace;  // bytes of X and D that there may be at once, of more than one parameter
};

void polar_steps(const PolarSteps& all);

}  // namespace steepest::cpu_polar
