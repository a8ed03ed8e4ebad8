// Loads, stores, atomics, fences, and conversions of addresses.
#include "memory.h"

#include <algorithm>

namespace ptxsim {
namespace {
// memcpy of what is mostly one of a few sizes, without a call.
void copy(void* to, const void* from, size_t bytes) {
  switch (bytes) {
    case 2:
      memcpy(to, from, 2);
      return;
    case 4:
      memcpy(to, from, 4);
      return;
    case 8:
      memcpy(to, from, 8);
      return;
    case 16:
      memcpy(to, from, 16);
      return;
    default:
      memcpy(to, from, bytes);
  }
}

constexpr u64 kRankShift = 24;  // of an address in the cluster's shared memory: a block's rank + 1 above its offset

bool inside(u64 address, size_t bytes, const void* begin, size_t size) {
  const u64 b = reinterpret_cast<u64>(begin);
  return address >= b && address + bytes <= b + size;
}
}  // namespace

Place shared_at(Warp& w, const Instruction& in, u64 address, size_t bytes) {
  Block* cta = w.cta;
  u64 offset = address;
  if (address >= 1u << kRankShift) {
    const u32 rank = u32(address >> kRankShift) - 1;
    offset = address & ((1u << kRankShift) - 1);
    if (rank >= cta->cluster->ctas.size())
      fail(w, in, "an address in the shared memory of a block that the cluster does not have");
    cta = cta->cluster->ctas[rank].get();
  }
  if (offset + bytes > cta->shared_bytes)
    fail(w, in,
         "shared memory out of bounds: " + std::to_string(bytes) + " bytes at " + std::to_string(offset) + " of " +
             std::to_string(cta->shared_bytes));
  if (cta != w.cta && cta->finished()) fail(w, in, "shared memory of a block that has left");
  return {cta->shared + offset, cta};
}

Block* block_of(const Warp& w, const u8* at) {
  for (const auto& c : w.cta->cluster->ctas)
    if (at >= c->shared && at < c->shared + c->shared_bytes) return c.get();
  return nullptr;
}

void check_global(const Warp& w, const Instruction& in, u64 address, size_t bytes, bool write, int lane) {
  if (address < 65536) fail(w, in, "null pointer (" + std::to_string(address) + "), lane " + std::to_string(lane));
  const Ranges& allowed = ranges();
  if (allowed.empty() || allowed.allows(address, bytes, write)) return;
  const Launch& l = *w.cta->launch;
  if (!write && inside(address, bytes, l.params.get(), l.kernel->param_bytes)) return;
  for (const Symbol& s : l.kernel->symbols)
    if (s.memory && inside(address, bytes, s.memory.get(), s.size)) return;
  if (inside(address, bytes, w.local.data(), w.local.size())) return;
  fail(w, in,
       string("global memory out of bounds: a ") + (write ? "store to " : "load of ") + std::to_string(bytes) +
           " bytes, lane " + std::to_string(lane) + ", " + allowed.nearest(address, bytes));
}

Place place_at(Warp& w, const Instruction& in, u64 address, int space, int lane, size_t bytes, bool write) {
  const bool narrow = space == kShared || space == kSharedCluster;
  if (narrow) address = u32(address);
  if (bytes && (address & (bytes - 1)) != 0)  // all accesses are of powers of two
    fail(w, in,
         "misaligned address, lane " + std::to_string(lane) + ": " + std::to_string(address % 64) +
             " mod 64, an access of " + std::to_string(bytes) + " bytes");
  if (narrow) return shared_at(w, in, address, bytes);
  u8* p = reinterpret_cast<u8*>(address);
  if (space == kGeneric)
    if (Block* cta = block_of(w, p)) {
      if (p + bytes > cta->shared + cta->shared_bytes) fail(w, in, "shared memory out of bounds");
      if (cta != w.cta && cta->finished()) fail(w, in, "shared memory of a block that has left");
      return {p, cta};
    }
  check_global(w, in, address, bytes, write, lane);
  return {p, nullptr};
}
Place place_of(Warp& w, const Instruction& in, const Operand& o, int space, int lane, size_t bytes, bool write) {
  return place_at(w, in, raw(w, o, lane) + u64(o.offset), space, lane, bytes, write);
}

void check_written(const Warp& w, const Instruction& in, const Place& p, size_t bytes) {
  const u8* flags = p.shared->written.data() + (p.at - p.shared->shared);
  u64 all = 0x0101010101010101ull;
  if (bytes == 8 || bytes == 16) {
    u64 a, b;
    memcpy(&a, flags, 8), memcpy(&b, flags + bytes - 8, 8);
    if ((a & b) == all) return;
  } else if (bytes == 4) {
    u32 a;
    memcpy(&a, flags, 4);
    if (a == u32(all)) return;
  }
  for (size_t i = 0; i < bytes; ++i)
    if (!flags[i])
      fail(w, in, "shared memory read before it was written, byte " + std::to_string(p.at - p.shared->shared + s64(i)));
}

void store_shared(Warp& w, const Place& p, const void* from, size_t bytes) {
  Block& cta = *p.shared;
  const size_t offset = size_t(p.at - cta.shared);
  constexpr u64 kOnes[4] = {0x0101010101010101ull, 0x0101010101010101ull, 0x0101010101010101ull, 0x0101010101010101ull};
  copy(p.at, from, bytes);
  copy(cta.written.data() + offset, kOnes, bytes);
  if (cta.async_view.empty()) return;
  // Without a fence nobody knows when the async proxy sees it: now, or only after one.
  if (cta.launch->one_in(2)) {
    memcpy(cta.async_view.data() + offset, from, bytes);
    return;
  }
  memset(cta.unpublished.data() + offset, 1, bytes);
  if (&cta == w.cta)
    w.unpublished.push_back({u32(offset), u32(bytes)});
  else
    cta.unpublished_ranges.push_back({u32(offset), u32(bytes)});
}
void store_shared_async(Block& cta, size_t offset, const void* from, size_t bytes) {
  if (from)
    memcpy(cta.shared + offset, from, bytes);
  else
    memset(cta.shared + offset, 0, bytes);
  memset(cta.written.data() + offset, 1, bytes);
  if (cta.async_view.empty()) return;
  memcpy(cta.async_view.data() + offset, cta.shared + offset, bytes);
  memset(cta.unpublished.data() + offset, 0, bytes);
}
const u8* load_shared_async(const Warp& w, const Instruction& in, u64 address, size_t bytes) {
  Block& cta = *w.cta;
  if (address + bytes > cta.shared_bytes)
    fail(w, in,
         "shared memory out of bounds: " + std::to_string(bytes) + " bytes at " + std::to_string(address) + " of " +
             std::to_string(cta.shared_bytes));
  check_written(w, in, {cta.shared + address, &cta}, bytes);
  return (cta.async_view.empty() ? cta.shared : cta.async_view.data()) + address;
}
namespace {
void publish(Block& cta, vector<std::pair<u32, u32>>& written) {
  for (const auto& [offset, bytes] : written)
    for (u32 i = offset; i < offset + bytes; ++i)
      if (cta.unpublished[i]) cta.async_view[i] = cta.shared[i], cta.unpublished[i] = 0;
  written.clear();
}
}  // namespace
void publish_shared(Warp& w) {
  if (w.cta->async_view.empty()) return;
  publish(*w.cta, w.unpublished);
  publish(*w.cta, w.cta->unpublished_ranges);
}
void hand_over_unpublished(Warp& w) {
  if (w.unpublished.empty()) return;
  auto& all = w.cta->unpublished_ranges;
  all.insert(all.end(), w.unpublished.begin(), w.unpublished.end());
  w.unpublished.clear();
}

namespace {
template <class T>
u64 word(const u8* at) {
  T v;
  memcpy(&v, at, sizeof v);
  return v;
}
// An element of 1, 2, 4 or 8 bytes, in the lowest bits.
u64 element(const u8* at, size_t bytes) {
  return bytes == 4 ? word<u32>(at) : bytes == 8 ? word<u64>(at) : bytes == 2 ? word<u16>(at) : *at;
}
}  // namespace

// t: of an element, a: space, b: how many elements
void run_ld(Warp& w, const Instruction& in, u32 mask) {
  const size_t each = size_t(size_of(in.t)), bytes = each * size_t(in.b);
  Launch& l = *w.cta->launch;
  for (const int lane : lanes(mask)) {
    const Place p = place_of(w, in, in.ops[1], in.a, lane, bytes, false);
    u8 seen[32];
    const u8* data = p.at;
    if (p.shared)
      check_written(w, in, p, bytes);
    else if (l.global.late && (in.a == kGlobal || in.a == kGeneric)) {
      l.global.load(*w.cta, p.at, seen, bytes, in.order, l.rng());
      data = seen;
    }
    for (int i = 0; i < in.b; ++i)
      put_raw(w, part(in.ops[0], i), lane, extend(element(data + size_t(i) * each, each), in.t));
  }
  if (in.order & kAcquire) l.global.acquire(*w.cta);
  w.polled |= in.polls;
}
void run_st(Warp& w, const Instruction& in, u32 mask) {
  const size_t each = size_t(size_of(in.t)), bytes = each * size_t(in.b);
  Launch& l = *w.cta->launch;
  if (in.order & kRelease) l.global.release(*w.cta);
  for (const int lane : lanes(mask)) {
    const Place p = place_of(w, in, in.ops[0], in.a, lane, bytes, true);
    u8 data[32 + 8];
    for (int i = 0; i < in.b; ++i) {
      const u64 v = raw(w, part(in.ops[1], i), lane);
      memcpy(data + size_t(i) * each, &v, 8);  // the next element, or nothing, is in the upper bytes
    }
    if (p.shared)
      store_shared(w, p, data, bytes);
    else if (in.a == kGlobal || in.a == kGeneric)
      l.global.store(*w.cta, p.at, data, bytes, in.order);
    else
      copy(p.at, data, bytes);
  }
}

namespace {
template <class T>
u64 apply_float(const Warp& w, const Instruction& in, u64 old, u64 x, u64 y) {
  const T a = from_bits<T>(old), b = from_bits<T>(x);
  switch (in.b) {
    case kAtomAdd:
      return to_bits<T>(a + b);
    case kAtomExchange:
      return x;
    case kAtomCompare:
      return old == x ? y : old;
    case kAtomMin:
      return b < a ? x : old;
    case kAtomMax:
      return b > a ? x : old;
    default:
      unknown(w, in);
  }
}
u64 apply_halves(const Warp& w, const Instruction& in, u64 old, u64 x) {
  if (in.b != kAtomAdd) unknown(w, in);
  const bool bf16 = in.t == BF16 || in.t == BF16X2;
  u64 r = 0;
  for (int h = 0; h < size_of(in.t) / 2; ++h)
    r |= u64(narrow(widen(u16(old >> (16 * h)), bf16) + widen(u16(x >> (16 * h)), bf16), bf16)) << (16 * h);
  return r;
}
}  // namespace

u64 combine(const Warp& w, const Instruction& in, u64 old, u64 x, u64 y) {
  const Type t = in.t;
  if (t == F32) return apply_float<float>(w, in, old, x, y);
  if (t == F64) return apply_float<double>(w, in, old, x, y);
  if (is_half(t)) return apply_halves(w, in, old, x);
  switch (in.b) {
    case kAtomAdd:
      return old + x;
    case kAtomExchange:
      return x;
    case kAtomCompare:
      return old == x ? y : old;
    case kAtomIncrement:
      return u32(old) >= u32(x) ? 0 : old + 1;
    case kAtomDecrement:
      return u32(old) == 0 || u32(old) > u32(x) ? x : old - 1;
    case kAtomAnd:
      return old & x;
    case kAtomOr:
      return old | x;
    case kAtomXor:
      return old ^ x;
    case kAtomMin:
    case kAtomMax: {
      const bool less = is_signed(t) ? s64(extend(old, t)) < s64(extend(x, t)) : old < x;
      return (in.b == kAtomMin) == less ? old : x;
    }
    default:
      unknown(w, in);
  }
}
// a: space, b: operation, c: red, which has no result
void run_atom(Warp& w, const Instruction& in, u32 mask) {
  const size_t bytes = size_t(size_of(in.t)), first = in.c ? 0 : 1;
  Launch& l = *w.cta->launch;
  if (in.order & kRelease) l.global.release(*w.cta);
  for (const int lane : lanes(mask)) {
    const Place p = place_of(w, in, in.ops[first], in.a, lane, bytes, true);
    if (p.shared)
      check_written(w, in, p, bytes);
    else
      l.global.drain_line_of(*w.cta, reinterpret_cast<u64>(p.at));
    const u64 bits = low_bits(int(8 * bytes));
    const u64 x = raw(w, in.ops[first + 1], lane) & bits;
    const u64 y = in.ops.size() > first + 2 ? raw(w, in.ops[first + 2], lane) & bits : 0;
    u64 old = 0;
    memcpy(&old, p.at, bytes);
    const u64 next = combine(w, in, old, x, y) & bits;
    if (next == old)
      w.polled = true;
    else
      ++l.progress;
    if (p.shared)
      store_shared(w, p, &next, bytes);
    else
      l.global.write_through(w.cta, p.at, reinterpret_cast<const u8*>(&next), bytes);
    if (!in.c) put_raw(w, in.ops[0], lane, old);
  }
  if (in.order & kAcquire) l.global.acquire(*w.cta);
}

// order: what the fence does for global memory; a: it is one of the async proxy
void run_fence(Warp& w, const Instruction& in, u32) {
  Launch& l = *w.cta->launch;
  if (in.order & kRelease) l.global.release(*w.cta);
  if (in.order & kAcquire) l.global.acquire(*w.cta);
  if (in.a) publish_shared(w);
  w.polled |= l.one_in(2);  // much may happen between a fence and what it orders
}

// a: 0 to generic, 1 from generic; b: space
void run_cvta(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    u64 v = raw(w, in.ops[1], lane);
    if (in.b == kShared || in.b == kSharedCluster) {
      if (in.a == 0)
        v = reinterpret_cast<u64>(shared_at(w, in, u32(v), 0).at);
      else {
        const Block* cta = block_of(w, reinterpret_cast<u8*>(v));
        if (!cta && v != reinterpret_cast<u64>(w.cta->shared + w.cta->shared_bytes))
          fail(w, in, "a generic address that is not in shared memory");
        if (!cta) cta = w.cta;
        const u64 offset = v - reinterpret_cast<u64>(cta->shared);
        v = cta == w.cta ? offset : offset | u64(cta->rank + 1) << kRankShift;
      }
    }
    put_raw(w, in.ops[0], lane, v);
  }
}
void run_isspacep(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    const Block* cta = block_of(w, reinterpret_cast<u8*>(raw(w, in.ops[1], lane)));
    const bool is = in.b == kShared          ? cta == w.cta
                    : in.b == kSharedCluster ? cta != nullptr
                    : in.b == kGlobal        ? cta == nullptr
                                             : false;
    put_raw(w, in.ops[0], lane, is);
  }
}
void run_mapa(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    const u64 v = raw(w, in.ops[1], lane);
    const u32 rank = u32(raw(w, in.ops[2], lane));
    if (rank >= w.cta->cluster->ctas.size()) fail(w, in, "mapa to a block that the cluster does not have");
    if (in.a == kGeneric) {
      const Block* cta = block_of(w, reinterpret_cast<u8*>(v));
      if (!cta) fail(w, in, "mapa of an address that is not in shared memory");
      const u64 offset = v - reinterpret_cast<u64>(cta->shared);
      put_raw(w, in.ops[0], lane, reinterpret_cast<u64>(w.cta->cluster->ctas[rank]->shared) + offset);
    } else
      put_raw(w, in.ops[0], lane, (u32(v) & ((1u << kRankShift) - 1)) | (u64(rank) + 1) << kRankShift);
  }
}
}  // namespace ptxsim
