#include "machine.h"

namespace ptxsim {
string where(const Warp& w, const Instruction& in) {
  return w.cta->launch->kernel->name.substr(0, 120) + ": block " + std::to_string(w.cta->id[0]) + " warp " +
         std::to_string(w.id) + ", line " + std::to_string(in.line) + ": " + in.text.substr(0, 160);
}
[[noreturn]] void fail(const Warp& w, const Instruction& in, const string& what) {
  fail(what + " [" + where(w, in) + "]");
}

namespace {
enum SpecialId {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaX,
  kCtaY,
  kCtaZ,
  kNctaX,
  kNctaY,
  kNctaZ,
  kLane,
  kWarpId,
  kNwarpId,
  kClusterCtaRank,
  kClusterNctaRank,
  kClusterIdX,
  kNclusterX,
  kClusterCtaX,
  kClusterCtaY,
  kClusterCtaZ,
  kClusterNctaX,
  kOne,
  kZero,
  kClock,
  kSmid,
  kLaneLt,
  kLaneLe,
  kLaneGt,
  kLaneGe,
  kLaneEq,
  kDynSmem,
  kTotalSmem
};
}  // namespace

const std::map<string, int> kSpecials = {{"%tid.x", kTidX},
                                         {"%tid.y", kTidY},
                                         {"%tid.z", kTidZ},
                                         {"%ntid.x", kNtidX},
                                         {"%ntid.y", kNtidY},
                                         {"%ntid.z", kNtidZ},
                                         {"%ctaid.x", kCtaX},
                                         {"%ctaid.y", kCtaY},
                                         {"%ctaid.z", kCtaZ},
                                         {"%nctaid.x", kNctaX},
                                         {"%nctaid.y", kNctaY},
                                         {"%nctaid.z", kNctaZ},
                                         {"%laneid", kLane},
                                         {"%warpid", kWarpId},
                                         {"%nwarpid", kNwarpId},
                                         {"%cluster_ctarank", kClusterCtaRank},
                                         {"%cluster_nctarank", kClusterNctaRank},
                                         {"%clusterid.x", kClusterIdX},
                                         {"%nclusterid.x", kNclusterX},
                                         {"%cluster_ctaid.x", kClusterCtaX},
                                         {"%cluster_ctaid.y", kClusterCtaY},
                                         {"%cluster_ctaid.z", kClusterCtaZ},
                                         {"%cluster_nctaid.x", kClusterNctaX},
                                         {"%cluster_nctaid.y", kOne},
                                         {"%cluster_nctaid.z", kOne},
                                         {"%clusterid.y", kZero},
                                         {"%clusterid.z", kZero},
                                         {"%nclusterid.y", kOne},
                                         {"%nclusterid.z", kOne},
                                         {"%clock", kClock},
                                         {"%clock64", kClock},
                                         {"%globaltimer", kClock},
                                         {"%smid", kSmid},
                                         {"%lanemask_lt", kLaneLt},
                                         {"%lanemask_le", kLaneLe},
                                         {"%lanemask_gt", kLaneGt},
                                         {"%lanemask_ge", kLaneGe},
                                         {"%lanemask_eq", kLaneEq},
                                         {"%dynamic_smem_size", kDynSmem},
                                         {"%total_smem_size", kTotalSmem}};

u64 special(const Warp& w, int id, int lane) {
  const Launch& l = *w.cta->launch;
  const u32 t = w.id * 32 + lane;
  switch (id) {
    case kTidX:
      return t % l.block.x;
    case kTidY:
      return t / l.block.x % l.block.y;
    case kTidZ:
      return t / (l.block.x * l.block.y);
    case kNtidX:
      return l.block.x;
    case kNtidY:
      return l.block.y;
    case kNtidZ:
      return l.block.z;
    case kCtaX:
      return w.cta->id[0];
    case kCtaY:
      return w.cta->id[1];
    case kCtaZ:
      return w.cta->id[2];
    case kNctaX:
      return l.grid.x;
    case kNctaY:
      return l.grid.y;
    case kNctaZ:
      return l.grid.z;
    case kLane:
      return lane;
    case kWarpId:
      return w.id;
    case kNwarpId:
      return (l.block.x * l.block.y * l.block.z + 31) / 32;
    case kClusterCtaRank:
    case kClusterCtaX:
      return w.cta->rank;
    case kClusterNctaRank:
    case kClusterNctaX:
      return l.cluster;
    case kClusterCtaY:
    case kClusterCtaZ:
    case kZero:
      return 0;
    case kClusterIdX:
      return w.cta->id[0] / l.cluster;
    case kNclusterX:
      return l.grid.x / l.cluster;
    case kOne:
      return 1;
    case kClock:
      return l.executed;
    case kSmid:
      return w.cta->id[0] % 132;
    case kLaneLt:
      return (1u << lane) - 1;
    case kLaneLe:
      return (2ull << lane) - 1;
    case kLaneEq:
      return 1u << lane;
    case kLaneGe:
      return u32(~((1u << lane) - 1));
    case kLaneGt:
      return u32(~((2ull << lane) - 1));
    case kDynSmem:
      return l.dynamic;
    case kTotalSmem:
      return w.cta->shared_bytes;
  }
  return 0;
}

u64 symbol_value(const Warp& w, int sym, int lane) {
  const Symbol& s = w.cta->launch->kernel->symbols[sym];
  switch (s.space) {
    case kShared:
      return s.offset;
    case kLocal:
      return reinterpret_cast<u64>(w.local[lane].data()) + s.offset;
    case kParam:
      return reinterpret_cast<u64>(w.cta->launch->params.get()) + s.offset;
    case kGlobal:
      return reinterpret_cast<u64>(s.init.data());
    case kCall:
      return 0;
  }
  return 0;
}

u64 slow_value(const Warp& w, const Operand& o, int lane) {
  switch (o.kind) {
    case Operand::Special:
      return special(w, o.special, lane);
    case Operand::Sym:
      return symbol_value(w, o.sym, lane) + o.offset;
    default:
      fail("an operand that has no value");
  }
}
}  // namespace ptxsim
