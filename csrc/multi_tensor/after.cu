// The fused weight update: p_i <- keep[i] p_i - step[i] u_i for many tensors in one launch.
//
// One block per chunk (plan.h). Flat tensors move 16 bytes at a time, two when a parameter is wider than its update;
// the others walk their strides, element by element. Items are grouped by dtypes, so a call is one launch per group.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "multi_tensor/formulas.cuh"
#include "multi_tensor/params.h"
#include "multi_tensor/plan.h"

namespace steepest::multi_tensor {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 8192;  // elements per block: 8 rounds of 256 threads x 4 fp32

struct FlatItem {
  void* p;
  const void* u;
  int64_t numel;
  int32_t index;  // into keep and step
  int32_t first_chunk;
};

struct StridedItem : FlatItem {
  Dtype p_dtype;
  Dtype u_dtype;
  Walk walk;
};

// Kernel arguments are at most 4 KB on every architecture and driver.
template <class Item_>
struct Batch {
  using Item = Item_;
  static constexpr int kCapacity = (4096 - sizeof(Factors) - 8) / sizeof(Item);
  Factors factors;
  int32_t count;
  Item items[kCapacity];
};
static_assert(sizeof(Batch<FlatItem>) <= 4096 && sizeof(Batch<StridedItem>) <= 4096);

__device__ inline float load(const float* at) { return *at; }
__device__ inline float load(const __nv_bfloat16* at) { return __bfloat162float(*at); }
__device__ inline float load(const __half* at) { return __half2float(*at); }
__device__ inline void store(float* at, float value) { *at = value; }
__device__ inline void store(__nv_bfloat16* at, float value) { *at = __float2bfloat16_rn(value); }
__device__ inline void store(__half* at, float value) { *at = __float2half_rn(value); }

// Runs the statements with T as the element type that `dtype` names.
#define STEEPEST_DTYPE_SWITCH(dtype, T, ...) \
  switch (dtype) {                           \
    case Dtype::f32: {                       \
      using T = float;                       \
      __VA_ARGS__;                           \
      break;                                 \
    }                                        \
    case Dtype::bf16: {                      \
      using T = __nv_bfloat16;               \
      __VA_ARGS__;                           \
      break;                                 \
    }                                        \
    case Dtype::f16: {                       \
      using T = __half;                      \
      __VA_ARGS__;                           \
      break;                                 \
    }                                        \
  }

// The part of a tensor that a block works on, and its two numbers.
template <class Item>
struct Work {
  const Item& item;
  int64_t start;
  int64_t length;
  float keep;
  float step;

  __device__ explicit Work(const Batch<Item>& batch) : item(find(batch)) {
    start = (static_cast<int64_t>(blockIdx.x) - item.first_chunk) * kChunk;
    length = min(kChunk, item.numel - start);
    keep = batch.factors.keep[item.index * batch.factors.keep_stride];
    step = batch.factors.step[item.index * batch.factors.step_stride];
  }
  __device__ static const Item& find(const Batch<Item>& batch) {
    const auto first_chunk = [&](int i) { return batch.items[i].first_chunk; };
    return batch.items[owner(first_chunk, batch.count, static_cast<int32_t>(blockIdx.x))];
  }
  // An update that is multiplied by zero is not read: it may hold NaN.
  __device__ bool reads_update() const { return step != 0.f; }
  __device__ bool changes_nothing() const { return keep == 1.f && step == 0.f; }
};

template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T at[kCount];
};

template <int kVector, class P, class U>
__device__ inline void update_flat(P* p, const U* u, const Work<FlatItem>& work) {
  using PackP = Pack<P, kVector>;
  using PackU = Pack<U, kVector>;
  const int64_t body = work.length / kVector * kVector;
  for (int64_t i = threadIdx.x * kVector; i < body; i += kThreads * kVector) {
    PackP x = *reinterpret_cast<const PackP*>(p + i);
    PackU d{};
    if (work.reads_update()) d = *reinterpret_cast<const PackU*>(u + i);
#pragma unroll
    for (int j = 0; j < kVector; ++j) store(&x.at[j], after(load(&x.at[j]), load(&d.at[j]), work.keep, work.step));
    *reinterpret_cast<PackP*>(p + i) = x;
  }
  for (int64_t i = body + threadIdx.x; i < work.length; i += kThreads)
    store(p + i, after(load(p + i), work.reads_update() ? load(u + i) : 0.f, work.keep, work.step));
}

