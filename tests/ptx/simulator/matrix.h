// What mma and wgmma share.
#pragma once
#include "types.h"

namespace ptxsim {
inline float element(u32 word, int half, Type t) {
  const u16 v = word >> (16 * half);
  return t == BF16 ? bf_to(v) : half_to(v);
}

// The address of a byte of a tile that is swizzled over 128 (kind 1), 64 (2) or 32 (3) bytes.
inline u32 swizzled(u32 address, int kind) {  // 1: 128 bytes, 2: 64, 3: 32
  if (kind == 1) return address ^ ((address >> 7 & 7) << 4);
  if (kind == 2) return address ^ ((address >> 7 & 3) << 4);
  if (kind == 3) return address ^ ((address >> 7 & 1) << 4);
  return address;
}
}  // namespace ptxsim
