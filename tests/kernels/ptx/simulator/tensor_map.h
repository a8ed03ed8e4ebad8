// The description of a tensor in global memory that bulk tensor copies follow.
#pragma once
#include "types.h"

namespace ptxsim {
struct TensorMap {
  u64 magic, address;
  u64 strides[4];  // bytes, of all sides but the first
  u32 sides[5];
  u16 box[5];
  u8 rank, element_bytes, swizzle;  // swizzle as in a wgmma descriptor: 0 none, 1 of 128 bytes, 2 of 64, 3 of 32
};
static_assert(sizeof(TensorMap) <= 128);
constexpr u64 kTensorMapMagic = 0x7470616d726f736eull;

// Fills a map of 128 bytes; throws Refused where the driver would. Strides are in bytes, of all sides but the first;
// `swizzle` is 0, 32, 64 or 128.
void encode_tensor_map(void* map, int element_bytes, int rank, const void* address, const u64* sides,
                       const u64* strides, const u32* box, int swizzle);
}  // namespace ptxsim
