// Where the shared memory of a block goes; host and device. "Own" are the rows of the matrix that a block holds: all of
// them, or its part of them in a cluster.
//
//     alone         sums | Q^T high | Q^T low | R high | R low | Z      squares of halves
//                                             | panel 0 | panel 1       of X, in passing
//
//     in a cluster  sums | Z, all rows        | R high | R low | Q^T    own rows
//                   diagonal                  | panel 0 | panel 1
//
// Panels are there before R is and after it is needed. In a cluster Z's place is taken in turn by all that products
// read whole: R's high halves, Z and in the end Q^T, whose own rows then make room for panels too.
//
// 256 rows take 10 bytes an element, 640 KB, which 227 KB for a block do not hold twice. Four blocks do, with Q in 16
// bits (small_polar.cu): Z 128 KB, of R 64 KB and of Q 32 KB. Up to 192 rows two would do, but they take twice the time
// in half of the multiprocessors: there is one size of clusters. Where a block has 99 KB, four bear 144 rows.
//
// A row of a square is an odd number of 16 bytes long, so that ldmatrix meets no bank twice; at 128 and 256 rows, where
// that much is not left, 16 bytes change places within a row instead.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/host_device.h"

namespace steepest::small_polar {

constexpr int kPanel = 64;   // of the long side, in the block at once
constexpr int kSums = 128;   // bytes, for sums over a block and a cluster
constexpr int kCluster = 4;  // blocks

struct Layout {
  int blocks;  // that share a matrix
  int tiles;   // of 16 on the short side
  int stride;  // halves from a square's row to the next
  int mask;    // of the row number, that the number of a row's 16 bytes is changed by

  STEEPEST_HD Layout(int64_t rows, int blocks) : blocks(blocks) {
    tiles = static_cast<int>((rows + 15) / 16);
    mask = tiles % 8 == 0 ? 7 : 0;
    stride = 16 * tiles + (mask != 0 ? 0 : 8);
  }
  STEEPEST_HD int diagonal() const { return blocks == 1 ? 0 : 16 * tiles * static_cast<int>(sizeof(float)); }  // bytes
  STEEPEST_HD int square() const { return 16 * tiles * stride; }
  STEEPEST_HD int share() const { return 16 * ((tiles + blocks - 1) / blocks) * stride; }
  STEEPEST_HD int panel_stride(bool tall) const { return (tall ? 16 * tiles : kPanel) + 8; }
  STEEPEST_HD int panel() const {  // halves, wide or tall
    const int wide = 16 * tiles * panel_stride(false), tall = kPanel * panel_stride(true);
    return wide > tall ? wide : tall;
  }
  STEEPEST_HD size_t bytes() const {
    const int before = (blocks == 1 ? 2 : 1) * square(), squares = 3 * share(), panels = 2 * panel();
    return kSums + diagonal() + sizeof(uint16_t) * (before + (squares > panels ? squares : panels));
  }
};

}  // namespace steepest::small_polar
