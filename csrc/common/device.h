// What a device is; no CUDA header in here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace steepest {

int multiprocessors_of(int32_t device);
int64_t l2_bytes_of(int32_t device);
int capability_of(int32_t device);  // 10 major + minor
bool has_clusters(int32_t device);  // whether blocks may be launched in clusters

// Lets launches of a kernel on the current device have up to so much dynamic shared memory. The limit belongs to the
// kernel and not to a launch: `bytes` is the most that any launch of it asks for there, and is set once. A limit that
// followed each launch would be lowered between another thread's limit and launch, and under a captured graph.
void allow_shared_memory(const void* kernel, size_t bytes);

// What shared memory a block may have on a device of this capability; 0 below 8.0, for which nothing here is built.
// Capabilities not known are given what the smallest known one has.
inline size_t shared_limit(int capability) {
  if (capability < 80) return 0;
  const bool large = capability == 90 || capability == 100 || capability == 103;
  const bool middle = capability == 80 || capability == 87;
  return size_t{large ? 227u : middle ? 163u : 99u} << 10;
}

}  // namespace steepest
