// The refresh of small eigenbases: one matrix to a block, everything in shared memory.
//
// Two squares are enough: P is read again where it is needed, and results take the place of factors. A Jacobi rotation
// is some 12 n^3 multiplications (Q^T Q, P Q and Q^T P Q, the rotation, two or three Newton-Schulz steps, and the
// measure of what came out): 0.2 million clocks at n = 128, by 128 multiplications a clock. A Jacobi sweep is 6 n^3,
// and its n - 1 rounds move what they turn through shared memory: 2048 clocks each there, 0.26 million in all. So a
// sweep would do for a rotation by its time, and its angles are not bounded; but it turns columns of nearly equal
// values by any angle, and the rotation leaves them where second moments expect them. Sweeps therefore come after it,
// where it was not enough, and begin where it ended.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/block.cuh"
#include "common/check.h"
#include "common/device.h"
#include "common/shared.cuh"
#include "eigh/formulas.cuh"
#include "eigh/jacobi.cuh"
#include "eigh/layout.h"
#include "eigh/params.h"
#include "eigh/square.cuh"

namespace steepest::eigh {
namespace {

// What was measured on a basis; every thread of the block has it.
struct Measure {
  float residual;  // ||Q^T Q - I||_F / sqrt n
  float error;     // the whitening error
  float largest;   // value
};

__device__ inline bool orthonormal(const Measure& of) {
  return of.error <= 3e38f && of.residual <= kOrthonormal;  // false for NaN
}

// What a block does to a basis: nothing, a Jacobi rotation, nothing but to orthonormalise it (the old one, where the
// rotation was a failure), Jacobi sweeps.
enum class Stage { old, rotation, again, sweeps, end };

template <int kSpans>
struct Block {
  const float* p;
  const float* q;
  int n;
  Square work, basis;
  float *d, *old_d, *vector, *image;  // d: diag of basis^T P basis, at least 0
  Rotation* rotations;
  int *column_of, *target_of;
  float factor;   // brings P to entries of order 1
  bool identity;  // in the place of Q

  __device__ Block(const Refresh& all, int64_t matrix) : n(all.n), factor(0), identity(false) {
    const int64_t square = int64_t{n} * n;
    p = all.p + matrix * square, q = all.q + matrix * square;
    const Layout layout(n);
    auto* at = reinterpret_cast<float*>(dynamic_shared());
    work = {at, layout.even, layout.stride}, at += layout.square();
    basis = {at, layout.even, layout.stride}, at += layout.square();
    rotations = reinterpret_cast<Rotation*>(at), at += layout.even / 2 * (sizeof(Rotation) / sizeof(float));
    d = at, old_d = d + layout.even, vector = old_d + layout.even, image = vector + layout.even;
    column_of = reinterpret_cast<int*>(image + layout.even), target_of = column_of + layout.even;
  }

  // ---- reading

  // factor source, zero beyond n. Waits for the block.
  __device__ void load(const Square& to, const float* source, float times) const {
    to.for_each(to.even, [&](int row, int column) {
      to(row, column) = row < n && column < n ? times * source[row * n + column] : 0.0f;
    });
    __syncthreads();
  }
  __device__ float old_entry(int row, int column) const {
    return identity ? (row == column ? 1.0f : 0.0f) : q[row * n + column];
  }
  __device__ void load_old() const {
    basis.for_each(basis.even, [&](int row, int column) {
      basis(row, column) = row < n && column < n ? old_entry(row, column) : 0.0f;
    });
    __syncthreads();
  }
  // The factor of P, 0 where it is zero or not finite; whether it is finite.
  __device__ bool find_factor() {
    float seen[2] = {};  // the largest, and whether any is not finite
    for (int i = threadIdx.x; i < n * n; i += kThreads) {
      const float size = fabsf(p[i]);
      seen[0] = size > seen[0] ? size : seen[0];
      seen[1] = size <= 3.4028235e38f ? seen[1] : 1.0f;
    }
    reduce_block<3>(seen);
    factor = seen[1] == 0 ? inverse_power_of_two(seen[0]) : 0;
    return seen[1] == 0;
  }
  // P into work; whether it is symmetric.
  __device__ bool load_p() const {
    load(work, p, factor);
    float largest[2] = {};
    work.for_each(n, [&](int row, int column) {
      const float size = fabsf(work(row, column));
      largest[0] = size > largest[0] ? size : largest[0];
    });
    __syncthreads();
    largest[1] = work.symmetrize();
    reduce_block<3>(largest);
    return largest[1] <= kSymmetric * largest[0];
  }

