// Takes the place of the CUDA runtime: kernels that nvcc compiled to PTX register themselves, launches run here, device
// memory is host memory. The device's compute capability is chosen, and with it the PTX that it is given.
#include "cuda_runtime.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdio>

#include "launch.h"
#include "scheduler.h"
#include "tensor_map.h"

using std::string;

namespace {
// What nvcc leaves in an object: PTX and machine code in an archive, and the host's functions that stand for kernels.
struct FatWrapper {
  int magic, version;
  const void* data;
  void* file;
};
struct Image {
  bool exact;  // for this architecture alone, as sm_90a
  string text;
  std::unique_ptr<ptxsim::Module> module;  // when it is first asked for
};
struct Binary {
  const uint8_t* data = nullptr;
  std::map<int, Image> images;  // by capability
};
struct Function {
  Binary* binary;
  string name;
  std::map<int, size_t> allowed_dynamic;  // bytes of shared memory that were asked for, by device
};
struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};

struct Runtime {
  std::vector<std::unique_ptr<Binary>> binaries;
  std::map<const void*, Function> functions;  // by the host's stub
  std::vector<Configuration> configurations;
  std::map<string, std::unique_ptr<ptxsim::Module>> replacements;  // by kernel
  string error;
  cudaError_t last = cudaSuccess;
  int capability = 90;
  bool clusters = true;  // where the capability has them
};
Runtime& runtime() {
  static Runtime r;
  return r;
}
cudaError_t report(cudaError_t code, const string& what) {
  runtime().error = what;
  return runtime().last = code;
}

template <class T>
T field(const uint8_t* at) {
  T value;
  memcpy(&value, at, sizeof value);
  return value;
}

// Lists the texts of PTX in an archive of nvcc (-no-compress) by their targets.
void read_archive(Binary& binary) {
  if (!binary.images.empty()) return;
  const uint8_t* p = binary.data;
  if (field<uint32_t>(p) != 0xBA55ED50) ptxsim::fail("not a fat binary");
  const uint8_t *at = p + field<uint16_t>(p + 6), *end = at + field<uint64_t>(p + 8);
  while (at < end) {
    const auto kind = field<uint16_t>(at);
    const auto head = field<uint32_t>(at + 4);
    const auto bytes = field<uint64_t>(at + 8), flags = field<uint64_t>(at + 40);
    if (kind == 1) {
      if (flags & 0xf000) ptxsim::fail("compressed PTX: compile with nvcc -no-compress");
      string text(reinterpret_cast<const char*>(at + head), bytes);
      text.resize(strlen(text.c_str()));
      const size_t target = text.find(".target sm_");
      if (target == string::npos) ptxsim::fail("PTX without a target");
      char* rest = nullptr;
      const long capability = strtol(text.c_str() + target + 11, &rest, 10);
      const bool exact = *rest == 'a';
      binary.images[int(capability)] = {exact, std::move(text), nullptr};
    }
    at += head + bytes;
  }
}

// What the driver would take: the newest PTX that the device can be given.
Image& image_of(Binary& binary) {
  read_archive(binary);
  for (auto it = binary.images.rbegin(); it != binary.images.rend(); ++it)
    if (it->second.exact ? it->first == runtime().capability : it->first <= runtime().capability) return it->second;
  ptxsim::fail("no PTX for compute capability " + std::to_string(runtime().capability));
}

Function& function_of(const void* host) {
  const auto it = runtime().functions.find(host);
  if (it == runtime().functions.end()) ptxsim::fail("a launch of a kernel that nobody registered");
  return it->second;
}

// Bytes that a block may have where a kernel asks for more than 48 KB.
int most_shared() {
  const int capability = runtime().capability;
  return (capability == 90 || capability == 100 ? 227 : capability == 80 ? 163 : 99) << 10;
}

bool has_clusters() { return runtime().capability >= 90 && runtime().clusters; }

ptxsim::Kernel& kernel_of(const Function& function) {
  const auto replaced = runtime().replacements.find(function.name);
  ptxsim::Module* module = nullptr;
  if (replaced != runtime().replacements.end()) {
    module = replaced->second.get();
  } else {
    Image& image = image_of(*function.binary);
    if (!image.module) image.module = std::make_unique<ptxsim::Module>(image.text);
    module = image.module.get();
  }
  ptxsim::Kernel* kernel = module->find(function.name);
  if (!kernel) ptxsim::fail("no PTX of " + function.name);
  const auto allowed = function.allowed_dynamic.find(runtime().capability);
  const bool asked = allowed != function.allowed_dynamic.end();
  const size_t most = size_t(asked ? most_shared() : 48 << 10), fixed = std::min(kernel->shared_bytes, most);
  kernel->allowed_dynamic = asked ? std::min(allowed->second, most - fixed) : most - fixed;
  return *kernel;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** args, size_t dynamic, int cluster) {
  if (cluster > 1 && !has_clusters())
    return report(cudaErrorInvalidClusterSize, "a launch in clusters on a device without them");
  try {
    ptxsim::launch(kernel_of(function_of(function)), {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, cluster,
                   dynamic, args);
    return cudaSuccess;
  } catch (const ptxsim::Refused& e) {
    return report(cudaErrorInvalidConfiguration, e.what());
  } catch (const std::exception& e) {
    return report(cudaErrorLaunchFailure, e.what());
  }
}

CUresult encode_tiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address,
                      const cuuint64_t* sides, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* element_strides, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  try {
    int bytes = 0;
    switch (type) {
      case CU_TENSOR_MAP_DATA_TYPE_UINT8:
        bytes = 1;
        break;
      case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
      case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      case CU_TENSOR_MAP_DATA_TYPE_UINT16:
        bytes = 2;
        break;
      case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
      case CU_TENSOR_MAP_DATA_TYPE_INT32:
      case CU_TENSOR_MAP_DATA_TYPE_UINT32:
        bytes = 4;
        break;
      default:
        break;
    }
    if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) throw ptxsim::Refused("tensor map refused: interleave");
    if (fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) throw ptxsim::Refused("tensor map refused: NaN outside");
    for (cuuint32_t i = 0; i < rank && i < 5; ++i)
      if (element_strides[i] != 1) throw ptxsim::Refused("tensor map refused: element strides");
    const int span = swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 128
                     : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
                     : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32
                                                            : 0;
    ptxsim::encode_tensor_map(out, bytes, int(rank), address, sides, strides, box, span);
  } catch (const std::exception& e) {
    runtime().error = e.what();
    return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}
}  // namespace

