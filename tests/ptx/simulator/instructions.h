// Every instruction's handler: what it does for the lanes of `mask` in warp `w`.
#pragma once
#include "machine.h"

namespace ptxsim {
void run_ld(Warp& w, const Instruction& in, u32 mask);
void run_st(Warp& w, const Instruction& in, u32 mask);
void run_atom(Warp& w, const Instruction& in, u32 mask);
void run_add(Warp& w, const Instruction& in, u32 mask);
void run_sub(Warp& w, const Instruction& in, u32 mask);
void run_mul(Warp& w, const Instruction& in, u32 mask);
void run_mad(Warp& w, const Instruction& in, u32 mask);
void run_fma(Warp& w, const Instruction& in, u32 mask);
void run_div(Warp& w, const Instruction& in, u32 mask);
void run_rem(Warp& w, const Instruction& in, u32 mask);
void run_min(Warp& w, const Instruction& in, u32 mask);
void run_max(Warp& w, const Instruction& in, u32 mask);
void run_abs(Warp& w, const Instruction& in, u32 mask);
void run_neg(Warp& w, const Instruction& in, u32 mask);
void run_fn(Warp& w, const Instruction& in, u32 mask);
void run_copysign(Warp& w, const Instruction& in, u32 mask);
void run_bits(Warp& w, const Instruction& in, u32 mask);
void run_shl(Warp& w, const Instruction& in, u32 mask);
void run_shr(Warp& w, const Instruction& in, u32 mask);
void run_shf(Warp& w, const Instruction& in, u32 mask);
void run_lop3(Warp& w, const Instruction& in, u32 mask);
void run_prmt(Warp& w, const Instruction& in, u32 mask);
void run_bfe(Warp& w, const Instruction& in, u32 mask);
void run_bfi(Warp& w, const Instruction& in, u32 mask);
void run_count(Warp& w, const Instruction& in, u32 mask);
void run_mov(Warp& w, const Instruction& in, u32 mask);
void run_selp(Warp& w, const Instruction& in, u32 mask);
void run_setp(Warp& w, const Instruction& in, u32 mask);
void run_set(Warp& w, const Instruction& in, u32 mask);
void run_cvt(Warp& w, const Instruction& in, u32 mask);
void run_cvta(Warp& w, const Instruction& in, u32 mask);
void run_isspacep(Warp& w, const Instruction& in, u32 mask);
void run_nop(Warp& w, const Instruction& in, u32 mask);
void run_yield(Warp& w, const Instruction& in, u32 mask);
void run_shfl(Warp& w, const Instruction& in, u32 mask);
void run_vote(Warp& w, const Instruction& in, u32 mask);
void run_activemask(Warp& w, const Instruction& in, u32 mask);
void run_redux(Warp& w, const Instruction& in, u32 mask);
void run_elect(Warp& w, const Instruction& in, u32 mask);
void run_match(Warp& w, const Instruction& in, u32 mask);
void run_ldmatrix(Warp& w, const Instruction& in, u32 mask);
void run_stmatrix(Warp& w, const Instruction& in, u32 mask);
void run_mma(Warp& w, const Instruction& in, u32 mask);
void run_wgmma(Warp& w, const Instruction& in, u32 mask);
void run_wgmma_commit(Warp& w, const Instruction& in, u32 mask);
void run_wgmma_wait(Warp& w, const Instruction& in, u32 mask);
void run_bar(Warp& w, const Instruction& in, u32 mask);
void run_cluster_arrive(Warp& w, const Instruction& in, u32 mask);
void run_cluster_wait(Warp& w, const Instruction& in, u32 mask);
void run_mbar_init(Warp& w, const Instruction& in, u32 mask);
void run_mbar_inval(Warp& w, const Instruction& in, u32 mask);
void run_mbar_arrive(Warp& w, const Instruction& in, u32 mask);
void run_mbar_test(Warp& w, const Instruction& in, u32 mask);
void run_mapa(Warp& w, const Instruction& in, u32 mask);
void run_tma_load(Warp& w, const Instruction& in, u32 mask);
void run_call(Warp& w, const Instruction& in, u32 mask);

enum MemSpace { kGen, kSh, kGl, kLo, kPa, kCo, kShCl };
enum AtomOp { kAdd, kMin, kMax, kExch, kCas, kInc, kDec, kAnd, kOr, kXor };
enum Fn { kSqrt, kRsqrt, kRcp, kSin, kCos, kEx2, kLg2, kTanh };
enum Bits { kBAnd, kBOr, kBXor, kBNot };
enum Cmp { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };
extern const std::map<string, int> kCmps;
u64 atom_apply(Type t, int op, u64 old, u64 x, u64 y);
}  // namespace ptxsim
