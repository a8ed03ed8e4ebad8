// Bulk copies of tiles of tensors, and the maps that describe the tensors.
#pragma once
#include "types.h"

namespace ptxsim {
struct TensorMap {
  u64 magic;
  u64 address;
  u32 dims[5];
  u16 box[5];
  u8 rank, bytes;
  u64 strides[4];
  u8 swizzle, used;
};
static_assert(sizeof(TensorMap) <= 128);
constexpr u64 kMagic = 0x7470616d726f736eull;

// Fills a map of 128 bytes; throws Refused where the driver would. Strides are in bytes, of all sides but the first;
// `swizzle` is 0, 32, 64 or 128.
void encode_tensor_map(void* map, int element_bytes, int rank, const void* address, const u64* sides,
                       const u64* strides, const u32* box, int swizzle);
}  // namespace ptxsim
