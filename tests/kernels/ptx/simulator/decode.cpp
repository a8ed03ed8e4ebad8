// The instruction set: which handler executes an instruction, and what its modifiers tell the handler.
#include "decode.h"

#include <algorithm>
#include <unordered_map>

#include "instructions.h"

namespace ptxsim {
Type type_of(const string& modifier) {
  static const std::unordered_map<string, Type> types = {
      {"u8", U8},       {"u16", U16},       {"u32", U32},   {"u64", U64},       {"s8", S8},        {"s16", S16},
      {"s32", S32},     {"s64", S64},       {"b8", B8},     {"b16", B16},       {"b32", B32},      {"b64", B64},
      {"b128", B128},   {"f16", F16},       {"bf16", BF16}, {"f32", F32},       {"f64", F64},      {"pred", PRED},
      {"f16x2", F16X2}, {"bf16x2", BF16X2}, {"tf32", TF32}, {"e4m3x2", E4M3X2}, {"e5m2x2", E5M2X2}};
  const auto it = types.find(modifier);
  return it == types.end() ? NONE : it->second;
}

namespace {
using Modifiers = void (*)(Instruction& in);
struct Entry {
  Handler run;
  Modifiers modifiers = nullptr;
  Flow flow = kPlain;
};

bool has(const Instruction& in, const char* m) { return std::find(in.mods.begin(), in.mods.end(), m) != in.mods.end(); }
bool has_prefix(const Instruction& in, const char* p) {
  return std::any_of(in.mods.begin(), in.mods.end(), [&](const string& m) { return m.rfind(p, 0) == 0; });
}
[[noreturn]] void unknown(const Instruction& in) {
  fail("an instruction that the simulator does not know: " + in.text);
}
// The number of the modifier that is there, among choices.
int which(const Instruction& in, std::initializer_list<const char*> choices, int otherwise) {
  int i = 0;
  for (const char* c : choices) {
    if (has(in, c)) return i;
    ++i;
  }
  return otherwise;
}

int space_of(const Instruction& in) {
  if (has(in, "shared::cluster")) return kSharedCluster;
  if (has(in, "shared") || has(in, "shared::cta")) return kShared;
  if (has(in, "global")) return kGlobal;
  if (has(in, "local")) return kLocal;
  if (has_prefix(in, "param")) return kParam;
  if (has(in, "const")) return kConst;
  return kGeneric;
}

// ---- modifiers of groups of instructions

void half(Instruction& in) { in.a = has(in, "hi") ? 1 : has(in, "wide") ? 2 : 0; }
void nan(Instruction& in) {
  in.c = has(in, "NaN");
  if (has(in, "xorsign")) unknown(in);
}
void relu(Instruction& in) { in.c = has(in, "relu"); }
void space_in_a(Instruction& in) { in.a = space_of(in); }
template <int kFunction>
void function(Instruction& in) {
  in.a = kFunction;
  in.c = has(in, "approx") && in.t == F64;
}
void registers(Instruction& in) { in.whole = true, in.a = has(in, "inc"); }

void vector_access(Instruction& in) {
  in.a = space_of(in), in.b = has(in, "v2") ? 2 : has(in, "v4") ? 4 : has(in, "v8") ? 8 : 1;
}
bool of_block(const Instruction& in) { return has(in, "cta"); }
void load(Instruction& in) {
  vector_access(in);
  if (has(in, "nc")) in.order |= kNonCoherent;
  // A scope within the block says nothing to others.
  const bool strong = has(in, "volatile") || ((has(in, "relaxed") || has(in, "acquire")) && !of_block(in));
  if (strong || has(in, "cv") || has(in, "mmio")) in.order |= kStrong;
  if (has(in, "acquire") && !of_block(in)) in.order |= kAcquire;
  in.polls = strong;
}
void store(Instruction& in) {
  vector_access(in);
  if (has(in, "volatile") || (has(in, "relaxed") && !of_block(in))) in.order |= kStrong;
  if (has(in, "release") && !of_block(in)) in.order |= kStrong | kRelease;
}
int atom_operation(const Instruction& in) {
  const int op = which(in, {"add", "min", "max", "exch", "cas", "inc", "dec", "and", "or", "xor"}, -1);
  if (op < 0) unknown(in);
  return op;
}
void atom(Instruction& in) {
  in.a = space_of(in), in.b = atom_operation(in);
  if (has(in, "v2") || has(in, "v4") || has(in, "v8")) unknown(in);
  if (of_block(in)) return;
  if (has(in, "release") || has(in, "acq_rel")) in.order |= kRelease;
  if (has(in, "acquire") || has(in, "acq_rel")) in.order |= kAcquire;
}
void red(Instruction& in) {
  atom(in);
  in.c = 1;
}
// fence, membar
void fence(Instruction& in) {
  if (has_prefix(in, "proxy")) {
    in.a = has_prefix(in, "async") || has_prefix(in, "proxy::async");
    if (has(in, "release") || has(in, "acquire")) in.order = kRelease | kAcquire;  // of a tensor map
    return;
  }
  if (has(in, "mbarrier_init") || has(in, "cta")) return;
  in.order = kRelease | kAcquire;
}

void comparison(Instruction& in) {
  static const std::unordered_map<string, int> comparisons = {
      {"eq", kEq},   {"ne", kNe},   {"lt", kLt},   {"le", kLe},   {"gt", kGt},   {"ge", kGe},
      {"lo", kLt},   {"ls", kLe},   {"hi", kGt},   {"hs", kGe},   {"equ", kEqu}, {"neu", kNeu},
      {"ltu", kLtu}, {"leu", kLeu}, {"gtu", kGtu}, {"geu", kGeu}, {"num", kNum}, {"nan", kNan}};
  const auto it = comparisons.find(in.mods[0]);
  if (it == comparisons.end()) unknown(in);
  in.a = it->second, in.b = which(in, {"", "and", "or", "xor"}, 0);
  if (in.b && (in.run == run_set || in.t == F16X2 || in.t == BF16X2)) unknown(in);
}
void conversion(Instruction& in) {
  if (in.t2 == NONE) unknown(in);
  in.a = which(in, {"", "rni", "rzi", "rmi", "rpi"}, 0);
  in.c = (has(in, "sat") ? 1 : 0) | (has(in, "relu") ? 2 : 0) | (has(in, "satfinite") ? 4 : 0);
  if (has(in, "rs") || has(in, "scaled::n2::ue8m0")) unknown(in);
}
void to_generic(Instruction& in) { in.a = has(in, "to"), in.b = space_of(in); }
void space_in_b(Instruction& in) { in.b = space_of(in); }
void funnel(Instruction& in) { in.a = has(in, "l"), in.b = has(in, "wrap"); }
void permute(Instruction& in) {
  in.a = has(in, "f4e") || has(in, "b4e") || has(in, "rc8") || has(in, "ecl") || has(in, "ecr") || has(in, "rc16");
}
template <int kWhat>
void count(Instruction& in) {
  in.a = kWhat, in.b = has(in, "shiftamt");
}
void property(Instruction& in) {
  in.a = which(in, {"finite", "infinite", "number", "notanumber", "normal", "subnormal"}, -1);
  if (in.a < 0) unknown(in);
}

void shuffle(Instruction& in) { in.whole = in.masked = true, in.a = which(in, {"up", "down", "bfly", "idx"}, 3); }
void vote(Instruction& in) { in.whole = in.masked = true, in.a = which(in, {"all", "any", "uni", "ballot"}, 3); }
void redux(Instruction& in) { in.whole = in.masked = true, in.b = atom_operation(in); }
void masked(Instruction& in) { in.whole = in.masked = true, in.a = has(in, "all"); }

void matrices(Instruction& in) {
  in.whole = true, in.a = has(in, "trans"), in.b = has(in, "x4") ? 4 : has(in, "x2") ? 2 : 1;
  if (in.t != B16 || !has(in, "m8n8")) unknown(in);
}
vector<Type> types_of(const Instruction& in) {
  vector<Type> types;
  for (const string& m : in.mods)
    if (const Type t = type_of(m)) types.push_back(t);
  return types;
}
// a: k, t: of the factors
void mma(Instruction& in) {
  in.whole = true;
  for (const string& m : in.mods)
    if (m.rfind("m16n8k", 0) == 0) in.a = atoi(m.c_str() + 6);
  const vector<Type> types = types_of(in);
  if (types.size() != 4 || types[0] != types[3] || types[1] != types[2]) unknown(in);
  in.t = types[1], in.t2 = types[0];
  const bool halves = (in.t == F16 || in.t == BF16) && (in.a == 8 || in.a == 16);
  const bool single = in.t == TF32 && (in.a == 4 || in.a == 8), fp64 = in.t == F64 && has(in, "m8n8k4");
  if (fp64) in.a = 4;
  if (!(((halves || single) && in.t2 == F32) || (fp64 && in.t2 == F64))) unknown(in);
}
void wgmma(Instruction& in) {
  in.whole = true;
  const string& what = in.mods[0];
  if (what == "mma_async") {
    in.run = run_wgmma;
    for (const string& m : in.mods)
      if (m.rfind("m64n", 0) == 0) in.a = atoi(m.c_str() + 4), in.b = atoi(m.c_str() + m.find('k') + 1);
    const vector<Type> types = types_of(in);
    if (types.size() != 3 || types[0] != F32 || types[1] != types[2]) unknown(in);
    in.t = types[1];
    if (!((in.t == F16 || in.t == BF16) && in.b == 16) && !(in.t == TF32 && in.b == 8)) unknown(in);
  } else if (what == "commit_group")
    in.run = run_wgmma_commit;
  else if (what == "wait_group")
    in.run = run_wgmma_wait;
  else if (what == "fence")
    in.run = run_wgmma_fence;
  else
    unknown(in);
}

// bar, barrier: a: 0 sync, 1 arrive, 2 red; b: of red 0 popc, 1 and, 2 or
void barrier(Instruction& in) {
  in.whole = true;
  if (has(in, "cluster")) {
    in.run = has(in, "arrive") ? run_cluster_arrive : run_cluster_wait;
    // Both order memory unless told otherwise.
    in.order = has(in, "relaxed") ? kWeak : has(in, "arrive") ? kRelease : kAcquire;
  } else if (has(in, "warp"))
    in.run = run_syncwarp, in.masked = true;
  else
    in.a = has(in, "arrive") ? 1 : has(in, "red") ? 2 : 0, in.b = which(in, {"popc", "and", "or"}, 0);
}
// a: space; arrive: b expects bytes, c no arrival; test: b by parity, c may wait
void mbarrier(Instruction& in) {
  in.a = space_of(in);
  const string& what = in.mods[0];
  const bool far = has(in, "cluster");  // the scope
  if (what == "init")
    in.run = run_mbarrier_init;
  else if (what == "inval")
    in.run = run_mbarrier_inval;
  else if (what == "arrive" || what == "arrive_drop") {
    if (what == "arrive_drop" || has(in, "noComplete")) unknown(in);
    in.run = run_mbarrier_arrive, in.b = has(in, "expect_tx");
    if (far && !has(in, "relaxed")) in.order = kRelease;
  } else if (what == "expect_tx")
    in.run = run_mbarrier_arrive, in.b = 1, in.c = 1;
  else if (what == "try_wait" || what == "test_wait") {
    in.run = run_mbarrier_test, in.b = has(in, "parity"), in.c = what == "try_wait";
    if (far && !has(in, "relaxed")) in.order = kAcquire;
  } else
    unknown(in);
}
// cp: asynchronous copies of all kinds
void copy(Instruction& in) {
  if (has(in, "prefetch")) {
    in.run = run_nothing;
    return;
  }
  if (has(in, "reduce")) unknown(in);
  const bool bulk = has(in, "bulk");
  if (has(in, "commit_group")) {
    in.run = bulk ? run_bulk_commit : run_cp_async_commit;
    in.whole = !bulk;  // the groups are kept by warp
  } else if (has(in, "wait_group") || has(in, "wait_all")) {
    in.run = bulk ? run_bulk_wait : run_cp_async_wait;
    in.a = has(in, "wait_all"), in.b = has(in, "read");
  } else if (!bulk && has(in, "mbarrier")) {
    in.run = run_cp_async_arrive, in.a = space_of(in), in.b = has(in, "noinc");
  } else if (!bulk) {
    in.run = run_cp_async;
    if (has(in, "ca") + has(in, "cg") != 1) unknown(in);
    in.b = has(in, "cg");
  } else {
    // The first state space is the destination's.
    const auto space = std::find_if(in.mods.begin(), in.mods.end(),
                                    [](const string& m) { return m.rfind("shared", 0) == 0 || m == "global"; });
    if (space == in.mods.end()) unknown(in);
    const bool tensor = has(in, "tensor");
    if (tensor && has_prefix(in, "im2col")) unknown(in);
    if (*space != "global") {
      if (!has(in, "mbarrier::complete_tx::bytes")) unknown(in);
      in.run = tensor ? run_bulk_tensor_load : run_bulk_load, in.b = has(in, "multicast::cluster");
    } else {
      if (!has(in, "bulk_group")) unknown(in);
      in.run = tensor ? run_bulk_tensor_store : run_bulk_store;
    }
  }
}

// An instruction is a row: its name, its handler, what reads its modifiers.
const std::unordered_map<string, Entry>& instructions() {
  static const std::unordered_map<string, Entry> rows = {
      // arithmetic
      {"add", {run_add}},
      {"sub", {run_sub}},
      {"mul", {run_mul, half}},
      {"mad", {run_mad, half}},
      {"mul24", {run_mul24, half}},
      {"mad24", {run_mul24, half}},
      {"fma", {run_fma, relu}},
      {"div", {run_div}},
      {"rem", {run_rem}},
      {"min", {run_min, nan}},
      {"max", {run_max, nan}},
      {"abs", {run_abs}},
      {"neg", {run_neg}},
      {"sqrt", {run_function, function<kSqrt>}},
      {"rsqrt", {run_function, function<kRsqrt>}},
      {"rcp", {run_function, function<kRcp>}},
      {"sin", {run_function, function<kSin>}},
      {"cos", {run_function, function<kCos>}},
      {"ex2", {run_function, function<kEx2>}},
      {"lg2", {run_function, function<kLg2>}},
      {"tanh", {run_function, function<kTanh>}},
      {"copysign", {run_copysign}},
      {"testp", {run_testp, property}},
      {"dp4a", {run_dp4a}},
      // logic and moves
      {"and", {run_and}},
      {"or", {run_or}},
      {"xor", {run_xor}},
      {"not", {run_not}},
      {"cnot", {run_cnot}},
      {"shl", {run_shl}},
      {"shr", {run_shr}},
      {"shf", {run_shf, funnel}},
      {"lop3", {run_lop3}},
      {"prmt", {run_prmt, permute}},
      {"bfe", {run_bfe}},
      {"bfi", {run_bfi}},
      {"bmsk", {run_bmsk}},
      {"popc", {run_count, count<0>}},
      {"clz", {run_count, count<1>}},
      {"brev", {run_count, count<2>}},
      {"bfind", {run_count, count<3>}},
      {"mov", {run_mov}},
      {"selp", {run_selp}},
      {"slct", {run_slct}},
      {"setp", {run_setp, comparison}},
      {"set", {run_set, comparison}},
      {"cvt", {run_cvt, conversion}},
      // memory
      {"ld", {run_ld, load}},
      {"ldu", {run_ld, load}},
      {"st", {run_st, store}},
      {"atom", {run_atom, atom}},
      {"red", {run_atom, red}},
      {"fence", {run_fence, fence}},
      {"membar", {run_fence, fence}},
      {"cvta", {run_cvta, to_generic}},
      {"isspacep", {run_isspacep, space_in_b}},
      {"mapa", {run_mapa, space_in_a}},
      {"cp", {nullptr, copy}},
      {"prefetch", {run_nothing}},
      {"prefetchu", {run_nothing}},
      {"createpolicy", {run_nothing}},
      {"applypriority", {run_nothing}},
      {"discard", {run_nothing}},
      // across a warp
      {"shfl", {run_shfl, shuffle}},
      {"vote", {run_vote, vote}},
      {"redux", {run_redux, redux}},
      {"match", {run_match, masked}},
      {"elect", {run_elect, masked}},
      {"activemask", {run_activemask}},
      // matrices
      {"ldmatrix", {run_ldmatrix, matrices}},
      {"stmatrix", {run_stmatrix, matrices}},
      {"mma", {run_mma, mma}},
      {"wgmma", {nullptr, wgmma}},
      // barriers
      {"bar", {run_bar, barrier}},
      {"barrier", {run_bar, barrier}},
      {"mbarrier", {nullptr, mbarrier}},
      {"nanosleep", {run_sleep}},
      {"griddepcontrol", {run_nothing}},
      {"setmaxnreg", {run_setmaxnreg, registers}},
      // control
      {"call", {run_call}},
      {"bra", {nullptr, nullptr, kBranch}},
      {"brx", {nullptr, nullptr, kBranchTable}},
      {"ret", {nullptr, nullptr, kExit}},
      {"exit", {nullptr, nullptr, kExit}},
      {"trap", {nullptr, nullptr, kTrap}},
      {"brkpt", {run_nothing}},
      {"pragma", {run_nothing}},
  };
  return rows;
}
}  // namespace

void decode(Instruction& in, const string& name) {
  const auto row = instructions().find(name);
  if (row == instructions().end()) unknown(in);
  const vector<Type> types = types_of(in);
  in.t = types.empty() ? NONE : types[0];
  in.t2 = types.size() > 1 ? types[1] : NONE;
  in.ftz = has(in, "ftz");
  in.saturates = has(in, "sat");
  const bool single = in.t == F32 || in.t == F64 || name == "cvt";
  const bool wide = std::find(types.begin(), types.end(), B128) != types.end();
  if (wide || has(in, "cc") || (in.saturates && !single) || (in.ftz && is_half(in.t) && !single)) unknown(in);
  in.rounding = u8(which(in, {"rn", "rz", "rm", "rp"}, 0));
  in.run = row->second.run, in.flow = row->second.flow;
  if (row->second.modifiers) row->second.modifiers(in);
  if (in.flow == kPlain && !in.run) unknown(in);
}
}  // namespace ptxsim
