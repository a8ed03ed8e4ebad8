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

// Products of one matrix with its bases.
class Turn {
 public:
  Turn(int64_t rows, int64_t columns, const Team& team, bool pairs = false)
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
    Product product{};
    product.a = room.first(), product.b = room.second(), product.m = m, product.n = columns, product.k = k;
    product.d = out, product.alpha = 1;
    team.multiply(product);
    return out;
  }

  const int64_t rows, columns, size;
  const Team& team;
  const Room room;
};

// A basis of one matrix of a stack, or what lies beside it; nullptr where there is none.
const float* part(const float* from, int64_t i, int64_t size) { return from == nullptr ? from : from + i * size; }

void rotate_one(const Rotation& all, int64_t i, Way way, float beta, const Team& team) {
  const Turn turn(all.rows, all.columns, team);
  const float* const x = part(all.x, i, turn.size);
  const float* const left = part(all.left, i, turn.rows * turn.rows);
  const float* const right = part(all.right, i, turn.columns * turn.columns);
  const float* const second = part(all.second, i, turn.size);
  float* const out = all.out + i * turn.size;
  const auto divide = [&] {
    if (second != nullptr) team.kernels.over_roots(second, turn.size, all.over, all.eps, out);
  };
  if (way == Way::kBack) {
    std::copy_n(x, turn.size, out);
    divide();
    turn(out, left, right, true, out);
  } else if (way == Way::kInto) {
    turn(x, left, right, false, out);
    divide();
  } else {
    if (second != out) std::copy_n(second, turn.size, out);
    turn(x, left, right, false, turn.room.matrix());
    team.kernels.mix_squares(turn.room.matrix(), turn.size, beta, out);
  }
}

// L^T X R of a gradient and of an x, one behind the other in the room: the bases are packed once for both.
float* turned_pair(const Turn& turn, const float* grad, const float* x, const float* left, const float* right) {
  const int64_t rows = turn.rows, columns = turn.columns, size = turn.size;
  float *const turned = turn.room.matrix(), *const made = turned + 2 * size;
  if (left != nullptr) turn.team.pack_rows({left, rows, rows, false}, turn.room.first());
  const float* const both[] = {grad, x};
  for (int k = 0; k < 2; ++k) {
    float* const to = turned + k * size;
    if (left == nullptr) {
      std::copy_n(both[k], size, to);
    } else {
      turn.team.pack({both[k], columns, rows, false}, turn.room.second());
      turn.multiply(rows, rows, to);
    }
  }
  if (right == nullptr) return turned;
  turn.team.pack_rows({turned, 2 * rows, columns, true}, turn.room.first());
  turn.team.pack({right, columns, columns, false}, turn.room.second());
  turn.multiply(2 * rows, columns, made);
  return made;
}

void adam_one(const AdamStep& all, int64_t i, const Team& team) {
  const Turn turn(all.rows, all.columns, team, true);
  const int64_t size = turn.size;
  const float* const left = part(all.left, i, turn.rows * turn.rows);
  const float* const right = part(all.right, i, turn.columns * turn.columns);
  float* const pair = turned_pair(turn, all.grads + i * size, all.x + i * size, left, right);
  if (all.learned != nullptr) team.kernels.mix_squares(pair, size, all.beta, all.learned + i * size);
  float* const x = pair + size;
  for (int side = 0; side < 2; ++side) team.kernels.over_roots(all.second + i * size, size, all.over, all.eps, x);
  turn(x, left, right, true, all.out + i * size);
}

}  // namespace

void adam(const std::vector<AdamStep>& steps, const Kernels& kernels) {
  const auto small = [](const AdamStep& each) { return each.rows * each.columns <= kAlone; };
  cpu_polar::each_matrix(steps, kernels, small, adam_one);
}

void rotate(const std::vector<Rotation>& rotations, Way way, float beta, const Kernels& kernels) {
  const auto small = [](const Rotation& each) { return each.rows * each.columns <= kAlone; };
  cpu_polar::each_matrix(rotations, kernels, small, [&](const Rotation& stack, int64_t i, const Team& team) {
    rotate_one(stack, i, way, beta, team);
  });
}

}  // namespace steepest::eigh
