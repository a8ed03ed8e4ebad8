// Loads, stores, atomics, and conversions of addresses.
#include "memory.h"

namespace ptxsim {
u8* shared_at(Warp& w, const Instruction& in, u64 address, size_t bytes, Block** block_at) {
  Block* cta = w.cta;
  u64 offset = address;
  if (address >= (1u << 24)) {
    const u32 rank = (address >> 24) - 1;
    offset = address & 0xffffff;
    if (rank >= cta->cluster->ctas.size())
      fail(w, in, "an address in the shared memory of a block that the cluster does not have");
    cta = cta->cluster->ctas[rank].get();
  }
  if (offset + bytes > cta->shared_bytes)
    fail(w, in,
         "shared memory out of bounds: byte " + std::to_string(offset) + " of " + std::to_string(cta->shared_bytes));
  if (cta->done == int(cta->warps.size()) && cta != w.cta) fail(w, in, "shared memory of a block that has left");
  if (block_at) *block_at = cta;
  return cta->shared + offset;
}
Block* block_of(Warp& w, const u8* at) {
  for (auto& c : w.cta->cluster->ctas)
    if (at >= c->shared && at < c->shared + c->shared_bytes) return c.get();
  return nullptr;
}
u8* address_of(Warp& w, const Instruction& in, const Operand& o, int space, int lane, size_t bytes, Block** block_at) {
  u64 base = o.reg >= 0 ? w.R[o.reg * 32 + lane] : o.sym >= 0 ? symbol_value(w, o.sym, lane) : 0;
  const bool narrow = space == kSh || space == kShCl;
  u64 at = base + o.offset;
  if (narrow) at = u32(at);
  if (at % bytes != 0)
    fail(w, in, "misaligned address, lane " + std::to_string(lane) + ", " + std::to_string(at % 64) + " mod 64");
  if (narrow) return shared_at(w, in, at, bytes, block_at);
  u8* p = reinterpret_cast<u8*>(at);
  if (space == kGen) *block_at = block_of(w, p);
  if (at < 65536) fail(w, in, "null pointer, lane " + std::to_string(lane));
  return p;
}

void mark(Block* block_at, const u8* p, size_t bytes) {
  if (block_at) memset(block_at->written.data() + (p - block_at->shared), 1, bytes);
}
void check_written(Warp& w, const Instruction& in, Block* block_at, const u8* p, size_t bytes) {
  if (!block_at) return;
  const u8* f = block_at->written.data() + (p - block_at->shared);
  for (size_t i = 0; i < bytes; ++i)
    if (!f[i])
      fail(w, in, "shared memory read before it was written, byte " + std::to_string(p - block_at->shared + i));
}
// a: space, b: count, c: allow unwritten
void run_ld(Warp& w, const Instruction& in, u32 mask) {
  const int each = size_of(in.t), count = in.b;
  const size_t bytes = size_t(each) * count;
  for (const int lane : lanes(mask)) {
    Block* block_at = nullptr;
    if (in.a == kPa && in.ops[1].sym >= 0 && w.cta->launch->kernel->symbols[in.ops[1].sym].space == kCall) {
      put_raw(w, in.ops[0], lane, w.R[w.cta->launch->kernel->symbols[in.ops[1].sym].reg * 32 + lane]);
      continue;
    }
    const u8* p = address_of(w, in, in.ops[1], in.a, lane, bytes, &block_at);
    check_written(w, in, block_at, p, bytes);
    for (int i = 0; i < count; ++i) {
      const Operand& d = in.ops[0].kind == Operand::Vec ? in.ops[0].parts[i] : in.ops[0];
      u64 v = 0;
      memcpy(&v, p + i * each, each);
      put_raw(w, d, lane, extend(v, in.t));
    }
  }
}
void run_st(Warp& w, const Instruction& in, u32 mask) {
  const int each = size_of(in.t), count = in.b;
  const size_t bytes = size_t(each) * count;
  for (const int lane : lanes(mask)) {
    Block* block_at = nullptr;
    if (in.a == kPa && in.ops[0].sym >= 0 && w.cta->launch->kernel->symbols[in.ops[0].sym].space == kCall) {
      w.R[w.cta->launch->kernel->symbols[in.ops[0].sym].reg * 32 + lane] = raw(w, in.ops[1], lane);
      continue;
    }
    u8* p = address_of(w, in, in.ops[0], in.a, lane, bytes, &block_at);
    mark(block_at, p, bytes);
    for (int i = 0; i < count; ++i) {
      const u64 v = raw(w, in.ops[1].kind == Operand::Vec ? in.ops[1].parts[i] : in.ops[1], lane);
      memcpy(p + i * each, &v, each);
    }
  }
}
u64 atom_apply(Type t, int op, u64 old, u64 x, u64 y) {
  if (t == F32) {
    float a, b;
    u32 o = old, v = x;
    memcpy(&a, &o, 4);
    memcpy(&b, &v, 4);
    if (op == kAdd)
      a += b;
    else if (op == kExch)
      a = b;
    else
      fail("atom f32");
    memcpy(&o, &a, 4);
    return o;
  }
  if (t == F64) {
    double a, b;
    memcpy(&a, &old, 8);
    memcpy(&b, &x, 8);
    a += b;
    memcpy(&old, &a, 8);
    return old;
  }
  switch (op) {
    case kAdd:
      return old + x;
    case kExch:
      return x;
    case kCas:
      return old == x ? y : old;
    case kInc:
      return u32(old) >= u32(x) ? 0 : old + 1;
    case kDec:
      return (u32(old) == 0 || u32(old) > u32(x)) ? x : old - 1;
    case kAnd:
      return old & x;
    case kOr:
      return old | x;
    case kXor:
      return old ^ x;
    case kMin:
    case kMax: {
      const bool less = is_signed(t) ? s64(extend(old, t)) < s64(extend(x, t)) : old < x;
      return (op == kMin) == less ? old : x;
    }
  }
  fail("atom");
}
// b: op, c: red (no destination)
void run_atom(Warp& w, const Instruction& in, u32 mask) {
  const int bytes = size_of(in.t), first = in.c ? 0 : 1;
  for (const int lane : lanes(mask)) {
    Block* block_at = nullptr;
    u8* p = address_of(w, in, in.ops[first], in.a, lane, bytes, &block_at);
    check_written(w, in, block_at, p, bytes);
    u64 old = 0, x = raw(w, in.ops[first + 1], lane),
        y = in.ops.size() > size_t(first + 2) ? raw(w, in.ops[first + 2], lane) : 0;
    memcpy(&old, p, bytes);
    if (bytes == 4) x = u32(x), y = u32(y);
    const u64 next = atom_apply(in.t, in.b, old, x, y);
    memcpy(p, &next, bytes);
    if (!in.c) put_raw(w, in.ops[0], lane, old);
  }
  ++w.cta->launch->progress;
}
// a: 0 to generic, 1 from generic; b: space
void run_cvta(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    u64 v = raw(w, in.ops[1], lane);
    if (in.b == kSh || in.b == kShCl) {
      if (in.a == 0) {
        Block* o;
        v = reinterpret_cast<u64>(shared_at(w, in, u32(v), 0, &o));
      } else {
        Block* o = block_of(w, reinterpret_cast<u8*>(v));
        if (!o && v != reinterpret_cast<u64>(w.cta->shared + w.cta->shared_bytes))
          fail(w, in, "a generic address that is not in shared memory");
        if (!o) o = w.cta;
        const u64 off = v - reinterpret_cast<u64>(o->shared);
        v = o == w.cta ? off : off | u64(o->rank + 1) << 24;
      }
    }
    put_raw(w, in.ops[0], lane, v);
  }
}
void run_isspacep(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask))
    put_raw(w, in.ops[0], lane,
            (block_of(w, reinterpret_cast<u8*>(raw(w, in.ops[1], lane))) != nullptr) == (in.b == kSh));
}
void run_mapa(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    const u64 v = raw(w, in.ops[1], lane);
    const u32 rank = raw(w, in.ops[2], lane);
    if (rank >= w.cta->cluster->ctas.size()) fail(w, in, "mapa to a block that the cluster does not have");
    if (in.a == kGen) {
      Block* o = block_of(w, reinterpret_cast<u8*>(v));
      if (!o) fail(w, in, "mapa of an address that is not in shared memory");
      put<u64>(w, in.ops[0], lane,
               reinterpret_cast<u64>(w.cta->cluster->ctas[rank]->shared) + (v - reinterpret_cast<u64>(o->shared)));
    } else
      put<u64>(w, in.ops[0], lane, (u32(v) & 0xffffff) | (u64(rank) + 1) << 24);
  }
}
}  // namespace ptxsim
