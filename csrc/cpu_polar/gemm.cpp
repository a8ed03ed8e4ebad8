#include "cpu_polar/gemm.h"

#include <algorithm>
#include <vector>

#include "cpu_polar/team.h"
#include "cpu_polar/words.h"

namespace steepest::cpu_polar {
namespace {

constexpr int64_t kAlone = int64_t{1} << 14;  // elements of the longest matrix up to which a thread takes a product

void multiply_one(const Gemm& gemm, int64_t i, const Team& team) {
  const int64_t m = gemm.m, n = gemm.n, k = gemm.k;
  const float *const a = gemm.a.at + i * m * k, *const b = gemm.b.at + i * k * n;
  const int64_t of_b = packed_words(team.kernels, sizeof(float), n, k);
  const int64_t of_a = gemm.a.by_rows ? 0 : packed_words(team.kernels, sizeof(float), m, k);
  const Words packed = make_words(of_a + of_b);
  Product product{};
  product.m = m, product.n = n, product.k = k, product.symmetric = gemm.symmetric;
  product.b = packed.get();
  team.pack({b, n, k, !gemm.b.by_rows}, packed.get());
  if (gemm.a.by_rows) {
    product.a = reinterpret_cast<const uint32_t*>(a), product.row = k;
  } else {
    product.a = packed.get() + of_b;
    team.pack_rows({a, m, k, false}, packed.get() + of_b);
  }
  product.c = gemm.beta == 0 ? nullptr : gemm.c + i * m * n;
  product.d = gemm.out + i * m * n;
  product.alpha = gemm.alpha, product.beta = gemm.beta;
  team.multiply(product);
}

}  // namespace

void multiply(const Gemm& gemm, const Kernels& kernels) {
  const auto small = [](const Gemm& each) {
    return std::max(each.m * each.n, std::max(each.m, each.n) * each.k) <= kAlone;
  };
  each_matrix(std::vector<Gemm>{gemm}, kernels, small, multiply_one);
}

}  // namespace steepest::cpu_polar
