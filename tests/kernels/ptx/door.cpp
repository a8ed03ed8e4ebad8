// Between the product's doors (csrc/ops, compiled as for a GPU) and the simulator: the linker sends here what build.py
// names, so that CPU tensors pass for tensors of a CUDA device.
//
// What a door hands to a kernel it has asked of torch, and here it is written down: a tensor's memory is known to the
// simulator from the moment a door takes its address, for reading or for writing too, until the door lets go of it.
// A launch must come from under a device guard and be on the current stream.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "common/device.h"
#include "eigh/cusolver.h"
#include "simulator/api.h"
#include "simulator/cuda_runtime.h"
#include "small_polar/params.h"
#include "symm_gemm/plan.h"

namespace {

// What the tests choose.
int tiles = 0;                      // 0: as the planner has it, 1: wide, 2: small
int streams = 0;                    // 0: as the planner has it, 1: never, 2: always
int most_blocks = INT32_MAX;        // of a launch of small matrices
int refuse_at = -1;                 // of the launches from now on the one that is refused, 0 the next; -1: none
const void* host_tensor = nullptr;  // the memory of a tensor that stays a CPU's
char current_stream;                // its address stands for one

int guards = 0;
std::string complaint;              // of what is here, for cudaGetErrorString
cudaError_t pending = cudaSuccess;  // for cudaGetLastError

cudaError_t fail(cudaError_t error, const std::string& what) {
  complaint = what;
  return pending = error;
}

struct Allowed {
  const void* kernel;
  int device, bytes;
};
std::vector<Allowed> allowed;  // every cudaFuncSetAttribute so far

struct Memory {
  const char* begin;
  const char* end;
  bool written;
};
std::multimap<AtenTensorHandle, Memory> known;
bool registered = true;  // whether the simulator knows what is in there

// A tensor's elements, in pieces that lie in a row each: what is between them is not the tensor's.
void remember(AtenTensorHandle tensor, const void* at, bool written) {
  int64_t numel = 0, dims = 0, *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;
  aoti_torch_get_numel(tensor, &numel), aoti_torch_get_dim(tensor, &dims), aoti_torch_get_dtype(tensor, &dtype);
  aoti_torch_get_sizes(tensor, &sizes), aoti_torch_get_strides(tensor, &strides);
  if (numel == 0) return;
  std::vector<std::pair<int64_t, int64_t>> sides;  // stride and size, from the inside out
  for (int64_t d = 0; d < dims; ++d)
    if (sizes[d] > 1 && strides[d] > 0) sides.emplace_back(strides[d], sizes[d]);
  std::sort(sides.begin(), sides.end());
  int64_t piece = 1;
  size_t outer = 0;
  while (outer < sides.size() && sides[outer].first <= piece)
    piece += (sides[outer].second - 1) * sides[outer].first, ++outer;
  const int64_t width = aoti_torch_dtype_element_size(dtype);
  std::vector<int64_t> starts{0};
  for (; outer < sides.size(); ++outer) {
    const size_t before = starts.size();
    for (int64_t i = 1; i < sides[outer].second; ++i)
      for (size_t k = 0; k < before; ++k) starts.push_back(starts[k] + i * sides[outer].first);
  }
  for (const int64_t start : starts) {
    const char* begin = static_cast<const char*>(at) + start * width;
    known.emplace(tensor, Memory{begin, begin + piece * width, written});
  }
  registered = false;
}

// Tells the simulator what kernels may read, and what they may write too.
void register_memory() {
  if (std::exchange(registered, true)) return;
  ptxsim_unregister_all();
  for (const auto& [tensor, memory] : known)
    ptxsim_register(memory.begin, memory.end - memory.begin, "a tensor", memory.written);
}

bool is_ready(cudaStream_t stream, cudaError_t& error) {
  if (refuse_at >= 0 && refuse_at-- == 0) {
    error = fail(cudaErrorInvalidConfiguration, "refused on purpose");
  } else if (guards == 0) {
    error = fail(cudaErrorInvalidDevice, "a launch without a device guard");
  } else if (static_cast<void*>(stream) != &current_stream) {
    error = fail(cudaErrorInvalidResourceHandle, "a launch on another stream than the current one");
  } else {
    complaint.clear();
    register_memory();
    return true;
  }
  return false;
}

AOTITorchError filled(AOTITorchError error, AtenTensorHandle tensor, int byte) {
  int64_t numel = 0;
  int32_t dtype = 0;
  void* at = nullptr;
  aoti_torch_get_numel(tensor, &numel), aoti_torch_get_dtype(tensor, &dtype), aoti_torch_get_data_ptr(tensor, &at);
  std::memset(at, byte, numel * aoti_torch_dtype_element_size(dtype));
  return error;
}

}  // namespace

