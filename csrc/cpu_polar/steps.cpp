#include "cpu_polar/steps.h"

#include <stdexcept>

#include "cpu_polar/words.h"
#include "multi_tensor/stack_steps.h"

namespace steepest::cpu_polar {
namespace {

using multi_tensor::Item;
using multi_tensor::ItemsParams;
using multi_tensor::put;
using multi_tensor::Stage;

void* at(int64_t address) { return multi_tensor::at<void>(address); }
Dtype type(int64_t code) { return static_cast<Dtype>(code); }

// Of X, and of D.
int64_t bytes(const PolarStep& step) {
  return step.matrices * step.rows * step.columns * bytes_of(type(step.input_type));
}

class Steps {
 public:
  explicit Steps(const PolarSteps& all) : all_(all), stacks_(all.steps, all.count, all.hypers) {}

  void decide() {
    multi_tensor::GradStatsParams params{};
    for (int64_t i = 0; i < all_.count; ++i)
      params.gradients.push_back(stacks_.gradient(i, all_.grads[i], type(all_.steps[i].grad_type)));
    params.scaling = all_.scaling, params.rows = all_.rows, params.sums = all_.sums, params.skipped = all_.skipped;
    params.scratch = stacks_.scratch(), params.decide = true;
    multi_tensor::grad_stats_on_host(params);
  }

  // As many at once as there is room for.
  void take() {
    int64_t first = 0, room = 0;
    for (int64_t i = 0; i < all_.count; ++i) {
      const int64_t more = 2 * bytes(all_.steps[i]);
      if (i > first && room + more > all_.workspace) take(first, i), first = i, room = 0;
      room += more;
    }
    take(first, all_.count);
  }

 private:
  void take(int64_t first, int64_t end) {
    // Each has memory of its own: what is larger than 32 MiB the system would map anew, and clear, in every step.
    std::vector<Words> room;
    const auto make_room = [&](const PolarStep& step) {
      room.push_back(make_words((bytes(step) + 3) / 4));
      return room.back().get();
    };
    ItemsParams moments{{}, all_.rows, all_.sums, stacks_.scratch()}, weights = moments;
    std::vector<std::vector<Stack>> stacks(all_.chains.size());
    for (int64_t i = first; i < end; ++i) {
      const PolarStep& step = all_.steps[i];
      void *const x = make_room(step), *const d = make_room(step);
      moments.items.push_back(item_of(i, x, false)), weights.items.push_back(item_of(i, d, true));
      stacks[step.chain].push_back({step.matrices, step.rows, step.columns, x, type(step.input_type), d,
                                    type(step.input_type), static_cast<float*>(at(step.slack))});
    }
    run_on_host(Stage::update_moments, moments);
    for (size_t k = 0; k < stacks.size(); ++k) {
      const ChainOfSteps& of = all_.chains[k];
      if (!stacks[k].empty()) run(of.chain, stacks[k], of.dtype, *kernels_for(of.dtype), of.at_once);
    }
    run_on_host(Stage::apply_update, weights);
  }

  // What `update_moments` takes, or `apply_update`.
  Item item_of(int64_t i, void* direction, bool moves) const {
    const PolarStep& step = all_.steps[i];
    Item item = stacks_.item(i, all_.ratios[i]);
    put(item, multi_tensor::kGrad, moves ? nullptr : at(all_.grads[i]), type(step.grad_type));
    put(item, multi_tensor::kMomentum, moves ? nullptr : at(step.momentum), type(step.momentum_type));
    put(item, multi_tensor::kSecond, at(step.second), type(step.second_type));
    put(item, multi_tensor::kDirection, direction, type(step.input_type));
    put(item, multi_tensor::kParam, moves ? at(all_.params[i]) : nullptr, type(step.param_type));
    put(item, multi_tensor::kMantissa, moves ? at(step.mantissa) : nullptr, Dtype::i16);
    return item;
  }

  const PolarSteps& all_;
  multi_tensor::StackSteps<PolarStep> stacks_;
};

}  // namespace

std::vector<ChainOfSteps> chains_of(const int64_t* ints, const double* floats, int64_t count) {
  std::vector<ChainOfSteps> chains;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t nodes = ints[0], tables = ints[1], columns = ints[2];
    const int64_t* const node_ints = ints + 8;
    const int64_t* const powers = node_ints + polar::kNodeInts * nodes;
    const double* const constants = floats + polar::kNodeFloats * nodes;
    const double* const least = constants + tables * columns;
    const double eps = least[tables - 1];
    ChainOfSteps chain{};
    chain.chain.numbering = polar::numbering_of({constants, constants + tables * columns}, {powers, powers + columns},
                                                {least, least + tables - 1}, ints[3] != 0, eps);
    chain.chain.nodes = polar::nodes_of(node_ints, floats, nodes, columns);
    chain.chain.result = static_cast<polar::Buffer>(ints[4]), chain.chain.divides = ints[5] != 0;
    chain.dtype = type(ints[6]), chain.at_once = ints[7];
    if (kernels_for(chain.dtype) == nullptr) throw std::runtime_error("there are no products for this processor");
    chains.push_back(chain);
    ints = powers + columns, floats = least + tables;
  }
  return chains;
}

void polar_steps(const PolarSteps& all) {
  Steps steps(all);
  steps.decide();
  steps.take();
}

}  // namespace steepest::cpu_polar
