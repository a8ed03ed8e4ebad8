// The ops of matrices that are stepped in eigenbases of their factors, on a CPU: check -> pointers -> loops.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu_polar/kernels.h"
#include "cpu_polar/syrk.h"
#include "eigh/coupled.h"
#include "eigh/iterate.h"
#include "eigh/rotate.h"
#include "ops/op_checks.h"

namespace steepest {
namespace {

using Tensors = std::vector<Tensor>;

const cpu_polar::Kernels& kernels_of(const char* op) {
  const cpu_polar::Kernels* const kernels = cpu_polar::kernels_for(Dtype::f32);
  STD_TORCH_CHECK(kernels != nullptr, op, " has no products for this processor");
  return *kernels;
}

// A contiguous tensor of so many elements; nullptr for one without elements where that is allowed.
template <class T>
T* data_of(const Tensor& tensor, int64_t elements, const char* name, size_t i, bool may_be_absent = false) {
  constexpr ScalarType type = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Int;
  if (may_be_absent && tensor.numel() == 0) return nullptr;
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.scalar_type() == type && tensor.is_contiguous() && tensor.numel() == elements, name,
      "[", i, "] must be a contiguous tensor of ", torch::headeronly::toString(type), " on the CPU with ", elements,
      " elements");
  return pointer<T>(tensor);
}

bool taken(const Tensor& flag, size_t i) {
  STD_TORCH_CHECK(flag.is_cpu() && flag.scalar_type() == ScalarType::Bool && flag.numel() == 1, "flags[", i,
                  "] must be one bool on the CPU");
  return *static_cast<const bool*>(flag.const_data_ptr());
}

void check_stack(const Tensor& x, const char* name, size_t i) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3 && x.scalar_type() == ScalarType::Float && x.is_contiguous(), name, "[", i,
                  "] must be a contiguous float32 stack of matrices on the CPU");
}

// What a stack's factors, of which one may be absent, take of its gradients.
struct FactorUpdate {
  bool taken;
  int64_t matrices, sizes[2];
  const float* grads;
  float *factors[2], *count, weight;
};

// The stacks of a call, whose counts go up once all is done (`count_up`).
std::vector<FactorUpdate> checked_updates(const Tensors& grads, const Tensors& factors, const Tensors& counts,
                                          const Tensors& flags, double beta) {
  check_lengths(factors.size(), 2 * grads.size(), "factors"), check_lengths(counts.size(), grads.size(), "counts");
  check_lengths(flags.size(), grads.size(), "flags");
  STD_TORCH_CHECK(beta >= 0 && beta < 1, "beta is ", beta, "; it is at least 0 and below 1");
  std::vector<FactorUpdate> updates;
  for (size_t i = 0; i < grads.size(); ++i) {
    check_stack(grads[i], "grads", i);
    FactorUpdate update{};
    update.taken = taken(flags[i], i), update.matrices = grads[i].size(0);
    update.sizes[0] = grads[i].size(1), update.sizes[1] = grads[i].size(2);
    update.grads = static_cast<const float*>(grads[i].const_data_ptr());
    for (size_t side = 0; side < 2; ++side) {
      const int64_t n = update.sizes[side];
      update.factors[side] =
          data_of<float>(factors[2 * i + side], update.matrices * n * n, "factors", 2 * i + side, true);
    }
    update.count = data_of<float>(counts[i], 1, "counts", i);
    update.weight = cpu_polar::newest_weight(*update.count, beta);
    updates.push_back(update);
  }
  return updates;
}

void count_up(const std::vector<FactorUpdate>& updates) {
  for (const FactorUpdate& update : updates)
    if (update.taken) *update.count += 1;
}

void update_factors(const Tensors& grads, const Tensors& factors, const Tensors& counts, const Tensors& flags,
                    double beta) {
  const std::vector<FactorUpdate> updates = checked_updates(grads, factors, counts, flags, beta);
  cpu_polar::FactorAverages averages;
  for (const FactorUpdate& each : updates)
    if (each.taken)
      averages.add(each.matrices, each.sizes[0], each.sizes[1], each.grads, each.grads, each.factors[0],
                   each.factors[1], each.weight);
  averages.take(kernels_of("update_factors"));
  count_up(updates);
}

