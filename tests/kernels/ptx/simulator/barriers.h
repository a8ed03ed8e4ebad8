// Barriers of a block, of a cluster, and in shared memory.
#pragma once
#include "memory.h"

namespace ptxsim {
// Completes the cluster's barrier when every warp has arrived or left.
void check_cluster(Cluster& c, Launch& l);

// Copies that a barrier in shared memory waits for: `bytes` have landed.
void complete_bytes(Block& cta, u64 offset, s64 bytes, const Warp& issuer, const Instruction& in);
// cp.async.mbarrier.arrive: one arrival, with noinc of those that are expected, else of one more.
void arrive_at(Warp& w, const Instruction& in, u64 address, int space, int lane, s64 count, s64 expected_bytes);
}  // namespace ptxsim
