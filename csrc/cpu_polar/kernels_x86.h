// The kernels of kernels.h; a source that includes this names its instruction set in STEEPEST_ISA, and everything here
// lies in a namespace of that name.
//
// A tile of D, a few rows times up to three panels of columns, is summed in registers along all of k. Panels of B stay
// in the L2 cache while A passes by.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/floats.h"
#include "cpu_polar/kernels.h"

namespace steepest::cpu_polar::STEEPEST_ISA {
namespace {

#ifdef __AVX512F__
constexpr int kRows = 8, kWidth = 3;  // 24 of 32 registers hold sums
#else
constexpr int kRows = 6, kWidth = 1;  // 12 of 16
#endif

// Words of A's rows, of those that a tile begins with: of a panel, and of rows that are not packed.
struct PanelRows {
  const uint32_t* at;
  uint32_t word(int r, int64_t i) const { return at[i * kPanel + r]; }
};
struct PlainRows {
  const uint32_t* rows[kRows];
  PlainRows(const uint32_t* a, int64_t row, int64_t first, int64_t count) {
    for (int64_t r = 0; r < kRows; ++r) rows[r] = a + (first + r < count ? first + r : count - 1) * row;
  }
  uint32_t word(int r, int64_t i) const { return rows[r][i]; }
};

// fp32: a word is a number.
struct Single {
  using Stored = float;
  static constexpr bool kIsSum = true;  // as which a number is stored, and a row of A is one of words
  static constexpr int kDepth = 1;      // numbers of k in a word
  static float wide(float x) { return x; }
  static float narrow(float x) { return x; }
  static uint32_t word(const float* x) { return bits_of(*x); }
  // Sixteen entries alpha sum + beta c; c may be nullptr, or `to`.
  static void finish(const float* sums, float alpha, const float* c, float beta, float* to) {
    float entries[kPanel];
    if (c == nullptr)
      for (int j = 0; j < kPanel; ++j) entries[j] = alpha * sums[j];
    else
      for (int j = 0; j < kPanel; ++j) entries[j] = alpha * sums[j] + beta * c[j];
    std::memcpy(to, entries, sizeof entries);
  }
  // Sixteen words of a panel.
  static void pack(const float* row, const float*, uint32_t* to) { std::memcpy(to, row, kPanel * sizeof(float)); }

#ifdef __AVX512F__
  template <int kR, int kW, class Left>
  static void tile(const Left& a, const uint32_t* b, int64_t steps, float* to, int64_t to_row) {
    __m512 total[kR][kW];
    for (int r = 0; r < kR; ++r)
      for (int w = 0; w < kW; ++w) total[r][w] = _mm512_setzero_ps();
    for (int64_t i = 0; i < steps; ++i, b += kPanel) {
      __m512 right[kW];
      for (int w = 0; w < kW; ++w) right[w] = _mm512_loadu_ps(b + w * steps * kPanel);
      for (int r = 0; r < kR; ++r) {
        const __m512 left = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(a.word(r, i))));
        for (int w = 0; w < kW; ++w) total[r][w] = _mm512_fmadd_ps(left, right[w], total[r][w]);
      }
    }
    for (int r = 0; r < kR; ++r)
      for (int w = 0; w < kW; ++w) _mm512_storeu_ps(to + r * to_row + w * kPanel, total[r][w]);
  }
#else
  template <int kR, int kW, class Left>
  static void tile(const Left& a, const uint32_t* b, int64_t steps, float* to, int64_t to_row) {
    static_assert(kW == 1);
    __m256 total[kR][2];
    for (int r = 0; r < kR; ++r) total[r][0] = total[r][1] = _mm256_setzero_ps();
    for (int64_t i = 0; i < steps; ++i, b += kPanel) {
      const auto* const right = reinterpret_cast<const float*>(b);
      const __m256 first = _mm256_loadu_ps(right), second = _mm256_loadu_ps(right + 8);
      for (int r = 0; r < kR; ++r) {
        const __m256 left = _mm256_set1_ps(float_of(a.word(r, i)));
        total[r][0] = _mm256_fmadd_ps(left, first, total[r][0]);
        total[r][1] = _mm256_fmadd_ps(left, second, total[r][1]);
      }
    }
    for (int r = 0; r < kR; ++r)
      for (int h = 0; h < 2; ++h) _mm256_storeu_ps(to + r * to_row + 8 * h, total[r][h]);
  }
#endif
};