void update_coupled_factors(const Tensors& grads, const Tensors& bases, const Tensors& factors, const Tensors& values,
                            const Tensors& counts, const Tensors& flags, double beta, bool limited) {
  check_lengths(bases.size(), 2 * grads.size(), "bases"), check_lengths(values.size(), 2 * grads.size(), "values");
  const std::vector<FactorUpdate> updates = checked_updates(grads, factors, counts, flags, beta);
  std::vector<eigh::Coupled> stacks;
  for (size_t i = 0; i < updates.size(); ++i) {
    const FactorUpdate& update = updates[i];
    eigh::Coupled stack{};
    stack.matrices = update.matrices, stack.rows = update.sizes[0], stack.columns = update.sizes[1];
    stack.grads = update.grads;
    for (size_t side = 0; side < 2; ++side) {
      const size_t k = 2 * i + side;
      const int64_t n = update.sizes[side];
      stack.factors[side] = update.factors[side];
      if (stack.factors[side] == nullptr) continue;
      stack.bases[side] = data_of<float>(bases[k], update.matrices * n * n, "bases", k);
      stack.values[side] = data_of<float>(values[k], update.matrices * n, "values", k);
    }
    stack.weight = update.weight, stack.beta = static_cast<float>(beta);
    stack.started = *update.count > 0, stack.limited = limited;
    if (update.taken) stacks.push_back(stack);
  }
  eigh::update_coupled(stacks, kernels_of("update_coupled_factors"));
  count_up(updates);
}

eigh::Side make_side(const Tensor& factor, const Tensor& basis, const Tensor& status, int64_t matrices, int64_t n,
                     int32_t* left, size_t i) {
  eigh::Side side{};
  side.p = data_of<float>(factor, matrices * n * n, "factors", i, true);
  if (side.p == nullptr) return side;
  side.basis = data_of<float>(basis, matrices * n * n, "bases", i);
  side.status = data_of<int32_t>(status, matrices, "statuses", i), side.left = left;
  return side;
}

void track_bases(const Tensors& factors, const Tensors& bases, const Tensors& statuses, const Tensors& seconds,
                 const Tensors& values, const Tensors& flags, const std::vector<int64_t>& shapes,
                 const std::vector<double>& limits, int64_t accepted, int64_t steps, const Tensor& left) {
  const size_t count = flags.size();
  check_lengths(factors.size(), 2 * count, "factors"), check_lengths(bases.size(), 2 * count, "bases");
  check_lengths(statuses.size(), 2 * count, "statuses"), check_lengths(seconds.size(), count, "seconds");
  check_lengths(values.size(), 2 * count, "values");
  check_lengths(shapes.size(), 3 * count, "shapes"), check_lengths(limits.size(), 3, "limits");
  int64_t lines = 0;
  for (size_t i = 0; i < count; ++i) lines += 2 * shapes[3 * i];
  auto* line = data_of<int32_t>(left, lines, "left", 0, lines == 0);
  std::vector<eigh::Tracked> stacks;
  for (size_t i = 0; i < count; ++i) {
    const int64_t matrices = shapes[3 * i], sizes[] = {shapes[3 * i + 1], shapes[3 * i + 2]};
    eigh::Tracked stack{matrices, sizes[0], sizes[1], {}, nullptr};
    for (size_t side = 0; side < 2; ++side, line += matrices) {
      const size_t k = 2 * i + side;
      stack.sides[side] = make_side(factors[k], bases[k], statuses[k], matrices, sizes[side], line, k);
      stack.sides[side].values = data_of<float>(values[k], matrices * sizes[side], "values", k, true);
      std::fill_n(line, matrices, 0);
    }
    stack.second = data_of<float>(seconds[i], matrices * sizes[0] * sizes[1], "seconds", i, true);
    if (taken(flags[i], i)) stacks.push_back(stack);
  }
  STD_TORCH_CHECK(steps > 0, "steps is ", steps, "; it is at least 1");
  const eigh::Limits given{limits[0], limits[1], limits[2], static_cast<int32_t>(accepted), steps};
  eigh::track(stacks, given, kernels_of("track_bases"));
}

