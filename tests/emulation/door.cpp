// The kernels in the place of the host's version: with the doors of csrc/ops, an op on CPU tensors launches them.
#include <cuda_runtime.h>

#include <string>

#include "eigh/cusolver.h"
#include "multi_tensor/params.h"
#include "polar/chain.h"

namespace steepest::multi_tensor {

void inspect_on_host(const InspectParams& params) { inspect_on_device(params, nullptr); }
void run_on_host(Stage stage, const ItemsParams& params) { run_on_device(stage, params, nullptr); }

}  // namespace steepest::multi_tensor

namespace steepest::polar {

void numbers_on_host(const NumbersParams& params) { numbers_on_device(params, nullptr); }
void sum_on_host(const Node& node, const Stack& stack, Dtype dtype) { sum_on_device(node, stack, dtype, nullptr); }

}  // namespace steepest::polar

extern "C" {
void emulation_order(int order) { emulation::order = static_cast<emulation::Order>(order); }
int64_t emulation_launches() { return emulation::launches; }
// Why the library does not load, empty where it does.
const char* emulation_load_cusolver(const char* name) {
  static std::string reason;
  return (reason = steepest::eigh::load_cusolver({name})).c_str();
}
}
