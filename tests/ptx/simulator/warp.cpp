// Instructions across the lanes of a warp.
#include "instructions.h"

namespace ptxsim {
void run_nop(Warp&, const Instruction&, u32) {}
void run_yield(Warp& w, const Instruction&, u32) { w.polled = true; }
// a: 0 up 1 down 2 bfly 3 idx; ops: d, (p), a, b, c, mask
void run_shfl(Warp& w, const Instruction& in, u32 mask) {
  const bool two = in.c;
  const Operand &src = in.ops[two ? 2 : 1], &ob = in.ops[two ? 3 : 2], &oc = in.ops[two ? 4 : 3],
                &om = in.ops[two ? 5 : 4];
  u32 shown[32];
  for (const int lane : lanes(mask)) shown[lane] = raw(w, src, lane);
  u32 out[32];
  bool ok[32];
  for (const int lane : lanes(mask)) {
    const u32 members = raw(w, om, lane);
    if (!(members >> lane & 1)) fail(w, in, "a lane that is not in its own mask");
    const u32 b = raw(w, ob, lane) & 31, c = raw(w, oc, lane), clamp = c & 31, seg = c >> 8 & 31;
    const int max_lane = (lane & seg) | (clamp & ~seg & 31), min_lane = lane & seg;
    int j;
    bool p;
    if (in.a == 0)
      j = lane - int(b), p = j >= max_lane;
    else if (in.a == 1)
      j = lane + int(b), p = j <= max_lane;
    else if (in.a == 2)
      j = lane ^ int(b), p = j <= max_lane;
    else
      j = min_lane | (int(b) & ~seg & 31), p = j <= max_lane;
    if (!p) j = lane;
    if (!(mask >> j & 1)) fail(w, in, "a shuffle from a lane that does not take part");
    out[lane] = shown[j], ok[lane] = p;
  }
  for (const int lane : lanes(mask)) {
    put<u32>(w, in.ops[0], lane, out[lane]);
    if (two) put_raw(w, in.ops[1], lane, ok[lane]);
  }
}
// a: 0 all 1 any 2 uni 3 ballot
void run_vote(Warp& w, const Instruction& in, u32 mask) {
  u32 votes = 0;
  for (const int lane : lanes(mask))
    if (truth(w, in.ops[1], lane)) votes |= 1u << lane;
  for (const int lane : lanes(mask))
    put_raw(w, in.ops[0], lane,
            in.a == 0   ? votes == mask
            : in.a == 1 ? votes != 0
            : in.a == 2 ? votes == mask || votes == 0
                        : votes);
}
void run_activemask(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) put<u32>(w, in.ops[0], lane, mask);
}
void run_redux(Warp& w, const Instruction& in, u32 mask) {
  u64 r = 0;
  bool first = true;
  for (const int lane : lanes(mask)) {
    const u64 v = u32(raw(w, in.ops[1], lane));
    r = first ? v : u32(atom_apply(in.t, in.a, r, v, 0));
    first = false;
  }
  for (const int lane : lanes(mask)) put<u32>(w, in.ops[0], lane, r);
}
void run_elect(Warp& w, const Instruction& in, u32 mask) {
  const int leader = __builtin_ctz(mask);
  for (const int lane : lanes(mask)) {
    put<u32>(w, in.ops[0], lane, leader);
    put_raw(w, in.ops[1], lane, lane == leader);
  }
}
void run_match(Warp& w, const Instruction& in, u32 mask) {
  for (const int lane : lanes(mask)) {
    u32 r = 0;
    const u64 v = raw(w, in.ops[1], lane);
    for (u32 m = mask; m; m &= m - 1)
      if (raw(w, in.ops[1], __builtin_ctz(m)) == v) r |= 1u << __builtin_ctz(m);
    put<u32>(w, in.ops[0], lane, r);
  }
}
}  // namespace ptxsim
