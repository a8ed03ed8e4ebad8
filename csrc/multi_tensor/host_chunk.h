// A chunk of `grad_stats`, `update_moments` and `apply_update` on the host: the formulas of the kernels, a few hundred
// elements at a time.
//
// Compiled once for each instruction set (host_*.cpp names it in STEEPEST_ISA); everything here and in the headers it
// takes its formulas from lies in a namespace of that name, so that no function of one set is linked into another.
#pragma once

#define STEEPEST_VECTOR_CODE

#include <cstdint>

#include "common/floats.h"
#include "common/vectors.h"
#include "multi_tensor/formulas.cuh"
#include "multi_tensor/host.h"
#include "multi_tensor/normalize.cuh"

namespace steepest::multi_tensor::STEEPEST_ISA {
namespace {

constexpr int kRun = 2048;  // elements of a loop that leaves nothing between its passes
constexpr int kTile = 128;  // elements: measured best of 16 to 1024, fewer pay for switches and more leave the cache

int tile_count(const Span& span, int64_t done, int tile = kTile) {
  return static_cast<int>(span.length - done < tile ? span.length - done : tile);
}

// Where element `index` of a tensor lies, in elements.
int64_t offset(const Walk& walk, int tensor, int64_t index) {
  int64_t at = 0;
  for (int d = walk.dims - 1; d >= 0; --d) {
    at += index % walk.size[d] * walk.stride[tensor][d];
    index /= walk.size[d];
  }
  return at;
}

// Where the elements [start, start + count) of a tensor are, if they follow one another in memory; else nullptr.
template <class T>
T* range_of(T* at, bool flat, const Walk& walk, int tensor, int64_t start, int count) {
  if (flat) return at + start;
  const int last = walk.dims - 1;
  if (last < 0 || walk.stride[tensor][last] != 1 || start % walk.size[last] + count > walk.size[last]) return nullptr;
  return at + offset(walk, tensor, start);
}

template <class T, class R, class Convert>
void gather(const T* from, bool flat, const Walk& walk, int tensor, int64_t start, int count, R* to, Convert convert) {
  if (const T* range = range_of(from, flat, walk, tensor, start, count))
    for (int j = 0; j < count; ++j) to[j] = static_cast<R>(convert(range[j]));
  else
    for (int j = 0; j < count; ++j) to[j] = static_cast<R>(convert(from[offset(walk, tensor, start + j)]));
}

template <class T, class R, class Convert>
void scatter(T* to, bool flat, const Walk& walk, int tensor, int64_t start, int count, const R* from, Convert convert) {
  if (T* range = range_of(to, flat, walk, tensor, start, count))
    for (int j = 0; j < count; ++j) range[j] = convert(from[j]);
  else
    for (int j = 0; j < count; ++j) to[offset(walk, tensor, start + j)] = convert(from[j]);
}

template <class R>
void load(const void* at, Dtype dtype, bool flat, const Walk& walk, int tensor, int64_t start, int count, R* to) {
  const auto as_is = [](auto x) { return x; };
  switch (dtype) {
    case Dtype::f32:
      return gather(static_cast<const float*>(at), flat, walk, tensor, start, count, to, as_is);
    case Dtype::f64:
      return gather(static_cast<const double*>(at), flat, walk, tensor, start, count, to, as_is);
    case Dtype::bf16:
      return gather(static_cast<const uint16_t*>(at), flat, walk, tensor, start, count, to, from_bf16);
    case Dtype::f16:
      return gather(static_cast<const uint16_t*>(at), flat, walk, tensor, start, count, to, from_f16);
    case Dtype::i16:
      return gather(static_cast<const int16_t*>(at), flat, walk, tensor, start, count, to, as_is);
  }
}

template <class R>
void store(void* at, Dtype dtype, bool flat, const Walk& walk, int tensor, int64_t start, int count, const R* from) {
  switch (dtype) {
    case Dtype::f32:
      return scatter(static_cast<float*>(at), flat, walk, tensor, start, count, from,
                     [](R x) { return static_cast<float>(x); });
    case Dtype::f64:
      return scatter(static_cast<double*>(at), flat, walk, tensor, start, count, from,
                     [](R x) { return static_cast<double>(x); });
    case Dtype::bf16:
      return scatter(static_cast<uint16_t*>(at), flat, walk, tensor, start, count, from,
                     [](R x) { return to_bf16(static_cast<float>(x)); });
    case Dtype::f16:
      return scatter(static_cast<uint16_t*>(at), flat, walk, tensor, start, count, from,
                     [](R x) { return to_f16(static_cast<float>(x)); });
    case Dtype::i16:
      return scatter(static_cast<int16_t*>(at), flat, walk, tensor, start, count, from,
                     [](R x) { return static_cast<int16_t>(x); });
  }
}

// Momentum as its type stores it.
template <class R>
void quantize(Dtype dtype, R* values) {
  if (dtype == Dtype::bf16)
    for (int j = 0; j < kTile; ++j) values[j] = from_bf16(to_bf16(static_cast<float>(values[j])));
  if (dtype == Dtype::f32)
    for (int j = 0; j < kTile; ++j) values[j] = static_cast<float>(values[j]);
  if (dtype == Dtype::f16)
    for (int j = 0; j < kTile; ++j) values[j] = from_f16(to_f16(static_cast<float>(values[j])));
}

// What the row of an element is multiplied by.
template <class R>
R factor_at(const Item& item, int64_t index) {
  const int64_t row = index / item.columns;
  return item.factor_dtype == Dtype::f64 ? static_cast<R>(static_cast<const double*>(item.factors)[row])
                                         : static_cast<R>(static_cast<const float*>(item.factors)[row]);
}

// Of elements from `start` on, where the row of the j-th ends, at most `count`.
int end_of_row(const Item& item, int64_t start, int j, int count) {
  const int64_t end = ((start + j) / item.columns + 1) * item.columns - start;
  return static_cast<int>(end < count ? end : count);
}

// Elements [start, start + count) of an item; those of the tile beyond them are zero.
template <class R>
struct Part {
  const Item& item;
  const double* row;
  int64_t start;
  int count;

