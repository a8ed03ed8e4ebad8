#include "tensor_copies.h"

#include <array>

#include "barriers.h"
#include "launch.h"
#include "matrix.h"
#include "memory.h"

namespace ptxsim {
void run_tma_load(Warp& w, const Instruction& in, u32 mask) {
  // ops: [dst], [map, {coords}], [mbar] (, mask) (, hint)
  for (const int lane : lanes(mask)) {
    const Operand& m = in.ops[1];
    const TensorMap* map = reinterpret_cast<const TensorMap*>(
        (m.reg >= 0 ? w.R[m.reg * 32 + lane] : symbol_value(w, m.sym, lane)) + m.offset);
    if (map->magic != kMagic) fail(w, in, "not a tensor map");
    if (reinterpret_cast<u64>(map) % 64) fail(w, in, "a tensor map that is not aligned to 64 bytes");
    TensorMap copy = *map;
    std::array<s64, 5> at{};
    if (int(m.parts.size()) != copy.rank) fail(w, in, "coordinates do not fit the tensor map's rank");
    for (int i = 0; i < copy.rank; ++i) at[i] = s32(raw(w, m.parts[i], lane));
    const Operand &od = in.ops[0], &ob = in.ops[2];
    const u32 dst = u32(w.R[od.reg * 32 + lane] + od.offset), bar = u32(w.R[ob.reg * 32 + lane] + ob.offset);
    u32 to = 0;
    const bool multicast = in.b;
    if (multicast) to = u16(raw(w, in.ops[3], lane));
    if (dst % 128) fail(w, in, "a bulk tensor copy to an address that is not aligned to 128 bytes");
    if (multicast && (to == 0 || to >> w.cta->cluster->ctas.size()))
      fail(w, in, "a multicast to blocks that the cluster does not have");
    u32 bytes = copy.bytes;
    for (int i = 0; i < copy.rank; ++i) bytes *= copy.box[i];
    vector<Block*> ctas;
    if (multicast) {
      for (int i = 0; i < 16; ++i)
        if (to >> i & 1) ctas.push_back(w.cta->cluster->ctas[i].get());
    } else
      ctas.push_back(dst >= 1u << 24 ? w.cta->cluster->ctas[(dst >> 24) - 1].get() : w.cta);
    Warp* issuer = &w;
    const Instruction* instr = &in;
    for (Block* cta : ctas)
      w.cta->launch->copies.push_back([=]() {
        const u32 d0 = dst & 0xffffff;
        if (cta->done == int(cta->warps.size())) fail(*issuer, *instr, "a bulk copy into a block that has left");
        if (d0 + bytes > cta->shared_bytes) fail(*issuer, *instr, "a bulk copy out of the bounds of shared memory");
        const u32 n0 = copy.box[0];
        u32 rows = 1;
        for (int i = 1; i < copy.rank; ++i) rows *= copy.box[i];
        for (u32 r = 0; r < rows; ++r) {
          s64 c[5] = {at[0]};
          u32 rest = r;
          bool inside = true;
          u64 base = copy.address;
          for (int i = 1; i < copy.rank; ++i) {
            c[i] = at[i] + rest % copy.box[i];
            rest /= copy.box[i];
            inside &= c[i] >= 0 && c[i] < copy.dims[i];
            base += c[i] * copy.strides[i - 1];
          }
          for (u32 x = 0; x < n0; ++x) {
            const s64 cx = at[0] + x;
            const u32 off = (r * n0 + x) * copy.bytes;
            u8* p = cta->shared + swizzled(d0 + off, copy.swizzle == 3   ? 1
                                                     : copy.swizzle == 2 ? 2
                                                     : copy.swizzle == 1 ? 3
                                                                         : 0);
            if (inside && cx >= 0 && cx < copy.dims[0])
              memcpy(p, reinterpret_cast<const u8*>(base + cx * copy.bytes), copy.bytes);
            else
              memset(p, 0, copy.bytes);
            mark(cta, p, copy.bytes);
          }
        }
        u8* b = cta->shared + (bar & 0xffffff);
        tx_counts()[b] -= bytes;
        trace(*issuer, cta, "landed", b, bytes);
        MBarrier mb;
        memcpy(&mb, b, 8);
        if (mb.pending == 0 && tx_counts()[b] == 0) {
          mb.phase ^= 1;
          mb.pending = mb.expected;
          memcpy(b, &mb, 8);
        }
        ++cta->launch->progress;
      });
  }
}
void run_call(Warp& w, const Instruction& in, u32 mask) {
  const auto& symbols = w.cta->launch->kernel->symbols;
  const string& name = in.mods.back();
  auto reg = [&](const Operand& o) { return symbols[o.sym].reg; };
  if (name != "__internal_accurate_pow") fail(w, in, "a call of " + name);
  for (const int lane : lanes(mask)) {
    double x, y;
    memcpy(&x, &w.R[reg(in.ops[1]) * 32 + lane], 8);
    memcpy(&y, &w.R[reg(in.ops[2]) * 32 + lane], 8);
    const double r = std::pow(std::fabs(x), y);  // of the absolute value; the caller mends signs
    memcpy(&w.R[reg(in.ops[0]) * 32 + lane], &r, 8);
  }
}

void encode_tensor_map(void* out, int element_bytes, int rank, const void* address, const u64* sides,
                       const u64* strides, const u32* box, int swizzle) {
  auto refuse = [](const string& why) { throw Refused("tensor map refused: " + why); };
  TensorMap m{};
  m.magic = kMagic, m.address = reinterpret_cast<u64>(address), m.rank = u8(rank), m.bytes = u8(element_bytes);
  if (element_bytes != 1 && element_bytes != 2 && element_bytes != 4 && element_bytes != 8) refuse("element type");
  if (reinterpret_cast<u64>(out) % 64) refuse("the map is not aligned to 64 bytes");
  if (rank < 1 || rank > 5) refuse("rank " + std::to_string(rank));
  if (m.address % 16) refuse("the address is not aligned to 16 bytes");
  for (int i = 0; i < rank; ++i) {
    if (sides[i] == 0 || sides[i] > (1ull << 32)) refuse("a side of " + std::to_string(sides[i]));
    if (box[i] == 0 || box[i] > 256) refuse("a box of " + std::to_string(box[i]));
    m.dims[i] = u32(sides[i]), m.box[i] = u16(box[i]);
  }
  for (int i = 0; i + 1 < rank; ++i) {
    if (strides[i] % 16 || strides[i] >= (1ull << 40)) refuse("a stride of " + std::to_string(strides[i]) + " bytes");
    m.strides[i] = strides[i];
  }
  const u32 inner = box[0] * u32(element_bytes);
  if (inner % 16) refuse("the box's inner side is not a multiple of 16 bytes");
  if (swizzle && inner > u32(swizzle)) refuse("the box's inner side is longer than the swizzle");
  m.swizzle = swizzle == 128 ? 3 : swizzle == 64 ? 2 : swizzle == 32 ? 1 : 0;
  memset(out, 0, 128);
  memcpy(out, &m, sizeof m);
}
}  // namespace ptxsim
