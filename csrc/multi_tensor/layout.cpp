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

bool is_flat(const Ints& sizes, const Ints& p_strides, const Ints& u_strides) {
  int64_t expected = 1;
  for (size_t d : by_stride(sizes, p_strides)) {
    if (p_strides[d] != expected || u_strides[d] != expected) return false;
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

bool merge_dims(const Ints& sizes, const Ints& p_strides, const Ints& u_strides, Walk& walk) {
  walk.dims = 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 1) continue;
    const int last = walk.dims - 1;
    const bool joins =
        last >= 0 && walk.p_stride[last] == p_strides[d] * sizes[d] && walk.u_stride[last] == u_strides[d] * sizes[d];
    if (!joins && walk.dims == kMaxDims) return false;
    const int at = joins ? last : walk.dims++;
    walk.size[at] = joins ? walk.size[at] * sizes[d] : sizes[d];
    walk.p_stride[at] = p_strides[d];
    walk.u_stride[at] = u_strides[d];
  }
  return true;
}

}  // namespace steepest::multi_tensor