#ifdef __AVX512BF16__
// bf16: a word is two numbers that follow one another along k.
struct Half {
  using Stored = uint16_t;
  static constexpr bool kIsSum = false;
  static constexpr int kDepth = 2;
  static float wide(uint16_t x) { return from_bf16(x); }
  static uint16_t narrow(float x) { return to_bf16(x); }
  static uint32_t word(const uint16_t* x) { return x[0] | static_cast<uint32_t>(x[1]) << 16; }

  static __m512i words(const uint16_t* x) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  static void finish(const float* sums, float alpha, const uint16_t* c, float beta, uint16_t* to) {
    __m512 entries = _mm512_mul_ps(_mm512_set1_ps(alpha), _mm512_loadu_ps(sums));
    if (c != nullptr)
      entries = _mm512_fmadd_ps(_mm512_set1_ps(beta), _mm512_castsi512_ps(_mm512_slli_epi32(words(c), 16)), entries);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(entries));
  }
  static void pack(const uint16_t* first, const uint16_t* second, uint32_t* to) {
    _mm512_storeu_si512(to, _mm512_or_si512(words(first), _mm512_slli_epi32(words(second), 16)));
  }

  template <int kR, int kW, class Left>
  static void tile(const Left& a, const uint32_t* b, int64_t steps, float* to, int64_t to_row) {
    __m512 total[kR][kW];
    for (int r = 0; r < kR; ++r)
      for (int w = 0; w < kW; ++w) total[r][w] = _mm512_setzero_ps();
    for (int64_t i = 0; i < steps; ++i, b += kPanel) {
      __m512bh right[kW];
      for (int w = 0; w < kW; ++w) right[w] = (__m512bh)_mm512_loadu_si512(b + w * steps * kPanel);
      for (int r = 0; r < kR; ++r) {
        const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a.word(r, i)));
        for (int w = 0; w < kW; ++w) total[r][w] = _mm512_dpbf16_ps(total[r][w], left, right[w]);
      }
    }
    for (int r = 0; r < kR; ++r)
      for (int w = 0; w < kW; ++w) _mm512_storeu_ps(to + r * to_row + w * kPanel, total[r][w]);
  }
};
#endif

// ---- packing -------------------------------------------------------------------------------------------------------

// Four words of four rows, turned.
template <class T>
void turn(const T* from, int64_t row, uint32_t* to) {
  __m128 r[4];
  for (int i = 0; i < 4; ++i) r[i] = _mm_loadu_ps(reinterpret_cast<const float*>(from + i * row));
  _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
  for (int i = 0; i < 4; ++i) _mm_storeu_ps(reinterpret_cast<float*>(to + i * kPanel), r[i]);
}

// One word; numbers that are not there are 0.
template <class E>
uint32_t word_at(const typename E::Stored* row, int64_t at, int64_t length) {
  typename E::Stored x[E::kDepth] = {};
  for (int i = 0; i < E::kDepth && at + i < length; ++i) x[i] = row[at + i];
  return E::word(x);
}

// A panel whose memory rows run along k.
template <class E>
void pack_along(const Factor& factor, int64_t panel, uint32_t* to) {
  const auto* const from = static_cast<const typename E::Stored*>(factor.at) + panel * kPanel * factor.k;
  const int64_t steps = (factor.k + E::kDepth - 1) / E::kDepth, whole = factor.k / (4 * E::kDepth) * 4;
  const int rows = static_cast<int>(factor.size - panel * kPanel < kPanel ? factor.size - panel * kPanel : kPanel);
  const int turned = rows / 4 * 4;
  for (int64_t step = 0; step < whole; step += 4)
    for (int r = 0; r < turned; r += 4) turn(from + r * factor.k + step * E::kDepth, factor.k, to + step * kPanel + r);
  for (int r = 0; r < kPanel; ++r)
    for (int64_t step = r < turned ? whole : 0; step < steps; ++step)
      to[step * kPanel + r] = r < rows ? word_at<E>(from + r * factor.k, step * E::kDepth, factor.k) : 0;
}