  // ---- measures

  // work <- basis^T basis - I; returns ||.||_F / sqrt n.
  __device__ float gram() const {
    Sums<kSpans> sums;
    multiply<true, kSpans>(sums, basis, basis);
    store<kSpans>(work, sums);
    if (static_cast<int>(threadIdx.x) < n) work(threadIdx.x, threadIdx.x) -= 1;
    __syncthreads();
    return frobenius();
  }
  __device__ float frobenius() const {
    float sum[1] = {};
    work.for_each(n, [&](int row, int column) { sum[0] += work(row, column) * work(row, column); });
    reduce_block<0>(sum);
    return sqrtf(sum[0] / static_cast<float>(n));
  }
  // work <- B = basis^T P basis and d <- diag B, from P in work.
  __device__ Measure measure(float residual) const {
    Sums<kSpans> sums;
    multiply<true, kSpans>(sums, work, basis);  // P is symmetric
    store<kSpans>(work, sums);
    multiply<true, kSpans>(sums, basis, work);
    store<kSpans>(work, sums);
    work.symmetrize();
    const int thread = threadIdx.x;
    float largest[1] = {};
    if (thread < n) {
      const float value = work(thread, thread);
      d[thread] = largest[0] = value < 0 ? 0.0f : value;
    }
    reduce_block<1>(largest);
    if (thread < n) vector[thread] = whitening_scale(d[thread], value_floor(largest[0]));
    __syncthreads();
    float sum[1] = {};
    work.for_each(n, [&](int row, int column) {
      const float entry = row == column ? 0.0f : work(row, column) * vector[row] * vector[column];
      sum[0] += entry * entry;
    });
    reduce_block<0>(sum);
    return {residual, sqrtf(sum[0] / static_cast<float>(n)), largest[0]};
  }
  __device__ float rounding(float largest) const {
    float sum[1] = {};
    const float floor = value_floor(largest);
    if (static_cast<int>(threadIdx.x) < n) {
      const float value = floored(d[threadIdx.x], floor);
      sum[0] = largest / (value == 0 ? 1.0f : value);
    }
    reduce_block<0>(sum);
    return rounding_error(sum[0], n);
  }

  // ---- one simultaneous Jacobi rotation

  // work <- X from B; whether its eta is at most kLargestEta.
  __device__ bool generate(float largest) const {
    const float floor = value_floor(largest);
    float eta = kSmallestEta / 2;
    float longest[1] = {};
#pragma unroll 1
    for (int k = 0; k < kEtas; ++k) {
      eta *= 2;
      longest[0] = 0;
      for (int row = threadIdx.x / 32; row < n; row += kWarps) {
        float sum = 0;
        for (int column = threadIdx.x % 32; column < n; column += 32) {
          const float x = generator(work(row, column), d[row], d[column], floor, eta);
          sum += x * x;
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffff, sum, step);
        if (threadIdx.x % 32 == 0 && sum > longest[0]) longest[0] = sum;
      }
      reduce_block<1>(longest);
      longest[0] = sqrtf(longest[0]);
      if (longest[0] <= kLongestRow) break;
    }
    const float times = longest[0] > kLongestRow ? kLongestRow / longest[0] : 1;
    work.for_each(n, [&](int row, int column) {
      work(row, column) = times * generator(work(row, column), d[row], d[column], floor, eta);
    });
    __syncthreads();
    return eta <= kLargestEta;
  }

  // ||E||_2 of E in work, a little underestimated: power iteration from the column with the largest diagonal entry.
  __device__ float largest_eigenvalue() const {
    const int thread = threadIdx.x;
    int column = 0;
    for (int i = 1; i < n; ++i) column = work(i, i) > work(column, column) ? i : column;
    if (thread < n) image[thread] = work(thread, column);
    float length = 0;
#pragma unroll 1
    for (int step = 0; step <= kPowerSteps; ++step) {
      float square[1] = {thread < n ? image[thread] * image[thread] : 0.0f};
      reduce_block<0>(square);
      length = sqrtf(square[0]);
      if (step == kPowerSteps) break;
      if (thread < n) vector[thread] = image[thread] / (length == 0 ? 1.0f : length);
      __syncthreads();
      for (int row = threadIdx.x / 32; row < n; row += kWarps) {
        float sum = 0;
        for (int k = threadIdx.x % 32; k < n; k += 32) sum += work(row, k) * vector[k];
#pragma unroll
        for (int half = 16; half > 0; half /= 2) sum += __shfl_down_sync(0xffffffff, sum, half);
        if (threadIdx.x % 32 == 0) image[row] = sum;
      }
      __syncthreads();
    }
    return length;
  }

