// The products of a matrix with two bases, on a CPU; no torch in here.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu_polar/kernels.h"
#include "cpu_polar/team.h"
#include "cpu_polar/words.h"

namespace steepest::eigh {

constexpr int64_t kAlone = int64_t{1} << 14;  // elements up to which a thread takes a matrix

// Room for two packed factors, the first of which may be of a pair of matrices, and for one matrix or two pairs.
class Room {
 public:
  Room(const cpu_polar::Kernels& kernels, int64_t rows, int64_t columns, bool pairs = false)
      : packed_(cpu_polar::packed_words(kernels, sizeof(float), std::max(pairs ? 2 * rows : rows, columns),
                                        std::max(rows, columns))),
        words_(cpu_polar::make_words(2 * packed_ + (pairs ? 4 : 1) * rows * columns)) {}

  uint32_t* first() const { return words_.get(); }
  uint32_t* second() const { return words_.get() + packed_; }
  float* matrix() const { return reinterpret_cast<float*>(words_.get() + 2 * packed_); }

 private:
  int64_t packed_;
  cpu_polar::Words words_;
};

// Products of one matrix with its bases.
class Turn {
 public:
  Turn(int64_t rows, int64_t columns, const cpu_polar::Team& team, bool pairs = false)
      : rows(rows), columns(columns), size(rows * columns), team(team), room(team.kernels, rows, columns, pairs) {}

  // L^T X R, or back L X R^T.
  void operator()(const float* x, const float* left, const float* right, bool back, float* out) const {
    if (left != nullptr) {
      team.pack_rows({left, rows, rows, back}, room.first());
      team.pack({x, columns, rows, false}, room.second());
      x = multiply(rows, rows, right == nullptr ? out : room.matrix());
    }
    if (right != nullptr) {
      team.pack_rows({x, rows, columns, true}, room.first());
      team.pack({right, columns, columns, back}, room.second());
      x = multiply(rows, columns, out);
    }
    if (x != out) std::copy_n(x, size, out);
  }

  // The product m x columns of what is packed.
  const float* multiply(int64_t m, int64_t k, float* out) const {
    cpu_polar::Product product{};
    product.a = room.first(), product.b = room.second(), product.m = m, product.n = columns, product.k = k;
    product.d = out, product.alpha = 1;
    team.multiply(product);
    return out;
  }

  const int64_t rows, columns, size;
  const cpu_polar::Team& team;
  const Room room;
};

// A basis of one matrix of a stack, or what lies beside it; nullptr where there is none.
inline const float* part(const float* from, int64_t i, int64_t size) {
  return from == nullptr ? from : from + i * size;
}

}  // namespace steepest::eigh
