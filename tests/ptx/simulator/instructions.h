// Every instruction's handler: what it does in the lanes of `mask` of warp `w`. Which instruction has which handler,
// and what a, b and c say, is in decode.cpp.
#pragma once
#include "machine.h"

namespace ptxsim {
// clang-format off
#define PTXSIM_HANDLERS(X) \
  X(abs) X(activemask) X(add) X(and) X(atom) X(bar) X(bfe) X(bfi) X(bmsk) X(bulk_commit) X(bulk_load) \
  X(bulk_store) X(bulk_tensor_load) X(bulk_tensor_store) X(bulk_wait) X(call) X(cluster_arrive) X(cluster_wait) \
  X(cnot) X(copysign) X(count) X(cp_async) X(cp_async_arrive) X(cp_async_commit) X(cp_async_wait) X(cvt) \
  X(cvta) X(div) X(dp4a) X(elect) X(fence) X(fma) X(function) X(isspacep) X(ld) X(ldmatrix) X(lop3) X(mad) \
  X(mapa) X(match) X(max) X(mbarrier_arrive) X(mbarrier_init) X(mbarrier_inval) X(mbarrier_test) X(min) X(mma) \
  X(mov) X(mul) X(mul24) X(neg) X(not) X(nothing) X(or) X(prmt) X(redux) X(rem) X(selp) X(set) X(setp) X(shf) \
  X(shfl) X(shl) X(shr) X(slct) X(sleep) X(st) X(stmatrix) X(sub) X(testp) X(vote) X(wgmma) X(wgmma_commit) \
  X(wgmma_fence) X(wgmma_wait) X(xor)
// clang-format on
#define PTXSIM_DECLARE(name) void run_##name(Warp& w, const Instruction& in, u32 mask);
PTXSIM_HANDLERS(PTXSIM_DECLARE)
#undef PTXSIM_DECLARE
#undef PTXSIM_HANDLERS

enum AtomOperation {
  kAtomAdd,
  kAtomMin,
  kAtomMax,
  kAtomExchange,
  kAtomCompare,
  kAtomIncrement,
  kAtomDecrement,
  kAtomAnd,
  kAtomOr,
  kAtomXor
};
enum Function { kSqrt, kRsqrt, kRcp, kSin, kCos, kEx2, kLg2, kTanh };
enum Comparison { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };

// What atomic operation `in.b` makes of an old value and its operands.
u64 combine(const Warp& w, const Instruction& in, u64 old, u64 x, u64 y);
}  // namespace ptxsim
