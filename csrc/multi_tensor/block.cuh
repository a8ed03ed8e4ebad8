// What a block of a fused elementwise kernel does whatever its formulas: find its work and move elements.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/arguments.h"
#include "common/binary_search.h"
#include "common/block.cuh"
#include "common/check.h"
#include "common/floats.h"
#include "multi_tensor/formulas.cuh"
#include "multi_tensor/params.h"
#include "multi_tensor/plan.h"

namespace steepest::multi_tensor {

constexpr int kVector = 8;  // elements a thread takes at once: 16 bytes of a 16-bit type, twice 16 of fp32

// A launch's items, handed over by value: a captured launch replays without any table in memory. Head is what they
// share.
template <class Head_, class Item_>
struct alignas(8) Batch {
  using Head = Head_;
  using Item = Item_;
  static constexpr int kCapacity = static_cast<int>((kArgumentBytes - sizeof(Head) - 8) / sizeof(Item));
  Head head;
  int32_t count;
  Item items[kCapacity];
};

template <class Batch>
__device__ inline const typename Batch::Item& find(const Batch& batch, int32_t block) {
  return batch.items[part_with([&](int i) { return batch.items[i].first_chunk; }, batch.count, block)];
}

// ---- elements ------------------------------------------------------------------------------------------------------

// Where element `index` lies in every tensor of an item, in elements; one division for every dimension but the
// outermost.
template <int kTensors>
__device__ inline void locate(const Walk& walk, int64_t index, int64_t (&places)[kTensors]) {
#pragma unroll
  for (int t = 0; t < kTensors; ++t) places[t] = 0;
  for (int d = walk.dims - 1; d >= 0; --d) {
    const int64_t next = d > 0 ? index / walk.size[d] : 0, along = index - next * walk.size[d];
#pragma unroll
    for (int t = 0; t < kTensors; ++t) places[t] += along * walk.stride[t][d];
    index = next;
  }
}

// Eight elements as they lie in memory. Fetching and converting are apart so that the loads of all tensors are under
// way before the first is needed.
struct Raw {
  uint4 low, high;  // high: elements 4 to 7 of a 4-byte type
};

__device__ inline void fetch(const void* at, Dtype dtype, int64_t index, Raw& raw) {
  if (dtype == Dtype::f32) {
    const uint4* from = reinterpret_cast<const uint4*>(static_cast<const float*>(at) + index);
    raw.low = from[0], raw.high = from[1];
  } else {
    raw.low = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(at) + index);
  }
}

__device__ inline uint16_t half_word(const uint4& words, int j) {
  const uint32_t word = j < 2 ? words.x : j < 4 ? words.y : j < 6 ? words.z : words.w;
  return static_cast<uint16_t>(j % 2 ? word >> 16 : word);
}

__device__ inline void convert(const Raw& raw, Dtype dtype, float (&to)[kVector]) {
  if (dtype == Dtype::f32) {
    const uint32_t words[kVector] = {raw.low.x,  raw.low.y,  raw.low.z,  raw.low.w,
                                     raw.high.x, raw.high.y, raw.high.z, raw.high.w};
#pragma unroll
    for (int j = 0; j < kVector; ++j) to[j] = float_of(words[j]);
  } else if (dtype == Dtype::bf16) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) to[j] = from_bf16(half_word(raw.low, j));
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) to[j] = from_f16(half_word(raw.low, j));
  }
}

__device__ inline uint4 pack(const uint16_t (&half)[kVector]) {
  const auto pair = [&half](int j) { return half[j] | static_cast<uint32_t>(half[j + 1]) << 16; };
  return {pair(0), pair(2), pair(4), pair(6)};
}

__device__ inline uint16_t to_half_word(float value, Dtype dtype) {
  return dtype == Dtype::bf16 ? to_bf16(value) : to_f16(value);
}

// Said as one instruction: an assignment is four stores to the compiler, which it does not always join again.
__device__ inline void put_words(void* at, uint4 words) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(at)), "r"(words.x),
               "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
#else
  *static_cast<uint4*>(at) = words;
#endif
}

