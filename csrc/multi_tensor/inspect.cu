// The pass over all gradients that comes before anything is written: finite or not, largest entry, norm; and from them
// the row of numbers with which `before` and `after` take the step.
#include "multi_tensor/block.cuh"

namespace steepest::multi_tensor {
namespace {

struct FlatGradient {
  const void* at;
  int64_t size;
  Owner owner;
  int32_t index;  // of its row
  int32_t first_chunk;
  Dtype dtype;
  bool aligned;
};

struct StridedGradient : FlatGradient {
  Walk walk;
};

struct Head {
  Scaling scaling;
  double* rows;
  const double* sums;
  int64_t* skipped;
  Scratch scratch;
};

enum { kMost, kSquare, kValues };
constexpr uint32_t kLargestValues = 1u << kMost;

struct Measure {
  const void* at;
  Dtype dtype;
  const Walk* walk;  // nullptr: flat
  float (&values)[kValues];

  // One tensor is read and no other: without this a bf16 gradient has 16 bytes under way in a thread.
  static constexpr int kAtOnce = 4;

  __device__ void several(int64_t index) {
    Raw raw[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) fetch(at, dtype, index + k * kThreads * kVector, raw[k]);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) take<kVector>(raw[k]);
  }

  template <int N>
  __device__ void operator()(int64_t index) {
    int64_t place[1] = {index};
    if (walk != nullptr) locate(*walk, index, place);
    typename RawOf<N>::type raw;
    fetch(at, dtype, place[0], raw);
    take<N>(raw);
  }

  template <int N>
  __device__ void take(const typename RawOf<N>::type& raw) {
    float g[N];
    convert(raw, dtype, g);
#pragma unroll
    for (int j = 0; j < N; ++j) g[j] = g[j] == g[j] ? g[j] : INFINITY;
    values[kMost] = larger(values[kMost], largest(g));
    values[kSquare] += dot(g, g);
  }
};

template <class Batch>
__global__ void __launch_bounds__(kThreads) inspect(const __grid_constant__ Batch batch) {
  // From the last chunk to the first: `before` begins with the gradients that are still in the cache.
  const int32_t block = static_cast<int32_t>(gridDim.x - 1 - blockIdx.x);
  const auto& item = find(batch, block);
  const Span part = span(item.size, kChunk, block - item.first_chunk);
  constexpr bool kFlat = std::is_same_v<typename Batch::Item, FlatGradient>;
  const Walk* walk = nullptr;
  if constexpr (!kFlat) walk = &item.walk;
  float values[kValues] = {};
  Measure measure{item.at, item.dtype, walk, values};
  for_each_element<kFlat>(part, item.aligned, measure);
  combine_block<kValues, kLargestValues>(values);
  double totals[kValues] = {values[kMost], values[kSquare]};
  const Head& head = batch.head;
  if (!combine_chunks<kSums, kValues, kLargestValues>(head.scratch, item.index, part.chunks, item.first_chunk, block,
                                                      totals))
    return;
  double momentum_max[1] = {};
  for (int64_t line = item.owner.first_sum + threadIdx.x; line < item.owner.end_sum; line += kThreads)
    momentum_max[0] = larger(momentum_max[0], head.sums[line * kSums + kMomentumMax]);
  combine_block<1, 1>(momentum_max);
  if (threadIdx.x != 0) return;
  double* row = head.rows + int64_t{item.index} * kColumns;
  if (!finish_inspection(item.owner, head.scaling, totals[kMost], totals[kSquare], momentum_max[0], false, row))
    atomicAdd(reinterpret_cast<unsigned long long*>(head.skipped), 1ull);
}

template <class Item>
void launch_some(const InspectParams& params, const std::vector<int>& some, cudaStream_t stream) {
  const Head head{params.scaling, params.rows, params.sums, params.skipped, params.scratch};
  std::vector<Extent> extents;
  for (int i : some) extents.push_back({1, params.gradients[i].size});
  launch<Batch<Head, Item>>("inspect", head, extents, stream, inspect<Batch<Head, Item>>, [&](int position) {
    const Gradient& from = params.gradients[some[position]];
    Item item{};
    item.at = from.at, item.size = from.size, item.owner = from.owner, item.index = some[position];
    item.dtype = from.dtype;
    if constexpr (std::is_same_v<Item, StridedGradient>)
      item.walk = from.walk;
    else
      item.aligned = reinterpret_cast<uintptr_t>(from.at) % 16 == 0;
    return item;
  });
}

}  // namespace

void inspect_on_device(const InspectParams& params, void* stream) {
  std::vector<int> flat, strided;
  for (int i = 0; i < static_cast<int>(params.gradients.size()); ++i)
    (params.gradients[i].flat ? flat : strided).push_back(i);
  launch_some<FlatGradient>(params, flat, static_cast<cudaStream_t>(stream));
  launch_some<StridedGradient>(params, strided, static_cast<cudaStream_t>(stream));
}

}  // namespace steepest::multi_tensor
