// Where the shared memory of a block goes; host and device.
//
//     work | basis | d, old d, two vectors | rotations | two lists of columns
//
// The squares have an even number of rows, of two neighbours each, and a stride of twice an odd number: neighbours are
// read at once, and 32 lanes that go down a column meet no bank more than twice.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/host_device.h"

namespace steepest::eigh {

struct alignas(16) Rotation {
  float c, s;
  float p, q;  // the diagonal after it
};

struct Layout {
  int even;    // rows and columns of a square, the last of them zero where n is odd
  int stride;  // from a row to the next

  STEEPEST_HD explicit Layout(int64_t n) {
    even = static_cast<int>(n + n % 2);
    stride = even % 4 == 2 ? even : even + 2;
  }
  STEEPEST_HD int square() const { return even * stride; }
  STEEPEST_HD size_t bytes() const {
    return sizeof(float) * (2 * square() + 4 * even) + sizeof(Rotation) * (even / 2) + sizeof(int) * 2 * even;
  }
};

}  // namespace steepest::eigh
