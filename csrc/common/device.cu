#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common/device.h"

namespace steepest {

namespace {

int attribute(cudaDeviceAttr name, int32_t device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, name, device);
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("steepest: cudaDeviceGetAttribute failed: ") + cudaGetErrorString(error));
  return value;
}

}  // namespace

int multiprocessors_of(int32_t device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

int64_t l2_bytes_of(int32_t device) { return attribute(cudaDevAttrL2CacheSize, device); }

int capability_of(int32_t device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

}  // namespace steepest
