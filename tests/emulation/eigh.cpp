// The kernel of csrc/eigh on a CPU, for ctypes.
#include <cuda_runtime.h>

#include <exception>

#include "common/device.h"
#include "eigh/formulas.cuh"
#include "eigh/params.h"

using namespace steepest::eigh;

namespace {
std::string message;
}

extern "C" {

const char* eigh_message() { return message.c_str(); }
void eigh_order(int order) { emulation::order = static_cast<emulation::Order>(order); }
int64_t eigh_launches() { return emulation::launches; }
int64_t eigh_bytes(int64_t n) { return static_cast<int64_t>(shared_bytes(n)); }
int64_t eigh_most_rows(int capability) { return most_rows(steepest::shared_limit(capability)); }
void eigh_pair(int round, int k, int even, int* players) {
  const Players both = pair(round, k, even);
  players[0] = both.p, players[1] = both.q;
}

int eigh_refresh(const Refresh* refresh, int capability) {
  try {
    refresh_on_device(*refresh, steepest::shared_limit(capability), nullptr);
    return 0;
  } catch (const std::exception& error) {
    message = error.what();
    return 1;
  }
}
}
