// How the elements of a parameter and its update meet in memory. Sizes and strides are in elements. Host only.
#pragma once

#include <cstdint>
#include <vector>

namespace steepest::multi_tensor {

using Ints = std::vector<int64_t>;

// Dimensions of the strided walk. Neighbouring dimensions are merged first, so real tensors stay well below it.
constexpr int kMaxDims = 5;

struct Walk {
  int dims = 0;  // innermost last
  int64_t size[kMaxDims];
  int64_t p_stride[kMaxDims];
  int64_t u_stride[kMaxDims];
};

// True when both are the same dense permutation of the same memory order, so that element i of one flat range meets
// element i of the other whatever the order of the dimensions.
bool is_flat(const Ints& sizes, const Ints& p_strides, const Ints& u_strides);

// True when two indices may name the same element: such a tensor cannot be written in place.
bool may_overlap(const Ints& sizes, const Ints& strides);

// Fills `walk` with the merged dimensions; false when more than kMaxDims are left.
bool merge_dims(const Ints& sizes, const Ints& p_strides, const Ints& u_strides, Walk& walk);

}  // namespace steepest::multi_tensor
