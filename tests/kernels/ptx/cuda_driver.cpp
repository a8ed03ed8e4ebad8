// Takes the place of the CUDA driver for Triton, whose driver.c and launchers call what stands here: a module is PTX, a
// launch is executed by the simulator, device memory is the host memory that was lent to the device. Device 0 is of
// compute capability 8.0, device 1 of 9.0.
#include <cuda.h>

#include <map>

#include "global_memory.h"
#include "launch.h"
#include "program.h"
#include "tensor_map.h"

namespace {
using ptxsim::Kernel;
using std::string;

struct Device {
  int major, minor, shared_of_block, shared_of_multiprocessor;
};
constexpr Device kDevices[] = {{8, 0, 163 << 10, 164 << 10}, {9, 0, 227 << 10, 228 << 10}};

struct Function {
  int device;
  Kernel* kernel;
};

int current = 0;

struct Module {
  explicit Module(const char* ptx) : text(ptx) {}
  int device = current;
  ptxsim::Module text;
  std::map<string, Function> functions;  // those that were asked for
};

char contexts[std::size(kDevices)];  // a context is the address of its byte
string error = "no error";

template <class F>
CUresult guarded(F f) {
  try {
    f();
    return CUDA_SUCCESS;
  } catch (const ptxsim::Refused& e) {
    error = e.what();
    return CUDA_ERROR_INVALID_VALUE;
  } catch (const std::exception& e) {
    error = e.what();
    return CUDA_ERROR_LAUNCH_FAILED;
  }
}

Function& function_of(CUfunction f) {
  auto& function = *reinterpret_cast<Function*>(f);
  if (function.device != current) throw ptxsim::Refused("a function of another device");
  return function;
}

// Bytes of an element as the map's type says.
int element_bytes(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
      return 4;
    default:
      throw ptxsim::Refused("a tensor map of type " + std::to_string(type));
  }
}
}  // namespace

extern "C" {
// What torch.cuda.set_device does.
void ptxsim_set_device(int device) { current = device; }

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
// Triton changes bits of the tensor maps that drivers up to 13.1 make.
CUresult cuDriverGetVersion(int* version) { return *version = 13020, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult result, const char** text) {
  static string last;  // Triton has room for 1024 characters
  last = result == CUDA_SUCCESS ? "no error" : error.substr(0, 900);
  return *text = last.c_str(), CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) { return *count = int(std::size(kDevices)), CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (ordinal < 0 || ordinal >= int(std::size(kDevices))) return CUDA_ERROR_INVALID_DEVICE;
  return *device = ordinal, CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  const Device& d = kDevices[device];
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return *value = d.major, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      return *value = d.minor, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      return *value = d.shared_of_block, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      return *value = d.shared_of_multiprocessor, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      return *value = 65536, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return *value = 132, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      return *value = 32, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
      return *value = 1, CUDA_SUCCESS;
    default:
      error = "attribute " + std::to_string(attribute) + " of a device";
      return CUDA_ERROR_INVALID_VALUE;
  }
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  return *context = reinterpret_cast<CUcontext>(&contexts[current]), CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  current = int(reinterpret_cast<char*>(context) - contexts);
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) { return *device = current, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = reinterpret_cast<CUcontext>(&contexts[device]), CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  return guarded([&] { *module = reinterpret_cast<CUmodule>(new Module(static_cast<const char*>(image))); });
}
CUresult cuModuleUnload(CUmodule module) { return delete reinterpret_cast<Module*>(module), CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  Module& m = *reinterpret_cast<Module*>(module);
  Kernel* kernel = m.text.find(name);
  if (!kernel) return error = "no kernel " + string(name), CUDA_ERROR_NOT_FOUND;
  *function = reinterpret_cast<CUfunction>(&(m.functions[name] = {m.device, kernel}));
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction f) {
  return guarded([&] {
    const Kernel& k = *function_of(f).kernel;
    switch (attribute) {
      case CU_FUNC_ATTRIBUTE_NUM_REGS:  // ptxas alone knows
      case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
        *value = 0;
        break;
      case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        *value = k.most_threads;
        break;
      case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
        *value = int(k.shared_bytes);
        break;
      default:
        throw ptxsim::Refused("attribute " + std::to_string(attribute) + " of a function");
    }
  });
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) {
  return guarded([&] {
    const Function& function = function_of(f);
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
      throw ptxsim::Refused("attribute " + std::to_string(attribute) + " of a function");
    if (value + int(function.kernel->shared_bytes) > kDevices[function.device].shared_of_block)
      throw ptxsim::Refused(std::to_string(value) + " bytes of shared memory");
    function.kernel->allowed_dynamic = value;
  });
}
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int*, CUfunction, const CUlaunchConfig*) { return CUDA_ERROR_NOT_SUPPORTED; }

CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** arguments, void** extra) {
  return guarded([&] {
    int cluster = 1;
    for (unsigned i = 0; i < c->numAttrs; ++i) {
      const CUlaunchAttribute& a = c->attrs[i];
      if (a.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
        cluster = a.value.clusterDim.x * a.value.clusterDim.y * a.value.clusterDim.z;
      else if (a.id != CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE)
        throw ptxsim::Refused("a launch with attribute " + std::to_string(a.id));
    }
    const Function& function = function_of(f);
    if (extra) throw ptxsim::Refused("a launch with a buffer of arguments");
    if (cluster > 1 && kDevices[function.device].major < 9) throw ptxsim::Refused("clusters before 9.0");
    ptxsim::launch(*function.kernel, {c->gridDimX, c->gridDimY, c->gridDimZ},
                   {c->blockDimX, c->blockDimY, c->blockDimZ}, cluster, c->sharedMemBytes, arguments);
  });
}

CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER || !ptxsim::ranges().allows(pointer, 1, false))
    return error = "not an address of the device's", CUDA_ERROR_INVALID_VALUE;
  return *static_cast<CUdeviceptr*>(value) = pointer, CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sides, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  return guarded([&] {
    if (kDevices[current].major < 9) throw ptxsim::Refused("a tensor map before 9.0");
    if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) throw ptxsim::Refused("a tensor map of interleaved slices");
    if (fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) throw ptxsim::Refused("a tensor map that fills with NaN");
    for (unsigned i = 0; i < rank; ++i)
      if (steps[i] != 1) throw ptxsim::Refused("a tensor map with steps");
    const std::map<CUtensorMapSwizzle, int> spans = {{CU_TENSOR_MAP_SWIZZLE_NONE, 0},
                                                     {CU_TENSOR_MAP_SWIZZLE_32B, 32},
                                                     {CU_TENSOR_MAP_SWIZZLE_64B, 64},
                                                     {CU_TENSOR_MAP_SWIZZLE_128B, 128}};
    const auto span = spans.find(swizzle);
    if (span == spans.end()) throw ptxsim::Refused("a tensor map with swizzle " + std::to_string(swizzle));
    ptxsim::encode_tensor_map(map, element_bytes(type), int(rank), address, sides, strides, box, span->second);
  });
}
CUresult cuTensorMapEncodeIm2col(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const int*, const int*, cuuint32_t, cuuint32_t, const cuuint32_t*,
                                 CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
}
