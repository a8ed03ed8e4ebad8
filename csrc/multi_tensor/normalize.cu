// `normalize_updates`: one read of the updates, a warp or a block for each row or a chunk of elements for a block, and
// of each matrix the block that comes last makes its factors.
//
// A thread takes the same elements of a matrix in the same order wherever it lies and whatever else is in the launch,
// so that sums have the same bits.
#include "multi_tensor/block.cuh"
#include "multi_tensor/normalize.cuh"

namespace steepest::multi_tensor {
namespace {

static_assert(kRowsAtOnce * 32 == kThreads);

struct StackItem {
  const void* updates;
  float* seconds;
  float* divided;
  float* factors;
  const bool* taken;
  double beta2;
  int64_t first_matrix;  // its counter
  int32_t rows, columns;
  int32_t blocks;  // of a matrix
  int32_t first_chunk;
  Dtype dtype;

  __device__ double entries() const { return static_cast<double>(rows) * static_cast<double>(columns); }
};

struct Head {
  double eps, rms;
  Scratch scratch;
};

// A block's place: the matrix, and which of its blocks it is.
struct Part {
  int64_t matrix;
  int32_t number;
};

__device__ inline Part part_of(const StackItem& item, int32_t block) {
  const int32_t at = block - item.first_chunk, matrix = at / item.blocks;
  return {matrix, at - matrix * item.blocks};
}

// True in the block that comes last of its matrix, whose thread 0 has the lengths of all of it.
__device__ inline bool combine_lengths(const Head& head, const StackItem& item, const Part& part, int32_t block,
                                       double (&lengths)[kLengths]) {
  combine_block<kLengths, 0>(lengths);
  return combine_chunks<kLengths, kLengths, 0>(head.scratch, item.first_matrix + part.matrix, item.blocks,
                                               block - part.number, block, lengths);
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
__device__ inline float square_sum(const StackItem& item, int64_t begin, int place, int team) {
  constexpr int kAtOnce = 4;  // runs under way in a thread
  const bool aligned = starts_aligned(item.updates, item.dtype, begin);
  const int64_t columns = item.columns, step = int64_t{team} * kVector;
  int64_t column = int64_t{place} * kVector;
  float sum = 0, x[kVector];
  for (; aligned && column + (kAtOnce - 1) * step + kVector <= columns; column += kAtOnce * step) {
    Raw raw[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) fetch(item.updates, item.dtype, begin + column + k * step, raw[k]);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      convert(raw[k], item.dtype, x);
      sum += dot(x, x);
    }
  }
  for (; column < columns; column += step) {
    get(item.updates, item.dtype, begin + column, columns - column, aligned, x);
    sum += dot(x, x);
  }
  return sum;
}

template <class Batch>
__global__ void __launch_bounds__(kThreads, 2) normalize_rows(const __grid_constant__ Batch batch) {
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  const auto& item = find(batch, block);
  if (item.taken != nullptr && !*item.taken) return;
  const Part part = part_of(item, block);
  const int64_t rows = item.rows, columns = item.columns, first_row = part.matrix * rows;
  const int64_t some = rows_of_block(columns), first = part.number * some;
  const int64_t end = first + some < rows ? first + some : rows;
  const int team = columns >= kLongRow ? kThreads : 32, place = threadIdx.x % team;
  const Rates<float> rates(item.beta2, batch.head.eps, static_cast<double>(columns));
  double lengths[kLengths] = {};
  for (int64_t row = first_row + first + threadIdx.x / team; row < first_row + end; row += kThreads / team) {
    float sum[1] = {square_sum(item, row * columns, place, team)};
    if (team == kThreads) {
      combine_block<1, 0>(sum);
    } else {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum[0] += __shfl_down_sync(0xffffffff, sum[0], step);
    }
    if (place != 0) continue;
    const float second = mean_square(rates, item.seconds[row], sum[0]), scale = inverse_root(rates, second);
    item.seconds[row] = second, item.factors[row] = scale;
    lengths[kBefore] += sum[0], lengths[kAfter] += static_cast<double>(sum[0]) * scale * scale;
  }
  if (!combine_lengths(batch.head, item, part, block, lengths)) return;
  __shared__ float ratio;
  if (threadIdx.x == 0) ratio = length_ratio<float>(lengths, batch.head.rms, item.entries());
  __syncthreads();
  for (int64_t row = first_row + threadIdx.x; row < first_row + rows; row += kThreads)
    item.factors[row] = __ldcg(item.factors + row) * ratio;
}

template <class Batch>
__global__ void __launch_bounds__(kThreads) normalize_elements(const __grid_constant__ Batch batch) {
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  const auto& item = find(batch, block);
  if (item.taken != nullptr && !*item.taken) return;
  const Part part = part_of(item, block);
  const Span chunk = span(int64_t{item.rows} * item.columns, kChunk, part.matrix * item.blocks + part.number);
  const Rates<float> rates(item.beta2, batch.head.eps, 1);
  const bool of_updates = starts_aligned(item.updates, item.dtype, chunk.start);
  const bool of_others =
      starts_aligned(item.seconds, Dtype::f32, chunk.start) && starts_aligned(item.divided, Dtype::f32, chunk.start);
  float before = 0, after = 0;
  for (int64_t done = threadIdx.x * kVector; done < chunk.length; done += kThreads * kVector) {
    const int64_t index = chunk.start + done, count = chunk.length - done;
    float u[kVector], v[kVector];
    get(item.updates, item.dtype, index, count, of_updates, u);
    get(item.seconds, Dtype::f32, index, count, of_others, v);
    before += dot(u, u);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      v[j] = mean_square(rates, v[j], u[j] * u[j]);
      u[j] *= inverse_root(rates, v[j]);
    }
    after += dot(u, u);
    put_some(item.seconds, index, count, of_others, v);
    put_some(item.divided, index, count, of_others, u);
  }
  double lengths[kLengths] = {before, after};
  if (combine_lengths(batch.head, item, part, block, lengths) && threadIdx.x == 0)
    item.factors[part.matrix] = length_ratio<float>(lengths, batch.head.rms, item.entries());
}

// Those with `divided`, or those without.
void launch_some(const NormalizeParams& params, bool elements, cudaStream_t stream) {
  using Batch = Batch<Head, StackItem>;
  const Head head{params.eps, params.rms, params.scratch};
  std::vector<Extent> extents;
  std::vector<StackItem> items;
  int64_t first_matrix = 0;
  for (const Stack& from : params.stacks) {
    if ((from.divided != nullptr) == elements) {
      StackItem item{};
      item.updates = from.updates, item.seconds = static_cast<float*>(from.seconds);
      item.divided = static_cast<float*>(from.divided), item.factors = static_cast<float*>(from.factors);
      item.taken = from.taken, item.beta2 = from.beta2, item.first_matrix = first_matrix;
      item.rows = static_cast<int32_t>(from.rows), item.columns = static_cast<int32_t>(from.columns);
      item.blocks = static_cast<int32_t>(blocks_of(from)), item.dtype = from.dtype;
      extents.push_back({from.matrices, item.blocks});
      items.push_back(item);
    }
    first_matrix += from.matrices;
  }
  const auto convert = [&](int i) { return items[i]; };
  if (elements)
    launch<Batch>("normalize_updates", head, extents, stream, normalize_elements<Batch>, convert, 1);
  else
    launch<Batch>("normalize_updates", head, extents, stream, normalize_rows<Batch>, convert, 1);
}

}  // namespace

void normalize_on_device(const NormalizeParams& params, void* stream) {
  launch_some(params, false, static_cast<cudaStream_t>(stream));
  launch_some(params, true, static_cast<cudaStream_t>(stream));
}

}  // namespace steepest::multi_tensor