namespace steepest::symm_gemm {
Plan planned(const std::vector<Shape>& shapes, int multiprocessors, const Options& options);

Plan make_plan(const std::vector<Shape>& shapes, int multiprocessors, const Options& given) {
  Options options = given;
  if (streams != 0) options.streams = streams == 1 ? Streams::never : Streams::always;
  if (tiles != 0) options.wide = tiles == 1, options.small = tiles == 2;
  return planned(shapes, multiprocessors, options);
}
}  // namespace steepest::symm_gemm

namespace steepest::small_polar {
void polar_in_launches(const std::vector<Matrices>& matrices, const Schedule& schedule, const Room& room, void* stream,
                       int32_t most) {
  polar_on_device(matrices, schedule, room, stream, std::min(most, most_blocks));
}
}  // namespace steepest::small_polar

extern "C" {

// ---- torch

AOTITorchError __wrap_aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* type) {
  void* at = nullptr;
  aoti_torch_get_data_ptr(tensor, &at);
  *type = host_tensor != nullptr && at == host_tensor ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError __wrap_aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
  cudaGetDevice(index);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = &current_stream;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError __wrap_aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  ++guards;
  *guard = reinterpret_cast<DeviceGuardHandle>(&guards);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError __wrap_aoti_torch_delete_device_guard(DeviceGuardHandle) {
  --guards;
  return AOTI_TORCH_SUCCESS;
}

// What is registered for CUDA is what CPU tensors come to; the host's versions are nobody's. Ops without tensors stay.
AOTITorchError __real_aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t,
                                                   TorchLibraryHandle*);
AOTITorchError __wrap_aoti_torch_library_init_impl(const char* name, const char* key, const char* file, uint32_t line,
                                                   TorchLibraryHandle* library) {
  const std::string registered(key);
  const char* here = registered == "CUDA" ? "CPU" : registered == "CPU" ? "PrivateUse1" : key;
  return __real_aoti_torch_library_init_impl(name, here, file, line, library);
}

AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle, void**);
AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** at) {
  const AOTITorchError error = __real_torch_get_mutable_data_ptr(tensor, at);
  remember(tensor, *at, true);
  return error;
}
AOTITorchError __real_torch_get_const_data_ptr(AtenTensorHandle, const void**);
AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** at) {
  const AOTITorchError error = __real_torch_get_const_data_ptr(tensor, at);
  remember(tensor, *at, false);
  return error;
}
AOTITorchError __real_aoti_torch_delete_tensor_object(AtenTensorHandle);
AOTITorchError __wrap_aoti_torch_delete_tensor_object(AtenTensorHandle tensor) {
  if (known.erase(tensor) != 0) registered = false;
  return __real_aoti_torch_delete_tensor_object(tensor);
}

AOTITorchError __real_aoti_torch_aten_new_empty(AtenTensorHandle, const int64_t*, int64_t, int32_t*, int32_t*, int32_t*,
                                                int32_t, int32_t*, AtenTensorHandle*);
AOTITorchError __wrap_aoti_torch_aten_new_empty(AtenTensorHandle self, const int64_t* size, int64_t dims,
                                                int32_t* dtype, int32_t* layout, int32_t*, int32_t, int32_t* pinned,
                                                AtenTensorHandle* made) {
  int32_t cpu = aoti_torch_device_type_cpu();
  return filled(__real_aoti_torch_aten_new_empty(self, size, dims, dtype, layout, &cpu, 0, pinned, made), *made, 0xff);
}
AOTITorchError __wrap_aoti_torch_aten_new_zeros(AtenTensorHandle self, const int64_t* size, int64_t dims,
                                                int32_t* dtype, int32_t* layout, int32_t*, int32_t, int32_t* pinned,
                                                AtenTensorHandle* made) {
  int32_t cpu = aoti_torch_device_type_cpu();
  return filled(__real_aoti_torch_aten_new_empty(self, size, dims, dtype, layout, &cpu, 0, pinned, made), *made, 0);
}

// ---- the runtime

cudaError_t __real___cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t);
cudaError_t __wrap___cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                      cudaStream_t stream) {
  cudaError_t error;
  if (!is_ready(stream, error)) return error;
  return __real___cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
cudaError_t __real_cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**);
cudaError_t __wrap_cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  cudaError_t error;
  if (!is_ready(config->stream, error)) return error;
  return __real_cudaLaunchKernelExC(config, kernel, arguments);
}
cudaError_t __real_cudaFuncSetAttribute(const void*, cudaFuncAttribute, int);
cudaError_t __wrap_cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    int device = 0;
    cudaGetDevice(&device);
    allowed.push_back({kernel, device, value});
  }
  return __real_cudaFuncSetAttribute(kernel, attribute, value);
}
const char* __real_cudaGetErrorString(cudaError_t);
const char* __wrap_cudaGetErrorString(cudaError_t error) {
  return complaint.empty() ? __real_cudaGetErrorString(error) : complaint.c_str();
}
cudaError_t __real_cudaGetLastError();
cudaError_t __wrap_cudaGetLastError() {
  const cudaError_t error = __real_cudaGetLastError(), mine = pending;
  pending = cudaSuccess;
  return mine != cudaSuccess ? mine : error;
}

