// Barriers of a block, of a cluster, and in shared memory.
#pragma once
#include <unordered_map>

#include "machine.h"

namespace ptxsim {
// Completes the cluster's barrier when every warp has arrived or left.
void check_cluster(Cluster& c, Launch& l);

struct MBarrier {
  u32 phase : 1, expected : 20, unused : 11;
  s32 pending : 20, rest : 12;
};
static_assert(sizeof(MBarrier) == 8);
// Bytes that a barrier in memory still waits for.
std::unordered_map<const u8*, s64>& tx_counts();
void trace(const Warp& w, const Block* of, const char* what, const u8* p, s64 n);
}  // namespace ptxsim
