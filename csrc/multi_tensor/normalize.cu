// `normalize_and_apply_update`, and without the second half `normalize_updates`: one launch, in which the updates of
// all matrices are read once for their factors, a warp or a block for each row or a chunk of elements for a block, and
// then chunk by chunk by `apply_update`.
//
// Blocks take tickets. The first are for the parts of matrices that are normalized, whose blocks wait for nobody: of
// each matrix the one that comes last makes the factors and raises a flag. The others are for chunks, whose blocks wait
// for the flag of their matrix, if it has one. A ticket is only taken by a block that runs, so that whatever a block
// waits for is done, or is being done by a block that runs, in whatever order and numbers a GPU starts blocks.
//
// A thread takes the same elements of a matrix in the same order wherever it lies and whatever else is in the launch,
// so that sums have the same bits.
#include "common/flag.cuh"
#include "multi_tensor/items.cuh"
#include "multi_tensor/normalize.cuh"

namespace steepest::multi_tensor {
namespace {

static_assert(kRowsAtOnce * 32 == kThreads);

// How an item's directions are normalized; their rows are those that `apply_update` reads a factor for, and where
// elements are divided a matrix is one.
struct Normalization {
  const void* updates;
  float* seconds;
  float* divided;  // nullptr where rows are normalized
  double beta2, eps, rms;
  int64_t first_matrix;  // its counter and its flag
  int32_t parts;         // blocks of a matrix; 0: directions are taken as they are
  int32_t first_part;
  Dtype dtype;
};

template <class Item>
struct Normalized : Item {
  Normalization what;

  static constexpr bool kNormalized = true;

  __device__ float* made() const { return const_cast<float*>(this->factors); }
};

// rows: nullptr where the updates are normalized and no more.
struct NormalizedHead : Head {
  Scratch meeting;   // one ticket, then the counters of matrices and their flags
  int64_t matrices;  // of all launches
  int32_t parts;     // blocks of this one that normalize

  __device__ uint64_t* ticket() const { return meeting.counters; }
  __device__ int64_t counter(int64_t matrix) const { return 1 + matrix; }
  __device__ uint64_t* flag(int64_t matrix) const { return meeting.counters + 1 + matrices + matrix; }
};

// In every thread of a block the number of its work, which no other block has.
__device__ inline int32_t take_ticket(uint64_t* at) {
  __shared__ int32_t taken;
  if (threadIdx.x == 0) {
    auto* const next = reinterpret_cast<unsigned long long*>(at);
    taken = static_cast<int32_t>(atomicAdd(next, 1ull));
    if (taken == static_cast<int32_t>(gridDim.x) - 1) *next = 0;  // for the next launch
  }
  __syncthreads();
  return taken;
}

// By every thread of a block.
template <class Batch>
__device__ inline void wait_for_factors(const Batch& batch, const typename Batch::Item& item, int64_t matrix) {
  if (item.what.parts == 0) return;
  if (threadIdx.x == 0) wait_for_flag(batch.head.flag(item.what.first_matrix + matrix));
  __syncthreads();
}

// By the last block that waited.
template <class Batch>
__device__ inline void forget_factors(const Batch& batch, const typename Batch::Item& item, int64_t matrix) {
  if (item.what.parts != 0) *batch.head.flag(item.what.first_matrix + matrix) = 0;
}

__device__ inline bool starts_aligned(const void* at, Dtype dtype, int64_t index) {
  return (reinterpret_cast<uintptr_t>(at) + index * (dtype == Dtype::f32 ? 4 : 2)) % 16 == 0;
}

// Elements from `index` on, the first `count` of kVector and zeros behind them.
__device__ inline void get(const void* at, Dtype dtype, int64_t index, int64_t count, bool aligned,
                           float (&to)[kVector]) {
  if (aligned && count >= kVector) {
    Raw raw;
    fetch(at, dtype, index, raw);
    return convert(raw, dtype, to);
  }
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    to[j] = 0;
    if (j >= count) continue;
    RawOne raw;
    float one[1];
    fetch(at, dtype, index + j, raw);
    convert(raw, dtype, one);
    to[j] = one[0];
  }
}

__device__ inline void put_some(float* at, int64_t index, int64_t count, bool aligned, const float (&from)[kVector]) {
  if (aligned && count >= kVector) return put(at, Dtype::f32, index, from);
#pragma unroll
  for (int j = 0; j < kVector; ++j)
    if (j < count) at[index + j] = from[j];
}

// Sum of squares of a row that begins at element `begin`: the share of thread `place` of `team`, which takes every
// team-th run of kVector elements.
__device__ inline float square_sum(const Normalization& what, int64_t columns, int64_t begin, int place, int team) {
  constexpr int kAtOnce = 4;  // runs under way in a thread
  const bool aligned = starts_aligned(what.updates, what.dtype, begin);
  const int64_t step = int64_t{team} * kVector;
  int64_t column = int64_t{place} * kVector;
  float sum = 0, x[kVector];
  for (; aligned && column + (kAtOnce - 1) * step + kVector <= columns; column += kAtOnce * step) {
    Raw raw[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) fetch(what.updates, what.dtype, begin + column + k * step, raw[k]);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      convert(raw[k], what.dtype, x);
      sum += dot(x, x);
    }
  }
  for (; column < columns; column += step) {
    get(what.updates, what.dtype, begin + column, columns - column, aligned, x);
    sum += dot(x, x);
  }
  return sum;
}

