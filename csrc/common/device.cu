#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>

#include "common/check.h"
#include "common/device.h"

namespace steepest {

namespace {

int attribute(cudaDeviceAttr name, int32_t device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, name, device), "device: cudaDeviceGetAttribute");
  return value;
}

}  // namespace

int multiprocessors_of(int32_t device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

int64_t l2_bytes_of(int32_t device) { return attribute(cudaDevAttrL2CacheSize, device); }

int capability_of(int32_t device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

bool has_clusters(int32_t device) { return attribute(cudaDevAttrClusterLaunch, device) != 0; }

void allow_shared_memory(const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "device: cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) != 0) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
             "device: cudaFuncSetAttribute for ", bytes, " bytes of shared memory");
  allowed.insert({kernel, device});
}

}  // namespace steepest
