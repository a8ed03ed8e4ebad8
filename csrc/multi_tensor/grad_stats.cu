// The pass over all gradients that comes before anything is written: finite or not, largest entry, norm; and from them,
// in the same launch or another, the row of numbers with which `update_moments` and `apply_update` take the step.
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

// A row whose gradient is measured.
struct Decision {
  Owner owner;
  int32_t index;  // of the row
  int32_t first_chunk;
};

struct Head {
  Scaling scaling;
  double* rows;
  const double* sums;
  int64_t* skipped;
  Scratch scratch;
  bool decide;
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

// The rest of a row, by a block whose first thread has measured it.
__device__ inline void decide_by_block(const Head& head, const Owner& owner, int32_t index) {
  double momentum_max[1] = {};
  for (int64_t line = owner.first_sum + threadIdx.x; line < owner.end_sum; line += kThreads)
    momentum_max[0] = larger(momentum_max[0], head.sums[line * kSums + kMomentumMax]);
  combine_block<1, 1>(momentum_max);
  if (threadIdx.x != 0) return;
  if (!decide(owner, head.scaling.grad_scale, momentum_max[0], head.rows + int64_t{index} * kColumns))
    atomicAdd(reinterpret_cast<unsigned long long*>(head.skipped), 1ull);
}

template <class Batch>
__global__ void __launch_bounds__(kThreads) decide_steps(const __grid_constant__ Batch batch) {
  const auto& item = find(batch, static_cast<int32_t>(blockIdx.x));
  decide_by_block(batch.head, item.owner, item.index);
}

template <class Batch>
__global__ void __launch_bounds__(kThreads) grad_stats(const __grid_constant__ Batch batch) {
  // From the last chunk to the first: `update_moments` begins with the gradients that are still in the cache.
  const int32_t block = static_cast<int32_t>(gridDim.x - 1 - blockIdx.x);
  const auto& item = find(batch, block);
  const Span part = span(item.size, kChunk, block - item.first_chunk);
  constexpr bool kFlat = std::is_same_v<typename Batch::Item, FlatGradient>;
  const Walk* walk = nullptr;
  if constexpr (!kFlat) walk = &item.walk;
  float values[kValues] = {};
  Measure work{item.at, item.dtype, walk, values};
  for_each_element<kFlat>(part, item.aligned, work);
  combine_block<kValues, kLargestValues>(values);
  double totals[kValues] = {values[kMost], values[kSquare]};
  const Head& head = batch.head;
  if (!combine_chunks<kSums, kValues, kLargestValues>(head.scratch, item.index, part.chunks, item.first_chunk, block,
                                                      totals))
    return;
  if (threadIdx.x == 0)
    measure(head.scaling, totals[kMost], totals[kSquare], false, head.rows + int64_t{item.index} * kColumns);
  if (head.decide) decide_by_block(head, item.owner, item.index);
}

template <class Item>
void launch_some(const GradStatsParams& params, const std::vector<int>& some, cudaStream_t stream) {
  const Head head{params.scaling, params.rows, params.sums, params.skipped, params.scratch, params.decide};
  std::vector<Extent> extents;
  for (int i : some) extents.push_back({1, params.gradients[i].size});
  launch<Batch<Head, Item>>("grad_stats", head, extents, stream, grad_stats<Batch<Head, Item>>, [&](int position) {
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

void grad_stats_on_device(const GradStatsParams& params, void* stream) {
  std::vector<int> flat, strided;
  for (int i = 0; i < static_cast<int>(params.gradients.size()); ++i)
    (params.gradients[i].flat ? flat : strided).push_back(i);
  launch_some<FlatGradient>(params, flat, static_cast<cudaStream_t>(stream));
  launch_some<StridedGradient>(params, strided, static_cast<cudaStream_t>(stream));
}

void decide_steps_on_device(const DecideStepsParams& params, void* stream) {
  using Batch = Batch<Head, Decision>;
  const Head head{{nullptr, params.grad_scale}, params.rows, params.sums, params.skipped, {}, true};
  const std::vector<Extent> rows(params.owners.size(), {1, 1});  // a block each
  launch<Batch>("decide_steps", head, rows, static_cast<cudaStream_t>(stream), decide_steps<Batch>,
                [&](int i) { return Decision{params.owners[i], i, 0}; });
}

}  // namespace steepest::multi_tensor