// ---- the tests

// Memory of a test's own, until door_forget.
void door_remember(const void* begin, uint64_t bytes, bool written) {
  const char* at = static_cast<const char*>(begin);
  known.emplace(nullptr, Memory{at, at + bytes, written});
  registered = false;
}
void door_forget() { known.erase(nullptr), registered = false; }
void door_tiles(int mode) { tiles = mode; }
void door_streams(int mode) { streams = mode; }
void door_most_blocks(int count) { most_blocks = count; }
void door_refuse(int launch) { refuse_at = launch; }
void door_host(const void* at) { host_tensor = at; }
// Whether an error waits for somebody who asks.
int door_stale() { return pending != cudaSuccess || cudaPeekAtLastError() != cudaSuccess; }
// As a new test finds it.
void door_clear() {
  tiles = streams = 0, refuse_at = -1, most_blocks = INT32_MAX, host_tensor = nullptr;
  complaint.clear(), pending = cudaSuccess;
  ptxsim_clear();
}
int door_allowed(int index, const void** kernel, int* device) {
  if (index >= static_cast<int>(allowed.size())) return -1;
  *kernel = allowed[index].kernel, *device = allowed[index].device;
  return allowed[index].bytes;
}
// A list of products as csrc/symm_gemm takes it, with what no op asks for. Each alpha, beta, gamma and eta is an array
// of one number for each matrix; `weights` are addresses, or nullptr.
struct Product {
  int64_t shape[15];
  const void *a, *b, *c;
  void* d;
  const float *alpha, *beta, *gamma, *eta;
  float *partials, *diagonal;
  void* const* weights;
  int32_t weights_dtype;
};

// `partials` becomes how many sums of squares each problem leaves for a matrix; `streams` how many launches cut tiles.
const char* door_products(const Product* products, int count, int dtype, bool run, int64_t* partials, int* launches,
                          int* cut) {
  namespace sg = steepest::symm_gemm;
  static std::string error;
  error.clear();
  std::vector<sg::Problem> problems;
  std::vector<sg::Shape> shapes;
  for (int i = 0; i < count; ++i) {
    const Product& p = products[i];
    const int64_t* at = p.shape;
    sg::Problem to{};
    to.shape = {at[0],
                at[1],
                at[2],
                at[3],
                static_cast<sg::Majors>(at[4]),
                at[5] != 0,
                {at[6], at[7]},
                {at[8], at[9]},
                {at[10], at[11]},
                {at[12], at[13]},
                at[14] != 0};
    to.a = p.a, to.b = p.b, to.c = p.c, to.d = p.d;
    to.alpha = {p.alpha, 1, 0}, to.beta = {p.beta, 1, 0}, to.gamma = {p.gamma, 1, 0};
    to.partials = p.partials, to.diagonal = p.diagonal;
    if (p.weights != nullptr) to.update = {p.weights, static_cast<steepest::Dtype>(p.weights_dtype), {p.eta, 1, 0}};
    problems.push_back(to), shapes.push_back(to.shape);
  }
  try {
    const bool updates = problems[0].update.weights != nullptr;
    const sg::Plan plan = make_plan(shapes, steepest::multiprocessors_of(0), sg::options_of(updates));
    *launches = static_cast<int>(plan.launches.size()), *cut = 0;
    for (const sg::Launch& launch : plan.launches) {
      *cut += launch.schedule.steps > 0;
      for (const sg::PlannedProblem& problem : launch.problems) partials[problem.index] = problem.tiling.partials;
    }
    for (const std::string& reason : plan.reasons)
      if (!reason.empty()) return (error = reason).c_str();
    if (!run) return nullptr;
    // What a cut tile leaves begins at a multiple of 16 bytes.
    std::vector<float> floats(plan.workspace_floats + 4, __builtin_nanf(""));
    std::vector<uint32_t> counters(plan.workspace_counters, 0);
    float* aligned = floats.data() + (16 - reinterpret_cast<uintptr_t>(floats.data()) % 16) % 16 / 4;
    door_remember(aligned, plan.workspace_floats * 4, true), door_remember(counters.data(), counters.size() * 4, true);
    ++guards;
    try {
      run_on_sm90(plan, problems, static_cast<steepest::Dtype>(dtype), {aligned, counters.data()}, &current_stream);
    } catch (const std::exception& e) {
      error = e.what();
    }
    --guards;
    door_forget();
    if (!error.empty()) return error.c_str();
    for (const uint32_t counter : counters)
      if (counter != 0) return "a counter of the workspace is not 0 after the launch";
    return nullptr;
  } catch (const std::exception& e) {
    return (error = e.what()).c_str();
  }
}

int door_known() { return static_cast<int>(known.size()); }
// Why the library does not load, empty where it does.
const char* door_load_cusolver(const char* name) {
  static std::string reason;
  return (reason = steepest::eigh::load_cusolver({name})).c_str();
}
}