  // Eigenvalues of basis^T basis - I, in work, between 0 and m become ones of +-m / (2 + m); the residual then.
  __device__ float shrink() const {
    const float times = 1 / (1 + 0.5f * largest_eigenvalue()), root = sqrtf(times);
    work.for_each(n, [&](int row, int column) {
      basis(row, column) *= root;
      work(row, column) = work(row, column) * times - (row == column ? 1 - times : 0.0f);
    });
    __syncthreads();
    return frobenius();
  }

  // basis <- its polar factor by Newton-Schulz steps, for E in work; a bound on the residual.
  __device__ float orthonormalize(float residual) const {
    Sums<kSpans> sums;
#pragma unroll 1
    for (int step = 1;; ++step) {
      multiply<false, kSpans>(sums, basis, work);
      store<kSpans>(basis, sums, -0.5f, 1);
      const float bound = residual_after_step(residual, n);
      if (bound <= kOrthonormalEnough || step == kSteps) return bound;
      residual = gram();
    }
  }

  // ---- stages

  // basis <- what a stage makes of it, and B in work; orthonormal. What is measured on it.
  __device__ Measure run(Stage stage, const Measure& last, bool& small, int32_t& status) {
    if (stage == Stage::rotation) {
      small = generate(last.largest);
      Sums<kSpans> sums;
      multiply<false, kSpans>(sums, basis, work);
      store<kSpans>(basis, sums, 1, 1);
    }
    if (stage == Stage::sweeps) jacobi(work, basis, rotations, n, last.largest);
    float residual = gram();
    if (stage == Stage::rotation) residual = shrink();
    if (stage != Stage::old) {
      residual = orthonormalize(residual);
    } else if (!(residual <= kOrthonormalOnEntry)) {
      status |= kNotOrthonormal;
      identity = true, residual = 0;
      load_old();
    }
    if (!load_p()) status |= kNotSymmetric;
    return measure(residual);
  }

  // ---- writing

  // to[r] <- the column whose value has rank r, the first one 0. Waits for the block.
  __device__ void rank(const float* values, int* to) const {
    const int thread = threadIdx.x;
    if (thread < n) {
      int before = 0;
      for (int i = 0; i < n; ++i) before += values[i] > values[thread] || (values[i] == values[thread] && i < thread);
      to[before] = thread;
    }
    __syncthreads();
  }

  // The basis and its values as they are.
  __device__ void write(float* to, float* values) const {
    basis.for_each(n, [&](int row, int column) { to[row * n + column] = basis(row, column); });
    if (static_cast<int>(threadIdx.x) < n) values[threadIdx.x] = d[threadIdx.x] / factor;
    __syncthreads();
  }

  // Its columns by rank, into the slots of the old values' ranks or in descending order, with the signs nearest to the
  // old columns of the same rank.
  __device__ void write_by_rank(float* to, float* values, int64_t* order, bool slots) const {
    rank(old_d, column_of);
    rank(d, target_of);
    const int thread = threadIdx.x;
    float* sign = vector;
    if (thread < n) {
      const int from = target_of[thread], old = column_of[thread];
      float along = 0;
      for (int row = 0; row < n; ++row) along += basis(row, from) * old_entry(row, old);
      sign[thread] = along < 0 ? -1.0f : 1.0f;
      values[slots ? old : thread] = d[from] / factor;
      if (!slots) order[thread] = old;
    }
    __syncthreads();
    basis.for_each(
        n, [&](int row, int k) { to[row * n + (slots ? column_of[k] : k)] = sign[k] * basis(row, target_of[k]); });
    __syncthreads();
  }