  bool has(Slot slot) const { return item.at[slot] != nullptr; }
  void load(Slot slot, R* to) const {
    for (int j = count; j < kTile; ++j) to[j] = R(0);
    STEEPEST_ISA::load(item.at[slot], item.dtype[slot], item.flat, item.walk, slot, start, count, to);
  }
  void store(Slot slot, const R* from) const {
    STEEPEST_ISA::store(item.at[slot], item.dtype[slot], item.flat, item.walk, slot, start, count, from);
  }
  // Directions by the factors of their rows.
  void scale_rows(R* d) const {
    for (int j = 0; j < count;) {
      const int end = end_of_row(item, start, j, count);
      for (const R factor = factor_at<R>(item, start + j); j < end; ++j) d[j] *= factor;
    }
  }
  void load_param(R* p) const {
    load(kParam, p);
    if (!has(kMantissa)) return;
    R low[kTile];
    load(kMantissa, low);
    for (int j = 0; j < count; ++j) p[j] = join({to_bf16(static_cast<float>(p[j])), static_cast<int16_t>(low[j])});
  }
  void store_param(R* p) const {
    if (item.program.rounding == Program::kStochastic && item.dtype[kParam] == Dtype::bf16) {
      const uint32_t item_seed = seed(row[kStep], item.place);
      for (int j = 0; j < count; ++j) p[j] = from_bf16(to_bf16(static_cast<float>(p[j]), noise(item_seed, start + j)));
    }
    if (has(kMantissa)) {
      R low[kTile];
      for (int j = 0; j < count; ++j) {
        const Split parts = split(static_cast<float>(p[j]));
        p[j] = from_bf16(parts.high), low[j] = parts.low;
      }
      store(kMantissa, low);
    }
    store(kParam, p);
  }
};

// ---- the commonest items, in one loop ------------------------------------------------------------------------------
//
// Contiguous fp32 tensors under the programs that most parameters have. The same formulas on the same elements, so
// the same bits but of sums, without the way through a tile.

bool is_f32(const Item& item, Slot slot) { return item.at[slot] != nullptr && item.dtype[slot] == Dtype::f32; }

template <class T>
T* part_of(const Item& item, Slot slot, int64_t start) {
  return static_cast<T*>(item.at[slot]) + start;
}

bool is_bf16(const Item& item, Slot slot) { return item.at[slot] != nullptr && item.dtype[slot] == Dtype::bf16; }

// AdamW: u = y / (sqrt(v) / sqrt(1 - beta2^t) + eps).
bool is_adamw(const Item& item) {
  const Program& p = item.program;
  return item.flat && p.direction == Program::kIdentity && p.power == Program::kQuarter && !p.heavy_ball &&
         !p.nesterov && !p.sum && !p.eps_inside && !p.cautious && !p.decay_after && !p.frozen_moments &&
         is_f32(item, kSecond) && item.at[kDirection] == nullptr;
}

bool is_f32_adamw(const Item& item) {
  return is_adamw(item) && is_f32(item, kGrad) && is_f32(item, kMomentum) && is_f32(item, kParam);
}

bool is_bf16_adamw(const Item& item) {
  return is_adamw(item) && is_bf16(item, kGrad) && is_bf16(item, kMomentum) && is_bf16(item, kParam) &&
         item.program.rounding == Program::kNearest;
}

float get(float x) { return x; }
float get(uint16_t x) { return from_bf16(x); }

// A number as T stores it.
template <class T>
T stored(float x) {
  if constexpr (sizeof(T) == sizeof(float))
    return x;
  else
    return to_bf16(x);
}

// Elements of the widest vector, and of a line of the cache.
template <class T>
constexpr int kLanes = 64 / sizeof(T);
// Bytes that are asked for ahead. The processor's own prefetching ends where a page does: with pages of 4 KiB a step on
// 12 x 2.4 million elements took a tenth longer without, and 512 bytes to a page ahead were alike.
constexpr int kAhead = 2048;

template <class T>
void fetch_ahead(const T* at) {
  __builtin_prefetch(reinterpret_cast<const char*>(at) + kAhead);
}

template <int N>
struct AdamwSums {
  float grad_dot[N]{}, momentum_sq[N]{}, momentum_max[N]{}, update_sq[N]{}, param_sq[N]{};
};

// At most kLanes elements.
template <class T>
[[gnu::always_inline]] inline void adamw_vector(const T* __restrict g, T* __restrict m, float* __restrict v,
                                                T* __restrict p, const Numbers<float>& n, int count,
                                                AdamwSums<kLanes<T>>& sums) {
#pragma omp simd
  for (int j = 0; j < count; ++j) {
    const float gradient = get(g[j]) * n.grad_scale;
    const T kept = stored<T>(lerp(get(m[j]), gradient, n.one_minus_beta1, n.beta1));
    const float momentum = get(kept);
    const float second = v[j] * n.beta2 + gradient * gradient * n.one_minus_beta2;
    const float squared = square_root(second) * n.inverse_correction2 + n.eps;
    const float read = momentum * n.inverse_correction1;
    const float update = squared > 0.0f ? read / squared : 0.0f;
    const float param = get(p[j]) * n.keep - update * n.step;
    m[j] = kept, v[j] = second, p[j] = stored<T>(param);
    sums.grad_dot[j] += gradient * momentum, sums.momentum_sq[j] += momentum * momentum;
    sums.momentum_max[j] = larger(magnitude(momentum), sums.momentum_max[j]);
    sums.update_sq[j] += update * update, sums.param_sq[j] += param * param;
  }
}

template <class T>
void adamw_part(const Item& item, const Numbers<float>& n, int64_t start, int count, Sums<float>& sums) {
  const T* g = part_of<const T>(item, kGrad, start);
  T* m = part_of<T>(item, kMomentum, start);
  float* v = part_of<float>(item, kSecond, start);
  T* p = part_of<T>(item, kParam, start);
  AdamwSums<kLanes<T>> lanes;
  int done = 0;
  for (; done + kLanes<T> <= count; done += kLanes<T>) {
    fetch_ahead(g + done), fetch_ahead(m + done), fetch_ahead(p + done);
    for (int j = 0; j < kLanes<T>; j += kLanes<float>) fetch_ahead(v + done + j);
    adamw_vector(g + done, m + done, v + done, p + done, n, kLanes<T>, lanes);
  }
  if (done < count) adamw_vector(g + done, m + done, v + done, p + done, n, count - done, lanes);
  float grad_dot = 0, momentum_sq = 0, momentum_max = 0, update_sq = 0, param_sq = 0;
#pragma omp simd reduction(+ : grad_dot, momentum_sq, update_sq, param_sq) reduction(max : momentum_max)
  for (int j = 0; j < kLanes<T>; ++j) {
    grad_dot += lanes.grad_dot[j], momentum_sq += lanes.momentum_sq[j];
    momentum_max = larger(lanes.momentum_max[j], momentum_max);
    update_sq += lanes.update_sq[j], param_sq += lanes.param_sq[j];
  }
  sums.at[kGradDot] = grad_dot, sums.at[kMomentumSq] = momentum_sq, sums.at[kMomentumMax] = momentum_max;
  sums.at[kUpdateSq] = update_sq * (n.step * n.step), sums.at[kParamSq] = param_sq;
}

// Muon's momentum, read as Nesterov does or as it is; with frozen moments it is read alone.
bool is_plain_momentum(const Item& item) {
  const Program& p = item.program;
  return item.flat && p.direction == Program::kGiven && p.power == Program::kNone && !p.heavy_ball &&
         is_f32(item, kGrad) && is_f32(item, kMomentum) && item.at[kSecond] == nullptr && item.at[kParam] == nullptr;
}

template <bool kNesterov, bool kFrozen>
void plain_momentum(const Item& item, const Numbers<float>& n, int64_t start, int count, Sums<float>& sums,
                    float* __restrict d) {
  const float* __restrict g = part_of<const float>(item, kGrad, start);
  float* __restrict m = part_of<float>(item, kMomentum, start);
  float grad_dot = 0, momentum_sq = 0, momentum_max = 0, input_sq = 0, input_max = 0;
#pragma omp simd reduction(+ : grad_dot, momentum_sq, input_sq) reduction(max : momentum_max, input_max)
  for (int j = 0; j < count; ++j) {
    const float gradient = g[j] * n.grad_scale;
    const float momentum = kFrozen ? m[j] : lerp(m[j], gradient, n.one_minus_beta1, n.beta1);
    const float input =
        kNesterov ? lerp(gradient, momentum, n.read_beta1, n.one_minus_read_beta1) : momentum * n.inverse_correction1;
    if (!kFrozen) m[j] = momentum;
    d[j] = input;
    grad_dot += gradient * momentum, momentum_sq += momentum * momentum, input_sq += input * input;
    momentum_max = larger(magnitude(momentum), momentum_max);
    input_max = larger(magnitude(input), input_max);
  }
  sums.at[kGradDot] = grad_dot, sums.at[kMomentumSq] = momentum_sq, sums.at[kMomentumMax] = momentum_max;
  sums.at[kInputSq] = input_sq, sums.at[kInputMax] = input_max;
}

void plain_momentum_part(const Item& item, const Numbers<float>& n, int64_t start, int count, Sums<float>& sums) {
  float input[kRun];
  const Program& p = item.program;
  const auto run = p.nesterov ? (p.frozen_moments ? plain_momentum<true, true> : plain_momentum<true, false>)
                              : (p.frozen_moments ? plain_momentum<false, true> : plain_momentum<false, false>);
  const bool straight = is_f32(item, kDirection);
  run(item, n, start, count, sums, straight ? part_of<float>(item, kDirection, start) : input);
  if (straight || item.at[kDirection] == nullptr) return;
  if (item.dtype[kDirection] == Dtype::f16)
    for (int j = 0; j < count; ++j) input[j] = clamp_to_f16(input[j] * n.input_scale);
  store(item.at[kDirection], item.dtype[kDirection], true, item.walk, kDirection, start, count, input);
}

// W <- (1 - decay) W - step d, rows of d by their factors where they have any.
bool is_plain_move(const Item& item) {
  const Program& p = item.program;
  return item.flat && p.power == Program::kNone && !p.cautious && !p.decay_after && is_f32(item, kParam) &&
         item.at[kDirection] != nullptr &&
         (item.dtype[kDirection] == Dtype::f32 || item.dtype[kDirection] == Dtype::bf16);
}

// Compiled once for all callers, so that products and sums are joined in one way and a direction has the same bits
// whether its rows were multiplied here or before.
template <class D>
[[gnu::noinline]] void plain_move(const D* __restrict d, float* __restrict p, const Numbers<float>& n, int count,
                                  Sums<float>& sums) {
  float update_sq = 0, param_sq = 0;
#pragma omp simd reduction(+ : update_sq, param_sq)
  for (int j = 0; j < count; ++j) {
    const float update = get(d[j]);
    const float param = p[j] * n.keep - update * n.step;
    p[j] = param;
    update_sq += update * update, param_sq += param * param;
  }
  sums.at[kUpdateSq] = update_sq * (n.step * n.step), sums.at[kParamSq] = param_sq;
}

template <class D>
void plain_move_part(const Item& item, const Numbers<float>& n, int64_t start, int count, Sums<float>& sums) {
  const D* const d = part_of<const D>(item, kDirection, start);
  float* const p = part_of<float>(item, kParam, start);
  if (item.factors == nullptr) return plain_move(d, p, n, count, sums);
  float scaled[kRun];
  for (int j = 0; j < count;) {
    const int end = end_of_row(item, start, j, count);
    for (const float factor = factor_at<float>(item, start + j); j < end; ++j) scaled[j] = get(d[j]) * factor;
  }
  plain_move(scaled, p, n, count, sums);
}

using PartInOne = void (*)(const Item& item, const Numbers<float>& n, int64_t start, int count, Sums<float>& sums);

// The loop that does all of a stage for an item, nullptr where there is none.
PartInOne in_one(Stage stage, const Item& item) {
  const bool bf16 = item.dtype[kDirection] == Dtype::bf16;
  if (stage == Stage::apply_update)
    return !is_plain_move(item) ? nullptr : bf16 ? plain_move_part<uint16_t> : plain_move_part<float>;
  if (is_f32_adamw(item)) return adamw_part<float>;
  if (is_bf16_adamw(item)) return adamw_part<uint16_t>;
  return is_plain_momentum(item) ? plain_momentum_part : nullptr;
}

template <class R>
void update_moments_part(const Part<R>& part, const Numbers<R>& n, Sums<R>& sums) {
  const Item& item = part.item;
  Tile<R, kTile> tile;
  part.load(kGrad, tile.g);
  part.load(kMomentum, tile.m);
  if (part.has(kSecond)) part.load(kSecond, tile.v);
  if (part.has(kParam)) part.load_param(tile.p);
  until_direction(item.program, n, tile, sums, [&](R* m) { quantize(item.dtype[kMomentum], m); });
  if (!item.program.frozen_moments) {
    part.store(kMomentum, tile.m);
    if (part.has(kSecond)) part.store(kSecond, tile.v);
  }
  if (part.has(kParam)) part.store_param(tile.p);
  if (!part.has(kDirection)) return;
  if (item.dtype[kDirection] == Dtype::f16)
    for (R& x : tile.d) x = clamp_to_f16(x * n.input_scale);
  part.store(kDirection, tile.d);
}

template <class R>
void apply_update_part(const Part<R>& part, const Numbers<R>& n, Sums<R>& sums) {
  Tile<R, kTile> tile;
  part.load(kDirection, tile.d);
  if (part.item.factors != nullptr) part.scale_rows(tile.d);
  if (part.has(kSecond)) part.load(kSecond, tile.v);
  part.load_param(tile.p);
  from_direction(part.item.program, n, tile, sums);
  part.store_param(tile.p);
}

template <class R>
void add(const Sums<R>& sums, double* partial) {
  for (int c = 0; c < kSums; ++c)
    partial[c] = is_largest(c) ? larger<double>(partial[c], sums.at[c]) : partial[c] + sums.at[c];
}

// A chunk's sums into `partial`.
template <class R>
void run_chunk(Stage stage, const Item& item, const double* row, const Span& span, double* partial) {
  const Numbers<R> n(item.program, row, item.ratio, item.lengths ? item.lengths[span.matrix] : 1.0);
  for (int c = 0; c < kSums; ++c) partial[c] = 0;
  if constexpr (sizeof(R) == sizeof(float)) {
    const PartInOne part = in_one(stage, item);
    for (int64_t done = 0; part != nullptr && done < span.length; done += kRun) {
      Sums<R> sums{};
      part(item, n, span.start + done, tile_count(span, done, kRun), sums);
      add(sums, partial);
    }
    if (part != nullptr) return;
  }
  for (int64_t done = 0; done < span.length; done += kTile) {
    const Part<R> part{item, row, span.start + done, tile_count(span, done)};
    Sums<R> sums{};
    if (stage == Stage::update_moments)
      update_moments_part(part, n, sums);
    else
      apply_update_part(part, n, sums);
    add(sums, partial);
  }
}

// No step is taken: the direction's input becomes 0, and everything else stays as it is.
void clear_input(const Item& item, const Span& span) {
  if (item.at[kDirection] == nullptr) return;
  const float zeros[kTile] = {};
  for (int64_t done = 0; done < span.length; done += kTile)
    store(item.at[kDirection], item.dtype[kDirection], item.flat, item.walk, kDirection, span.start + done,
          tile_count(span, done), zeros);
}

bool is_double(const Item& item) {
  for (int slot = 0; slot < kSlots; ++slot)
    if (item.at[slot] != nullptr && item.dtype[slot] == Dtype::f64) return true;
  return false;
}

void run(Stage stage, const Item& item, const double* row, const Span& span, double* partial) {
  if (row[kFinite] != 0)
    is_double(item) ? run_chunk<double>(stage, item, row, span, partial)
                    : run_chunk<float>(stage, item, row, span, partial);
  else if (stage == Stage::update_moments)
    clear_input(item, span);
}

template <class R>
void grad_stats_tiles(const Gradient& gradient, const Span& span, double* partial) {
  R values[kTile];
  double most = 0, square = 0;
  for (int64_t done = 0; done < span.length; done += kTile) {
    const int count = tile_count(span, done);
    for (int j = count; j < kTile; ++j) values[j] = 0;
    load(gradient.at, gradient.dtype, gradient.flat, gradient.walk, 0, span.start + done, count, values);
    for (R& x : values) x = x == x ? x : R(INFINITY);
    most = larger<double>(most, largest(values));
    square += dot(values, values);
  }
  partial[0] = most, partial[1] = square;
}

// Magnitudes are ordered as their bits are, and what is not finite is the largest.
template <int N>
struct LargestAndSquares {
  uint32_t most[N]{};
  float square[N]{};
};

[[gnu::always_inline]] inline void look_at(const float* g, int count, LargestAndSquares<kLanes<float>>& lanes) {
#pragma omp simd
  for (int j = 0; j < count; ++j) {
    const uint32_t bits = bits_of(g[j]) & 0x7fffffff;
    lanes.most[j] = bits > lanes.most[j] ? bits : lanes.most[j];
    lanes.square[j] += g[j] * g[j];
  }
}

[[gnu::always_inline]] inline void look_at(const uint16_t* g, int count, LargestAndSquares<kLanes<uint16_t>>& lanes) {
#pragma omp simd
  for (int j = 0; j < count; ++j) {
    const uint32_t bits = static_cast<uint32_t>(g[j] & 0x7fff) << 16;
    const float x = float_of(bits);
    lanes.most[j] = bits > lanes.most[j] ? bits : lanes.most[j];
    lanes.square[j] += x * x;
  }
}

// T is float, or uint16_t for bf16. A chunk has four parts, of which kStreams are read side by side: of gradients that
// are in no cache one stream leaves a core of Intel's waiting at the end of every page (.38 ns an element beside .20 of
// four), and takes one of AMD's .110 where four take .123.
template <class T, int kStreams>
void grad_stats_flat(const Gradient& gradient, const Span& span, double* partial) {
  using Lanes = LargestAndSquares<kLanes<T>>;
  constexpr int kParts = 4, kInARow = 1024;  // elements that are added up in fp32
  const T* const g = static_cast<const T*>(gradient.at) + span.start;
  uint32_t most = 0;
  const auto sum_of = [&](const Lanes& lanes) {
    float sum = 0;
#pragma omp simd reduction(+ : sum) reduction(max : most)
    for (int j = 0; j < kLanes<T>; ++j) most = lanes.most[j] > most ? lanes.most[j] : most, sum += lanes.square[j];
    return sum;
  };
  const int64_t length = span.length / kParts / kLanes<T> * kLanes<T>, rows = (length + kInARow - 1) / kInARow;
  float sums[kChunk / kInARow];
  for (int part = 0; part < kParts; part += kStreams)
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t end = (row + 1) * kInARow < length ? (row + 1) * kInARow : length;
      Lanes lanes[kStreams];
      for (int64_t j = row * kInARow; j < end; j += kLanes<T>)
        for (int s = 0; s < kStreams; ++s) {
          const T* const at = g + (part + s) * length + j;
          fetch_ahead(at);
          look_at(at, kLanes<T>, lanes[s]);
        }
      for (int s = 0; s < kStreams; ++s) sums[row * kParts + part + s] = sum_of(lanes[s]);
    }
  double square = 0;
  for (int64_t i = 0; i < rows * kParts; ++i) square += sums[i];
  Lanes rest;
  for (int64_t done = kParts * length; done < span.length; done += kLanes<T>)
    look_at(g + done, tile_count(span, done, kLanes<T>), rest);
  square += sum_of(rest);
  const bool finite = most < 0x7f800000;
  partial[0] = finite ? float_of(most) : INFINITY, partial[1] = finite ? square : INFINITY;
}

template <class T>
void grad_stats_flat(const Gradient& gradient, const Span& span, double* partial) {
  static const bool side_by_side = is_intel();
  side_by_side ? grad_stats_flat<T, 4>(gradient, span, partial) : grad_stats_flat<T, 1>(gradient, span, partial);
}

void grad_stats(const Gradient& gradient, const Span& span, double* partial) {
  if (gradient.flat && gradient.dtype == Dtype::f32) return grad_stats_flat<float>(gradient, span, partial);
  if (gradient.flat && gradient.dtype == Dtype::bf16) return grad_stats_flat<uint16_t>(gradient, span, partial);
  gradient.dtype == Dtype::f64 ? grad_stats_tiles<double>(gradient, span, partial)
                               : grad_stats_tiles<float>(gradient, span, partial);
}

// ---- updates that are normalized ------------------------------------------------------------------------------------

// Elements [start, start + count) of contiguous memory.
template <class R>
void load_flat(const void* at, Dtype dtype, int64_t start, int count, R* to) {
  load(at, dtype, true, Walk{}, 0, start, count, to);
}

template <class R>
double square_sum_in(const void* at, Dtype dtype, int64_t count) {
  double total = 0;
  for (int64_t done = 0; done < count; done += kRun) {
    const int some = static_cast<int>(count - done < kRun ? count - done : kRun);
    R x[kRun], sum = 0;
    load_flat(at, dtype, done, some, x);
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < some; ++j) sum += x[j] * x[j];
    total += sum;
  }
  return total;
}