// Which of the blocks of which matrix a block is.
struct Part {
  int64_t matrix;
  int32_t number;
};

// Rows of a part; thread 0 has their lengths.
template <class Item>
__device__ inline void normalize_rows(const Item& item, const Part& part, double (&lengths)[kLengths]) {
  const Normalization& what = item.what;
  const int64_t columns = item.columns, rows = item.size / columns, first_row = part.matrix * rows;
  const int64_t some = rows_of_block(columns), first = part.number * some;
  const int64_t end = first + some < rows ? first + some : rows;
  const int team = columns >= kLongRow ? kThreads : 32, place = threadIdx.x % team;
  const Rates<float> rates(what.beta2, what.eps, static_cast<double>(columns));
  for (int64_t row = first_row + first + threadIdx.x / team; row < first_row + end; row += kThreads / team) {
    float sum[1] = {square_sum(what, columns, row * columns, place, team)};
    if (team == kThreads) {
      combine_block<1, 0>(sum);
    } else {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum[0] += __shfl_down_sync(0xffffffff, sum[0], step);
    }
    if (place != 0) continue;
    const float second = mean_square(rates, what.seconds[row], sum[0]), scale = inverse_root(rates, second);
    what.seconds[row] = second, item.made()[row] = scale;
    lengths[kBefore] += sum[0], lengths[kAfter] += static_cast<double>(sum[0]) * scale * scale;
  }
}

// Elements of a part, each thread's own.
template <class Item>
__device__ inline void normalize_elements(const Item& item, const Part& part, double (&lengths)[kLengths]) {
  const Normalization& what = item.what;
  const Span chunk = span(item.size, kChunk, part.matrix * what.parts + part.number);
  const Rates<float> rates(what.beta2, what.eps, 1);
  const bool of_updates = starts_aligned(what.updates, what.dtype, chunk.start);
  const bool of_others =
      starts_aligned(what.seconds, Dtype::f32, chunk.start) && starts_aligned(what.divided, Dtype::f32, chunk.start);
  float before = 0, after = 0;
  for (int64_t done = threadIdx.x * kVector; done < chunk.length; done += kThreads * kVector) {
    const int64_t index = chunk.start + done, count = chunk.length - done;
    float u[kVector], v[kVector];
    get(what.updates, what.dtype, index, count, of_updates, u);
    get(what.seconds, Dtype::f32, index, count, of_others, v);
    before += dot(u, u);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      v[j] = mean_square(rates, v[j], u[j] * u[j]);
      u[j] *= inverse_root(rates, v[j]);
    }
    after += dot(u, u);
    put_some(what.seconds, index, count, of_others, v);
    put_some(what.divided, index, count, of_others, u);
  }
  lengths[kBefore] = before, lengths[kAfter] = after;
}

// The part with the number `block` of the launch.
template <class Batch>
__device__ inline void normalize(const Batch& batch, int32_t block) {
  const auto& head = batch.head;
  const auto& item = batch.items[part_with([&](int i) { return batch.items[i].what.first_part; }, batch.count, block)];
  if (head.rows != nullptr && head.rows[int64_t{item.row} * kColumns + kFinite] == 0) return;  // and nobody waits
  const Normalization& what = item.what;
  const int32_t at = block - what.first_part, matrix = at / what.parts;
  const Part part{matrix, at - matrix * what.parts};
  double lengths[kLengths] = {};
  if (what.divided == nullptr)
    normalize_rows(item, part, lengths);
  else
    normalize_elements(item, part, lengths);
  combine_block<kLengths, 0>(lengths);
  const int64_t number = what.first_matrix + matrix;
  if (!combine_chunks<kLengths, kLengths, 0>(head.meeting, head.counter(number), what.parts, block - part.number, block,
                                             lengths))
    return;
  __shared__ float ratio;
  if (threadIdx.x == 0) ratio = length_ratio<float>(lengths, what.rms, static_cast<double>(item.size));
  __syncthreads();
  const int64_t rows = item.size / item.columns;
  float* const factors = item.made() + matrix * rows;
  if (what.divided == nullptr)
    for (int64_t row = threadIdx.x; row < rows; row += kThreads) factors[row] = __ldcg(factors + row) * ratio;
  else if (threadIdx.x == 0)
    factors[0] = ratio;
  if (head.rows == nullptr) return;
  __syncthreads();
  if (threadIdx.x == 0) raise_flag(head.flag(number));
}

