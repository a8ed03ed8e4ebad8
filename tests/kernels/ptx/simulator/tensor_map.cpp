#include "tensor_map.h"

#include "launch.h"

namespace ptxsim {
void encode_tensor_map(void* out, int element_bytes, int rank, const void* address, const u64* sides,
                       const u64* strides, const u32* box, int swizzle) {
  auto refuse = [](const string& why) { throw Refused("tensor map refused: " + why); };
  TensorMap m{};
  m.magic = kTensorMapMagic, m.address = reinterpret_cast<u64>(address);
  m.rank = u8(rank), m.element_bytes = u8(element_bytes);
  if (element_bytes != 1 && element_bytes != 2 && element_bytes != 4 && element_bytes != 8) refuse("element type");
  if (reinterpret_cast<u64>(out) % 64) refuse("the map is not aligned to 64 bytes");
  if (rank < 1 || rank > 5) refuse("rank " + std::to_string(rank));
  if (m.address % 16) refuse("the address is not aligned to 16 bytes");
  for (int i = 0; i < rank; ++i) {
    if (sides[i] == 0 || sides[i] > 1ull << 32) refuse("a side of " + std::to_string(sides[i]));
    if (box[i] == 0 || box[i] > 256) refuse("a box of " + std::to_string(box[i]));
    m.sides[i] = u32(sides[i]), m.box[i] = u16(box[i]);
  }
  for (int i = 0; i + 1 < rank; ++i) {
    if (strides[i] % 16 || strides[i] >= 1ull << 40) refuse("a stride of " + std::to_string(strides[i]) + " bytes");
    m.strides[i] = strides[i];
  }
  const u32 inner = box[0] * u32(element_bytes);
  if (inner % 16) refuse("the box's inner side is not a multiple of 16 bytes");
  if (swizzle && inner > u32(swizzle)) refuse("the box's inner side is longer than the swizzle");
  m.swizzle = swizzle == 128 ? 1 : swizzle == 64 ? 2 : swizzle == 32 ? 3 : 0;
  memset(out, 0, 128);
  memcpy(out, &m, sizeof m);
}
}  // namespace ptxsim
