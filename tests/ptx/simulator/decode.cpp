// The instruction set: which handler executes an instruction, and with which modifiers.
#include "decode.h"

#include <algorithm>

#include "instructions.h"

namespace ptxsim {
namespace {
bool has(const vector<string>& mods, const char* m) { return std::find(mods.begin(), mods.end(), m) != mods.end(); }

int mem_space(const vector<string>& mods) {
  if (has(mods, "shared::cluster")) return kShCl;
  if (has(mods, "shared") || has(mods, "shared::cta")) return kSh;
  if (has(mods, "global")) return kGl;
  if (has(mods, "local")) return kLo;
  if (has(mods, "param")) return kPa;
  if (has(mods, "const")) return kCo;
  return kGen;
}
}  // namespace
void decode(Instruction& in, const string& base) {
  auto& m = in.mods;
  vector<Type> types;
  for (auto& x : m) {
    auto it = kTypes.find(x);
    if (it != kTypes.end()) types.push_back(it->second);
  }
  in.t = types.empty() ? NONE : types[0];
  in.t2 = types.size() > 1 ? types[1] : NONE;
  in.ftz = has(m, "ftz");
  auto is = [&](const char* x) { return base == x; };
  if (is("add"))
    in.run = run_add;
  else if (is("sub"))
    in.run = run_sub;
  else if (is("mul"))
    in.run = run_mul, in.a = has(m, "hi") ? 1 : has(m, "wide") ? 2 : 0;
  else if (is("mad")) {
    if (is_float(in.t))
      in.run = run_fma;
    else
      in.run = run_mad, in.a = has(m, "hi") ? 1 : has(m, "wide") ? 2 : 0;
  } else if (is("fma"))
    in.run = run_fma;
  else if (is("div"))
    in.run = run_div;
  else if (is("rem"))
    in.run = run_rem;
  else if (is("min"))
    in.run = run_min, in.c = has(m, "NaN");
  else if (is("max"))
    in.run = run_max, in.c = has(m, "NaN");
  else if (is("abs"))
    in.run = run_abs;
  else if (is("neg"))
    in.run = run_neg;
  else if (is("sqrt"))
    in.run = run_fn, in.a = kSqrt;
  else if (is("rsqrt"))
    in.run = run_fn, in.a = kRsqrt;
  else if (is("rcp"))
    in.run = run_fn, in.a = kRcp;
  else if (is("sin"))
    in.run = run_fn, in.a = kSin;
  else if (is("cos"))
    in.run = run_fn, in.a = kCos;
  else if (is("ex2"))
    in.run = run_fn, in.a = kEx2;
  else if (is("lg2"))
    in.run = run_fn, in.a = kLg2;
  else if (is("tanh"))
    in.run = run_fn, in.a = kTanh;
  else if (is("copysign"))
    in.run = run_copysign;
  else if (is("and"))
    in.run = run_bits, in.a = kBAnd;
  else if (is("or"))
    in.run = run_bits, in.a = kBOr;
  else if (is("xor"))
    in.run = run_bits, in.a = kBXor;
  else if (is("not"))
    in.run = run_bits, in.a = kBNot;
  else if (is("shl"))
    in.run = run_shl;
  else if (is("shr"))
    in.run = run_shr;
  else if (is("shf"))
    in.run = run_shf, in.a = has(m, "l"), in.b = has(m, "wrap");
  else if (is("lop3"))
    in.run = run_lop3;
  else if (is("prmt"))
    in.run = run_prmt;
  else if (is("bfe"))
    in.run = run_bfe;
  else if (is("bfi"))
    in.run = run_bfi;
  else if (is("popc"))
    in.run = run_count, in.a = 0;
  else if (is("clz"))
    in.run = run_count, in.a = 1;
  else if (is("brev"))
    in.run = run_count, in.a = 2;
  else if (is("bfind"))
    in.run = run_count, in.a = 3;
  else if (is("mov"))
    in.run = run_mov;
  else if (is("selp"))
    in.run = run_selp;
  else if (is("setp") || is("set")) {
    in.run = is("set") ? run_set : run_setp;
    in.a = kCmps.at(m[0]);
    if (is("setp")) {
      in.b = has(m, "and") ? 1 : has(m, "or") && m[0] != "or" ? 2 : has(m, "xor") ? 3 : 0;
    }
  } else if (is("cvt")) {
    in.run = run_cvt;
    if (in.t2 == NONE) fail("cvt of one type: " + in.text);
    in.a = has(m, "rni") ? 1 : has(m, "rzi") ? 2 : has(m, "rmi") ? 3 : has(m, "rpi") ? 4 : 0;
    in.b = has(m, "rz") ? 1 : has(m, "rm") ? 2 : has(m, "rp") ? 3 : 0;
    in.c = (has(m, "sat") ? 1 : 0) | (has(m, "relu") ? 2 : 0);
  } else if (is("cvta"))
    in.run = run_cvta, in.a = has(m, "to"), in.b = mem_space(m);
  else if (is("isspacep"))
    in.run = run_isspacep, in.b = mem_space(m);
  else if (is("ld") || is("ldu")) {
    in.run = run_ld, in.a = mem_space(m), in.b = has(m, "v2") ? 2 : has(m, "v4") ? 4 : has(m, "v8") ? 8 : 1;
    in.yields = has(m, "volatile") || has(m, "acquire") || has(m, "relaxed");
  } else if (is("st"))
    in.run = run_st, in.a = mem_space(m), in.b = has(m, "v2") ? 2 : has(m, "v4") ? 4 : has(m, "v8") ? 8 : 1;
  else if (is("atom") || is("red")) {
    in.run = run_atom, in.a = mem_space(m), in.c = is("red"), in.yields = true;
    static const std::map<string, int> ops = {{"add", kAdd}, {"min", kMin}, {"max", kMax}, {"exch", kExch},
                                              {"cas", kCas}, {"inc", kInc}, {"dec", kDec}, {"and", kAnd},
                                              {"or", kOr},   {"xor", kXor}};
    for (auto& x : m) {
      auto it = ops.find(x);
      if (it != ops.end()) in.b = it->second;
    }
  } else if (is("shfl")) {
    in.run = run_shfl, in.whole = true, in.a = has(m, "up") ? 0 : has(m, "down") ? 1 : has(m, "bfly") ? 2 : 3;
  } else if (is("vote"))
    in.run = run_vote, in.whole = true, in.a = has(m, "all") ? 0 : has(m, "any") ? 1 : has(m, "uni") ? 2 : 3;
  else if (is("activemask"))
    in.run = run_activemask;
  else if (is("redux")) {
    in.run = run_redux, in.whole = true,
    in.a = has(m, "add")   ? kAdd
           : has(m, "min") ? kMin
           : has(m, "max") ? kMax
           : has(m, "and") ? kAnd
           : has(m, "or")  ? kOr
                           : kXor;
  } else if (is("elect"))
    in.run = run_elect, in.whole = true;
  else if (is("match"))
    in.run = run_match, in.whole = true;
  else if (is("ldmatrix"))
    in.run = run_ldmatrix, in.whole = true, in.a = has(m, "trans"), in.b = has(m, "x4") ? 4 : has(m, "x2") ? 2 : 1;
  else if (is("stmatrix"))
    in.run = run_stmatrix, in.whole = true, in.a = has(m, "trans"), in.b = has(m, "x4") ? 4 : has(m, "x2") ? 2 : 1;
  else if (is("mma")) {
    in.run = run_mma, in.whole = true;
    for (auto& x : m)
      if (x[0] == 'm' && isdigit(x[1])) {
        if (x.substr(0, 6) != "m16n8k") fail("mma " + x);
        in.a = atoi(x.c_str() + 6);
      }
    if (types.size() != 4 || types[0] != F32 || types[3] != F32) fail("mma with other accumulators: " + in.text);
    in.t = types[1];
  } else if (is("wgmma")) {
    in.whole = true;
    if (m[0] == "mma_async") {
      in.run = run_wgmma;
      for (auto& x : m)
        if (x.substr(0, 3) == "m64") in.a = atoi(x.c_str() + 4);
      if (types.size() != 3 || types[0] != F32) fail("wgmma " + in.text);
      in.t = types[1];
    } else if (m[0] == "commit_group")
      in.run = run_wgmma_commit;
    else if (m[0] == "wait_group")
      in.run = run_wgmma_wait;
    else
      in.run = run_nop;
  } else if (is("bar") || is("barrier")) {
    in.whole = true, in.yields = true;
    if (has(m, "cluster"))
      in.run = has(m, "arrive") ? run_cluster_arrive : run_cluster_wait;
    else if (has(m, "warp"))
      in.run = run_nop;
    else if (has(m, "red"))
      fail("bar.red");
    else
      in.run = run_bar, in.a = has(m, "arrive");
  } else if (is("membar") || is("fence") || is("prefetch") || is("prefetchu") || is("griddepcontrol") ||
             is("setmaxnreg") || is("createpolicy") || is("applypriority") || is("discard"))
    in.run = run_nop;
  else if (is("nanosleep"))
    in.run = run_yield, in.yields = true;
  else if (is("mbarrier")) {
    in.a = mem_space(m), in.yields = true;
    if (m[0] == "init")
      in.run = run_mbar_init;
    else if (m[0] == "inval")
      in.run = run_mbar_inval;
    else if (m[0] == "arrive")
      in.run = run_mbar_arrive, in.b = has(m, "expect_tx");
    else if (m[0] == "expect_tx")
      in.run = run_mbar_arrive, in.b = 1, in.c = 1;
    else if (m[0] == "try_wait" || m[0] == "test_wait") {
      in.run = run_mbar_test;
      if (!has(m, "parity")) fail("mbarrier wait by state");
    } else
      fail("mbarrier." + m[0]);
  } else if (is("mapa"))
    in.run = run_mapa, in.a = mem_space(m);
  else if (is("cp") && has(m, "bulk") && has(m, "tensor") && !has(m, "prefetch") &&
           has(m, "mbarrier::complete_tx::bytes"))
    in.run = run_tma_load, in.b = has(m, "multicast::cluster"), in.yields = true;
  else if (is("cp") && has(m, "prefetch"))
    in.run = run_nop;
  else if (is("call"))
    in.run = run_call;
  else if (is("bra"))
    in.flow = kBranch;
  else if (is("brx"))
    in.flow = kBrx;
  else if (is("ret") || is("exit"))
    in.flow = kExit;
  else if (is("trap") || is("brkpt"))
    in.flow = kTrap;
  else
    fail("an instruction that is not known: " + in.text);
}
}  // namespace ptxsim
