// csrc/common/mma.cuh on a CPU: the same functions, whose 32 lanes show one another what they hold.
//
// Products of halves are exact. Their sum is rounded once to fp32 or, with `truncating`, aligned to its largest term
// and cut off as tensor cores do, pessimistically: one bit below fp32's last place, then to fp32.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/floats.h"
#include "common/shared.cuh"

namespace emulation {

inline bool truncating = false;
inline int64_t products = 0;  // of whole warps

struct Operands {
  uint32_t a[4], b[2];
  float c[4];
};
struct Meeting {  // of a warp; by turns, as in a shuffle
  int arrived;
  const uint16_t* rows[kWarp];
  Operands operands[kWarp];
};
inline Meeting meetings[2][kMost / kWarp];
inline int meeting_turn[kMost];

inline Meeting& meet() { return meetings[meeting_turn[current]++ % 2][current / kWarp]; }

inline const float* halves() {
  static const std::vector<float> table = [] {
    std::vector<float> values(65536);
    for (int bits = 0; bits < 65536; ++bits) values[bits] = steepest::from_f16(static_cast<uint16_t>(bits));
    return values;
  }();
  return table.data();
}

inline float cut_off(double value, double unit) { return static_cast<float>(std::trunc(value / unit) * unit); }

inline float sum_truncated(const float* products, float c) {
  float most = std::fabs(c);
  for (int k = 0; k < 16; ++k) most = std::max(most, std::fabs(products[k]));
  if (most == 0 || !std::isfinite(most)) return c;
  const double unit = std::ldexp(1.0, std::ilogb(most) - 24);
  double sum = cut_off(c, unit);
  for (int k = 0; k < 16; ++k) sum += std::trunc(products[k] / unit) * unit;
  return sum == 0 ? 0 : cut_off(sum, std::ldexp(1.0, std::ilogb(sum) - 23));
}

// Every lane's operands make A, B and C, and D goes back to where C was.
inline void multiply(Operands (&lanes)[kWarp]) {
  float a[16][16], b[8][16];
  const float* value = halves();
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      const auto at = [half](uint32_t word) { return word >> (16 * half) & 0xffff; };
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = value[at(lanes[lane].a[i])];
      for (int i = 0; i < 2; ++i) b[g][2 * t + i * 8 + half] = value[at(lanes[lane].b[i])];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const float* row = a[lane / 4 + i / 2 * 8];
      const float* column = b[lane % 4 * 2 + i % 2];
      float& c = lanes[lane].c[i];
      if (truncating) {
        float terms[16];
        for (int k = 0; k < 16; ++k) terms[k] = row[k] * column[k];
        c = sum_truncated(terms, c);
      } else {
        double sum = 0;
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(row[k] * column[k]);
        c = static_cast<float>(sum + c);
      }
    }
  }
  ++products;
}

}  // namespace emulation

namespace steepest {

constexpr int kTile = 16;

__device__ inline void store_16_bytes(uint16_t* at, uint4 words) { *reinterpret_cast<uint4*>(at) = words; }

template <bool kTransposed>
__device__ inline void load_matrices(uint32_t (&to)[4], const uint16_t* row, int line = __builtin_LINE()) {
  using namespace emulation;
  if (!is_shared(row, 16)) fail("ldmatrix outside of shared memory");
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix of a row that is not aligned");
  Meeting& meeting = meet();
  const int lane = current % kWarp, g = lane / 4, t = lane % 4;
  meeting.rows[lane] = row;
  wait(of_warp[current / kWarp], kWarp, line);
  for (int i = 0; i < 4; ++i) {
    const uint16_t* const* rows = meeting.rows + 8 * i;
    to[i] = kTransposed ? rows[2 * t][g] | static_cast<uint32_t>(rows[2 * t + 1][g]) << 16
                        : rows[g][2 * t] | static_cast<uint32_t>(rows[g][2 * t + 1]) << 16;
  }
}

__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    int line = __builtin_LINE()) {
  using namespace emulation;
  Meeting& meeting = meet();
  Operands& own = meeting.operands[current % kWarp];
  std::copy(a, a + 4, own.a), std::copy(c, c + 4, own.c);
  own.b[0] = b0, own.b[1] = b1;
  if (++meeting.arrived == kWarp) {
    meeting.arrived = 0;
    emulation::multiply(meeting.operands);
  }
  wait(of_warp[current / kWarp], kWarp, line);
  std::copy(own.c, own.c + 4, c);
}

}  // namespace steepest
