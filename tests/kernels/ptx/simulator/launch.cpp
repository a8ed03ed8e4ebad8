#include "launch.h"

#include "scheduler.h"

namespace ptxsim {
void launch(const Kernel& k, Dim3 grid, Dim3 block, int cluster, size_t dynamic_bytes, void** arguments) {
  const u64 threads = u64(block.x) * block.y * block.z;
  if (k.cluster) cluster = k.cluster;
  auto refuse = [&](const string& why) { throw Refused("launch of " + k.name.substr(0, 100) + " refused: " + why); };
  if (threads == 0 || threads > 1024 || threads > u64(k.most_threads))
    refuse(std::to_string(threads) + " threads of at most " + std::to_string(std::min(1024, k.most_threads)));
  if (k.threads && threads != u64(k.threads))
    refuse(std::to_string(threads) + " threads of " + std::to_string(k.threads));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u)
    refuse("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z));
  if (cluster < 1 || cluster > 8) refuse("a cluster of " + std::to_string(cluster) + " blocks");
  if (grid.x % u32(cluster)) refuse("the grid is not a multiple of the cluster");
  if (dynamic_bytes > k.allowed_dynamic || dynamic_bytes + k.shared_bytes > (227 << 10))
    refuse(std::to_string(dynamic_bytes) + " bytes of dynamic shared memory");
  if (k.param_bytes > 32764) refuse(std::to_string(k.param_bytes) + " bytes of parameters");
  vector<u8> params(k.param_bytes);
  for (size_t i = 0; i < k.param_sizes.size(); ++i)
    memcpy(params.data() + k.param_offsets[i], arguments[i], k.param_sizes[i]);
  run(k, grid, block, cluster, dynamic_bytes, params);
}
}  // namespace ptxsim
