// Memory in which blocks that share a matrix meet: zero at first, and counters zero again after every launch.
#pragma once

#include <cstdint>

namespace steepest {

struct Scratch {
  uint64_t* counters;
  double* partials;
};

}  // namespace steepest
