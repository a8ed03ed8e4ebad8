// What every op checks and asks for: where an op runs, its pointers, its stream.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/scratch.h"

// Lives in libtorch_cuda. Weak, so that a torch without CUDA still loads this library.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace steepest {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Where an op runs: every tensor is on the device of the first.
struct Place {
  bool cuda;
  int32_t index;

  explicit Place(const Tensor& first) : cuda(first.is_cuda()), index(cuda ? first.get_device_index() : 0) {}
  void check(const Tensor& tensor, const char* name, size_t i = 0) const {
    STD_TORCH_CHECK(tensor.is_cuda() == cuda && (cuda ? tensor.get_device_index() == index : tensor.is_cpu()), name,
                    "[", i, "] is not on the device of the other tensors; call once per device");
  }
};

inline void check_lengths(size_t given, size_t wanted, const char* name) {
  STD_TORCH_CHECK(given == wanted, name, " has ", given, " elements; it goes by ", wanted);
}

// Of an element, with `i` the place of its tensor in the list `name`.
inline Dtype element_type(const Tensor& tensor, const Place& place, const char* name, size_t i) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    case ScalarType::Short:
      return Dtype::i16;
    case ScalarType::Double:
      if (!place.cuda) return Dtype::f64;
      [[fallthrough]];
    default:
      STD_TORCH_CHECK(false, name, "[", i, "] is ", torch::headeronly::toString(tensor.scalar_type()),
                      "; accepted are float32, bfloat16 and float16, on the CPU float64 as well");
  }
}

template <class T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Of a matrix of weights that a product is taken into: contiguous, of the type of the others of its stack.
inline void* weight_address(const Tensor& weight, const Place& place, size_t i, int64_t rows, int64_t columns,
                            Dtype dtype) {
  place.check(weight, "weights", i);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == columns && weight.is_contiguous(),
                  "weights[", i, "] must be a contiguous matrix of ", rows, " x ", columns);
  STD_TORCH_CHECK((dtype == Dtype::f32 || dtype == Dtype::bf16 || dtype == Dtype::f16) &&
                      element_type(weight, place, "weights", i) == dtype,
                  "weights[", i, "] must be float32, bfloat16 or float16, like the others of its stack");
  return weight.mutable_data_ptr();
}

inline void* current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "no current stream on CUDA device ",
                  device);
  return stream;
}

// The scratch of an op over so many counters and chunks of `width` partials each.
inline Scratch check_scratch(const Tensor& scratch, const Place& place, int64_t width, int64_t counters, int64_t chunks,
                             const char* name = "scratch") {
  place.check(scratch, name);
  const int64_t wanted = counters + chunks * width;
  STD_TORCH_CHECK(scratch.scalar_type() == ScalarType::Double && scratch.is_contiguous() && scratch.numel() >= wanted,
                  name, " must be a contiguous float64 tensor of at least ", wanted, " elements, all zero at first");
  double* begin = pointer<double>(scratch);
  return {reinterpret_cast<uint64_t*>(begin), begin + counters};
}

}  // namespace steepest
