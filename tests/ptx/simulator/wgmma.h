#pragma once
#include "machine.h"

namespace ptxsim {
// Executes the oldest group of a warp.
void finish_group(Warp& w);
}  // namespace ptxsim
