// Every instruction's handler: what it does in the lanes of `mask` of warp `w`. Which instruction has which handler,
// and what a, b and c say, is in decode.cpp.
#pragma once
#include "machine.h"

namespace ptxsim {
using HandlerFunction = void(Warp& w, const Instruction& in, u32 mask);
HandlerFunction run_abs, run_activemask, run_add, run_and, run_atom, run_bar, run_bfe, run_bfi, run_bmsk,
    run_bulk_commit, run_bulk_load, run_bulk_store, run_bulk_tensor_load, run_bulk_tensor_store, run_bulk_wait,
    run_call, run_cluster_arrive, run_cluster_wait, run_cnot, run_copysign, run_count, run_cp_async,
    run_cp_async_arrive, run_cp_async_commit, run_cp_async_wait, run_cvt, run_cvta, run_div, run_dp4a, run_elect,
    run_fence, run_fma, run_function, run_isspacep, run_ld, run_ldmatrix, run_lop3, run_mad, run_mapa, run_match,
    run_max, run_mbarrier_arrive, run_mbarrier_init, run_mbarrier_inval, run_mbarrier_test, run_min, run_mma, run_mov,
    run_mul, run_mul24, run_neg, run_not, run_nothing, run_or, run_prmt, run_redux, run_rem, run_selp, run_set,
    run_setmaxnreg, run_setp, run_shf, run_shfl, run_shl, run_shr, run_slct, run_sleep, run_st, run_stmatrix, run_sub,
    run_syncwarp, run_testp, run_vote, run_wgmma, run_wgmma_commit, run_wgmma_fence, run_wgmma_wait, run_xor;

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
