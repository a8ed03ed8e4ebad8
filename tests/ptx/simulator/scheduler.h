// Runs a launch: blocks, clusters and warps, interleaved by a seed.
#pragma once
#include "machine.h"

namespace ptxsim {
struct Settings {
  u64 seed = getenv("PTXSIM_SEED") ? strtoull(getenv("PTXSIM_SEED"), nullptr, 10) : 1;
  int multiprocessors = getenv("PTXSIM_SMS") ? atoi(getenv("PTXSIM_SMS")) : 8;
  u64 launches = 0;
};
Settings& settings();

void run(const Kernel& kernel, Dim3 grid, Dim3 block, size_t dynamic, int cluster, const vector<u8>& params);
}  // namespace ptxsim
