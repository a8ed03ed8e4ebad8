// `grad_stats`, `update_moments` and `apply_update` on the host, in parallel over chunks (host_chunk.h).
//
// The CPU's backend, and the proof of what the kernels share with it: the items, the cut into chunks, the strided walk,
// the formulas and the order in which a matrix' sums are added up.
#include "multi_tensor/host.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/binary_search.h"
#include "common/threads.h"
#include "common/vectors.h"
#include "multi_tensor/formulas.cuh"
#include "multi_tensor/params.h"
#include "multi_tensor/plan.h"

namespace steepest::multi_tensor {
namespace {

constexpr int kAllItems = 1 << 30;

// The chunks of all items in one list: (item, span).
template <class Items, class Extent_>
std::vector<std::pair<int, Span>> cut(const Items& items, const Extent_& extent) {
  std::vector<Extent> extents;
  for (const auto& item : items) extents.push_back(extent(item));
  std::vector<std::pair<int, Span>> chunks;
  for (const Launch& launch : plan_launches(extents, kChunk, kAllItems)) {
    const auto first = [&](int i) { return launch.first_chunk[i]; };
    for (int32_t b = 0; b < launch.chunks; ++b) {
      const int at = part_with(first, static_cast<int>(launch.items.size()), b), index = launch.items[at];
      chunks.emplace_back(index, span(extents[index].size, kChunk, b - launch.first_chunk[at]));
    }
  }
  return chunks;
}

// The rest of a measured row.
void decide_one(const Owner& owner, const float* grad_scale, const double* sums, int64_t* skipped, double* row) {
  double momentum_max = 0;
  for (int64_t line = owner.first_sum; line < owner.end_sum; ++line)
    momentum_max = std::max(momentum_max, sums[line * kSums + kMomentumMax]);
  if (!decide(owner, grad_scale, momentum_max, row)) ++*skipped;
}

}  // namespace

const HostChunks& best_chunks() {
#ifdef STEEPEST_HAS_X86_SETS
  static const HostChunks& best = *of_widest_vectors(&avx512::chunks, &avx2::chunks, &baseline::chunks);
  return best;
#else
  return baseline::chunks;
#endif
}

void run_on_host(Stage stage, const ItemsParams& params) {
  const auto chunks = cut(params.items, [](const Item& item) { return Extent{item.matrices, item.size}; });
  parallel_for(static_cast<int64_t>(chunks.size()), [&](int64_t i) {
    const auto& [index, span] = chunks[i];
    const Item& item = params.items[index];
    const double* row = params.rows + int64_t{item.row} * kColumns;
    best_chunks().run(stage, item, row, span, params.scratch.partials + i * kSums);
  });
  // Chunks of a matrix follow one another, so that its sums are added up in their order.
  for (size_t i = 0; i < chunks.size();) {
    const auto& [index, span] = chunks[i];
    const Item& item = params.items[index];
    const bool skipped = params.rows[int64_t{item.row} * kColumns + kFinite] == 0;
    double* sums = params.sums + (item.first_sum + span.matrix) * kSums;
    double total[kSums] = {};
    for (size_t end = i + span.chunks; i < end; ++i)
      for (int c = 0; c < kSums; ++c) {
        const double x = params.scratch.partials[i * kSums + c];
        total[c] = is_largest(c) ? std::max(total[c], x) : total[c] + x;
      }
    if (skipped) continue;
    for (int c = 0; c < kSums; ++c)
      if (writes_sum(stage == Stage::apply_update, item.program.direction != Program::kGiven, c)) sums[c] = total[c];
  }
}

void grad_stats_on_host(const GradStatsParams& params) {
  const auto chunks = cut(params.gradients, [](const Gradient& gradient) { return Extent{1, gradient.size}; });
  parallel_for(static_cast<int64_t>(chunks.size()), [&](int64_t i) {
    best_chunks().grad_stats(params.gradients[chunks[i].first], chunks[i].second, params.scratch.partials + i * kSums);
  });
  for (size_t i = 0; i < chunks.size();) {
    const int index = chunks[i].first;
    double most = 0, square = 0;
    for (size_t end = i + chunks[i].second.chunks; i < end; ++i) {
      most = std::max(most, params.scratch.partials[i * kSums]);
      square += params.scratch.partials[i * kSums + 1];
    }
    const Gradient& gradient = params.gradients[index];
    double* row = params.rows + int64_t{index} * kColumns;
    measure(params.scaling, most, square, gradient.dtype == Dtype::f64, row);
    if (params.decide) decide_one(gradient.owner, params.scaling.grad_scale, params.sums, params.skipped, row);
  }
}

void decide_steps_on_host(const DecideStepsParams& params) {
  for (size_t i = 0; i < params.owners.size(); ++i)
    decide_one(params.owners[i], params.grad_scale, params.sums, params.skipped, params.rows + i * kColumns);
}

}  // namespace steepest::multi_tensor