// Panels whose memory rows are those of k, a few at a time: neighbours in memory, and not too many places to write to.
template <class E>
void pack_across(const Factor& factor, int64_t begin, int64_t end, uint32_t* to) {
  using T = typename E::Stored;
  constexpr int64_t kTogether = 8;
  const T* const from = static_cast<const T*>(factor.at);
  const int64_t steps = (factor.k + E::kDepth - 1) / E::kDepth, whole = factor.k / E::kDepth;
  const int64_t full = factor.size / kPanel < end ? factor.size / kPanel : end;  // panels that no edge cuts
  for (int64_t left = begin; left < full; left += kTogether) {
    const int64_t right = left + kTogether < full ? left + kTogether : full;
    for (int64_t step = 0; step < whole; ++step) {
      const T* const first = from + step * E::kDepth * factor.size;
      for (int64_t p = left; p < right; ++p)
        E::pack(first + p * kPanel, first + factor.size + p * kPanel, to + (p * steps + step) * kPanel);
    }
  }
  for (int64_t p = begin; p < end; ++p)
    for (int64_t step = p < full ? whole : 0; step < steps; ++step)
      for (int64_t j = 0; j < kPanel; ++j) {
        T x[E::kDepth] = {};
        for (int i = 0; i < E::kDepth; ++i) {
          const int64_t k = step * E::kDepth + i, at = p * kPanel + j;
          if (k < factor.k && at < factor.size) x[i] = from[k * factor.size + at];
        }
        to[(p * steps + step) * kPanel + j] = E::word(x);
      }
}

template <class E>
void pack(const Factor& factor, int64_t begin, int64_t end, uint32_t* to) {
  if (!factor.along_k) return pack_across<E>(factor, begin, end, to);
  const int64_t steps = (factor.k + E::kDepth - 1) / E::kDepth;
  for (int64_t p = begin; p < end; ++p) pack_along<E>(factor, p, to + p * steps * kPanel);
}

// ---- products ------------------------------------------------------------------------------------------------------

// Rows of a tile of at most kRows x (kWidth panels), where it lies in D.
struct Spot {
  int64_t row, column;
  int rows, columns;
};

// Sixteen sums as entries of D: of a row of a tile in its panel w.
template <class E>
void finish_panel(const Product& product, const Spot& spot, int r, int w, const float* sum) {
  using T = typename E::Stored;
  const int64_t at = (spot.row + r) * product.n + spot.column + w * kPanel;
  const int count = spot.columns - w * kPanel;
  const T* const c = product.beta != 0 ? static_cast<const T*>(product.c) + at : nullptr;
  T* const to = static_cast<T*>(product.d) + at;
  if (count >= kPanel) return E::finish(sum, product.alpha, c, product.beta, to);
  T added[kPanel] = {}, entries[kPanel];
  for (int j = 0; c != nullptr && j < count; ++j) added[j] = c[j];
  E::finish(sum, product.alpha, c != nullptr ? added : nullptr, product.beta, entries);
  for (int j = 0; j < count; ++j) to[j] = entries[j];
}

// Eight rows of eight 16-bit numbers, or four of four words, turned.
inline void turn_into(const uint16_t* from, int64_t row, uint16_t* to, int64_t to_row) {
  __m128i r[8], s[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * row));
  for (int i = 0; i < 4; ++i) {
    s[2 * i] = _mm_unpacklo_epi16(r[i], r[i + 4]);
    s[2 * i + 1] = _mm_unpackhi_epi16(r[i], r[i + 4]);
  }
  // Rows 0 4, 1 5, 2 6, 3 7 are interleaved; twice more, and every register is a column.
  for (int i = 0; i < 4; ++i) {
    r[2 * i] = _mm_unpacklo_epi16(s[i], s[i + 4]);
    r[2 * i + 1] = _mm_unpackhi_epi16(s[i], s[i + 4]);
  }
  for (int i = 0; i < 4; ++i) {
    s[2 * i] = _mm_unpacklo_epi16(r[i], r[i + 4]);
    s[2 * i + 1] = _mm_unpackhi_epi16(r[i], r[i + 4]);
  }
  for (int i = 0; i < 8; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * to_row), s[i]);
}
inline void turn_into(const float* from, int64_t row, float* to, int64_t to_row) {
  __m128 r[4];
  for (int i = 0; i < 4; ++i) r[i] = _mm_loadu_ps(from + i * row);
  _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
  for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + i * to_row, r[i]);
}

