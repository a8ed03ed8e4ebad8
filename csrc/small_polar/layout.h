// Where the shared memory of a block goes; host and device.
//
//     Q high | Q low | R high | R low | Z        squares of halves
//                    | panel 0 | panel 1 ...     X in passing, before R is there and after it is needed
//
// The first panels may begin at Q as well, which is not there yet; they do not, for one picture instead of two. A row
// of a square is an odd number of 16 bytes long, so that ldmatrix meets no bank twice; at 128 rows, where that much is
// not left on sm_80, 16 bytes change places within a row instead.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/host_device.h"

namespace steepest::small_polar {

constexpr int kPanel = 64;  // of the long side, in the block at once

struct Layout {
  int tiles;   // of 16 on the short side
  int stride;  // halves from a square's row to the next
  int mask;    // of the row number, that the number of a row's 16 bytes is changed by

  STEEPEST_HD explicit Layout(int64_t rows) {
    tiles = static_cast<int>((rows + 15) / 16);
    mask = tiles == 8 ? 7 : 0;
    stride = 16 * tiles + (mask != 0 ? 0 : 8);
  }
  STEEPEST_HD int square() const { return 16 * tiles * stride; }
  STEEPEST_HD int panel_stride(bool tall) const { return (tall ? 16 * tiles : kPanel) + 8; }
  STEEPEST_HD int panel() const {  // halves, wide or tall
    const int wide = 16 * tiles * panel_stride(false), tall = kPanel * panel_stride(true);
    return wide > tall ? wide : tall;
  }
  STEEPEST_HD size_t bytes() const {
    const int squares = 3 * square(), panels = 2 * panel();
    return sizeof(uint16_t) * (2 * square() + (squares > panels ? squares : panels));
  }
};

}  // namespace steepest::small_polar
