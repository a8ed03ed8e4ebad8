#include "multi_tensor/plan.h"

#include <limits>
#include <stdexcept>
#include <string>

namespace steepest::multi_tensor {

std::vector<Launch> plan_launches(const std::vector<int64_t>& numel, int64_t chunk, int capacity) {
  if (chunk < 1 || capacity < 1)
    throw std::invalid_argument("chunk and capacity must be at least 1, got " + std::to_string(chunk) + " and " +
                                std::to_string(capacity));
  constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();  // of a grid's first dimension
  std::vector<Launch> launches;
  for (size_t i = 0; i < numel.size(); ++i) {
    if (numel[i] == 0) continue;
    const int64_t chunks = (numel[i] - 1) / chunk + 1;
    if (numel[i] < 0 || chunks > kMaxBlocks)
      throw std::invalid_argument("tensor " + std::to_string(i) + " has " + std::to_string(numel[i]) +
                                  " elements; a launch takes 0 to " + std::to_string(kMaxBlocks) + " chunks of " +
                                  std::to_string(chunk));
    const bool full = launches.empty() || static_cast<int>(launches.back().tensors.size()) == capacity ||
                      launches.back().chunks > kMaxBlocks - chunks;
    if (full) launches.emplace_back();
    Launch& launch = launches.back();
    launch.tensors.push_back(static_cast<int>(i));
    launch.first_chunk.push_back(launch.chunks);
    launch.chunks += static_cast<int32_t>(chunks);
  }
  return launches;
}

}  // namespace steepest::multi_tensor
