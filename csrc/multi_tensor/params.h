// What the fused elementwise kernels are told; no torch in here. Sizes and strides are in elements.
#pragma once

#include <cstdint>
#include <vector>

#include "multi_tensor/layout.h"

namespace steepest::multi_tensor {

enum class Dtype : int32_t { f32, bf16, f16 };

// One parameter and its update. `p` is read and written; `u` may not overlap it.
struct AfterItem {
  void* p;
  const void* u;
  int64_t numel;
  Dtype p_dtype;
  Dtype u_dtype;
  bool flat;  // see layout.h; otherwise `walk` says where the elements are
  Walk walk;
};

// Device memory, fp32, one value per item: strides because a caller may hand a column of a table.
struct Factors {
  const float* keep;
  const float* step;
  int64_t keep_stride;
  int64_t step_stride;
};

struct AfterParams {
  std::vector<AfterItem> items;
  Factors factors;
};

// p_i <- keep[i] p_i - step[i] u_i. `stream` is a cudaStream_t on the current device. Throws when a launch fails.
void launch_after(const AfterParams& params, void* stream);

}  // namespace steepest::multi_tensor
