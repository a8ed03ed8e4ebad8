#include "multi_tensor/plan.h"

#include <limits>
#include <stdexcept>
#include <string>

namespace steepest::multi_tensor {

std::vector<Launch> plan_launches(const std::vector<Extent>& items, int64_t chunk, int capacity) {
  if (chunk < 1 || capacity < 1)
    throw std::invalid_argument("chunk and capacity must be at least 1, got " + std::to_string(chunk) + " and " +
                                std::to_string(capacity));
  constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();  // of a grid's first dimension
  std::vector<Launch> launches;
  for (size_t i = 0; i < items.size(); ++i) {
    const auto [matrices, size, parts] = items[i];
    if (matrices == 0 || size == 0) continue;
    const int64_t chunks = (size - 1) / chunk + 1;
    if (matrices < 0 || size < 0 || parts < 0 || chunks + parts > kMaxBlocks / matrices)
      throw std::invalid_argument("item " + std::to_string(i) + " has " + std::to_string(matrices) + " matrices of " +
                                  std::to_string(size) + " elements; a launch takes 0 to " +
                                  std::to_string(kMaxBlocks) + " chunks of " + std::to_string(chunk) +
                                  " and other parts");
    const bool full =
        launches.empty() || static_cast<int>(launches.back().items.size()) == capacity ||
        int64_t{launches.back().chunks} + launches.back().parts > kMaxBlocks - matrices * (chunks + parts);
    if (full) launches.emplace_back();
    Launch& launch = launches.back();
    launch.items.push_back(static_cast<int>(i));
    launch.first_chunk.push_back(launch.chunks), launch.first_part.push_back(launch.parts);
    launch.chunks += static_cast<int32_t>(matrices * chunks), launch.parts += static_cast<int32_t>(matrices * parts);
  }
  return launches;
}

}  // namespace steepest::multi_tensor
