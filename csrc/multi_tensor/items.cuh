// What a block of `update_moments` or `apply_update` does with its chunk of an item.
#pragma once

#include "multi_tensor/block.cuh"

namespace steepest::multi_tensor {
namespace {

struct FlatItem {
  void* at[kSlots];
  const double* lengths;
  const float* factors;
  int64_t size;
  int64_t first_sum;
  double ratio;
  uint32_t place[3];
  int32_t row;
  int32_t first_chunk;
  uint32_t columns;  // of a row of factors
  Dtype dtype[kSlots];
  Program program;
  bool aligned;

  static constexpr bool kFlat = true, kNormalized = false;
};

struct StridedItem : FlatItem {
  Walk walk;

  static constexpr bool kFlat = false;
};

struct Head {
  const double* rows;
  double* sums;
  Scratch scratch;
};

constexpr uint32_t largest_columns() {
  uint32_t bits = 0;
  for (int c = 0; c < kSums; ++c) bits |= uint32_t{is_largest(c)} << c;
  return bits;
}
constexpr uint32_t kLargestColumns = largest_columns();

// One thread's work on an item; walk is nullptr where the item is flat.
struct Worker {
  const FlatItem& item;
  const Walk* walk;
  Numbers<float> n;
  uint32_t seed;
  Sums<float> sums;
  int64_t places[kSlots];  // of the element at hand, where the item is strided

  static constexpr int kAtOnce = 1;

  __device__ void begin(int64_t index) {
    if (walk != nullptr) locate(*walk, index, places);
  }
  __device__ bool has(Slot slot) const { return item.at[slot] != nullptr; }
  __device__ int64_t where(Slot slot, int64_t index) const { return walk != nullptr ? places[slot] : index; }
  template <class Raw>
  __device__ void get(Slot slot, int64_t index, Raw& raw) const {
    if (has(slot)) fetch(item.at[slot], item.dtype[slot], where(slot, index), raw);
  }
  template <int N>
  __device__ void put_slot(Slot slot, int64_t index, const float (&from)[N]) const {
    put(item.at[slot], item.dtype[slot], where(slot, index), from);
  }

  template <int N, class Raw>
  __device__ void convert_param(const Raw& raw, const Raw& mantissa, float (&p)[N]) const {
    convert(raw, item.dtype[kParam], p);
    if (!has(kMantissa)) return;
    float low[N];
    convert(mantissa, Dtype::bf16, low);  // its 16 bits above 16 zeros
#pragma unroll
    for (int j = 0; j < N; ++j)
      p[j] = join({static_cast<uint16_t>(bits_of(p[j]) >> 16), static_cast<int16_t>(bits_of(low[j]) >> 16)});
  }

  template <int N>
  __device__ void put_param(int64_t index, const float (&p)[N]) const {
    uint16_t high[N];
    if (has(kMantissa)) {
      uint16_t low[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const Split parts = split(p[j]);
        high[j] = parts.high, low[j] = static_cast<uint16_t>(parts.low);
      }
      put(item.at[kMantissa], where(kMantissa, index), low);
    } else if (item.program.rounding == Program::kStochastic && item.dtype[kParam] == Dtype::bf16) {
#pragma unroll
      for (int j = 0; j < N; ++j) high[j] = to_bf16(p[j], noise(seed, index + j));
    } else {
      return put_slot(kParam, index, p);
    }
    put(item.at[kParam], where(kParam, index), high);
  }
};

struct UpdateMoments : Worker {
  template <int N>
  __device__ void operator()(int64_t index) {
    begin(index);
    typename RawOf<N>::type g, m, v, p, low;
    get(kGrad, index, g), get(kMomentum, index, m), get(kSecond, index, v), get(kParam, index, p);
    get(kMantissa, index, low);
    Tile<float, N> tile;
    convert(g, item.dtype[kGrad], tile.g);
    convert(m, item.dtype[kMomentum], tile.m);
    if (has(kSecond)) convert(v, item.dtype[kSecond], tile.v);
    if (has(kParam)) convert_param(p, low, tile.p);
    until_direction(item.program, n, tile, sums, [&](float (&m)[N]) {
      if (item.dtype[kMomentum] == Dtype::f32) return;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const uint16_t half = to_half_word(m[j], item.dtype[kMomentum]);
        m[j] = item.dtype[kMomentum] == Dtype::bf16 ? from_bf16(half) : from_f16(half);
      }
    });
    if (!item.program.frozen_moments) {
      put_slot(kMomentum, index, tile.m);
      if (has(kSecond)) put_slot(kSecond, index, tile.v);
    }
    if (has(kParam)) put_param(index, tile.p);
    if (!has(kDirection)) return;
    if (item.dtype[kDirection] == Dtype::f16) {
#pragma unroll
      for (int j = 0; j < N; ++j) tile.d[j] = clamp_to_f16(tile.d[j] * n.input_scale);
    }
    put_slot(kDirection, index, tile.d);
  }
};

struct ApplyUpdate : Worker {
  // Elements from `index` on by the factors of their rows.
  template <int N>
  __device__ void scale_rows(int64_t index, float (&d)[N]) const {
    const uint32_t columns = item.columns;
    const bool fits = index <= UINT32_MAX;  // its division takes a fraction of the other's
    int64_t row = fits ? static_cast<uint32_t>(index) / columns : index / columns;
    int64_t left = (row + 1) * columns - index;
    float factor = item.factors[row];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (left == 0) factor = item.factors[++row], left = columns;
      --left;
      d[j] *= factor;
    }
  }

