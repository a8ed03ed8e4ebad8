// Whole steps on the host: a gradient is looked at and taken while it is in the cache, and no tensor of torch is asked
// for anything.
//
// For parameters whose direction is the element itself (AdamW's), where no other parameter's gradient has a say. A
// thread looks at the gradient of a parameter, decides and moves it; all threads share one that is large beside the
// others. Formulas, cut into chunks and order of sums are those of `grad_stats` and `update_moments` (host.cpp), and so
// are the bits.
#pragma once

#include <cstdint>

#include "multi_tensor/params.h"

namespace steepest::multi_tensor {

// A row of the table that Python makes once (python/steepest/ops/whole_steps.py): a parameter whose tensors are
// contiguous, by its addresses. Types are Dtype; an address is 0 where there is no such tensor.
struct WholeStep {
  int64_t size;
  int64_t grad_type, param_type, momentum_type, second_type;
  int64_t momentum, second, mantissa, step;
  int64_t program, group;
  int64_t place[3];
};

struct WholeSteps {
  const WholeStep* steps;  // the i-th has row i and line i of the tables
  int64_t count;
  const int64_t *grads, *params;  // addresses of this step
  const double* hypers;           // kHypers for each group
  Scaling scaling;
  double *rows, *sums;
  int64_t* skipped;
};

void whole_steps_on_host(const WholeSteps& all);

}  // namespace steepest::multi_tensor
