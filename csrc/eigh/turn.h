// The products of a matrix with two bases, on a CPU; no torch in here.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu_polar/kernels.h"
#include "cpu_polar/team.h"
#include "cpu_polar/words.h"

namespace steepest::eigh {

constexpr int64_t kAlone = int64_t{1} << 14;  // elements up to which a thread takes a matrix

// Products of one matrix with its bases, L and R, nullptr: the identity. out is apart from what is multiplied, or is
// it.
class Turn {
 public:
  Turn(int64_t rows, int64_t columns, const float* left, const float* right, const cpu_polar::Team& team)
      : rows_(rows), columns_(columns), left_(left), right_(right), team_(team), size_(rows * columns) {
    const auto words = [&](int64_t size, int64_t k) {
      return cpu_polar::packed_words(team.kernels, sizeof(float), size, k);
    };
    const int64_t of_left = left == nullptr ? 0 : words(rows, rows),
                  of_right = right == nullptr ? 0 : words(columns, columns);
    words_ = cpu_polar::make_words(of_left + of_right + words(columns, rows) + 2 * size_);
    left_packed_ = words_.get(), right_packed_ = left_packed_ + of_left, packed_ = right_packed_ + of_right;
    between_ = reinterpret_cast<float*>(packed_ + words(columns, rows));
  }

  // Room for a matrix, which no product takes.
  float* matrix() const { return between_ + size_; }

  // L^T X R of as many X as there are, once the bases are packed for it.
  void pack_into() const {
    if (left_ != nullptr) team_.pack_rows({left_, rows_, rows_, false}, left_packed_);
    if (right_ != nullptr) team_.pack({right_, columns_, columns_, false}, right_packed_);
  }
  void into(const float* x, float* out) const {
    if (left_ != nullptr) {
      team_.pack({x, columns_, rows_, false}, packed_);
      x = multiply(left_packed_, 0, packed_, rows_, right_ == nullptr ? out : between_);
    }
    if (right_ != nullptr) x = multiply(x, right_packed_, out);
    if (x != out) std::copy_n(x, size_, out);
  }

  // L X R^T.
  void back(const float* x, float* out) const {
    if (left_ != nullptr) {
      team_.pack({x, columns_, rows_, false}, packed_);
      x = multiply(reinterpret_cast<const uint32_t*>(left_), rows_, packed_, rows_, right_ == nullptr ? out : between_);
    }
    if (right_ != nullptr) {
      team_.pack({right_, columns_, columns_, true}, right_packed_);
      if (x == out) x = std::copy_n(x, size_, between_) - size_;
      x = multiply(x, right_packed_, out);
    }
    if (x != out) std::copy_n(x, size_, out);
  }

 private:
  // Rows as they lie, times a basis of columns.
  const float* multiply(const float* x, const uint32_t* basis, float* out) const {
    return multiply(reinterpret_cast<const uint32_t*>(x), columns_, basis, columns_, out);
  }
  const float* multiply(const uint32_t* a, int64_t row, const uint32_t* b, int64_t k, float* out) const {
    cpu_polar::Product product{};
    product.a = a, product.row = row, product.b = b, product.m = rows_, product.n = columns_, product.k = k;
    product.d = out, product.alpha = 1;
    team_.multiply(product);
    return out;
  }

  const int64_t rows_, columns_;
  const float *const left_, *const right_;
  const cpu_polar::Team& team_;
  const int64_t size_;
  cpu_polar::Words words_;
  uint32_t *left_packed_, *right_packed_, *packed_;  // a basis is packed for one way at a time
  float* between_;
};

// A basis of one matrix of a stack, or what lies beside it; nullptr where there is none.
inline const float* part(const float* from, int64_t i, int64_t size) {
  return from == nullptr ? from : from + i * size;
}

}  // namespace steepest::eigh
