// Asynchronous copies: cp.async of a warp, and bulk copies of the async proxy.
#pragma once
#include "memory.h"

namespace ptxsim {
// Lets one of the warp's open copies land, as it may at any time.
void land_some(Warp& w);
// What a warp leaves behind lands.
void land_all(Warp& w);
}  // namespace ptxsim
