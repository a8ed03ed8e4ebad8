#include "multi_tensor/whole_steps.h"

#include <algorithm>
#include <vector>

#include "common/threads.h"
#include "multi_tensor/formulas.cuh"
#include "multi_tensor/host.h"
#include "multi_tensor/plan.h"

namespace steepest::multi_tensor {
namespace {

constexpr int64_t kChunksAlone = 8;   // of a parameter that one thread takes at any rate: 512 KiB of fp32 gradients
constexpr int64_t kOverhead = 2048;   // elements that take as long as a parameter does by itself
constexpr int64_t kRun = 4 * kChunk;  // elements that a thread takes at once, of small parameters

void* at(int64_t address) { return reinterpret_cast<void*>(address); }

// The numbers of a row that do not depend on the gradient, which many parameters of a group share.
class CommonNumbers {
 public:
  void decide(double* row, const Program& program, int64_t bits, const double* hypers, double step, double grad_scale) {
    if (same(bits, hypers, step, row[kFinite], grad_scale)) {
      std::copy(row_ + kStep, row_ + kInputScale, row + kStep);
      return;
    }
    decide_numbers(row, program, hypers, step, grad_scale);
    std::copy(row, row + kColumns, row_);
    bits_ = bits, step_ = step, grad_scale_ = grad_scale;
    std::copy(hypers, hypers + kHypers, hypers_);
  }

 private:
  bool same(int64_t bits, const double* hypers, double step, double finite, double grad_scale) const {
    return bits == bits_ && step == step_ && finite == row_[kFinite] && grad_scale == grad_scale_ &&
           std::equal(hypers, hypers + kHypers, hypers_);
  }

  int64_t bits_ = -1;
  double hypers_[kHypers], step_, grad_scale_, row_[kColumns];
};

// One parameter of a step.
class Whole {
 public:
  Whole(const WholeSteps& all, int64_t i)
      : all_(all), step_(all.steps[i]), row_(all.rows + i * kColumns), sums_(all.sums + i * kSums) {
    gradient_.at = at(all.grads[i]);
    gradient_.dtype = static_cast<Dtype>(step_.grad_type);
    gradient_.size = step_.size;
    gradient_.flat = item_.flat = true;
    const int64_t addresses[kSlots] = {all.grads[i], step_.momentum, step_.second, 0, all.params[i], step_.mantissa};
    const int64_t types[kSlots] = {
        step_.grad_type, step_.momentum_type, step_.second_type, 0, step_.param_type, static_cast<int64_t>(Dtype::i16)};
    for (int slot = 0; slot < kSlots; ++slot)
      item_.at[slot] = at(addresses[slot]), item_.dtype[slot] = static_cast<Dtype>(types[slot]);
    item_.matrices = 1, item_.size = step_.size;
    item_.program = Program(step_.program);
    item_.ratio = 1;
    for (int k = 0; k < 3; ++k) item_.place[k] = static_cast<uint32_t>(step_.place[k]);
  }

  int64_t chunks() const { return (step_.size - 1) / kChunk + 1; }
  void look(int64_t chunk, double* partial) const {
    best_chunks().grad_stats(gradient_, span(step_.size, kChunk, chunk), partial);
  }
  void move(int64_t chunk, double* partial) const {
    best_chunks().run(Stage::update_moments, item_, row_, span(step_.size, kChunk, chunk), partial);
  }
  // Whether the step is taken, from the gradient's largest magnitude and sum of squares.
  bool decide(double most, double square, CommonNumbers& numbers) const {
    measure(all_.scaling, most, square, gradient_.dtype == Dtype::f64, row_);
    float* const counter = static_cast<float*>(at(step_.step));
    const double grad_scale = value_or_one(all_.scaling.grad_scale);
    numbers.decide(row_, item_.program, step_.program, all_.hypers + step_.group * kHypers, counter ? *counter : 0.0,
                   grad_scale);
    row_[kInputScale] = 1;  // there is no input
    if (counter) *counter = static_cast<float>(row_[kStep]);
    return row_[kFinite] != 0;
  }
  // Sums are those of the last step that was taken.
  void keep(const double* total) const {
    for (int c = 0; c < kSums; ++c)
      if (writes_sum(false, true, c)) sums_[c] = total[c];
  }

