#include "eigh/steps.h"

#include <algorithm>
#include <vector>

#include "cpu_polar/syrk.h"
#include "cpu_polar/words.h"
#include "eigh/rotate.h"
#include "multi_tensor/stack_steps.h"

namespace steepest::eigh {
namespace {

using multi_tensor::at;
using multi_tensor::Item;
using multi_tensor::ItemsParams;
using multi_tensor::kColumns;
using multi_tensor::Owner;
using multi_tensor::put;
using multi_tensor::Stage;

int64_t elements(const StepInBases& step) { return step.matrices * step.rows * step.columns; }

class Steps {
 public:
  Steps(const StepsInBases& all, const cpu_polar::Kernels& kernels)
      : all_(all), kernels_(kernels), stacks_(all.steps, all.count, all.hypers) {}

  void decide() {
    multi_tensor::GradStatsParams params{};
    std::vector<Owner> owners;
    for (int64_t i = 0; i < all_.count; ++i) {
      params.gradients.push_back(stacks_.gradient(i, all_.grads[i], Dtype::f32));
      owners.push_back(params.gradients.back().owner);
    }
    params.scaling = all_.scaling, params.rows = all_.rows, params.sums = all_.sums, params.skipped = all_.skipped;
    params.scratch = stacks_.scratch(), params.decide = false;
    multi_tensor::grad_stats_on_host(params);
    for (int64_t i = 0; i < all_.count; ++i) {
      double* const row = all_.rows + i * kColumns;
      const StepNumbers& numbers = all_.numbers[i];
      const bool taken =
          row[multi_tensor::kGradSq] <= numbers.most_square && row[multi_tensor::kGradMax] <= numbers.most;
      if (!taken) row[multi_tensor::kFinite] = 0;
    }
    multi_tensor::decide_steps_on_host({owners, all_.scaling.grad_scale, all_.rows, all_.sums, all_.skipped});
  }

  // Those that step, as many at once as there is room for.
  void take() {
    std::vector<int64_t> some;
    int64_t size = 0;
    for (int64_t i = 0; i < all_.count; ++i) {
      if (!is_taken(i)) continue;
      const int64_t more = elements(all_.steps[i]);
      if (!some.empty() && size + more > all_.workspace) {
        take(some);
        some.clear(), size = 0;
      }
      some.push_back(i), size += more;
    }
    if (!some.empty()) take(some);
  }

  void refresh() const {
    const Refreshes& refreshes = all_.refreshes;
    if (refreshes.due == nullptr) return;
    std::fill_n(refreshes.left, 2 * stacks_.lines(), 0);
    std::vector<Tracked> stacks;
    for (int64_t i = 0; i < all_.count; ++i) {
      if (!refreshes.due[i] || !is_taken(i)) continue;
      const StepInBases& step = all_.steps[i];
      Tracked stack{step.matrices, step.rows, step.columns, {}, at<float>(step.second)};
      for (int64_t k = 0; k < 2; ++k)
        stack.sides[k] = {at<const float>(step.factors[k]), at<float>(step.bases[k]), at<int32_t>(step.statuses[k]),
                          refreshes.left + 2 * stacks_.first_line(i) + k * step.matrices, nullptr};
      stacks.push_back(stack);
    }
    track(stacks, refreshes.limits, kernels_);
  }

 private:
  bool is_taken(int64_t i) const { return all_.rows[i * kColumns + multi_tensor::kFinite] != 0; }

  void take(const std::vector<int64_t>& some) {
    std::vector<cpu_polar::Words> room;  // of each its own, as of cpu_polar/steps.cpp
    ItemsParams moments{{}, all_.rows, all_.sums, stacks_.scratch()}, weights = moments;
    std::vector<AdamStep> turned;
    for (int64_t i : some) {
      room.push_back(cpu_polar::make_words(elements(all_.steps[i])));
      float* const update = reinterpret_cast<float*>(room.back().get());
      Item item = make_item(i);
      item.at[multi_tensor::kDirection] = update, item.dtype[multi_tensor::kDirection] = Dtype::f32;
      turned.push_back(make_turn(i, update));
      weights.items.push_back(item);
      weights.items.back().at[multi_tensor::kGrad] = weights.items.back().at[multi_tensor::kMomentum] = nullptr;
      item.at[multi_tensor::kParam] = item.at[multi_tensor::kMantissa] = nullptr;
      moments.items.push_back(item);
    }
    run_on_host(Stage::update_moments, moments);
    adam(turned, kernels_);
    run_on_host(Stage::apply_update, weights);
    update_factors(some);
  }

  Item make_item(int64_t i) const {
    const StepInBases& step = all_.steps[i];
    Item item = stacks_.item(i, all_.numbers[i].ratio);
    put(item, multi_tensor::kGrad, at<void>(all_.grads[i]), Dtype::f32);
    put(item, multi_tensor::kMomentum, at<void>(step.momentum), static_cast<Dtype>(step.momentum_type));
    put(item, multi_tensor::kParam, at<void>(all_.params[i]), static_cast<Dtype>(step.param_type));
    put(item, multi_tensor::kMantissa, at<void>(step.mantissa), Dtype::i16);
    return item;
  }

  AdamStep make_turn(int64_t i, float* update) const {
    const StepInBases& step = all_.steps[i];
    const double beta = stacks_.hypers(i)[multi_tensor::kHyperBeta2], eps = stacks_.hypers(i)[multi_tensor::kHyperEps];
    Rotation rotation{step.matrices,
                      step.rows,
                      step.columns,
                      update,
                      at<const float>(step.bases[0]),
                      at<const float>(step.bases[1]),
                      at<const float>(step.second),
                      1,
                      0,
                      update};
    set_divisor(rotation, step.corrected ? at<const float>(step.step) : nullptr, beta, eps, step.inside);
    return {rotation, at<const float>(all_.grads[i]), at<float>(step.second), static_cast<float>(beta)};
  }

  void update_factors(const std::vector<int64_t>& some) const {
    cpu_polar::FactorAverages averages;
    for (int64_t i : some) {
      const StepInBases& step = all_.steps[i];
      const float weight = cpu_polar::newest_weight(*at<float>(step.learned), all_.betas[step.group]);
      const auto* const g = at<const float>(all_.grads[i]);
      averages.add(step.matrices, step.rows, step.columns, g, g, at<float>(step.factors[0]), at<float>(step.factors[1]),
                   weight);
    }
    averages.take(kernels_);
    for (int64_t i : some) *at<float>(all_.steps[i].learned) += 1;
  }

  const StepsInBases& all_;
  const cpu_polar::Kernels& kernels_;
  multi_tensor::StackSteps<StepInBases> stacks_;
};

}  // namespace

void steps_in_bases(const StepsInBases& all, const cpu_polar::Kernels& kernels) {
  Steps steps(all, kernels);
  steps.decide();
  steps.take();
  steps.refresh();
}

}  // namespace steepest::eigh
