// Products of bf16 in tiles (AMX): sixteen rows times sixteen columns along 32 numbers of k in one instruction.
//
// A panel is a list of tiles, of 16 vectors each: of A's rows a vector is a row, of B's columns it is two numbers of k.
// So a factor that stands on both sides is packed twice.
#define STEEPEST_ISA amx_bf16
#include "cpu_polar/kernels_x86.h"

namespace steepest::cpu_polar::amx_bf16 {
namespace {

constexpr int64_t kTile = kPanel * kPanel;  // words, and sums
constexpr int64_t kDepth = 2 * kPanel;      // numbers of k in a tile
constexpr int64_t kAtOnce = 8;              // tiles along k whose two panels of B stay in the L1 cache
constexpr int64_t kTall = 8;                // panels of A whose sums wait meanwhile
constexpr int64_t kInCache = 3 << 18;       // bytes of A that stay in the L2 cache while B passes by

// The first `count` of 32 numbers, or of 16 as words; the others are 0.
__m512i numbers(const uint16_t* x, int64_t count) {
  const __mmask32 mask = count >= kDepth ? ~__mmask32{0} : count <= 0 ? 0 : (__mmask32{1} << count) - 1;
  return _mm512_maskz_loadu_epi16(mask, x);
}
__m512i words(const uint16_t* x, int64_t count) {
  const __mmask16 mask = static_cast<__mmask16>(count >= kPanel ? 0xffff : count <= 0 ? 0 : (1u << count) - 1);
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x));
}

// Sixteen vectors of 16 words, turned.
void turn_words(__m512i (&x)[kPanel]) {
  __m512i y[kPanel];
  for (int i = 0; i < kPanel; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < kPanel; i += 4)
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  // A vector holds the quarters' columns j of four rows; two more exchanges bring the quarters together.
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 2; ++i) {
      y[8 * i + j] = _mm512_shuffle_i32x4(x[8 * i + j], x[8 * i + 4 + j], 0x88);
      y[8 * i + 4 + j] = _mm512_shuffle_i32x4(x[8 * i + j], x[8 * i + 4 + j], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    x[j] = _mm512_shuffle_i32x4(y[j], y[8 + j], 0x88);
    x[8 + j] = _mm512_shuffle_i32x4(y[j], y[8 + j], 0xdd);
  }
}

// Tile t of a panel: of A's rows, or of B's columns.
template <bool kRows>
void pack_tile(const Factor& factor, int64_t panel, int64_t t, uint32_t* to) {
  const auto* const from = static_cast<const uint16_t*>(factor.at);
  const int64_t k = factor.k, at = t * kDepth, first = panel * kPanel, rows = factor.size - first;
  const auto row = [&](int64_t i) {
    return i < k ? words(from + i * factor.size + first, rows) : _mm512_setzero_si512();
  };
  __m512i x[kPanel];
  for (int r = 0; r < kPanel; ++r) {
    if (factor.along_k)
      x[r] = r < rows ? numbers(from + (first + r) * k + at, k - at) : _mm512_setzero_si512();
    else
      x[r] = _mm512_or_si512(row(at + 2 * r), _mm512_slli_epi32(row(at + 2 * r + 1), 16));
  }
  if (kRows != factor.along_k) turn_words(x);
  for (int r = 0; r < kPanel; ++r) _mm512_store_si512(to + r * kPanel, x[r]);
}

template <bool kRows>
void pack(const Factor& factor, int64_t begin, int64_t end, uint32_t* to) {
  const int64_t tiles = (factor.k + kDepth - 1) / kDepth;
  const int64_t together = factor.along_k ? 1 : 8;  // neighbours in memory, where rows run across panels
  for (int64_t left = begin; left < end; left += together)
    for (int64_t t = 0; t < tiles; ++t)
      for (int64_t panel = left; panel < left + together && panel < end; ++panel)
        pack_tile<kRows>(factor, panel, t, to + (panel * tiles + t) * kTile);
}

