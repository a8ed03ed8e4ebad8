// Steps of Adam in the eigenbases of Kronecker factors (SOAP's), whole, on the host; no tensor of torch is asked for
// anything.
//
//   look at G, and decide       M takes G       V takes (L^T G R)^2, U = L ((L^T M R) / D^2) R^T       W moves by U
//   factors take G G^T and G^T G      bases that are due follow their factors
//
// One after the other what `grad_stats`, `decide_steps`, `update_moments`, `adam_in_bases`, `apply_update`,
// `update_factors` and `track_bases` do, by the same functions, and so with their bits.
#pragma once

#include <cstdint>

#include "cpu_polar/kernels.h"
#include "eigh/iterate.h"
#include "multi_tensor/params.h"

namespace steepest::eigh {

// A row of the table that Python makes once (python/steepest/ops/steps_in_bases.py): a parameter that is one stack of
// matrices, contiguous. Gradients, factors, bases and second moments are fp32. Types are Dtype; an address is 0 where
// there is no such tensor.
struct StepInBases {
  int64_t matrices, rows, columns;
  int64_t param_type, momentum_type;
  int64_t momentum, second, mantissa, step, learned;
  int64_t factors[2], bases[2], statuses[2];
  int64_t corrected, inside;  // whether second moments are corrected for their start, and where eps is (rotate.h)
  int64_t program, group;
  int64_t place[3];
};

// And its numbers: on the learning rate, for the shape, and what a gradient may have at most that is a step: sum of
// squares and magnitude.
struct StepNumbers {
  double ratio, most_square, most;
};

// Of the bases, those of steps whose flag in `due` is set; nullptr where none are. left: of every step a number for
// each matrix and side, those of the left side first: 1 where a basis that is due stays as it was.
struct Refreshes {
  const int8_t* due;
  int32_t* left;
  Limits limits;
};

struct StepsInBases {
  const StepInBases* steps;  // the i-th has row i, and lines of the sums behind those of the steps before it
  const StepNumbers* numbers;
  int64_t count;
  const int64_t *grads, *params;  // addresses of this step
  const double* hypers;           // kHypers for each group
  const double* betas;            // of the factors, one for each group
  multi_tensor::Scaling scaling;  // grad_scale is nullptr
  double *rows, *sums;
  int64_t* skipped;
  int64_t workspace;  // elements of updates that there may be at once, of more than one parameter
  Refreshes refreshes;
};

void steps_in_bases(const StepsInBases& all, const cpu_polar::Kernels& kernels);

}  // namespace steepest::eigh