  __device__ void write_old(float* to, float* values) const {
    basis.for_each(n, [&](int row, int column) { to[row * n + column] = old_entry(row, column); });
    if (static_cast<int>(threadIdx.x) < n) values[threadIdx.x] = factor == 0 ? 0.0f : old_d[threadIdx.x] / factor;
  }
};

// One loop runs all stages, so that their instructions are there once; which comes next, every thread finds alike.
template <int kSpans>
__global__ void __launch_bounds__(kThreads, kSpans == 4 ? 1 : 2) refresh(const Refresh all) {
  const int64_t matrix = blockIdx.x;
  const int n = all.n, thread = threadIdx.x;
  Block<kSpans> block(all, matrix);
  float* basis = all.basis + matrix * n * n;
  float* values = all.values + matrix * n;
  int64_t* order = all.order + matrix * n;
  if (thread < n) order[thread] = thread;

  int32_t status = block.find_factor() ? 0 : kNotFinite;
  block.load_old();
  Measure old{}, best{}, newest{};
  float rounding = 0;
  bool taken = false, small = true, done = true;
  int rotations = 0, passes = 0;
  Stage stage = Stage::old;
#pragma unroll 1
  do {
    newest = block.run(stage, newest, small, status);
    switch (stage) {
      case Stage::old:
        if (block.factor == 0) {
          stage = Stage::end;
          break;
        }
        old = best = newest, rounding = block.rounding(old.largest);
        if (thread < n) block.old_d[thread] = block.d[thread];
        __syncthreads();
        stage = all.method == Method::eigh ? Stage::sweeps : Stage::rotation;
        break;
      case Stage::rotation:
        if (++rotations < all.sweeps) break;
        small = small && orthonormal(newest);
        if (orthonormal(newest) && newest.error < old.error) {
          best = newest, taken = true;
          block.write(basis, values);
        }
        done = small && progress(best.error, old.error, rounding);
        if (!small) status |= kLargeRotation;
        stage = Stage::end;
        if (!done && all.method == Method::automatic) {
          status |= kFellBack;
          stage = taken ? Stage::sweeps : Stage::again;
          if (!taken) block.load_old();
        }
        break;
      case Stage::again:
        stage = Stage::sweeps;
        break;
      default:
        // What rounding adds to a basis in many rotations, and what an old one lacked in orthonormality, is seen in the
        // new B, and a second pass takes it away.
        if (++passes < kPasses && !(newest.error <= kSolved)) break;
        stage = Stage::end;
        done = orthonormal(newest);
        const bool sorted = all.method == Method::eigh;
        if (done &&
            (newest.error < best.error || (sorted && (newest.error == best.error || newest.error <= rounding)))) {
          taken = true;
          block.write_by_rank(basis, values, order, !sorted);
        }
    }
  } while (stage != Stage::end);
  if (!done) status |= kWantsExact;
  if (!taken) block.write_old(basis, values);
  if (thread == 0) all.status[matrix] = status | (taken ? kAccepted : 0);
}

// `most`: rows of the matrices that the device has room for.
template <int kSpans>
void launch(const Refresh& all, int64_t most, cudaStream_t stream) {
  const int blocks = static_cast<int>(all.count);
  const size_t bytes = shared_bytes(all.n);
  allow_shared_memory(reinterpret_cast<const void*>(refresh<kSpans>),
                      shared_bytes(std::min<int64_t>(most, kSpans * kSpan)));
  refresh<kSpans><<<blocks, kThreads, bytes, stream>>>(all);
  check_cuda(cudaGetLastError(), "eigh_refresh: a launch of ", blocks, " blocks with ", bytes,
             " bytes of shared memory");
}

}  // namespace

void refresh_on_device(const Refresh& all, size_t limit, void* stream) {
  if (all.count == 0 || all.n == 0) return;
  const int64_t most = most_rows(limit);
  if (all.n > most)
    throw std::invalid_argument("steepest::eigh_refresh: n must be at most " + std::to_string(most) + " with " +
                                std::to_string(limit) + " bytes of shared memory, got " + std::to_string(all.n));
  if (all.count > INT32_MAX)
    throw std::invalid_argument("steepest::eigh_refresh: at most 2^31 - 1 matrices in one call, got " +
                                std::to_string(all.count));
  constexpr decltype(&launch<1>) launches[] = {launch<1>, launch<2>, launch<3>, launch<4>};
  launches[(all.n - 1) / kSpan](all, most, static_cast<cudaStream_t>(stream));
}

}  // namespace steepest::eigh
