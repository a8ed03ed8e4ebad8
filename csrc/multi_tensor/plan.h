// Which block works on which part of which tensor.
//
// Every tensor is cut into chunks of `chunk` elements; a launch takes up to `capacity` tensors (what its kernel
// arguments hold) and one block for every chunk of theirs. A block finds its tensor by bisection over `first_chunk`,
// so there is no table that grows with the number of elements.
#pragma once

#include <cstdint>
#include <vector>

#include "common/host_device.h"

namespace steepest::multi_tensor {

struct Launch {
  std::vector<int> tensors;          // positions in the caller's list; empty tensors are left out
  std::vector<int32_t> first_chunk;  // of each tensor, rising from 0
  int32_t chunks = 0;                // blocks of this launch
};

std::vector<Launch> plan_launches(const std::vector<int64_t>& numel, int64_t chunk, int capacity);

// Position of the last item whose first chunk is not after `block`; first_chunk(i) rises with i.
template <class FirstChunk>
STEEPEST_HD inline int owner(const FirstChunk& first_chunk, int count, int32_t block) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_chunk(middle) <= block)
      low = middle;
    else
      high = middle;
  }
  return low;
}

}  // namespace steepest::multi_tensor
