#include "copies.h"

#include <algorithm>

#include "barriers.h"
#include "matrix.h"
#include "tensor_map.h"

namespace ptxsim {
namespace {
constexpr u32 kOffset = (1u << 24) - 1;  // of an address in the cluster's shared memory

void land(Warp& w, const Copy& copy) {
  Launch& l = *w.cta->launch;
  for (const Copy::Lane& lane : copy.lanes) {
    u8 data[16] = {};
    if (lane.bytes) l.global.load(*w.cta, reinterpret_cast<const u8*>(lane.from), data, lane.bytes, kStrong, 0);
    const size_t to = size_t(lane.to);
    store_shared(w, {w.cta->shared + to, w.cta}, data, copy.bytes);
  }
  ++l.progress;
}
void land(Warp& w, vector<Copy>& group) {
  for (const Copy& copy : group) land(w, copy);
  group.clear();
}
}  // namespace

// [shared], [global], bytes (, bytes that are read) (, policy); or a predicate that says to read nothing
void run_cp_async(Warp& w, const Instruction& in, u32 mask) {
  const u32 size = u32(raw(w, in.ops[2], __builtin_ctz(mask)));
  Copy copy{size, {}};
  if (size != 16 && (in.b || (size != 4 && size != 8))) fail(w, in, "cp.async of " + std::to_string(size) + " bytes");
  for (const int lane : lanes(mask)) {
    u32 read = size;
    if (in.ops.size() > 3) {
      const u64 v = raw(w, in.ops[3], lane);
      read = in.t == PRED ? (truth(w, in.ops[3], lane) ? 0 : size) : u32(v);
    }
    if (read > size) fail(w, in, "cp.async that reads more than it writes");
    const Place to = place_of(w, in, in.ops[0], kShared, lane, size, true);
    if (to.shared != w.cta) fail(w, in, "cp.async to another block");
    const u64 from = raw(w, in.ops[1], lane) + u64(in.ops[1].offset);
    if (from % size) fail(w, in, "misaligned address, lane " + std::to_string(lane));
    if (read) check_global(w, in, from, read, false, lane);
    copy.lanes.push_back({lane, u64(to.at - w.cta->shared), from, read});
  }
  w.copies_open.push_back(std::move(copy));
}
void run_cp_async_commit(Warp& w, const Instruction&, u32) {
  w.copy_groups.push_back(std::move(w.copies_open));
  w.copies_open.clear();
}
// a: everything, committed or not
void run_cp_async_wait(Warp& w, const Instruction& in, u32) {
  const size_t left = in.a ? 0 : size_t(raw(w, in.ops[0], 0));
  while (w.copy_groups.size() > left) {
    land(w, w.copy_groups.front());
    w.copy_groups.pop_front();
  }
  if (in.a) land(w, w.copies_open);
}
// An arrival when the copies so far have landed: here they land at once. b: it is one of the expected ones
void run_cp_async_arrive(Warp& w, const Instruction& in, u32 mask) {
  for (vector<Copy>& group : w.copy_groups) land(w, group);
  land(w, w.copies_open);
  if (!in.b) fail(w, in, "cp.async.mbarrier.arrive without .noinc");
  for (const int lane : lanes(mask))
    arrive_at(w, in, raw(w, in.ops[0], lane) + u64(in.ops[0].offset), in.a, lane, 1, 0);
}
void land_some(Warp& w) {
  Launch& l = *w.cta->launch;
  vector<Copy>* group =
      !w.copy_groups.empty() && l.one_in(2) ? &w.copy_groups[l.rng() % w.copy_groups.size()] : &w.copies_open;
  if (group->empty()) return;
  const size_t i = l.rng() % group->size();
  land(w, (*group)[i]);
  group->erase(group->begin() + s64(i));
}
void land_all(Warp& w) {
  for (vector<Copy>& group : w.copy_groups) land(w, group);
  w.copy_groups.clear();
  land(w, w.copies_open);
}

// ---- bulk copies

namespace {
// A box of a tensor: calls f(its offset in shared memory, address or nullptr where it is outside, bytes) for pieces
// that are contiguous on both sides.
template <class F>
void each_piece(const TensorMap& m, const s64* at, u32 base, F f) {
  u32 rows = 1;
  for (int i = 1; i < m.rank; ++i) rows *= m.box[i];
  const u32 row_bytes = u32(m.box[0]) * m.element_bytes;
  for (u32 r = 0; r < rows; ++r) {
    bool inside = true;
    u64 address = m.address;
    u32 rest = r;
    for (int i = 1; i < m.rank; ++i) {
      const s64 c = at[i] + rest % m.box[i];
      rest /= m.box[i];
      inside &= c >= 0 && c < m.sides[i];
      address += u64(c) * m.strides[i - 1];
    }
    for (u32 x = 0; x < row_bytes; x += 16) {
      const u32 to = swizzled(base + r * row_bytes + x, m.swizzle);
      const s64 first = at[0] + x / m.element_bytes, count = 16 / m.element_bytes;
      if (!inside || first + count <= 0 || first >= m.sides[0])
        f(to, static_cast<u8*>(nullptr), 16u);
      else if (first >= 0 && first + count <= m.sides[0])
        f(to, reinterpret_cast<u8*>(address + u64(first) * m.element_bytes), 16u);
      else
        for (s64 i = 0; i < count; ++i) {
          const s64 c = first + i;
          const bool there = c >= 0 && c < m.sides[0];
          f(to + u32(i) * m.element_bytes, there ? reinterpret_cast<u8*>(address + u64(c) * m.element_bytes) : nullptr,
            u32(m.element_bytes));
        }
    }
  }
}
struct Box {
  TensorMap map;
  s64 at[5] = {};
  u32 bytes = 0;
};
// [map, {coordinates}]
Box box_of(const Warp& w, const Instruction& in, const Operand& o, int lane) {
  const u64 address = raw(w, o, lane) + u64(o.offset);
  if (address % 64) fail(w, in, "a tensor map that is not aligned to 64 bytes");
  Box box;
  memcpy(&box.map, reinterpret_cast<const void*>(address), sizeof box.map);
  if (box.map.magic != kTensorMapMagic) fail(w, in, "not a tensor map");
  if (int(o.parts.size()) != box.map.rank)
    fail(w, in, std::to_string(o.parts.size()) + " coordinates in a tensor of rank " + std::to_string(box.map.rank));
  box.bytes = box.map.element_bytes;
  for (int i = 0; i < box.map.rank; ++i) box.at[i] = s32(raw(w, o.parts[size_t(i)], lane)), box.bytes *= box.map.box[i];
  return box;
}
// The blocks that get a copy: the one of the address, or those of a multicast's mask.
vector<Block*> receivers(const Warp& w, const Instruction& in, u32 to, const Operand* multicast, int lane) {
  const auto& ctas = w.cta->cluster->ctas;
  vector<Block*> out;
  if (!multicast) {
    const u32 rank = to > kOffset ? (to >> 24) - 1 : u32(w.cta->rank);
    if (rank >= ctas.size()) fail(w, in, "a copy to a block that the cluster does not have");
    return {ctas[rank].get()};
  }
  const u32 blocks = u16(raw(w, *multicast, lane));
  if (blocks == 0 || blocks >> ctas.size()) fail(w, in, "a multicast to blocks that the cluster does not have");
  for (u32 i = 0; i < ctas.size(); ++i)
    if (blocks >> i & 1) out.push_back(ctas[i].get());
  return out;
}
void check_landing(const Warp& w, const Instruction& in, const Block& cta, u32 offset, u32 bytes) {
  if (cta.finished()) fail(w, in, "a bulk copy into a block that has left");
  if (offset + bytes > cta.shared_bytes)
    fail(w, in,
         "a bulk copy out of the bounds of shared memory: " + std::to_string(bytes) + " bytes at " +
             std::to_string(offset) + " of " + std::to_string(cta.shared_bytes));
}
u64 address_in(const Warp& w, const Operand& o, int lane) { return raw(w, o, lane) + u64(o.offset); }
u32 shared_address(const Warp& w, const Operand& o, int lane) { return u32(address_in(w, o, lane)); }
}  // namespace

// b: multicast; [to], [map, {coordinates}], [mbarrier] (, multicast) (, policy)
void run_bulk_tensor_load(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    const Box box = box_of(w, in, in.ops[1], lane);
    const u32 to = shared_address(w, in.ops[0], lane), barrier = shared_address(w, in.ops[2], lane) & kOffset;
    if (to % 128) fail(w, in, "a bulk tensor copy to an address that is not aligned to 128 bytes");
    each_piece(box.map, box.at, 0, [&](u32, const u8* from, u32 bytes) {
      if (from) check_global(w, in, reinterpret_cast<u64>(from), bytes, false, lane);
    });
    for (Block* cta : receivers(w, in, to, in.b ? &in.ops[3] : nullptr, lane))
      w.cta->launch->copies.push_back(
          {cta->cluster, [box, cta, issuer = &w, instruction = &in, offset = to & kOffset, barrier] {
             check_landing(*issuer, *instruction, *cta, offset, box.bytes);
             each_piece(box.map, box.at, offset,
                        [&](u32 at, const u8* from, u32 bytes) { store_shared_async(*cta, at, from, bytes); });
             complete_bytes(*cta, barrier, box.bytes, *issuer, *instruction);
           }});
  }
}
// b: multicast; [to], [from], bytes, [mbarrier] (, multicast) (, policy)
void run_bulk_load(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    const u32 to = shared_address(w, in.ops[0], lane), bytes = u32(raw(w, in.ops[2], lane));
    const u32 barrier = shared_address(w, in.ops[3], lane) & kOffset;
    const u64 from = address_in(w, in.ops[1], lane);
    if (std::find(in.mods.begin(), in.mods.end(), "global") == in.mods.end())
      fail(w, in, "a bulk copy between blocks, which is not modelled");
    if (to % 16 || from % 16 || bytes % 16) fail(w, in, "a bulk copy that is not aligned to 16 bytes");
    check_global(w, in, from, bytes, false, lane);
    for (Block* cta : receivers(w, in, to, in.b ? &in.ops[4] : nullptr, lane))
      w.cta->launch->copies.push_back({cta->cluster, [=, issuer = &w, instruction = &in] {
                                         check_landing(*issuer, *instruction, *cta, to & kOffset, bytes);
                                         store_shared_async(*cta, to & kOffset, reinterpret_cast<const void*>(from),
                                                            bytes);
                                         complete_bytes(*cta, barrier, bytes, *issuer, *instruction);
                                       }});
  }
}
// [map, {coordinates}], [from]
void run_bulk_tensor_store(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    const Box box = box_of(w, in, in.ops[0], lane);
    const u32 from = shared_address(w, in.ops[1], lane) & kOffset;
    if (from % 128) fail(w, in, "a bulk tensor copy from an address that is not aligned to 128 bytes");
    w.bulk_open.push_back({[box, from, issuer = &w, instruction = &in, lane] {
      Launch& l = *issuer->cta->launch;
      each_piece(box.map, box.at, from, [&](u32 at, u8* to, u32 bytes) {
        if (!to) return;
        check_global(*issuer, *instruction, reinterpret_cast<u64>(to), bytes, true, lane);
        u8 data[16];
        memcpy(data, load_shared_async(*issuer, *instruction, at, bytes), bytes);
        l.global.write_through(issuer->cta, to, data, bytes);
      });
    }});
  }
}
// [to], [from], bytes
void run_bulk_store(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    const u64 to = address_in(w, in.ops[0], lane);
    const u32 from = shared_address(w, in.ops[1], lane) & kOffset, bytes = u32(raw(w, in.ops[2], lane));
    if (to % 16 || from % 16 || bytes % 16) fail(w, in, "a bulk copy that is not aligned to 16 bytes");
    check_global(w, in, to, bytes, true, lane);
    w.bulk_open.push_back({[=, issuer = &w, instruction = &in] {
      const u8* data = load_shared_async(*issuer, *instruction, from, bytes);
      issuer->cta->launch->global.write_through(issuer->cta, reinterpret_cast<u8*>(to), data, bytes);
    }});
  }
}
void run_bulk_commit(Warp& w, const Instruction&, u32) {
  w.bulk_groups.push_back(std::move(w.bulk_open));
  w.bulk_open.clear();
}
// Shared memory is read when the wait asks for it at the latest, and written at once.
void run_bulk_wait(Warp& w, const Instruction& in, u32) {
  const size_t left = size_t(raw(w, in.ops[0], 0));
  while (w.bulk_groups.size() > left) {
    for (const BulkStore& copy : w.bulk_groups.front()) copy.run();
    w.bulk_groups.pop_front();
  }
  ++w.cta->launch->progress;
}
}  // namespace ptxsim