template <class P, class U>
__global__ void __launch_bounds__(kThreads) after_flat(const __grid_constant__ Batch<FlatItem> batch) {
  const Work<FlatItem> work(batch);
  if (work.changes_nothing()) return;
  P* p = static_cast<P*>(work.item.p) + work.start;
  const U* u = static_cast<const U*>(work.item.u) + work.start;
  constexpr int kVector = 16 / (sizeof(P) < sizeof(U) ? sizeof(P) : sizeof(U));
  const bool aligned = (reinterpret_cast<uintptr_t>(p) | reinterpret_cast<uintptr_t>(u)) % 16 == 0;
  if (aligned)
    update_flat<kVector>(p, u, work);
  else
    update_flat<1>(p, u, work);
}

__global__ void __launch_bounds__(kThreads) after_strided(const __grid_constant__ Batch<StridedItem> batch) {
  const Work<StridedItem> work(batch);
  if (work.changes_nothing()) return;
  const StridedItem& item = work.item;
  for (int64_t i = threadIdx.x; i < work.length; i += kThreads) {
    int64_t rest = work.start + i, p_at = 0, u_at = 0;
    for (int d = item.walk.dims - 1; d >= 0; --d) {
      const int64_t along = rest % item.walk.size[d];
      rest /= item.walk.size[d];
      p_at += along * item.walk.p_stride[d];
      u_at += along * item.walk.u_stride[d];
    }
    float u = 0.f;
    if (work.reads_update()) {
      STEEPEST_DTYPE_SWITCH(item.u_dtype, U, u = load(static_cast<const U*>(item.u) + u_at))
    }
    STEEPEST_DTYPE_SWITCH(item.p_dtype, P, P* p = static_cast<P*>(item.p) + p_at;
                          store(p, after(load(p), u, work.keep, work.step)))
  }
}

FlatItem kernel_item(const AfterItem& from, FlatItem) { return {from.p, from.u, from.numel, 0, 0}; }
StridedItem kernel_item(const AfterItem& from, StridedItem) {
  return {kernel_item(from, FlatItem{}), from.p_dtype, from.u_dtype, from.walk};
}

void check_launch(const Launch& launch) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  throw std::runtime_error("steepest::after: a launch of " + std::to_string(launch.chunks) + " blocks over " +
                           std::to_string(launch.tensors.size()) + " tensors failed: " + cudaGetErrorString(error));
}

// `group` holds positions in params.items that one kernel can take.
template <class Item, class Kernel>
void launch_group(const AfterParams& params, const std::vector<int>& group, cudaStream_t stream, Kernel kernel) {
  std::vector<int64_t> numel;
  for (int index : group) numel.push_back(params.items[index].numel);
  for (const Launch& launch : plan_launches(numel, kChunk, Batch<Item>::kCapacity)) {
    Batch<Item> batch{};
    batch.factors = params.factors;
    batch.count = static_cast<int32_t>(launch.tensors.size());
    for (int i = 0; i < batch.count; ++i) {
      const int index = group[launch.tensors[i]];
      batch.items[i] = kernel_item(params.items[index], Item{});
      batch.items[i].index = index;
      batch.items[i].first_chunk = launch.first_chunk[i];
    }
    kernel<<<launch.chunks, kThreads, 0, stream>>>(batch);
    check_launch(launch);
  }
}

}  // namespace

void launch_after(const AfterParams& params, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  std::map<std::pair<Dtype, Dtype>, std::vector<int>> flat;
  std::vector<int> strided;
  for (int i = 0; i < static_cast<int>(params.items.size()); ++i) {
    const AfterItem& item = params.items[i];
    (item.flat ? flat[{item.p_dtype, item.u_dtype}] : strided).push_back(i);
  }
  for (const auto& [dtypes, group] : flat) {
    STEEPEST_DTYPE_SWITCH(
        dtypes.first, P,
        STEEPEST_DTYPE_SWITCH(dtypes.second, U, launch_group<FlatItem>(params, group, stream, after_flat<P, U>)))
  }
  launch_group<StridedItem>(params, strided, stream, after_strided);
}

}  // namespace steepest::multi_tensor