extern "C" {
void** __cudaRegisterFatBinary(void* wrapper) {
  auto binary = std::make_unique<Binary>();
  binary->data = static_cast<const uint8_t*>(static_cast<FatWrapper*>(wrapper)->data);
  runtime().binaries.push_back(std::move(binary));
  return reinterpret_cast<void**>(runtime().binaries.back().get());
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void** binary, const char* host, char*, const char* device, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
  runtime().functions[host] = {reinterpret_cast<Binary*>(binary), device, {}};
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  runtime().configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration c = runtime().configurations.back();
  runtime().configurations.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared, *static_cast<void**>(stream) = c.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* f) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(f));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  return launch(kernel, grid, block, args, shared, 1);
}
cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared,
                                    cudaStream_t) {
  return launch(kernel, grid, block, args, shared, 1);
}
cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  return launch(f, grid, block, args, shared, 1);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** args) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < c->numAttrs; ++i)
    if (c->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& sides = c->attrs[i].val.clusterDim;
      cluster = sides.x * sides.y * sides.z;
    }
  return launch(f, c->gridDim, c->blockDim, args, c->dynamicSmemBytes, int(cluster));
}
cudaError_t cudaFuncSetAttribute(const void* f, cudaFuncAttribute attribute, int value) {
  try {
    Function& function = function_of(f);
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
      if (value < 0 || value > most_shared())
        return report(cudaErrorInvalidValue, std::to_string(value) + " bytes of shared memory for a block");
      function.allowed_dynamic[runtime().capability] = size_t(value);
    }
    return cudaSuccess;
  } catch (const std::exception& e) {
    return report(cudaErrorInvalidDeviceFunction, e.what());
  }
}
cudaError_t cudaGetDevice(int* d) {
  *d = runtime().capability;  // a device of each kind
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = ptxsim::settings().multiprocessors;
      break;
    case cudaDevAttrL2CacheSize:
      *value = 50 << 20;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = runtime().capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = runtime().capability % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = most_shared();
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 228 << 10;
      break;
    case cudaDevAttrClusterLaunch:
      *value = has_clusters();
      break;
    default:
      return report(cudaErrorInvalidValue, "device attribute " + std::to_string(int(attribute)));
  }
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t e = runtime().last;
  runtime().last = cudaSuccess;
  return e;
}
cudaError_t cudaPeekAtLastError() { return runtime().last; }
const char* cudaGetErrorString(cudaError_t) { return runtime().error.c_str(); }
const char* cudaGetErrorName(cudaError_t) { return "error"; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* r) {
  *f = string(name) == "cuTensorMapEncodeTiled" ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  if (r) *r = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *f ? cudaSuccess : cudaErrorNotSupported;
}
#undef cudaGetDriverEntryPoint
cudaError_t cudaGetDriverEntryPoint(const char* name, void** f, unsigned long long flags,
                                    cudaDriverEntryPointQueryResult* r) {
  return cudaGetDriverEntryPointByVersion(name, f, 0, flags, r);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t) {
  memcpy(to, from, n);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int v, size_t n, cudaStream_t) {
  memset(to, v, n);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) {
  *s = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
const char* ptxsim_error() { return runtime().error.c_str(); }
void ptxsim_clear() {
  runtime().error.clear();
  runtime().last = cudaSuccess;
}
void ptxsim_capability(int capability) { runtime().capability = capability; }
void ptxsim_clusters(int yes) { runtime().clusters = yes != 0; }
const char* ptxsim_text(const char* kernel) {
  for (const auto& [host, function] : runtime().functions)
    if (function.name == kernel) return image_of(*function.binary).text.c_str();
  return nullptr;
}
const char* ptxsim_kernel(int index) {
  for (const auto& [host, function] : runtime().functions)
    if (index-- == 0) return function.name.c_str();
  return nullptr;
}
const char* ptxsim_replace(const char* kernel, const char* ptx) {
  runtime().replacements.erase(kernel);
  if (ptx == nullptr) return nullptr;
  try {
    auto module = std::make_unique<ptxsim::Module>(ptx);
    module->find(kernel);
    runtime().replacements[kernel] = std::move(module);
    return nullptr;
  } catch (const std::exception& e) {
    runtime().error = e.what();
    return runtime().error.c_str();
  }
}
}
