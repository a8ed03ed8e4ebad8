#include "cpu_polar/syrk.h"

#include "cpu_polar/team.h"
#include "cpu_polar/words.h"

namespace steepest::cpu_polar {
namespace {

constexpr int64_t kAlone = int64_t{1} << 18;  // elements of X and of the average up to which a thread takes a matrix

void average_one(const Averages& averages, int64_t i, const Team& team) {
  const int64_t m = averages.m, k = averages.k;
  const Words packed = make_words(packed_words(team.kernels, sizeof(float), m, k));
  team.pack({averages.x + i * m * k, m, k, averages.by_rows}, packed.get());
  Product product{};
  product.a = product.b = packed.get(), product.m = product.n = m, product.k = k;
  product.symmetric = product.same = true;
  product.alpha = averages.alpha[i], product.beta = averages.beta[i];
  product.c = product.beta == 0 ? nullptr : averages.c + i * m * m;
  product.d = averages.out + i * m * m;
  team.multiply(product);
}

}  // namespace

void average(const std::vector<Averages>& averages, const Kernels& kernels) {
  const auto small = [](const Averages& each) { return each.m * std::max(each.m, each.k) <= kAlone; };
  each_matrix(averages, kernels, small, average_one);
}

void FactorAverages::add(int64_t matrices, int64_t m, int64_t n, const float* x, const float* y, float* left,
                         float* right, float weight) {
  weights_.emplace_back(matrices, weight), weights_.emplace_back(matrices, 1 - weight);
  const float *const alpha = weights_[weights_.size() - 2].data(), *const rest = weights_.back().data();
  if (left != nullptr) averages_.push_back({matrices, m, n, x, true, left, left, alpha, rest});
  if (right != nullptr) averages_.push_back({matrices, n, m, y, false, right, right, alpha, rest});
}

}  // namespace steepest::cpu_polar
