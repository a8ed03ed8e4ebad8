// How the elements of an item's tensors meet in memory. Sizes and strides are in elements. Host only.
#pragma once

#include <cstdint>
#include <vector>

namespace steepest::multi_tensor {

using Ints = std::vector<int64_t>;

// Dimensions of the strided walk. Neighbouring dimensions are merged first, so real tensors stay well below it.
constexpr int kMaxDims = 4;
constexpr int kMaxTensors = 6;

struct Walk {
  int dims = 0;  // innermost last
  int64_t size[kMaxDims];
  int64_t stride[kMaxTensors][kMaxDims];
};

// True when all are the same dense permutation of the same memory order, so that element i of one flat range meets
// element i of the others whatever the order of the dimensions.
bool is_flat(const Ints& sizes, const std::vector<Ints>& strides);

// True when two indices may name the same element: such a tensor cannot be written in place.
bool may_overlap(const Ints& sizes, const Ints& strides);

// Fills `walk` with the merged dimensions, tensor by tensor; false when more than kMaxDims are left.
bool merge_dims(const Ints& sizes, const std::vector<Ints>& strides, Walk& walk);

}  // namespace steepest::multi_tensor
