// Which of several parts that lie behind one another has a place.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace steepest {

// The last of `count` parts that does not begin after `at`: where first(i), where part i begins, rises with i from
// first(0) <= at, and empty parts are followed by what is there.
template <class First>
STEEPEST_HD inline int32_t part_with(const First& first, int32_t count, int32_t at) {
  int32_t low = 0, high = count;
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (first(middle) <= at)
      low = middle;
    else
      high = middle;
  }
  return low;
}

}  // namespace steepest