  template <int N>
  __device__ void operator()(int64_t index) {
    begin(index);
    typename RawOf<N>::type d, v, p, low;
    get(kDirection, index, d), get(kSecond, index, v), get(kParam, index, p), get(kMantissa, index, low);
    Tile<float, N> tile;
    convert(d, item.dtype[kDirection], tile.d);
    if (item.factors != nullptr) scale_rows(index, tile.d);
    if (has(kSecond)) convert(v, item.dtype[kSecond], tile.v);
    convert_param(p, low, tile.p);
    from_direction(item.program, n, tile, sums);
    put_param(index, tile.p);
  }
};

// The direction's input of a matrix whose step is not taken.
struct Clear {
  const FlatItem& item;
  const Walk* walk;
  static constexpr int kAtOnce = 1;

  template <int N>
  __device__ void operator()(int64_t index) {
    const float zeros[N] = {};
    int64_t places[kSlots];
    if (walk != nullptr) locate(*walk, index, places);
    put(item.at[kDirection], item.dtype[kDirection], walk != nullptr ? places[kDirection] : index, zeros);
  }
};

// The chunk with the number `block` of the launch. Where the item is `Normalized`, see normalize.cu, its directions are
// read once they are.
template <class Work, class Batch>
__device__ inline void run(const Batch& batch, int32_t block) {
  constexpr bool kUpdate = std::is_same_v<Work, ApplyUpdate>;
  const auto& item = find(batch, block);
  const Span part = span(item.size, kChunk, block - item.first_chunk);
  const Head& head = batch.head;
  const double* row = head.rows + int64_t{item.row} * kColumns;
  constexpr bool kFlat = Batch::Item::kFlat;
  const Walk* walk = nullptr;
  if constexpr (!kFlat) walk = &item.walk;
  // Read before the test, so that the two latencies are one.
  const double length = item.lengths != nullptr ? item.lengths[part.matrix] : 1.0;
  const Numbers<float> numbers(item.program, row, item.ratio, length);
  const uint32_t item_seed = seed(row[kStep], item.place);
  if (row[kFinite] == 0) {
    if (!kUpdate && item.at[kDirection] != nullptr) {
      Clear clear{item, walk};
      for_each_element<kFlat>(part, item.aligned, clear);
    }
    return;
  }
  if constexpr (Batch::Item::kNormalized) wait_for_factors(batch, item, part.matrix);
  Work work{{item, walk, numbers, item_seed, {}, {}}};
  for_each_element<kFlat>(part, item.aligned, work);
  combine_block<kSums, kLargestColumns>(work.sums.at);
  double totals[kSums];
#pragma unroll
  for (int c = 0; c < kSums; ++c) totals[c] = work.sums.at[c];
  const int64_t line = item.first_sum + part.matrix;
  const int64_t first = item.first_chunk + part.matrix * part.chunks;
  if (!combine_chunks<kSums, kSums, kLargestColumns>(head.scratch, line, part.chunks, first, block, totals)) return;
  if (threadIdx.x != 0) return;
  if constexpr (Batch::Item::kNormalized) forget_factors(batch, item, part.matrix);  // which all chunks have seen
  const bool whole = item.program.direction != Program::kGiven;
#pragma unroll
  for (int c = 0; c < kSums; ++c)
    if (writes_sum(kUpdate, whole, c)) head.sums[line * kSums + c] = totals[c];
}

// All tensors begin at a multiple of 16 bytes, and so does every matrix in them.
inline bool is_aligned(const Item& item) {
  uintptr_t bits = 0;
  for (const void* at : item.at) bits |= reinterpret_cast<uintptr_t>(at);
  return bits % 16 == 0 && (item.matrices == 1 || item.size % kVector == 0);
}

// The kernels' form of an item.
template <class KernelItem>
KernelItem device_item(const Item& from) {
  KernelItem item{};
  for (int slot = 0; slot < kSlots; ++slot) item.at[slot] = from.at[slot], item.dtype[slot] = from.dtype[slot];
  for (int i = 0; i < 3; ++i) item.place[i] = from.place[i];
  item.factors = static_cast<const float*>(from.factors), item.columns = static_cast<uint32_t>(from.columns);
  item.lengths = from.lengths, item.size = from.size, item.first_sum = from.first_sum, item.ratio = from.ratio;
  item.row = from.row, item.program = from.program;
  if constexpr (KernelItem::kFlat)
    item.aligned = is_aligned(from);
  else
    item.walk = from.walk;
  return item;
}

}  // namespace
}  // namespace steepest::multi_tensor