double square_sum(const void* at, Dtype dtype, int64_t count, bool in_double) {
  return in_double ? square_sum_in<double>(at, dtype, count) : square_sum_in<float>(at, dtype, count);
}

template <class R>
void normalize_in(const Stack& stack, int64_t start, int64_t count, double eps, double* lengths) {
  const Rates<R> rates(stack.beta2, eps, 1);
  lengths[kBefore] = lengths[kAfter] = 0;
  for (int64_t done = 0; done < count; done += kRun) {
    const int some = static_cast<int>(count - done < kRun ? count - done : kRun);
    R u[kRun], before = 0, after = 0;
    R* const v = static_cast<R*>(stack.seconds) + start + done;
    R* const divided = static_cast<R*>(stack.divided) + start + done;
    load_flat(stack.updates, stack.dtype, start + done, some, u);  // all of it before any is written
#pragma omp simd reduction(+ : before, after)
    for (int j = 0; j < some; ++j) {
      const R second = mean_square(rates, v[j], u[j] * u[j]), scaled = u[j] * inverse_root(rates, second);
      v[j] = second, divided[j] = scaled;
      before += u[j] * u[j], after += scaled * scaled;
    }
    lengths[kBefore] += before, lengths[kAfter] += after;
  }
}

void normalize(const Stack& stack, int64_t start, int64_t count, double eps, double* lengths) {
  (stack.wide == Dtype::f64 ? normalize_in<double> : normalize_in<float>)(stack, start, count, eps, lengths);
}

}  // namespace

const HostChunks chunks{run, grad_stats, square_sum, normalize};

}  // namespace steepest::multi_tensor::STEEPEST_ISA
