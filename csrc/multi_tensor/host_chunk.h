// A chunk of `grad_stats`, `update_moments` and `apply_update` on the host: the formulas of the kernels, a few hundred
// elements at a time.
//
// Compiled once for each instruction set (host_*.cpp names it in STEEPEST_ISA); everything here and in the headers it
// takes its formulas from lies in a namespace of that name, so that no function of one set is linked into another.
#pragma once

#define STEEPEST_VECTOR_CODE

#include <cstdint>

#include "common/floats.h"
#include "multi_tensor/formulas.cuh"
#include "multi_tensor/host.h"

namespace steepest::multi_tensor::STEEPEST_ISA {
namespace {

constexpr int kTile = 128;  // elements: measured best of 16 to 1024, fewer pay for switches and more leave the cache

int tile_count(const Span& span, int64_t done) {
  return static_cast<int>(span.length - done < kTile ? span.length - done : kTile);
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

template <class T, class R, class Convert>
void gather(const T* from, bool flat, const Walk& walk, int tensor, int64_t start, int count, R* to, Convert convert) {
  if (flat)
    for (int j = 0; j < count; ++j) to[j] = static_cast<R>(convert(from[start + j]));
  else
    for (int j = 0; j < count; ++j) to[j] = static_cast<R>(convert(from[offset(walk, tensor, start + j)]));
}

template <class T, class R, class Convert>
void scatter(T* to, bool flat, const Walk& walk, int tensor, int64_t start, int count, const R* from, Convert convert) {
  if (flat)
    for (int j = 0; j < count; ++j) to[start + j] = convert(from[j]);
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
  void load_param(R* p) const {
    load(kParam, p);
    if (!has(kMantissa)) return;
    R low[kTile];
    load(kMantissa, low);
    for (int j = 0; j < count; ++j) p[j] = join({to_bf16(static_cast<float>(p[j])), static_cast<int16_t>(low[j])});
  }
  void store_param(R* p) const {
    if (item.program.rounding == Program::kStochastic && item.dtype[kParam] == Dtype::bf16) {
      const uint32_t own = seed(row[kStep], item.place);
      for (int j = 0; j < count; ++j) p[j] = from_bf16(to_bf16(static_cast<float>(p[j]), noise(own, start + j)));
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
  if (part.has(kSecond)) part.load(kSecond, tile.v);
  part.load_param(tile.p);
  from_direction(part.item.program, n, tile, sums);
  part.store_param(tile.p);
}

// A chunk's sums into `partial`.
template <class R>
void run_chunk(Stage stage, const Item& item, const double* row, const Span& span, double* partial) {
  const Numbers<R> n(item.program, row, item.ratio, item.lengths ? item.lengths[span.matrix] : 1.0);
  for (int c = 0; c < kSums; ++c) partial[c] = 0;
  for (int64_t done = 0; done < span.length; done += kTile) {
    const Part<R> part{item, row, span.start + done, tile_count(span, done)};
    Sums<R> sums{};
    if (stage == Stage::update_moments)
      update_moments_part(part, n, sums);
    else
      apply_update_part(part, n, sums);
    for (int c = 0; c < kSums; ++c)
      partial[c] = is_largest(c) ? larger<double>(partial[c], sums.at[c]) : partial[c] + sums.at[c];
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

void grad_stats(const Gradient& gradient, const Span& span, double* partial) {
  gradient.dtype == Dtype::f64 ? grad_stats_tiles<double>(gradient, span, partial)
                               : grad_stats_tiles<float>(gradient, span, partial);
}

}  // namespace

const HostChunks chunks{run, grad_stats};

}  // namespace steepest::multi_tensor::STEEPEST_ISA
