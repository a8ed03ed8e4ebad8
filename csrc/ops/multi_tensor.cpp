// The door of the fused elementwise kernels: check -> params -> device guard, stream -> launch.
//
// Python checks first and in its own words; these checks hold for whoever calls torch.ops.steepest directly.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "multi_tensor/params.h"

// Lives in libtorch_cuda. Weak, so that a torch without CUDA still loads this library.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace steepest {
namespace {

using multi_tensor::AfterItem;
using multi_tensor::AfterParams;
using multi_tensor::Dtype;
using multi_tensor::Ints;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Ints to_ints(torch::headeronly::IntHeaderOnlyArrayRef values) { return {values.begin(), values.end()}; }

Dtype element_type(const Tensor& tensor, const char* name, size_t i) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, name, "[", i, "] is ", torch::headeronly::toString(tensor.scalar_type()),
                      "; the CUDA kernel takes float32, bfloat16 and float16 (backend=\"torch\" takes float64)");
  }
}

void check_device(const Tensor& tensor, const Tensor& keep, const char* name, size_t i) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == keep.get_device_index(), name, "[", i,
                  "] is not on the CUDA device of keep, ", keep.get_device_index(), "; call once per device");
}

void check_factor(const Tensor& factor, const Tensor& keep, const char* name, size_t count) {
  STD_TORCH_CHECK(factor.dim() == 1 && factor.numel() == static_cast<int64_t>(count), name, " has ", factor.dim(),
                  " dimensions and ", factor.numel(), " elements; it holds one number for each of the ", count,
                  " params");
  STD_TORCH_CHECK(factor.scalar_type() == ScalarType::Float, name, " is ",
                  torch::headeronly::toString(factor.scalar_type()), "; the CUDA kernel takes float32");
  check_device(factor, keep, name, 0);
}

AfterItem make_item(const Tensor& p, const Tensor& u, const Tensor& keep, size_t i) {
  check_device(p, keep, "params", i);
  check_device(u, keep, "updates", i);
  const Ints sizes = to_ints(p.sizes()), p_strides = to_ints(p.strides()), u_strides = to_ints(u.strides());
  STD_TORCH_CHECK(sizes == to_ints(u.sizes()), "params[", i, "] and updates[", i, "] differ in shape");
  AfterItem item{};
  item.p = p.mutable_data_ptr();
  item.u = u.const_data_ptr();
  item.numel = p.numel();
  item.p_dtype = element_type(p, "params", i);
  item.u_dtype = element_type(u, "updates", i);
  item.flat = item.numel == 0 || multi_tensor::is_flat(sizes, p_strides, u_strides);
  if (item.flat) return item;
  STD_TORCH_CHECK(!multi_tensor::may_overlap(sizes, p_strides), "params[", i,
                  "] may hold one element at two indices, so it cannot be updated in place; clone() it first");
  STD_TORCH_CHECK(multi_tensor::merge_dims(sizes, p_strides, u_strides, item.walk), "params[", i, "] and updates[", i,
                  "] need more than ", multi_tensor::kMaxDims, " strided dimensions; make them contiguous()");
  return item;
}

void* current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "no current stream on CUDA device ",
                  device);
  return stream;
}

void after(const std::vector<Tensor>& params, const std::vector<Tensor>& updates, const Tensor& keep,
           const Tensor& step) {
  STD_TORCH_CHECK(params.size() == updates.size(), "params has ", params.size(), " tensors and updates ",
                  updates.size(), "; they are taken in pairs");
  check_factor(keep, keep, "keep", params.size());
  check_factor(step, keep, "step", params.size());
  if (params.empty()) return;
  AfterParams call{};
  for (size_t i = 0; i < params.size(); ++i) call.items.push_back(make_item(params[i], updates[i], keep, i));
  call.factors = {static_cast<const float*>(keep.const_data_ptr()), static_cast<const float*>(step.const_data_ptr()),
                  keep.stride(0), step.stride(0)};
  const int32_t device = keep.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  multi_tensor::launch_after(call, current_stream(device));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(steepest, CUDA, m) { m.impl("after", TORCH_BOX(&after)); }

}  // namespace steepest