 private:
  const WholeSteps& all_;
  const WholeStep& step_;
  double *row_, *sums_;
  Gradient gradient_{};
  Item item_{};
};

void add(const double* partial, double* total) {
  for (int c = 0; c < kSums; ++c) total[c] = is_largest(c) ? std::max(total[c], partial[c]) : total[c] + partial[c];
}

bool step_alone(const Whole& whole, CommonNumbers& numbers) {
  double most = 0, square = 0, partial[kSums], total[kSums] = {};
  for (int64_t c = 0; c < whole.chunks(); ++c) {
    whole.look(c, partial);
    most = std::max(most, partial[0]), square += partial[1];
  }
  if (!whole.decide(most, square, numbers)) return false;
  for (int64_t c = 0; c < whole.chunks(); ++c) {
    whole.move(c, partial);
    add(partial, total);
  }
  whole.keep(total);
  return true;
}

bool step_together(const Whole& whole, CommonNumbers& numbers, std::vector<double>& partials) {
  const int64_t chunks = whole.chunks();
  partials.resize(std::max<size_t>(partials.size(), chunks * kSums));
  parallel_for(chunks, [&](int64_t c) { whole.look(c, &partials[c * kSums]); });
  double most = 0, square = 0, total[kSums] = {};
  for (int64_t c = 0; c < chunks; ++c) most = std::max(most, partials[c * kSums]), square += partials[c * kSums + 1];
  if (!whole.decide(most, square, numbers)) return false;
  parallel_for(chunks, [&](int64_t c) { whole.move(c, &partials[c * kSums]); });
  for (int64_t c = 0; c < chunks; ++c) add(&partials[c * kSums], total);
  whole.keep(total);
  return true;
}

// Parameters that one thread takes, as runs [begin, end) of them, and those that all share.
struct Shares {
  std::vector<int64_t> alone, together, ends;

  explicit Shares(const WholeSteps& all) {
    const int64_t threads = threads_of_torch();
    int64_t total = 0, work = 0;
    for (int64_t i = 0; i < all.count; ++i) total += all.steps[i].size;
    // So many of them that threads end at about the same time without waiting for one another in between.
    const int64_t most = threads == 1 ? total : std::max(kChunksAlone * kChunk, total / (4 * threads));
    for (int64_t i = 0; i < all.count; ++i) {
      const int64_t size = all.steps[i].size;
      if (size > most) {
        together.push_back(i);
        continue;
      }
      alone.push_back(i);
      work += size + kOverhead;
      if (work >= kRun) ends.push_back(static_cast<int64_t>(alone.size())), work = 0;
    }
    if (work > 0) ends.push_back(static_cast<int64_t>(alone.size()));
  }
};

}  // namespace

void whole_steps_on_host(const WholeSteps& all) {
  const Shares shares(all);
  const auto runs = static_cast<int64_t>(shares.ends.size());
  std::vector<int64_t> skipped(runs);
  for_each(runs, threads_of_torch(), [&](int64_t run) {
    CommonNumbers numbers;
    for (int64_t k = run == 0 ? 0 : shares.ends[run - 1]; k < shares.ends[run]; ++k)
      skipped[run] += !step_alone(Whole(all, shares.alone[k]), numbers);
  });
  CommonNumbers numbers;
  std::vector<double> partials;
  for (int64_t i : shares.together) *all.skipped += !step_together(Whole(all, i), numbers, partials);
  for (int64_t count : skipped) *all.skipped += count;
}

}  // namespace steepest::multi_tensor