// What a tile of one panel's rows has below the diagonal, to its place above it.
template <class T>
void mirror(const Product& product, const Spot& spot) {
  constexpr int kTurned = 16 / sizeof(T);  // a side of what is turned at once
  T* const d = static_cast<T*>(product.d);
  const T* const from = d + spot.row * product.n + spot.column;
  T* const to = d + spot.column * product.n + spot.row;
  const int64_t corner = spot.row / kPanel * kPanel, end = spot.column + spot.columns;
  const int count = static_cast<int>((corner < end ? corner : end) - spot.column), rows = spot.rows / kTurned * kTurned;
  for (int r = 0; r < rows; r += kTurned)
    for (int j = 0; j < count; j += kTurned)
      turn_into(from + r * product.n + j, product.n, to + j * product.n + r, product.n);
  for (int r = rows; r < spot.rows; ++r)
    for (int j = 0; j < count; ++j) to[j * product.n + r] = from[r * product.n + j];
  // In the panel that the diagonal cuts, which is symmetric by itself where A = B^T.
  if (product.same || corner >= end) return;
  for (int64_t row = spot.row; row < spot.row + spot.rows; ++row)
    for (int64_t column = corner; column < row; ++column) d[column * product.n + row] = d[row * product.n + column];
}

template <class E, int kR, int kW>
void multiply_tile(const Product& product, int64_t row, int64_t panel) {
  using T = typename E::Stored;
  const int64_t steps = (product.k + E::kDepth - 1) / E::kDepth;
  const int64_t below = product.m - row, right = product.n - panel * kPanel;
  const Spot spot{row, panel * kPanel, static_cast<int>(below < kR ? below : kR),
                  static_cast<int>(right < kW * kPanel ? right : kW * kPanel)};
  const uint32_t* const b = product.b + panel * steps * kPanel;
  const auto sum = [&](float* to, int64_t to_row) {
    if (E::kIsSum && product.row != 0)
      E::template tile<kR, kW>(PlainRows(product.a, product.row, row, product.m), b, steps, to, to_row);
    else
      E::template tile<kR, kW>(PanelRows{product.a + row / kPanel * steps * kPanel + row % kPanel}, b, steps, to,
                               to_row);
  };
  const bool whole = spot.rows == kR && spot.columns == kW * kPanel;
  if (E::kIsSum && whole && product.alpha == 1 && product.beta == 0) {
    sum(static_cast<float*>(product.d) + spot.row * product.n + spot.column, product.n);
  } else {
    float sums[kRows][kWidth * kPanel];
    sum(sums[0], kWidth * kPanel);
    for (int r = 0; r < spot.rows; ++r)
      for (int w = 0; w < kW; ++w) finish_panel<E>(product, spot, r, w, sums[r] + w * kPanel);
  }
  if (product.symmetric) mirror<T>(product, spot);
}

template <class E, int kW>
void multiply_rows(const Product& product, int64_t row, int64_t end, int64_t panel) {
#ifdef __AVX512F__
  multiply_tile<E, 8, kW>(product, row, panel);
  if (row + 8 < end) multiply_tile<E, 8, kW>(product, row + 8, panel);
#else
  multiply_tile<E, 6, kW>(product, row, panel);
  if (row + 6 < end) multiply_tile<E, 6, kW>(product, row + 6, panel);
  if (row + 12 < end) multiply_tile<E, 4, kW>(product, row + 12, panel);
#endif
}

// The panels [left, left + width), of a symmetric product those that are not all above the diagonal.
template <class E>
void multiply_columns(const Product& product, int64_t begin, int64_t end, int64_t left, int64_t width) {
  for (int64_t row = begin; row < end; row += kPanel) {
    const int64_t below = row / kPanel + 1 - left, taken = product.symmetric && below < width ? below : width;
    if (taken == 1) multiply_rows<E, 1>(product, row, end, left);
#ifdef __AVX512F__
    if (taken == 2) multiply_rows<E, 2>(product, row, end, left);
    if (taken == 3) multiply_rows<E, 3>(product, row, end, left);
#endif
  }
}

template <class E>
void multiply(const Product& product, int64_t begin, int64_t end, int64_t left, int64_t right) {
  while (left < right) {
    const int64_t rest = right - left;  // the last four in twos: one panel alone makes poor use of loads
    const int64_t width = kWidth == 1 || rest == 1 ? 1 : rest == 4 || rest == 2 ? 2 : 3;
    multiply_columns<E>(product, begin, end, left, width);
    left += width;
  }
}

// ---- squares -------------------------------------------------------------------------------------------------------

