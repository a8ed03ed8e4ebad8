#include "machine.h"

#include <cstdlib>

namespace ptxsim {
Settings::Settings() {
  if (const char* s = getenv("PTXSIM_SEED")) seed = strtoull(s, nullptr, 10);
  if (const char* s = getenv("PTXSIM_SMS")) multiprocessors = atoi(s);
}
Settings& settings() {
  static Settings s;
  return s;
}

string where(const Warp& w, const Instruction& in) {
  const Kernel& k = *w.cta->launch->kernel;
  const u32* id = w.cta->id;
  string s = k.name.substr(0, 120) + ": block " + std::to_string(id[0]);
  if (w.cta->launch->grid.y > 1 || w.cta->launch->grid.z > 1)
    for (const u32 side : {id[1], id[2]}) s += ',', s += std::to_string(side);
  s += " warp " + std::to_string(w.id) + ", PTX line " + std::to_string(in.line);
  if (in.loc_file >= 0) {
    const auto file = k.files.find(in.loc_file);
    if (file != k.files.end()) s += " (" + file->second + ":" + std::to_string(in.loc_line) + ")";
  }
  return s + ": " + in.text.substr(0, 160);
}
void fail(const Warp& w, const Instruction& in, const string& what) { fail(what + " [" + where(w, in) + "]"); }

void sleep(Warp& w, Warp::State state) {
  vector<Warp*>& ready = w.cta->launch->ready;
  if (w.state == Warp::Run && w.ready_index >= 0) {
    ready.back()->ready_index = w.ready_index;
    ready[size_t(w.ready_index)] = ready.back();
    ready.pop_back();
    w.ready_index = -1;
  }
  w.state = state;
}
void wake(Warp& w) {
  if (w.state == Warp::Run || w.state == Warp::Done) return;
  w.state = Warp::Run;
  w.ready_index = int(w.cta->launch->ready.size());
  w.cta->launch->ready.push_back(&w);
}

namespace {
using Value = u64 (*)(const Warp& w, u32 lane);
u32 thread_of(const Warp& w, u32 lane) { return u32(w.id) * 32 + lane; }
u64 zero(const Warp&, u32) { return 0; }
u64 one(const Warp&, u32) { return 1; }

struct SpecialRegister {
  const char* name;
  Value value;
};
const SpecialRegister kSpecialRegisters[] = {
    {"%clock64", [](const Warp& w, u32) -> u64 { return w.cta->launch->executed; }},
    {"%tid.x", [](const Warp& w, u32 l) -> u64 { return thread_of(w, l) % w.cta->launch->block.x; }},
    {"%tid.y",
     [](const Warp& w, u32 l) -> u64 {
       const Dim3& b = w.cta->launch->block;
       return thread_of(w, l) / b.x % b.y;
     }},
    {"%tid.z",
     [](const Warp& w, u32 l) -> u64 {
       const Dim3& b = w.cta->launch->block;
       return thread_of(w, l) / (b.x * b.y);
     }},
    {"%ntid.x", [](const Warp& w, u32) -> u64 { return w.cta->launch->block.x; }},
    {"%ntid.y", [](const Warp& w, u32) -> u64 { return w.cta->launch->block.y; }},
    {"%ntid.z", [](const Warp& w, u32) -> u64 { return w.cta->launch->block.z; }},
    {"%ctaid.x", [](const Warp& w, u32) -> u64 { return w.cta->id[0]; }},
    {"%ctaid.y", [](const Warp& w, u32) -> u64 { return w.cta->id[1]; }},
    {"%ctaid.z", [](const Warp& w, u32) -> u64 { return w.cta->id[2]; }},
    {"%nctaid.x", [](const Warp& w, u32) -> u64 { return w.cta->launch->grid.x; }},
    {"%nctaid.y", [](const Warp& w, u32) -> u64 { return w.cta->launch->grid.y; }},
    {"%nctaid.z", [](const Warp& w, u32) -> u64 { return w.cta->launch->grid.z; }},
    {"%laneid", [](const Warp&, u32 l) -> u64 { return l; }},
    {"%warpid", [](const Warp& w, u32) -> u64 { return u64(w.id); }},
    {"%nwarpid", [](const Warp& w, u32) -> u64 { return w.cta->warps.size(); }},
    {"%smid", [](const Warp& w, u32) -> u64 { return w.cta->id[0] % u32(settings().multiprocessors); }},
    {"%nsmid", [](const Warp&, u32) -> u64 { return u64(settings().multiprocessors); }},
    {"%lanemask_eq", [](const Warp&, u32 l) -> u64 { return 1u << l; }},
    {"%lanemask_lt", [](const Warp&, u32 l) -> u64 { return (1u << l) - 1; }},
    {"%lanemask_le", [](const Warp&, u32 l) -> u64 { return u32((2ull << l) - 1); }},
    {"%lanemask_gt", [](const Warp&, u32 l) -> u64 { return u32(~((2ull << l) - 1)); }},
    {"%lanemask_ge", [](const Warp&, u32 l) -> u64 { return u32(~((1ull << l) - 1)); }},
    {"%dynamic_smem_size", [](const Warp& w, u32) -> u64 { return w.cta->launch->dynamic; }},
    {"%total_smem_size", [](const Warp& w, u32) -> u64 { return w.cta->shared_bytes; }},
    // A cluster lies along x.
    {"%cluster_ctarank", [](const Warp& w, u32) -> u64 { return u64(w.cta->rank); }},
    {"%cluster_nctarank", [](const Warp& w, u32) -> u64 { return u64(w.cta->launch->cluster); }},
    {"%cluster_ctaid.x", [](const Warp& w, u32) -> u64 { return u64(w.cta->rank); }},
    {"%cluster_ctaid.y", zero},
    {"%cluster_ctaid.z", zero},
    {"%cluster_nctaid.x", [](const Warp& w, u32) -> u64 { return u64(w.cta->launch->cluster); }},
    {"%cluster_nctaid.y", one},
    {"%cluster_nctaid.z", one},
    {"%clusterid.x", [](const Warp& w, u32) -> u64 { return w.cta->id[0] / u32(w.cta->launch->cluster); }},
    {"%clusterid.y", [](const Warp& w, u32) -> u64 { return w.cta->id[1]; }},
    {"%clusterid.z", [](const Warp& w, u32) -> u64 { return w.cta->id[2]; }},
    {"%nclusterid.x", [](const Warp& w, u32) -> u64 { return w.cta->launch->grid.x / u32(w.cta->launch->cluster); }},
    {"%nclusterid.y", [](const Warp& w, u32) -> u64 { return w.cta->launch->grid.y; }},
    {"%nclusterid.z", [](const Warp& w, u32) -> u64 { return w.cta->launch->grid.z; }},
    {"%is_explicit_cluster", [](const Warp& w, u32) -> u64 { return w.cta->launch->cluster > 1; }},
};
}  // namespace

int special_register(const string& name) {
  if (name == "%clock" || name == "%globaltimer" || name == "%globaltimer_lo") return kClock;
  int id = 0;
  for (const SpecialRegister& r : kSpecialRegisters) {
    if (name == r.name) return id;
    ++id;
  }
  return -1;
}
u64 special_value(const Warp& w, int id, int lane) { return kSpecialRegisters[id].value(w, u32(lane)); }

u64 address_of_symbol(const Warp& w, int symbol, int lane) {
  const Kernel& k = *w.cta->launch->kernel;
  const Symbol& s = k.symbols[size_t(symbol)];
  switch (s.space) {
    case kShared:
      return s.offset;
    case kLocal:
      return reinterpret_cast<u64>(w.local.data() + size_t(lane) * k.local_bytes) + s.offset;
    case kParam:
      return reinterpret_cast<u64>(w.cta->launch->params.get()) + s.offset;
    case kGlobal:
    case kConst:
      return reinterpret_cast<u64>(s.memory.get());
    default:
      return 0;
  }
}
}  // namespace ptxsim