// This thread's tiles, all of 16 rows of 64 bytes, while it lives.
class Tiles {
 public:
  Tiles() {
    alignas(64) uint8_t config[64] = {1};  // the palette; 16 bytes of it, 16 of 16 bits a row, 16 of 8 bits of rows
    for (int i = 0; i < 8; ++i) config[16 + 2 * i] = 64, config[48 + i] = 16;
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// Sums of kR panels of A times kW of B along so many tiles, at the sums that are there or the first; panels lie
// `panel` words apart.
template <int kR, int kW>
void multiply_block(const uint32_t* a, const uint32_t* b, int64_t panel, int64_t tiles, bool first,
                    float (*sums)[2][kTile]) {
  constexpr int64_t kRow = 64;
  if (first) {
    _tile_zero(0);
    if constexpr (kW > 1) _tile_zero(1);
    if constexpr (kR > 1) _tile_zero(2);
    if constexpr (kR > 1 && kW > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, sums[0][0], kRow);
    if constexpr (kW > 1) _tile_loadd(1, sums[0][1], kRow);
    if constexpr (kR > 1) _tile_loadd(2, sums[1][0], kRow);
    if constexpr (kR > 1 && kW > 1) _tile_loadd(3, sums[1][1], kRow);
  }
  for (int64_t t = 0; t < tiles; ++t, a += kTile, b += kTile) {
    _tile_loadd(4, a, kRow);
    _tile_loadd(6, b, kRow);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kW > 1) {
      _tile_loadd(7, b + panel, kRow);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kR > 1) {
      _tile_loadd(5, a + panel, kRow);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kR > 1 && kW > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums[0][0], kRow);
  if constexpr (kW > 1) _tile_stored(1, sums[0][1], kRow);
  if constexpr (kR > 1) _tile_stored(2, sums[1][0], kRow);
  if constexpr (kR > 1 && kW > 1) _tile_stored(3, sums[1][1], kRow);
}

// Rows of a panel of A times up to two panels of B, from their sums into D.
void finish_rows(const Product& product, int64_t row_panel, int64_t panel, int64_t width, float (&sums)[2][kTile]) {
  const int64_t taken = product.symmetric && row_panel + 1 - panel < width ? row_panel + 1 - panel : width;
  if (taken < 1) return;
  const int64_t row = row_panel * kPanel, column = panel * kPanel, below = product.m - row, right = product.n - column;
  const Spot spot{row, column, static_cast<int>(below < kPanel ? below : kPanel),
                  static_cast<int>(right < taken * kPanel ? right : taken * kPanel)};
  for (int r = 0; r < spot.rows; ++r)
    for (int w = 0; w < taken; ++w) finish_panel<Half>(product, spot, r, w, sums[w] + r * kPanel);
  if (product.symmetric) mirror<uint16_t>(product, spot);
}

template <int kW>
void multiply_columns(const Product& product, int64_t begin, int64_t end, int64_t panel) {
  const int64_t tiles = (product.k + kDepth - 1) / kDepth, words = tiles * kTile;
  alignas(64) float sums[kTall][2][kTile];
  for (int64_t top = begin; top < end; top += kTall) {
    const int64_t bottom = top + kTall < end ? top + kTall : end;
    for (int64_t t = 0; t < tiles; t += kAtOnce) {
      const int64_t count = tiles - t < kAtOnce ? tiles - t : kAtOnce;
      const uint32_t *const a = product.a + t * kTile, *const b = product.b + panel * words + t * kTile;
      for (int64_t p = top; p < bottom; p += 2) {
        if (p + 1 < bottom)
          multiply_block<2, kW>(a + p * words, b, words, count, t == 0, sums + (p - top));
        else
          multiply_block<1, kW>(a + p * words, b, words, count, t == 0, sums + (p - top));
      }
    }
    for (int64_t p = top; p < bottom; ++p) finish_rows(product, p, panel, kW, sums[p - top]);
  }
}

void multiply(const Product& product, int64_t begin, int64_t end, int64_t left, int64_t right) {
  const Tiles tiles;
  const int64_t first = begin / kPanel, last = panels_of(end);
  const int64_t fit = kInCache / (product.k * kPanel * 2) / kTall * kTall, block = fit > kTall ? fit : kTall;
  for (int64_t top = first; top < last; top += block) {
    const int64_t bottom = top + block < last ? top + block : last;
    for (int64_t panel = left; panel < right; panel += 2) {
      const int64_t from = product.symmetric && panel > top ? panel : top;
      if (panel + 1 < right)
        multiply_columns<2>(product, from, bottom, panel);
      else
        multiply_columns<1>(product, from, bottom, panel);
    }
  }
}

constexpr Kernels with_tiles() {
  Kernels all = kernels<Half>;
  all.depth = kDepth, all.together = 4, all.alike = false;
  all.pack = pack<false>, all.pack_rows = pack<true>, all.multiply = multiply;
  return all;
}
constexpr Kernels kWithTiles = with_tiles();  // made by the compiler: nothing here runs where there are no tiles

}  // namespace

const Kernels bf16 = kWithTiles;

}  // namespace steepest::cpu_polar::amx_bf16
