#include "barriers.h"

#include "memory.h"

namespace ptxsim {
namespace {
void complete_named(Block& cta, int id) {
  auto& b = cta.bars[id];
  b.arrived = b.expected = 0, ++b.generation;
  for (auto& other : cta.warps)
    if (other->state == Warp::Bar && other->bar == id && other->generation == b.generation) other->state = Warp::Run;
  ++cta.launch->progress;
}
}  // namespace
// a: 0 sync, 1 arrive
void run_bar(Warp& w, const Instruction& in, u32 mask) {
  const int id = raw(w, in.ops[0], __builtin_ctz(mask));
  const int all = int(w.cta->launch->block.x * w.cta->launch->block.y * w.cta->launch->block.z);
  const int expected = in.ops.size() > 1 ? int(raw(w, in.ops[1], __builtin_ctz(mask))) : all;
  if (id > 15) fail(w, in, "no such barrier");
  auto& b = w.cta->bars[id];
  if (b.arrived && b.expected != expected) fail(w, in, "a barrier with different counts");
  b.expected = expected;
  b.arrived += 32;
  if (b.arrived > expected) fail(w, in, "too many threads at a barrier");
  if (in.a == 0) w.state = Warp::Bar, w.bar = id, w.generation = b.generation + 1;
  if (b.arrived == expected) {
    complete_named(*w.cta, id);
    w.state = Warp::Run;
  }
}
void check_cluster(Cluster& c, Launch& l) {
  if (c.arrived + c.done_warps < c.warps || c.arrived == 0) return;
  c.arrived = 0, ++c.generation, ++l.progress;
  for (auto& cta : c.ctas)
    for (auto& o : cta->warps)
      if (o->state == Warp::ClusterWait && o->cluster_generation < c.generation) o->state = Warp::Run;
}
void run_cluster_arrive(Warp& w, const Instruction&, u32) {
  Cluster& c = *w.cta->cluster;
  w.cluster_generation = c.generation;
  ++c.arrived;
  check_cluster(c, *w.cta->launch);
}
void run_cluster_wait(Warp& w, const Instruction&, u32) {
  if (w.cluster_generation == w.cta->cluster->generation) w.state = Warp::ClusterWait;
}
// tx counts live beside the memory, which has no room for them
std::unordered_map<const u8*, s64>& tx_counts() {
  static std::unordered_map<const u8*, s64> m;
  return m;
}
bool tracing() {
  static const bool on = getenv("PTXSIM_TRACE");
  return on;
}
void trace(const Warp& w, const Block* of, const char* what, const u8* p, s64 n) {
  if (!tracing()) return;
  MBarrier b;
  memcpy(&b, p, 8);
  fprintf(stderr, "%s block %u warp %d -> block %u +%ld: n %ld, phase %u pending %d of %u tx %ld\n", what, w.cta->id[0],
          w.id, of->id[0], long(p - of->shared), long(n), b.phase, b.pending, b.expected, long(tx_counts()[p]));
}
void settle(Warp& w, u8* p) {
  MBarrier b;
  memcpy(&b, p, 8);
  if (b.pending == 0 && tx_counts()[p] == 0) {
    b.phase ^= 1;
    b.pending = b.expected;
    ++w.cta->launch->progress;
    memcpy(p, &b, 8);
  }
}
u8* mbar_at(Warp& w, const Instruction& in, const Operand& o, int lane, int space, bool init = false) {
  Block* block_at = nullptr;
  u8* p = address_of(w, in, o, space, lane, 8, &block_at);
  if (init)
    mark(block_at, p, 8);
  else
    check_written(w, in, block_at, p, 8);
  return p;
}
void run_mbar_init(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    u8* p = mbar_at(w, in, in.ops[0], lane, in.a, true);
    MBarrier b{};
    b.expected = b.pending = u32(raw(w, in.ops[1], lane));
    memcpy(p, &b, 8);
    tx_counts()[p] = 0;
    trace(w, w.cta, "init", p, b.expected);
  }
}
void run_mbar_inval(Warp&, const Instruction&, u32) {}
// b: 1 expect_tx given; c: 1 no arrival
void run_mbar_arrive(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    const int first = in.c ? 0 : 1;
    u8* p = mbar_at(w, in, in.ops[first], lane, in.a);
    if (in.b) tx_counts()[p] += s64(u32(raw(w, in.ops[first + 1], lane)));
    if (!in.c) {
      MBarrier b;
      memcpy(&b, p, 8);
      const int count = !in.b && in.ops.size() > size_t(first + 1) ? int(raw(w, in.ops[first + 1], lane)) : 1;
      if (b.pending < count) fail(w, in, "too many arrivals at an mbarrier");
      b.pending -= count;
      memcpy(p, &b, 8);
      if (in.ops[0].kind == Operand::Reg) put<u64>(w, in.ops[0], lane, b.phase);
    }
    trace(w, block_of(w, p), in.b ? "expect" : "arrive", p, 0);
    settle(w, p);
    ++w.cta->launch->progress;
  }
}
// a: space, b: parity form, c: try
void run_mbar_test(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    u8* p = mbar_at(w, in, in.ops[1], lane, in.a);
    MBarrier b;
    memcpy(&b, p, 8);
    const u32 parity = raw(w, in.ops[2], lane) & 1;
    const bool done = b.phase != parity;
    if (done) trace(w, w.cta, "passed", p, parity);
    put_raw(w, in.ops[0], lane, done);
    if (!done) w.polled = true;
  }
}
}  // namespace ptxsim