template <class E>
void sum(const void* a, const void* c, void* out, int64_t side, float alpha, float beta, float gamma) {
  using T = typename E::Stored;
  const T *from = static_cast<const T*>(a), *added = static_cast<const T*>(c);
  T* const to = static_cast<T*>(out);
  for (int64_t i = 0; i < side; ++i) {
    const int64_t row = i * side, diagonal = row + i;
    float value = alpha * E::wide(from[diagonal]) + gamma;
    if (added != nullptr) value += beta * E::wide(added[diagonal]);
    if (added == nullptr)
      for (int64_t j = row; j < row + side; ++j) to[j] = E::narrow(alpha * E::wide(from[j]));
    else
      for (int64_t j = row; j < row + side; ++j) to[j] = E::narrow(alpha * E::wide(from[j]) + beta * E::wide(added[j]));
    to[diagonal] = E::narrow(value);
  }
}

template <class E>
void spread(const void* gram, int64_t side, double& square, double& trace, double& diagonal_square) {
  const auto* const from = static_cast<const typename E::Stored*>(gram);
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < side * side; ++i) {
    const double x = E::wide(from[i]);
    total += x * x;
  }
  square = total, trace = diagonal_square = 0;
  for (int64_t i = 0; i < side; ++i) {
    const double x = E::wide(from[i * (side + 1)]);
    trace += x, diagonal_square += x * x;
  }
}

// ---- elements ------------------------------------------------------------------------------------------------------

inline float wide(float x) { return x; }
inline float wide(uint16_t x) { return from_bf16(x); }
inline void put(float x, float& to) { to = x; }
inline void put(float x, uint16_t& to) { to = to_bf16(x); }

template <class Body>
auto with(const Source& x, int64_t begin, const Body& body) {
  return x.dtype == Dtype::bf16 ? body(static_cast<const uint16_t*>(x.at) + x.first + begin)
                                : body(static_cast<const float*>(x.at) + x.first + begin);
}

// Magnitudes are ordered as their bits are, and what is not finite is the largest.
inline double largest(const Source& x, int64_t begin, int64_t count) {
  return with(x, begin, [&](const auto* from) {
    uint32_t most = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = bits_of(wide(from[i])) & 0x7fffffff;
      most = bits > most ? bits : most;
    }
    return static_cast<double>(float_of(most));
  });
}

template <class E>
double square(const void* x, int64_t begin, int64_t count) {
  const auto* const from = static_cast<const typename E::Stored*>(x) + begin;
  double total = 0;
  for (int64_t start = 0; start < count; start += 1024) {
    const int64_t end = start + 1024 < count ? start + 1024 : count;
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = start; i < end; ++i) part += E::wide(from[i]) * E::wide(from[i]);
    total += part;
  }
  return total;
}

template <class E>
void divide(void* x, int64_t begin, int64_t count, float by) {
  auto* const values = static_cast<typename E::Stored*>(x) + begin;
  for (int64_t i = 0; i < count; ++i) values[i] = E::narrow(E::wide(values[i]) / by);
}

template <class E>
float round(float x) {
  return E::wide(E::narrow(x));
}

template <class E>
void load(const Source& x, int64_t begin, int64_t count, float first, float second, void* to) {
  auto* const into = static_cast<typename E::Stored*>(to) + begin;
  with(x, begin, [&](const auto* from) {
    for (int64_t i = 0; i < count; ++i) into[i] = E::narrow(wide(from[i]) * first * second);
  });
}

template <class E>
void store_all(const void* from, int64_t begin, int64_t count, void* to, Dtype dtype) {
  const auto copy = [&](auto* into) {
    const auto* const values = static_cast<const typename E::Stored*>(from) + begin;
    for (int64_t i = 0; i < count; ++i) put(E::wide(values[i]), into[i]);
  };
  dtype == Dtype::bf16 ? copy(static_cast<uint16_t*>(to) + begin) : copy(static_cast<float*>(to) + begin);
}

inline void fill(void* to, Dtype dtype, int64_t count, float value) {
  const auto put_all = [&](auto* into) {
    for (int64_t i = 0; i < count; ++i) put(value, into[i]);
  };
  dtype == Dtype::bf16 ? put_all(static_cast<uint16_t*>(to)) : put_all(static_cast<float*>(to));
}

// body(row, column, rows, columns) of tiles of 16, of those with column <= row where `half`.
template <class Body>
void in_tiles(int64_t side, bool half, const Body& body) {
  for (int64_t i = 0; i < side; i += kPanel)
    for (int64_t j = 0; j < (half ? i + 1 : side); j += kPanel)
      body(i, j, static_cast<int>(side - i < kPanel ? side - i : kPanel),
           static_cast<int>(side - j < kPanel ? side - j : kPanel));
}

