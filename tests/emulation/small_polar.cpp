// The kernel of csrc/small_polar on a CPU, for ctypes.
#include <cuda_runtime.h>

#include <exception>

#include "common/device.h"
#include "common/mma.cuh"
#include "small_polar/params.h"

using namespace steepest::small_polar;

namespace {

std::string message;

template <class Body>
int guarded(const Body& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    message = error.what();
    return 1;
  }
}

}  // namespace

extern "C" {

const char* small_polar_message() { return message.c_str(); }
void small_polar_order(int order) { emulation::order = static_cast<emulation::Order>(order); }
void small_polar_truncating(int truncating) { emulation::truncating = truncating != 0; }
int64_t small_polar_launches() { return emulation::launches; }
int64_t small_polar_products() { return emulation::products; }
size_t small_polar_bytes(int64_t rows, int blocks) { return shared_bytes(rows, blocks); }
size_t small_polar_room(int capability) { return room_of(capability).bytes; }
int small_polar_blocks(int64_t rows, int capability) { return blocks_for(rows, room_of(capability)); }
int64_t small_polar_most_rows(int capability) { return most_rows(room_of(capability)); }

// coefficients: (tables, steps, 5), the highest ones NaN where a step has fewer.
int small_polar_run(const Matrices* matrices, int count, const double* coefficients, int tables, int steps,
                    const double* slacks, int tight, double eps, int capability, int most_blocks) {
  return guarded([&] {
    Schedule schedule{{}, {slacks, slacks + tables - 1}, tight != 0, eps};
    for (int t = 0; t < tables; ++t) {
      schedule.tables.emplace_back();
      for (int k = 0; k < steps; ++k, coefficients += kMostTerms) {
        schedule.tables.back().emplace_back();
        for (int i = 0; i < kMostTerms && coefficients[i] == coefficients[i]; ++i)
          schedule.tables.back().back().push_back(coefficients[i]);
      }
    }
    polar_on_device({matrices, matrices + count}, schedule, room_of(capability), nullptr, most_blocks);
  });
}
}