void check_rotations(size_t count, const Tensors& bases, const Tensors& seconds, const Tensors& steps,
                     const Tensors& outs) {
  check_lengths(bases.size(), 2 * count, "bases"), check_lengths(seconds.size(), count, "seconds");
  check_lengths(steps.size(), count, "steps"), check_lengths(outs.size(), count, "outs");
}

// Stack i, whose second moments may be absent.
eigh::Rotation make_rotation(const Tensors& xs, const Tensors& bases, const Tensors& seconds, const Tensors& steps,
                             const Tensors& outs, double beta, double eps, bool inside, bool may_be_absent, size_t i) {
  check_stack(xs[i], "xs", i);
  const int64_t matrices = xs[i].size(0), m = xs[i].size(1), n = xs[i].size(2), all = matrices * m * n;
  eigh::Rotation rotation{matrices, m,
                          n,        static_cast<const float*>(xs[i].const_data_ptr()),
                          nullptr,  nullptr,
                          nullptr,  1,
                          0,        data_of<float>(outs[i], all, "outs", i)};
  rotation.left = data_of<float>(bases[2 * i], matrices * m * m, "bases", 2 * i, true);
  rotation.right = data_of<float>(bases[2 * i + 1], matrices * n * n, "bases", 2 * i + 1, true);
  rotation.second = data_of<float>(seconds[i], all, "seconds", i, may_be_absent);
  eigh::set_divisor(rotation, data_of<float>(steps[i], 1, "steps", i, true), beta, eps, inside);
  return rotation;
}

void adam_in_bases(const Tensors& grads, const Tensors& xs, const Tensors& bases, const Tensors& seconds,
                   const Tensors& steps, double beta, double eps, bool inside, const Tensors& flags,
                   const Tensors& outs) {
  const size_t count = xs.size();
  check_rotations(count, bases, seconds, steps, outs);
  check_lengths(grads.size(), count, "grads"), check_lengths(flags.size(), count, "flags");
  std::vector<eigh::AdamStep> all;
  for (size_t i = 0; i < count; ++i) {
    const eigh::Rotation rotation = make_rotation(xs, bases, seconds, steps, outs, beta, eps, inside, false, i);
    const int64_t elements = rotation.matrices * rotation.rows * rotation.columns;
    const float* const grad = data_of<float>(grads[i], elements, "grads", i);
    float* const updated = taken(flags[i], i) ? data_of<float>(seconds[i], elements, "seconds", i) : nullptr;
    all.push_back({rotation, grad, updated, static_cast<float>(beta)});
  }
  eigh::adam(all, kernels_of("adam_in_bases"));
}

void rotate(const Tensors& xs, const Tensors& bases, const Tensors& seconds, const Tensors& steps, int64_t way,
            double beta, double eps, bool inside, const Tensors& flags, const Tensors& outs) {
  const size_t count = xs.size();
  check_rotations(count, bases, seconds, steps, outs);
  if (!flags.empty()) check_lengths(flags.size(), count, "flags");
  STD_TORCH_CHECK(way >= 0 && way <= static_cast<int64_t>(eigh::Way::kObserve), "way is ", way, "; it is 0, 1 or 2");
  const bool observes = way == static_cast<int64_t>(eigh::Way::kObserve);
  std::vector<eigh::Rotation> rotations;
  for (size_t i = 0; i < count; ++i) {
    const eigh::Rotation rotation = make_rotation(xs, bases, seconds, steps, outs, beta, eps, inside, !observes, i);
    if (flags.empty() || taken(flags[i], i)) rotations.push_back(rotation);
  }
  eigh::rotate(rotations, static_cast<eigh::Way>(way), static_cast<float>(beta), kernels_of("rotate"));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(steepest, CPU, m) {
  m.impl("update_factors", TORCH_BOX(&update_factors));
  m.impl("update_coupled_factors", TORCH_BOX(&update_coupled_factors));
  m.impl("track_bases", TORCH_BOX(&track_bases));
  m.impl("rotate", TORCH_BOX(&rotate));
  m.impl("adam_in_bases", TORCH_BOX(&adam_in_bases));
}

}  // namespace steepest