__device__ inline void put(void* at, int64_t index, const uint16_t (&half)[kVector]) {
  put_words(static_cast<uint16_t*>(at) + index, pack(half));
}

__device__ inline void put(void* at, Dtype dtype, int64_t index, const float (&from)[kVector]) {
  if (dtype == Dtype::f32) {
    float* to = static_cast<float*>(at) + index;
    put_words(to, {bits_of(from[0]), bits_of(from[1]), bits_of(from[2]), bits_of(from[3])});
    put_words(to + 4, {bits_of(from[4]), bits_of(from[5]), bits_of(from[6]), bits_of(from[7])});
    return;
  }
  uint16_t half[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) half[j] = to_half_word(from[j], dtype);
  put(at, index, half);
}

// One element at a time: the last few of a chunk, and tensors that are strided or not aligned.
struct RawOne {
  uint32_t bits;
};
__device__ inline void fetch(const void* at, Dtype dtype, int64_t index, RawOne& raw) {
  raw.bits = dtype == Dtype::f32 ? static_cast<const uint32_t*>(at)[index] : static_cast<const uint16_t*>(at)[index];
}
__device__ inline void convert(const RawOne& raw, Dtype dtype, float (&to)[1]) {
  const uint16_t half = static_cast<uint16_t>(raw.bits);
  to[0] = dtype == Dtype::f32 ? float_of(raw.bits) : dtype == Dtype::bf16 ? from_bf16(half) : from_f16(half);
}
__device__ inline void put(void* at, int64_t index, const uint16_t (&half)[1]) {
  static_cast<uint16_t*>(at)[index] = half[0];
}
__device__ inline void put(void* at, Dtype dtype, int64_t index, const float (&from)[1]) {
  if (dtype == Dtype::f32)
    static_cast<float*>(at)[index] = from[0];
  else
    static_cast<uint16_t*>(at)[index] = to_half_word(from[0], dtype);
}

template <int N>
struct RawOf {
  using type = Raw;
};
template <>
struct RawOf<1> {
  using type = RawOne;
};

// Calls body.template operator()<N>(index) for every element of a chunk, this thread's share of it: kVector at a time
// where the kernel knows flat items and this one is aligned, and one at a time otherwise and at the end. A body with
// kAtOnce > 1 takes so many turns at once, by several(index), to have more loads under way.
template <bool kFlat, class Body>
__device__ inline void for_each_element(const Span& span, bool aligned, Body& body) {
  const int64_t end = span.start + span.length;
  int64_t cut = span.start;
  if constexpr (kFlat) {
    if (aligned) cut += span.length / kVector * kVector;
    int64_t i = span.start + threadIdx.x * kVector;
    if constexpr (Body::kAtOnce > 1)
      for (; i + (Body::kAtOnce - 1) * kThreads * kVector < cut; i += Body::kAtOnce * kThreads * kVector)
        body.several(i);
    for (; i < cut; i += kThreads * kVector) body.template operator()<kVector>(i);
  }
  for (int64_t i = cut + threadIdx.x; i < end; i += kThreads) body.template operator()<1>(i);
}

// ---- launches ------------------------------------------------------------------------------------------------------

// Launches `kernel` over items, a block for each chunk of theirs; `convert(i)` is the kernel's form of the i-th,
// whose extent is extents[i].
template <class Batch, class Kernel, class Convert>
void launch(const char* op, const typename Batch::Head& head, const std::vector<Extent>& extents, cudaStream_t stream,
            Kernel kernel, const Convert& convert) {
  static_assert(sizeof(Batch) <= kArgumentBytes);
  for (const Launch& plan : plan_launches(extents, kChunk, Batch::kCapacity)) {
    static thread_local Batch batch;  // 32 KB: not on the stack; the launch copies what it is given
    batch.head = head;
    batch.count = static_cast<int32_t>(plan.items.size());
    for (int i = 0; i < batch.count; ++i) {
      batch.items[i] = convert(plan.items[i]);
      batch.items[i].first_chunk = plan.first_chunk[i];
    }
    kernel<<<plan.chunks, kThreads, 0, stream>>>(batch);
    check_launch(op, plan.chunks, plan.items.size());
  }
}

}  // namespace steepest::multi_tensor
