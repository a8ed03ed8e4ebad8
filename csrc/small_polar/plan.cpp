#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "common/device.h"
#include "small_polar/layout.h"
#include "small_polar/params.h"

namespace steepest::small_polar {
namespace {

// The lift of a vanishing singular value. R is known to 2^-22 of its largest eigenvalue, and what rounding puts in
// place of a vanishing one grows with the square of the gain: at 1024 to a quarter, beyond it to where the polynomials
// no longer bring it back.
constexpr double kMostGain = 1024;

// What multiplies a power of R, whose norm stays near 1: the sum is a half.
constexpr double kMostNumber = 4096;

void fail(const std::string& what) { throw std::invalid_argument("steepest::small_polar: " + what); }

void check(const Table& table, size_t steps) {
  if (table.size() != steps || steps < 1 || steps > kMostSteps)
    fail("tables must have the same 1 to " + std::to_string(kMostSteps) + " steps, got " +
         std::to_string(table.size()) + " where the first has " + std::to_string(steps));
  double gain = 1;
  for (const std::vector<double>& step : table) {
    if (step.size() < 2 || step.size() > kMostTerms || (step.size() == kMostTerms && step.back() == 0))
      fail("a step must have 2 to 5 coefficients and no zero at degree 9, got " + std::to_string(step.size()));
    gain *= std::fabs(step[0]);
  }
  if (!(gain <= kMostGain))
    fail("the product of a table's first coefficients must be at most 1024, got " + std::to_string(gain));
}

}  // namespace

Numbers numbers(const Schedule& schedule) {
  const size_t count = schedule.tables.size();
  if (count < 1 || count > kMostTables || schedule.slacks.size() + 1 != count)
    fail("a schedule must have 1 to 3 tables and a slack for each but the last, got " + std::to_string(count) +
         " and " + std::to_string(schedule.slacks.size()));
  Numbers to{};
  to.tables = static_cast<int32_t>(count), to.count = static_cast<int32_t>(schedule.tables[0].size());
  to.tight = schedule.tight, to.least_square = static_cast<float>(schedule.eps * schedule.eps);
  for (size_t t = 0; t < count; ++t) {
    check(schedule.tables[t], schedule.tables[0].size());
    to.slacks[t] = t + 1 < count ? static_cast<float>(schedule.slacks[t]) : -std::numeric_limits<float>::infinity();
    for (size_t k = 0; k < schedule.tables[t].size(); ++k) {
      std::vector<double> step = schedule.tables[t][k];
      to.terms[t][k] = static_cast<uint8_t>(step.size());
      if (step.size() == kMostTerms) {
        const double b = step[1], c = step[2], e = step[4], u = step[3] / (2 * e), kappa = c / e - u * u;
        step = {step[0], u, e, e * kappa, b - e * u * kappa};
      }
      for (size_t i = 0; i < step.size(); ++i) {
        if (!(std::fabs(step[i]) <= kMostNumber))
          fail("coefficients, and their ratios to that of degree 9, must be at most 4096, got " +
               std::to_string(step[i]));
        to.steps[t][k][i] = static_cast<float>(step[i]);
      }
    }
  }
  return to;
}

Room room_of(int capability) { return {shared_limit(capability), capability >= 90}; }

size_t shared_bytes(int64_t rows, int blocks) { return Layout(rows, blocks).bytes(); }

int blocks_for(int64_t rows, const Room& room) {
  if (rows <= kMostAlone && shared_bytes(rows, 1) <= room.bytes) return 1;
  if (rows <= kMostRows && room.clusters && shared_bytes(rows, kCluster) <= room.bytes) return kCluster;
  return 0;
}

int64_t most_rows(const Room& room) {
  int64_t rows = 0;
  while (blocks_for(rows + 16, room) > 0) rows += 16;
  return rows;
}

}  // namespace steepest::small_polar
