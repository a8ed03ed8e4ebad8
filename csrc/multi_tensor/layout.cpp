#include "multi_tensor/layout.h"

#include <algorithm>

namespace steepest::multi_tensor {
namespace {

// Dimensions of more than one element, smallest stride first.
std::vector<size_t> by_stride(const Ints& sizes, const Ints& strides) {
  std::vector<size_t> order;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1) order.push_back(d);
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  return order;
}

}  // namespace

bool is_flat(const Ints& sizes, const std::vector<Ints>& strides) {
  int64_t expected = 1;
  for (size_t d : by_stride(sizes, strides.at(0))) {
    for (const Ints& one : strides)
      if (one[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

bool may_overlap(const Ints& sizes, const Ints& strides) {
  int64_t reach = 0;  // offset of the last element of the dimensions seen so far
  for (size_t d : by_stride(sizes, strides)) {
    if (strides[d] <= reach) return true;
    reach += (sizes[d] - 1) * strides[d];
  }
  return false;
}

bool merge_dims(const Ints& sizes, const std::vector<Ints>& strides, Walk& walk) {
  walk.dims = 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 1) continue;
    const int last = walk.dims - 1;
    bool joins = last >= 0;
    for (size_t t = 0; joins && t < strides.size(); ++t) joins = walk.stride[t][last] == strides[t][d] * sizes[d];
    if (!joins && walk.dims == kMaxDims) return false;
    const int at = joins ? last : walk.dims++;
    walk.size[at] = joins ? walk.size[at] * sizes[d] : sizes[d];
    for (size_t t = 0; t < strides.size(); ++t) walk.stride[t][at] = strides[t][d];
  }
  return true;
}

}  // namespace steepest::multi_tensor
