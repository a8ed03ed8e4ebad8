// Instructions across the lanes of a warp.
#include "memory.h"

namespace ptxsim {
// a: 0 up, 1 down, 2 bfly, 3 idx; d(|p), a, b, c, mask
void run_shfl(Warp& w, const Instruction& in, u32 mask) {
  const size_t first = in.two_results ? 2 : 1;
  const Operand &source = in.ops[first], &ob = in.ops[first + 1], &oc = in.ops[first + 2];
  u64 shown[32], out[32];
  bool valid[32];
  memcpy(shown, lanes_of(w, source), sizeof shown);
  for (const int lane : lanes(mask)) {
    const int b = int(raw(w, ob, lane) & 31), c = int(raw(w, oc, lane)), clamp = c & 31, segment = c >> 8 & 31;
    const int most = (lane & segment) | (clamp & ~segment & 31), least = lane & segment;
    int from = 0;
    switch (in.a) {
      case 0:
        from = lane - b;
        break;
      case 1:
        from = lane + b;
        break;
      case 2:
        from = lane ^ b;
        break;
      default:
        from = least | (b & ~segment & 31);
    }
    const bool p = in.a == 0 ? from >= most : from <= most;
    if (!p) from = lane;
    if (!(mask >> from & 1)) fail(w, in, "a shuffle from lane " + std::to_string(from) + ", which does not take part");
    out[lane] = shown[from] & 0xffffffff, valid[lane] = p;
  }
  for (const int lane : lanes(mask)) {
    put_raw(w, in.ops[0], lane, out[lane]);
    if (in.two_results) put_raw(w, in.ops[1], lane, valid[lane]);
  }
}
// That all lanes of the mask are here is what it is for.
void run_syncwarp(Warp&, const Instruction&, u32) {}
// a: 0 all, 1 any, 2 uni, 3 ballot
void run_vote(Warp& w, const Instruction& in, u32 mask) {
  u32 votes = 0;
  for (const int lane : lanes(mask))
    if (truth(w, in.ops[1], lane)) votes |= 1u << lane;
  const u64 result = in.a == 0   ? votes == mask
                     : in.a == 1 ? votes != 0
                     : in.a == 2 ? votes == mask || votes == 0
                                 : votes;
  for (const int lane : lanes(mask)) put_raw(w, in.ops[0], lane, result);
}
void run_activemask(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) put<u32>(w, in.ops[0], lane, mask);
}
// b: AtomOperation
void run_redux(Warp& w, const Instruction& in, u32 mask) {
  u64 r = raw(w, in.ops[1], __builtin_ctz(mask)) & 0xffffffff;
  for (const int lane : lanes(mask & (mask - 1)))
    r = combine(w, in, r, raw(w, in.ops[1], lane) & 0xffffffff, 0) & 0xffffffff;
  for (const int lane : lanes(mask)) put_raw(w, in.ops[0], lane, r);
}
void run_elect(Warp& w, const Instruction& in, u32 mask) {
  const int leader = __builtin_ctz(mask);
  for (const int lane : lanes(mask)) {
    put<u32>(w, in.ops[0], lane, u32(leader));
    put_raw(w, in.ops[1], lane, lane == leader);
  }
}
// a: all lanes must agree
void run_match(Warp& w, const Instruction& in, u32 mask) {
  const size_t source = in.two_results ? 2 : 1;
  u32 equal[32];
  for (const int lane : lanes(mask)) {
    equal[lane] = 0;
    for (const int other : lanes(mask))
      if (((raw(w, in.ops[source], other) ^ raw(w, in.ops[source], lane)) & low_bits(8 * size_of(in.t))) == 0)
        equal[lane] |= 1u << other;
  }
  for (const int lane : lanes(mask)) {
    const bool all = equal[lane] == mask;
    put<u32>(w, in.ops[0], lane, !in.a || all ? equal[lane] : 0);
    if (in.two_results) put_raw(w, in.ops[1], lane, all);
  }
}
}  // namespace ptxsim
