#include "eigh/rotate.h"

#include <algorithm>

#include "cpu_polar/team.h"
#include "eigh/turn.h"

namespace steepest::eigh {
namespace {

using cpu_polar::Kernels;
using cpu_polar::Team;

Turn turn_of(const Rotation& all, int64_t i, const Team& team) {
  const float* const left = part(all.left, i, all.rows * all.rows);
  return {all.rows, all.columns, left, part(all.right, i, all.columns * all.columns), team};
}

void rotate_one(const Rotation& all, int64_t i, Way way, float beta, const Team& team) {
  const Turn turn = turn_of(all, i, team);
  const int64_t size = all.rows * all.columns;
  const float *const x = part(all.x, i, size), *const second = part(all.second, i, size);
  float* const out = all.out + i * size;
  const auto divide = [&] {
    if (second != nullptr) team.kernels.over_roots(second, size, all.over, all.eps, false, out);
  };
  if (way == Way::kBack) {
    std::copy_n(x, size, out);
    divide();
    turn.back(out, out);
    return;
  }
  turn.pack_into();
  if (way == Way::kInto) {
    turn.into(x, out);
    divide();
  } else {
    if (second != out) std::copy_n(second, size, out);
    turn.into(x, turn.matrix());
    team.kernels.mix_squares(turn.matrix(), size, beta, out);
  }
}

void adam_one(const AdamStep& all, int64_t i, const Team& team) {
  const Turn turn = turn_of(all, i, team);
  const int64_t size = all.rows * all.columns;
  turn.pack_into();
  float* const turned = turn.matrix();
  if (all.updated != nullptr) {
    turn.into(all.grads + i * size, turned);
    team.kernels.mix_squares(turned, size, all.beta, all.updated + i * size);
  }
  turn.into(all.x + i * size, turned);
  team.kernels.over_roots(all.second + i * size, size, all.over, all.eps, true, turned);
  turn.back(turned, all.out + i * size);
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
