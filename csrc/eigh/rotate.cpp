#include "eigh/rotate.h"

#include <algorithm>

#include "cpu_polar/team.h"
#include "eigh/turn.h"

namespace steepest::eigh {
namespace {

using cpu_polar::Kernels;
using cpu_polar::Team;

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

void adam_one(const AdamStep& all, int64_t i, float beta, const Team& team) {
  const Turn turn(all.rows, all.columns, team, true);
  const int64_t size = turn.size;
  const float* const left = part(all.left, i, turn.rows * turn.rows);
  const float* const right = part(all.right, i, turn.columns * turn.columns);
  float* const pair = turned_pair(turn, all.grads + i * size, all.x + i * size, left, right);
  if (all.learned != nullptr) team.kernels.mix_squares(pair, size, beta, all.learned + i * size);
  float* const x = pair + size;
  for (int side = 0; side < 2; ++side) team.kernels.over_roots(all.second + i * size, size, all.over, all.eps, x);
  turn(x, left, right, true, all.out + i * size);
}

}  // namespace

void adam(const std::vector<AdamStep>& steps, float beta, const Kernels& kernels) {
  const auto small = [](const AdamStep& each) { return each.rows * each.columns <= kAlone; };
  cpu_polar::each_matrix(steps, kernels, small,
                         [&](const AdamStep& stack, int64_t i, const Team& team) { adam_one(stack, i, beta, team); });
}

void rotate(const std::vector<Rotation>& rotations, Way way, float beta, const Kernels& kernels) {
  const auto small = [](const Rotation& each) { return each.rows * each.columns <= kAlone; };
  cpu_polar::each_matrix(rotations, kernels, small, [&](const Rotation& stack, int64_t i, const Team& team) {
    rotate_one(stack, i, way, beta, team);
  });
}

}  // namespace steepest::eigh
