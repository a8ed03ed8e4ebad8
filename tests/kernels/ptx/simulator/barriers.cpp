#include "barriers.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

namespace ptxsim {
namespace {
void complete_named(Block& cta, int id, Warp* last) {
  NamedBarrier& b = cta.barriers[id];
  ++b.generation;
  for (const auto& w : cta.warps) {
    if (w.get() != last && !(w->state == Warp::AtBarrier && w->bar == id && w->generation == b.generation)) continue;
    if (w->vote_register >= 0) {
      const int all = b.expected;
      const u64 result = w->vote_kind == 0 ? u64(b.votes) : w->vote_kind == 1 ? u64(b.votes == all) : u64(b.votes > 0);
      std::fill_n(w->R + size_t(w->vote_register) * 32, 32, result);
      w->vote_register = -1;
    }
    wake(*w);
  }
  b.arrived = b.expected = b.votes = 0;
  ++cta.launch->progress;
}
}  // namespace

// a: 0 sync, 1 arrive, 2 red; (d,) barrier (, threads) (, predicate)
void run_bar(Warp& w, const Instruction& in, u32 mask) {
  const size_t first = in.a == 2 ? 1 : 0, operands = in.ops.size() - first - (in.a == 2 ? 1 : 0);
  const int lane = __builtin_ctz(mask), id = int(raw(w, in.ops[first], lane));
  const int all = int(round(std::ceil(double(w.cta->launch->block.count()) / 32))) * 32;
  const int expected = operands > 1 ? int(raw(w, in.ops[first + 1], lane)) : all;
  if (id < 0 || id > 15) fail(w, in, "no such barrier: " + std::to_string(id));
  if (expected % 32) fail(w, in, "a barrier of " + std::to_string(expected) + " threads, which are not whole warps");
  NamedBarrier& b = w.cta->barriers[id];
  if (b.arrived && b.expected != expected) fail(w, in, "a barrier with different counts");
  b.expected = expected, b.arrived += 32;
  if (b.arrived > expected) fail(w, in, "too many threads at a barrier");
  hand_over_unpublished(w);
  if (in.a == 2) {
    w.vote_register = in.ops[0].reg, w.vote_kind = in.b;
    for (const int l : lanes(mask)) b.votes += truth(w, in.ops.back(), l);
  }
  if (b.arrived == expected) return complete_named(*w.cta, id, in.a == 1 ? nullptr : &w);
  if (in.a != 1) {
    w.bar = id, w.generation = b.generation + 1;
    sleep(w, Warp::AtBarrier);
  }
}

void check_cluster(Cluster& c, Launch& l) {
  if (c.arrived == 0 || c.arrived + c.done_warps < c.warps) return;
  c.arrived = 0, ++c.generation, ++l.progress;
  for (const auto& cta : c.ctas)
    for (const auto& w : cta->warps)
      if (w->state == Warp::AtCluster && w->cluster_generation < c.generation) {
        wake(*w);
        l.global.acquire(*w->cta);
      }
}
void run_cluster_arrive(Warp& w, const Instruction& in, u32) {
  Cluster& c = *w.cta->cluster;
  if (w.cluster_arrived) fail(w, in, "a second arrival at the cluster's barrier without a wait");
  if (in.order & kRelease) w.cta->launch->global.release(*w.cta);
  hand_over_unpublished(w);
  w.cluster_arrived = true;
  w.cluster_generation = c.generation;
  ++c.arrived;
  check_cluster(c, *w.cta->launch);
}
void run_cluster_wait(Warp& w, const Instruction& in, u32) {
  if (!w.cluster_arrived) fail(w, in, "a wait at the cluster's barrier without an arrival");
  w.cluster_arrived = false;
  if (w.cluster_generation == w.cta->cluster->generation)
    sleep(w, Warp::AtCluster);
  else
    w.cta->launch->global.acquire(*w.cta);
}

// ---- registers

// a: more of them; how many a lane may use. Who asks for more waits until others have given enough back.
void run_setmaxnreg(Warp& w, const Instruction& in, u32) {
  Block& cta = *w.cta;
  const int wanted = int(raw(w, in.ops[0], 0));
  if (wanted < 24 || wanted > 256 || wanted % 8) fail(w, in, "setmaxnreg to " + std::to_string(wanted));
  if (!w.most_registers) fail(w, in, "setmaxnreg in a kernel without bounds of its threads or registers");
  if (in.a ? wanted < w.most_registers : wanted > w.most_registers)
    fail(w, in, "setmaxnreg the wrong way, from " + std::to_string(w.most_registers) + " registers");
  w.wanted_registers = wanted;
  sleep(w, Warp::AtRegisters);
  for (const auto& each : cta.warps) {
    const int more = each->wanted_registers - each->most_registers;
    if (each->state != Warp::AtRegisters || more > cta.spare_registers) continue;
    cta.spare_registers -= more, each->most_registers = each->wanted_registers;
    wake(*each);
    ++cta.launch->progress;
  }
}

// ---- barriers in shared memory

namespace {
struct MBarrier {
  u64 phase : 1, valid : 2, expected : 20, pending : 20;
  s64 bytes : 21;  // that the phase still waits for
};
static_assert(sizeof(MBarrier) == 8);
constexpr u64 kValid = 2;

MBarrier read_mbarrier(const u8* p) {
  MBarrier b;
  memcpy(&b, p, 8);
  return b;
}
void trace(const Warp& w, const char* what, const u8* p, s64 n) {
  static const bool on = getenv("PTXSIM_TRACE") != nullptr;
  const Block* of = on ? block_of(w, p) : nullptr;
  if (!of) return;
  const MBarrier b = read_mbarrier(p);
  fprintf(stderr, "%s %ld: block %u warp %d -> block %u +%ld: phase %u pending %u of %u, %ld bytes\n", what, long(n),
          w.cta->id[0], w.id, of->id[0], long(p - of->shared), unsigned(b.phase), unsigned(b.pending),
          unsigned(b.expected), long(b.bytes));
}
// Writes a barrier back; flips the phase and wakes who waits when nothing is pending.
void settle(Launch& l, u8* p, MBarrier b) {
  const bool flips = b.pending == 0 && b.bytes == 0;
  if (flips) b.phase ^= 1, b.pending = b.expected;
  memcpy(p, &b, 8);
  ++l.progress;
  if (!flips) return;
  for (size_t i = 0; i < l.at_mbarriers.size();)
    if (l.at_mbarriers[i]->mbarrier == p) {
      wake(*l.at_mbarriers[i]);
      l.at_mbarriers[i] = l.at_mbarriers.back();
      l.at_mbarriers.pop_back();
    } else
      ++i;
}
u8* mbarrier_at(Warp& w, const Instruction& in, u64 address, int space, int lane) {
  const Place p = place_at(w, in, address, space, lane, 8, true);
  if (!p.shared) fail(w, in, "an mbarrier that is not in shared memory");
  check_written(w, in, p, 8);
  if (read_mbarrier(p.at).valid != kValid) fail(w, in, "not an mbarrier: nobody initialised it");
  return p.at;
}
void expect_bytes(const Warp& w, const Instruction& in, MBarrier& b, s64 bytes) {
  if (b.bytes + bytes >= 1 << 20 || b.bytes + bytes <= -(1 << 20))
    fail(w, in, "an mbarrier's count of bytes overflows");
  b.bytes = b.bytes + bytes;
}
}  // namespace

void run_mbarrier_init(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    const Place p = place_of(w, in, in.ops[0], in.a, lane, 8, true);
    if (!p.shared) fail(w, in, "an mbarrier that is not in shared memory");
    const u64 count = raw(w, in.ops[1], lane) & 0xffffffff;
    if (count == 0 || count >= 1 << 20) fail(w, in, "an mbarrier of " + std::to_string(count) + " arrivals");
    MBarrier b{};
    b.valid = kValid, b.expected = b.pending = count;
    store_shared(w, p, &b, 8);
    trace(w, "init", p.at, s64(count));
  }
}
void run_mbarrier_inval(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask))
    memset(mbarrier_at(w, in, raw(w, in.ops[0], lane) + u64(in.ops[0].offset), in.a, lane), 0, 8);
}
void arrive_at(Warp& w, const Instruction& in, u64 address, int space, int lane, s64 count, s64 bytes) {
  u8* p = mbarrier_at(w, in, address, space, lane);
  MBarrier b = read_mbarrier(p);
  expect_bytes(w, in, b, bytes);
  if (s64(b.pending) < count) fail(w, in, "too many arrivals at an mbarrier");
  b.pending = u64(s64(b.pending) - count);
  settle(*w.cta->launch, p, b);
  trace(w, count ? "arrive" : "expect", p, bytes);
}
// b: expects bytes, c: no arrival; (d,) [barrier] (, count or bytes)
void run_mbarrier_arrive(Warp& w, const Instruction& in, u32 mask) {
  const size_t first = in.ops[0].kind == Operand::Memory ? 0 : 1;
  if (in.order & kRelease) w.cta->launch->global.release(*w.cta);
  hand_over_unpublished(w);
  for (const int lane : lanes(mask)) {
    const u64 address = raw(w, in.ops[first], lane) + u64(in.ops[first].offset);
    const bool more = in.ops.size() > first + 1;
    const s64 value = more ? s64(raw(w, in.ops[first + 1], lane) & 0xffffffff) : 1;
    // The token is the phase that this arrival belongs to.
    const u64 token = read_mbarrier(mbarrier_at(w, in, address, in.a, lane)).phase;
    arrive_at(w, in, address, in.a, lane, in.c ? 0 : in.b ? 1 : value, in.b ? value : 0);
    if (first) put_raw(w, in.ops[0], lane, token);
  }
}
// b: by parity, c: may wait; p, [barrier], parity or token
void run_mbarrier_test(Warp& w, const Instruction& in, u32 mask) {
  const u8* waits_for = nullptr;
  bool some = false;
  for (const int lane : lanes(mask)) {
    const u8* p = mbarrier_at(w, in, raw(w, in.ops[1], lane) + u64(in.ops[1].offset), in.a, lane);
    const bool done = read_mbarrier(p).phase != (raw(w, in.ops[2], lane) & 1);
    put_raw(w, in.ops[0], lane, done);
    some |= done;
    if (!done) w.polled = true, waits_for = p;
  }
  if (some && (in.order & kAcquire)) w.cta->launch->global.acquire(*w.cta);
  // A try_wait suspends until the phase completes, or for a while.
  if (in.c && !some && w.together && mask == w.alive && !w.cta->launch->one_in(8)) {
    w.mbarrier = waits_for;
    sleep(w, Warp::AtMBarrier);
    w.cta->launch->at_mbarriers.push_back(&w);
  }
}
void complete_bytes(Block& cta, u64 offset, s64 bytes, const Warp& issuer, const Instruction& in) {
  u8* p = cta.shared + offset;
  MBarrier b = read_mbarrier(p);
  if (offset + 8 > cta.shared_bytes || offset % 8 || b.valid != kValid)
    fail(issuer, in, "a copy to a barrier that is not an mbarrier");
  expect_bytes(issuer, in, b, -bytes);
  settle(*cta.launch, p, b);
  trace(issuer, "landed", p, bytes);
}
}  // namespace ptxsim
