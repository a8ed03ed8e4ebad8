// One function per line of mathematics, all in fp32.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace steepest::multi_tensor {

// p <- keep p - step u.  (keep, step) = (1, 0) with u = 0 gives p back bit for bit, -0 included.
STEEPEST_HD inline float after(float p, float u, float keep, float step) { return fmaf(-step, u, keep * p); }

}  // namespace steepest::multi_tensor