// A tile turned, rows of kPanel numbers; what lies outside the square is left alone.
inline void turn_tile(const float* from, int64_t side, int rows, int columns, float* to, int64_t to_row) {
  if (rows == kPanel && columns == kPanel) {
    for (int r = 0; r < kPanel; r += 4)
      for (int c = 0; c < kPanel; c += 4) turn_into(from + r * side + c, side, to + c * to_row + r, to_row);
    return;
  }
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c) to[c * to_row + r] = from[r * side + c];
}

inline bool symmetric(const float* x, int64_t side) {
  bool same = true;
  in_tiles(side, true, [&](int64_t i, int64_t j, int rows, int columns) {
    float turned[kPanel * kPanel];
    turn_tile(x + i * side + j, side, rows, columns, turned, kPanel);
    for (int c = 0; c < columns; ++c) {
      const float* const row = x + (j + c) * side + i;
      for (int r = 0; r < rows; ++r) same &= row[r] == turned[c * kPanel + r];
    }
  });
  return same;
}

inline void transpose(const float* from, int64_t side, float* to) {
  in_tiles(side, false, [&](int64_t i, int64_t j, int rows, int columns) {
    turn_tile(from + i * side + j, side, rows, columns, to + j * side + i, side);
  });
}

// ---- rows ----------------------------------------------------------------------------------------------------------

inline float dot(const float* x, const float* y, int64_t length) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < length; ++i) total += x[i] * y[i];
  return total;
}

// The part along a row of length 1 taken off a row.
inline void take_off(const float* __restrict row, float* __restrict other, int64_t length) {
  const float along = dot(row, other, length);
  for (int64_t j = 0; j < length; ++j) other[j] -= along * row[j];
}

// The same of four rows, whose sums do not wait for one another.
inline void take_off_four(const float* __restrict row, float* __restrict a, int64_t length) {
  float* __restrict b = a + length, * __restrict c = b + length, * __restrict d = c + length;
  float of_a = 0, of_b = 0, of_c = 0, of_d = 0;
#pragma omp simd reduction(+ : of_a, of_b, of_c, of_d)
  for (int64_t j = 0; j < length; ++j)
    of_a += row[j] * a[j], of_b += row[j] * b[j], of_c += row[j] * c[j], of_d += row[j] * d[j];
  for (int64_t j = 0; j < length; ++j)
    a[j] -= of_a * row[j], b[j] -= of_b * row[j], c[j] -= of_c * row[j], d[j] -= of_d * row[j];
}

inline void orthonormalize(float* rows, int64_t count, int64_t length, float* lengths) {
  for (int64_t i = 0; i < count; ++i) {
    float* const row = rows + i * length;
    lengths[i] = std::sqrt(dot(row, row, length));
    if (!(lengths[i] > 0)) continue;
    const float by = 1 / lengths[i];
    for (int64_t j = 0; j < length; ++j) row[j] *= by;
    int64_t k = i + 1;
    for (; k + 4 <= count; k += 4) take_off_four(row, rows + k * length, length);
    for (; k < count; ++k) take_off(row, rows + k * length, length);
  }
}

// ---- second moments ------------------------------------------------------------------------------------------------

inline void mix_squares(const float* __restrict x, int64_t count, float beta, float* __restrict v) {
  const float rest = 1 - beta;
  for (int64_t i = 0; i < count; ++i) v[i] = v[i] * beta + rest * x[i] * x[i];
}

inline void over_roots(const float* __restrict v, int64_t count, float over, float eps, bool twice,
                       float* __restrict x) {
  const auto divide = [&](auto again) {
    for (int64_t i = 0; i < count; ++i) {
      const float root = std::sqrt(std::sqrt(v[i]) * over + eps), once = x[i] / root;
      x[i] = root == 0 ? 0.0f : again ? once / root : once;
    }
  };
  twice ? divide(std::true_type()) : divide(std::false_type());
}

template <class E>
constexpr Kernels kernels{E::kDepth, 3,         true,      pack<E>,        pack<E>,     multiply<E>,  sum<E>,
                          spread<E>, largest,   load<E>,   square<E>,      divide<E>,   store_all<E>, fill,
                          round<E>,  symmetric, transpose, orthonormalize, mix_squares, over_roots};

}  // namespace
}  // namespace steepest::cpu_polar::STEEPEST_ISA
