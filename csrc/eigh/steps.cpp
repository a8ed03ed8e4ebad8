#include "eigh/steps.h"

#include <algorithm>
#include <vector>

#include "cpu_polar/syrk.h"
#include "cpu_polar/words.h"
#include "eigh/rotate.h"

namespace steepest::eigh {
namespace {

using multi_tensor::Item;
using multi_tensor::ItemsParams;
using multi_tensor::kColumns;
using multi_tensor::kHypers;
using multi_tensor::kSums;
using multi_tensor::Owner;
using multi_tensor::Program;
using multi_tensor::Stage;

template <class T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

int64_t elements(const StepInBases& step) { return step.matrices * step.rows * step.columns; }

class Steps {
 public:
  Steps(const StepsInBases& all, const cpu_polar::Kernels& kernels) : all_(all), kernels_(kernels) {
    int64_t line = 0, chunks = 0;
    for (int64_t i = 0; i < all.count; ++i) {
      const StepInBases& step = all.steps[i];
      lines_.push_back(line), line += step.matrices;
      const int64_t size = step.rows * step.columns;
      chunks += step.matrices * ((size - 1) / multi_tensor::kChunk + 1);
    }
    lines_.push_back(line);
    partials_.resize(chunks * kSums);
  }

  void decide() {
    multi_tensor::GradStatsParams params{};
    std::vector<Owner> owners;
    for (int64_t i = 0; i < all_.count; ++i) {
      const StepInBases& step = all_.steps[i];
      Owner owner{};
      owner.step = at<float>(step.step), owner.program = Program(step.program);
      for (int h = 0; h < kHypers; ++h) owner.hyper[h] = {nullptr, hypers(i)[h], Dtype::f64};
      owner.first_sum = lines_[i], owner.end_sum = lines_[i + 1];
      multi_tensor::Gradient gradient{};
      gradient.at = at<const void>(all_.grads[i]), gradient.dtype = Dtype::f32, gradient.size = elements(step);
      gradient.owner = owner, gradient.flat = true;
      params.gradients.push_back(gradient), owners.push_back(owner);
    }
    params.scaling = all_.scaling, params.rows = all_.rows, params.sums = all_.sums, params.skipped = all_.skipped;
    params.scratch = {nullptr, partials_.data()}, params.decide = false;
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
    std::fill_n(refreshes.left, 2 * lines_.back(), 0);
    std::vector<Tracked> stacks;
    for (int64_t i = 0; i < all_.count; ++i) {
      if (!refreshes.due[i] || !is_taken(i)) continue;
      const StepInBases& step = all_.steps[i];
      Tracked stack{step.matrices, step.rows, step.columns, {}, at<float>(step.second)};
      for (int64_t k = 0; k < 2; ++k)
        stack.sides[k] = {at<const float>(step.factors[k]), at<float>(step.bases[k]), at<int32_t>(step.statuses[k]),
                          refreshes.left + 2 * lines_[i] + k * step.matrices, nullptr};
      stacks.push_back(stack);
    }
    track(stacks, refreshes.limits, kernels_);
  }

 private:
  bool is_taken(int64_t i) const { return all_.rows[i * kColumns + multi_tensor::kFinite] != 0; }
  const double* hypers(int64_t i) const { return all_.hypers + all_.steps[i].group * kHypers; }

  void take(const std::vector<int64_t>& some) {
    std::vector<cpu_polar::Words> room;  // of each its own, as of cpu_polar/steps.cpp
    ItemsParams moments{{}, all_.rows, all_.sums, {nullptr, partials_.data()}}, weights = moments;
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
    Item item{};
    const auto put = [&](multi_tensor::Slot slot, int64_t address, Dtype dtype) {
      item.at[slot] = at<void>(address), item.dtype[slot] = dtype;
    };
    put(multi_tensor::kGrad, all_.grads[i], Dtype::f32);
    put(multi_tensor::kMomentum, step.momentum, static_cast<Dtype>(step.momentum_type));
    put(multi_tensor::kParam, all_.params[i], static_cast<Dtype>(step.param_type));
    put(multi_tensor::kMantissa, step.mantissa, Dtype::i16);
    item.matrices = step.matrices, item.size = step.rows * step.columns;
    item.row = static_cast<int32_t>(i), item.first_sum = lines_[i];
    item.program = Program(step.program), item.ratio = all_.numbers[i].ratio;
    for (int k = 0; k < 3; ++k) item.place[k] = static_cast<uint32_t>(step.place[k]);
    item.flat = true;
    return item;
  }

  AdamStep make_turn(int64_t i, float* update) const {
    const StepInBases& step = all_.steps[i];
    const double beta = hypers(i)[multi_tensor::kHyperBeta2], eps = hypers(i)[multi_tensor::kHyperEps];
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
  std::vector<int64_t> lines_;
  std::vector<double> partials_;
};

}  // namespace

void steps_in_bases(const StepsInBases& all, const cpu_polar::Kernels& kernels) {
  Steps steps(all, kernels);
  steps.decide();
  steps.take();
  steps.refresh();
}

}  // namespace steepest::eigh
