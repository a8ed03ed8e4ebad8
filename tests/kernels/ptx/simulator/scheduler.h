// Runs a launch: blocks, clusters and warps, interleaved by a seed. Clusters start as there is room for them on the
// multiprocessors, in an order that the seed draws.
#pragma once
#include "machine.h"

namespace ptxsim {
// Runs a kernel whose launch was checked to its end; throws a std::runtime_error if it fails.
void run(const Kernel& kernel, Dim3 grid, Dim3 block, int cluster, size_t dynamic_bytes, const vector<u8>& params);
}  // namespace ptxsim