template <class Batch>
__global__ void __launch_bounds__(kThreads, 2) normalize_and_apply_update(const __grid_constant__ Batch batch) {
  const int32_t ticket = take_ticket(batch.head.ticket());
  if (ticket < batch.head.parts)
    normalize(batch, ticket);
  else
    run<ApplyUpdate>(batch, ticket - batch.head.parts);
}

// What a launch does, where `apply` with the chunks of its items, and without with the parts of its stacks alone. An
// item is `items[some[i]]` and its stack `stacks[some[i]]`.
template <class Item>
void launch_some(const char* op, const NormalizedItemsParams& params, const std::vector<int>& some, bool apply,
                 cudaStream_t stream) {
  using Batch = Batch<NormalizedHead, Normalized<Item>>;
  static_assert(sizeof(Batch) <= kArgumentBytes);
  std::vector<Extent> extents;
  for (int i : some) {
    const Stack& stack = params.stacks[i];
    extents.push_back({params.items[i].matrices, params.items[i].size, stack.matrices == 0 ? 0 : blocks_of(stack)});
  }
  std::vector<int64_t> first_matrix;  // of each stack
  int64_t matrices = 0;
  for (const Stack& stack : params.stacks) first_matrix.push_back(matrices), matrices += stack.matrices;
  for (const Launch& plan : plan_launches(extents, kChunk, Batch::kCapacity)) {
    static thread_local Batch batch;  // as in `launch`
    batch.head = {{params.rows, params.sums, params.scratch}, params.meeting, matrices, plan.parts};
    batch.count = static_cast<int32_t>(plan.items.size());
    for (int i = 0; i < batch.count; ++i) {
      const int from = some[plan.items[i]];
      const Stack& stack = params.stacks[from];
      auto& item = batch.items[i];
      static_cast<Item&>(item) = device_item<Item>(params.items[from]);
      item.first_chunk = plan.first_chunk[i];
      item.what = {};
      item.what.first_part = plan.first_part[i];
      if (stack.matrices == 0) continue;
      item.what.updates = stack.updates, item.what.seconds = static_cast<float*>(stack.seconds);
      item.what.divided = static_cast<float*>(stack.divided), item.what.dtype = stack.dtype;
      item.what.beta2 = stack.beta2, item.what.eps = stack.eps, item.what.rms = stack.rms;
      item.what.first_matrix = first_matrix[from], item.what.parts = static_cast<int32_t>(blocks_of(stack));
    }
    const int32_t blocks = plan.parts + (apply ? plan.chunks : 0);
    normalize_and_apply_update<Batch><<<blocks, kThreads, 0, stream>>>(batch);
    check_launch(op, blocks, plan.items.size());
  }
}

}  // namespace

void normalize_and_apply_on_device(const NormalizedItemsParams& params, void* stream) {
  std::vector<int> flat, strided;
  for (int i = 0; i < static_cast<int>(params.items.size()); ++i) (params.items[i].flat ? flat : strided).push_back(i);
  const auto at = static_cast<cudaStream_t>(stream);
  launch_some<FlatItem>("normalize_and_apply_update", params, flat, true, at);
  launch_some<StridedItem>("normalize_and_apply_update", params, strided, true, at);
}

void normalize_on_device(const NormalizeParams& params, void* stream) {
  NormalizedItemsParams alone{};
  alone.stacks = params.stacks, alone.meeting = params.scratch;
  std::vector<int> all;
  for (const Stack& stack : params.stacks) {
    Item item{};
    item.matrices = stack.matrices, item.size = stack.size(), item.factors = stack.factors;
    item.columns = stack.divided == nullptr ? stack.columns : stack.size();
    all.push_back(static_cast<int>(alone.items.size()));
    alone.items.push_back(item);
  }
  launch_some<FlatItem>("normalize_updates", alone, all, false, static_cast<cudaStream_t>(stream));
}

}  // namespace steepest::multi_tensor
