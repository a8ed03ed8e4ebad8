#include "eigh/coupled.h"

#include <algorithm>
#include <cmath>

#include "cpu_polar/syrk.h"
#include "cpu_polar/team.h"
#include "cpu_polar/words.h"
#include "eigh/turn.h"

namespace steepest::eigh {
namespace {

using cpu_polar::Kernels;
using cpu_polar::make_words;
using cpu_polar::Team;
using cpu_polar::Words;

float largest_whitening(int64_t n) { return static_cast<float>(std::clamp<int64_t>(n, 10, 4000)); }

// A stack, and room for what its factors are made of: G Q_R D_R / sqrt(columns), and D_L Q_L^T G / sqrt(rows).
struct Work {
  const Coupled& stack;
  int64_t matrices, rows, columns;
  Words memory;

  explicit Work(const Coupled& each)
      : stack(each),
        matrices(each.matrices),
        rows(each.rows),
        columns(each.columns),
        memory(make_words(2 * matrices * rows * columns)) {}

  float* input(int side) const { return reinterpret_cast<float*>(memory.get()) + side * matrices * rows * columns; }
};

// What is made of one gradient, and its values.
class Run {
 public:
  Run(const Work& work, int64_t i, const Team& team)
      : stack_(work.stack), rows_(stack_.rows), columns_(stack_.columns) {
    const int64_t size = rows_ * columns_;
    const Turn left(rows_, columns_, part(stack_.bases[0], i, rows_ * rows_), nullptr, team);
    const Turn right(rows_, columns_, nullptr, part(stack_.bases[1], i, columns_ * columns_), team);
    left.pack_into(), right.pack_into();
    const float* const g = stack_.grads + i * size;
    float *const by_right = work.input(0) + i * size, *const by_left = work.input(1) + i * size;
    float* const turned = right.matrix();
    left.into(g, by_left);
    right.into(by_left, turned);
    right.into(g, by_right);
    const std::vector<float> of_left = whitening(0, rows_, i), of_right = whitening(1, columns_, i);
    if (stack_.started) average(turned, of_left, of_right, i);
    for (int64_t row = 0; row < rows_; ++row) {
      const float over_rows = of_left[row] / std::sqrt(static_cast<float>(rows_));
      const float over_columns = 1 / std::sqrt(static_cast<float>(columns_));
      for (int64_t column = 0; column < columns_; ++column) {
        by_right[row * columns_ + column] *= of_right[column] * over_columns;
        by_left[row * columns_ + column] *= over_rows;
      }
    }
  }

 private:
  // D of a side.
  std::vector<float> whitening(int side, int64_t n, int64_t i) const {
    std::vector<float> inverse(n, 1.0f);
    if (stack_.values[side] == nullptr || !stack_.started) return inverse;
    for (int64_t k = 0; k < n; ++k) {
      const float root = 1 / std::sqrt(stack_.values[side][i * n + k]);
      inverse[k] = std::isfinite(root) ? root : 0.0f;
      if (stack_.limited) inverse[k] = std::min(inverse[k], largest_whitening(n));
    }
    return inverse;
  }

  // The averages of values take the squares of S.
  void average(const float* turned, const std::vector<float>& of_left, const std::vector<float>& of_right, int64_t i) {
    std::vector<double> rows(rows_, 0.0), columns(columns_, 0.0);
    for (int64_t row = 0; row < rows_; ++row) {
      const double of_row = double{of_left[row]} * of_left[row];
      for (int64_t column = 0; column < columns_; ++column) {
        const double x = turned[row * columns_ + column], square = x * x;
        rows[row] += square * of_right[column] * of_right[column];
        columns[column] += square * of_row;
      }
    }
    mix(0, rows, columns_, i), mix(1, columns, rows_, i);
  }

  void mix(int side, const std::vector<double>& sums, int64_t count, int64_t i) const {
    if (stack_.values[side] == nullptr) return;
    const auto n = static_cast<int64_t>(sums.size());
    const float least = 1 / (largest_whitening(n) * largest_whitening(n));
    for (int64_t k = 0; k < n; ++k) {
      float& value = stack_.values[side][i * n + k];
      value = static_cast<float>(double{value} * stack_.beta + sums[k] / count * (1 - double{stack_.beta}));
      if (stack_.limited && value > 0) value = std::max(value, least);
    }
  }

  const Coupled& stack_;
  const int64_t rows_, columns_;
};

}  // namespace

void update_coupled(const std::vector<Coupled>& stacks, const Kernels& kernels) {
  std::vector<Work> all;
  all.reserve(stacks.size());
  for (const Coupled& stack : stacks) all.emplace_back(stack);
  const auto small = [](const Work& work) { return work.rows * work.columns <= kAlone; };
  cpu_polar::each_matrix(all, kernels, small,
                         [](const Work& work, int64_t i, const Team& team) { const Run done(work, i, team); });
  cpu_polar::FactorAverages averages;
  for (const Work& work : all)
    averages.add(work.matrices, work.rows, work.columns, work.input(0), work.input(1), work.stack.factors[0],
                 work.stack.factors[1], work.stack.weight);
  averages.take(kernels);
}

}  // namespace steepest::eigh
