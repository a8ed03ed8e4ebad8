#include "cpu_polar/steps.h"

#include <stdexcept>

#include "cpu_polar/words.h"

namespace steepest::cpu_polar {
namespace {

using multi_tensor::Item;
using multi_tensor::ItemsParams;
using multi_tensor::kSums;
using multi_tensor::Program;
using multi_tensor::Stage;

void* at(int64_t address) { return reinterpret_cast<void*>(address); }
Dtype type(int64_t code) { return static_cast<Dtype>(code); }

// Of X, and of D.
int64_t bytes(const PolarStep& step) {
  return step.matrices * step.rows * step.columns * bytes_of(type(step.input_type));
}

class Steps {
 public:
  explicit Steps(const PolarSteps& all) : all_(all) {
    int64_t line = 0, chunks = 0;
    for (int64_t i = 0; i < all.count; ++i) {
      const PolarStep& step = all.steps[i];
      lines_.push_back(line), line += step.matrices;
      chunks += step.matrices * ((step.rows * step.columns - 1) / multi_tensor::kChunk + 1);
    }
    lines_.push_back(line);
    partials_.resize(chunks * kSums);
  }

  void decide() {
    multi_tensor::GradStatsParams params{};
    for (int64_t i = 0; i < all_.count; ++i) {
      const PolarStep& step = all_.steps[i];
      multi_tensor::Gradient gradient{};
      gradient.at = at(all_.grads[i]), gradient.dtype = type(step.grad_type), gradient.flat = true;
      gradient.size = step.matrices * step.rows * step.columns;
      multi_tensor::Owner& owner = gradient.owner;
      owner.step = static_cast<float*>(at(step.step)), owner.program = Program(step.program);
      const double* const hypers = all_.hypers + step.group * multi_tensor::kHypers;
      for (int h = 0; h < multi_tensor::kHypers; ++h) owner.hyper[h] = {nullptr, hypers[h], Dtype::f64};
      owner.first_sum = lines_[i], owner.end_sum = lines_[i + 1];
      params.gradients.push_back(gradient);
    }
    params.scaling = all_.scaling, params.rows = all_.rows, params.sums = all_.sums, params.skipped = all_.skipped;
    params.scratch = {nullptr, partials_.data()}, params.decide = true;
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
    ItemsParams moments{{}, all_.rows, all_.sums, {nullptr, partials_.data()}}, weights = moments;
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
    Item item{};
    const auto put = [&](multi_tensor::Slot slot, void* address, int64_t code) {
      item.at[slot] = address, item.dtype[slot] = type(code);
    };
    put(multi_tensor::kGrad, moves ? nullptr : at(all_.grads[i]), step.grad_type);
    put(multi_tensor::kMomentum, moves ? nullptr : at(step.momentum), step.momentum_type);
    put(multi_tensor::kSecond, at(step.second), step.second_type);
    put(multi_tensor::kDirection, direction, step.input_type);
    put(multi_tensor::kParam, moves ? at(all_.params[i]) : nullptr, step.param_type);
    put(multi_tensor::kMantissa, moves ? at(step.mantissa) : nullptr, static_cast<int64_t>(Dtype::i16));
    item.matrices = step.matrices, item.size = step.rows * step.columns;
    item.row = static_cast<int32_t>(i), item.first_sum = lines_[i];
    item.program = Program(step.program), item.ratio = all_.ratios[i];
    for (int k = 0; k < 3; ++k) item.place[k] = static_cast<uint32_t>(step.place[k]);
    item.flat = true;
    return item;
  }

  const PolarSteps& all_;
  std::vector<int64_t> lines_;
  std::vector<double> partials_;
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
