// Products of a warpgroup: their factors in shared memory are read at any time between the issue and the wait.
#pragma once
#include "machine.h"

namespace ptxsim {
// Executes the warpgroup's oldest group, if all four warps have issued it.
void finish_oldest_group(Warp& w);
}  // namespace ptxsim
