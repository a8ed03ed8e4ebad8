// The op that normalizes updates: check -> params -> device guard, stream -> launch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <vector>

#include "ops/stacks.h"

namespace steepest {
namespace {

using namespace multi_tensor;
using Tensors = std::vector<Tensor>;

void normalize_updates(const Tensors& updates, const Tensors& seconds, const Tensors& divided, const Tensors& factors,
                       const Tensor& scratch, const std::vector<double>& beta2, double eps, double rms) {
  const Place place(scratch);
  const size_t count = updates.size();
  check_lengths(seconds.size(), count, "seconds"), check_lengths(factors.size(), count, "factors");
  check_lengths(beta2.size(), count, "beta2");
  if (!divided.empty()) check_lengths(divided.size(), count, "divided");

  NormalizeParams params{};
  int64_t matrices = 0, blocks = 0;
  for (size_t i = 0; i < count; ++i) {
    Stack stack = make_stack(updates[i], seconds[i], divided.empty() ? nullptr : &divided[i], factors[i], place, i,
                             {"updates", "seconds"});
    add_rates(stack, beta2[i], eps, rms);
    if (updates[i].numel() == 0) continue;
    matrices += stack.matrices, blocks += stack.matrices * blocks_of(stack);
    params.stacks.push_back(stack);
  }
  if (params.stacks.empty()) return;
  params.scratch = check_meeting(scratch, place, matrices, blocks, "scratch");
#ifdef STEEPEST_HAS_CUDA
  if (place.cuda) {
    const torch::stable::accelerator::DeviceGuard guard(place.index);
    return normalize_on_device(params, current_stream(place.index));
  }
#endif
  normalize_on_host(params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(steepest, CPU, m) { m.impl("normalize_updates", TORCH_BOX(&normalize_updates)); }

#ifdef STEEPEST_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(steepest, CUDA, m) { m.impl("normalize_updates", TORCH_BOX(&normalize_updates)); }
#endif

}  // namespace steepest
