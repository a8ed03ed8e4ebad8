#include "eigh/rotate.h"

#include <algorithm>

#include "cpu_polar/team.h"
#include "cpu_polar/words.h"

namespace steepest::eigh {
namespace {

using cpu_polar::Kernels;
using cpu_polar::packed_words;
using cpu_polar::Product;
using cpu_polar::Team;
using cpu_polar::Words;

constexpr int64_t kAlone = int64_t{1} << 14;  // elements up to which a thread takes a matrix

// Room for two packed factors, the first of which may be of a pair of matrices, and for one matrix or two pairs.
class Room {
 public:
  Room(const Kernels& kernels, int64_t rows, int64_t columns, bool pairs = false)
      : packed_(
            packed_words(kernels, sizeof(float), std::max(pairs ? 2 * rows : rows, columns), std::max(rows, columns))),
        words_(cpu_polar::make_words(2 * packed_ + (pairs ? 4 : 1) * rows * columns)) {}

  uint32_t* first() const { return words_.get(); }
  uint32_t* second() const { return words_.get() + packed_; }
  float* matrix() const { return reinterpret_cast<float*>(words_.get() + 2 * packed_); }

 private:
  int64_t packed_;
  Words words_;
};

class Run {
 public:
  Run(const Rotation& all, int64_t i, Way way, float beta, const Team& team)
      : rows_(all.rows),
        columns_(all.columns),
        size_(all.rows * all.columns),
        way_(way),
        team_(team),
        room_(team.kernels, all.rows, all.columns) {
    const auto part = [&](const float* from, int64_t size) { return from == nullptr ? from : from + i * size; };
    const float* const x = part(all.x, size_);
    const float *const left = part(all.left, rows_ * rows_), *const right = part(all.right, columns_ * columns_);
    const float* const second = part(all.second, size_);
    float* const out = all.out + i * size_;
    if (way == Way::kBack) {
      divide(copied(x, out), second, all);
      multiply(out, left, right, out);
    } else if (way == Way::kInto) {
      multiply(x, left, right, out);
      divide(out, second, all);
    } else {
      if (second != out) std::copy_n(second, size_, out);
      multiply(x, left, right, room_.matrix());
      team_.kernels.mix_squares(room_.matrix(), size_, beta, out);
    }
  }

 private:
  float* copied(const float* x, float* out) const {
    std::copy_n(x, size_, out);
    return out;
  }

  void divide(float* x, const float* second, const Rotation& all) const {
    if (second != nullptr) team_.kernels.over_roots(second, size_, all.over, all.eps, x);
  }

  // L^T X R, or back L X R^T.
  void multiply(const float* x, const float* left, const float* right, float* out) const {
    const bool back = way_ == Way::kBack;
    if (left != nullptr) {
      team_.pack_rows({left, rows_, rows_, back}, room_.first());
      team_.pack({x, columns_, rows_, false}, room_.second());
      x = multiply(rows_, right == nullptr ? out : room_.matrix());
    }
    if (right != nullptr) {
      team_.pack_rows({x, rows_, columns_, true}, room_.first());
      team_.pack({right, columns_, columns_, back}, room_.second());
      x = multiply(columns_, out);
    }
    if (x != out) std::copy_n(x, size_, out);
  }

  const float* multiply(int64_t k, float* out) const {
    Product product{};
    product.a = room_.first(), product.b = room_.second(), product.m = rows_, product.n = columns_, product.k = k;
    product.d = out, product.alpha = 1;
    team_.multiply(product);
    return out;
  }

  const int64_t rows_, columns_, size_;
  const Way way_;
  const Team& team_;
  const Room room_;
};

// A gradient and an x with it: the bases are packed once for both.
class AdamRun {
 public:
  AdamRun(const AdamStep& all, int64_t i, float beta, const Team& team)
      : rows_(all.rows),
        columns_(all.columns),
        size_(rows_ * columns_),
        team_(team),
        room_(team.kernels, rows_, columns_, true) {
    const float* const left = all.left == nullptr ? nullptr : all.left + i * rows_ * rows_;
    const float* const right = all.right == nullptr ? nullptr : all.right + i * columns_ * columns_;
    float* const pair = into(all.grads + i * size_, all.x + i * size_, left, right);
    if (all.learned != nullptr) team_.kernels.mix_squares(pair, size_, beta, all.learned + i * size_);
    float* const x = pair + size_;
    for (int side = 0; side < 2; ++side) team_.kernels.over_roots(all.second + i * size_, size_, all.over, all.eps, x);
    back(x, left, right, all.out + i * size_);
  }

 private:
  // L^T X R of both, one behind the other.
  float* into(const float* grad, const float* x, const float* left, const float* right) const {
    float *const turned = room_.matrix(), *const made = turned + 2 * size_;
    if (left != nullptr) team_.pack_rows({left, rows_, rows_, false}, room_.first());
    for (const float* each : {grad, x}) {
      float* const to = turned + (each == grad ? 0 : size_);
      if (left == nullptr) {
        std::copy_n(each, size_, to);
      } else {
        team_.pack({each, columns_, rows_, false}, room_.second());
        multiply(rows_, rows_, to);
      }
    }
    if (right == nullptr) return turned;
    team_.pack_rows({turned, 2 * rows_, columns_, true}, room_.first());
    team_.pack({right, columns_, columns_, false}, room_.second());
    multiply(2 * rows_, columns_, made);
    return made;
  }

  // L X R^T.
  void back(const float* x, const float* left, const float* right, float* out) const {
    if (left != nullptr) {
      team_.pack_rows({left, rows_, rows_, true}, room_.first());
      team_.pack({x, columns_, rows_, false}, room_.second());
      x = multiply(rows_, rows_, right == nullptr ? out : room_.matrix());
    }
    if (right != nullptr) {
      team_.pack_rows({x, rows_, columns_, true}, room_.first());
      team_.pack({right, columns_, columns_, true}, room_.second());
      x = multiply(rows_, columns_, out);
    }
    if (x != out) std::copy_n(x, size_, out);
  }

  const float* multiply(int64_t m, int64_t k, float* out) const {
    Product product{};
    product.a = room_.first(), product.b = room_.second(), product.m = m, product.n = columns_, product.k = k;
    product.d = out, product.alpha = 1;
    team_.multiply(product);
    return out;
  }

  const int64_t rows_, columns_, size_;
  const Team& team_;
  const Room room_;
};

}  // namespace

void adam(const std::vector<AdamStep>& steps, float beta, const Kernels& kernels) {
  const auto small = [](const AdamStep& each) { return each.rows * each.columns <= kAlone; };
  cpu_polar::each_matrix(steps, kernels, small, [&](const AdamStep& stack, int64_t i, const Team& team) {
    const AdamRun done(stack, i, beta, team);
  });
}

void rotate(const std::vector<Rotation>& rotations, Way way, float beta, const Kernels& kernels) {
  const auto small = [](const Rotation& each) { return each.rows * each.columns <= kAlone; };
  cpu_polar::each_matrix(rotations, kernels, small, [&](const Rotation& stack, int64_t i, const Team& team) {
    const Run done(stack, i, way, beta, team);
  });
}

}  // namespace steepest::eigh
