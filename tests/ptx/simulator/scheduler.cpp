#include "scheduler.h"

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <set>

#include "barriers.h"
#include "instructions.h"
#include "wgmma.h"

namespace ptxsim {
namespace {
void leave(Warp& w, u32 mask) {
  w.alive &= ~mask;
  if (w.alive) {
    w.together = false;
    return;
  }
  w.state = Warp::Done;
  Block& cta = *w.cta;
  if (!w.groups.empty() || !w.open.empty()) fail("a warp leaves with wgmma under way");
  ++cta.done, ++cta.cluster->done_warps, ++cta.launch->progress;
  check_cluster(*cta.cluster, *cta.launch);
}

// What runs now, for a fault of the host that a wrong address of the kernel makes.
const Warp* now_warp = nullptr;
const Instruction* now_instr = nullptr;

// Turns such a fault into an exception (compiled with -fnon-call-exceptions), as long as it lives.
class FaultsThrow {
 public:
  FaultsThrow() {
    struct sigaction action{};
    action.sa_handler = [](int) {
      if (now_warp && now_instr) fail(*now_warp, *now_instr, "an address that is not mapped");
      fail("an address that is not mapped");
    };
    action.sa_flags = SA_NODEFER;
    sigaction(SIGSEGV, &action, &segv_);
    sigaction(SIGBUS, &action, &bus_);
  }
  ~FaultsThrow() {
    sigaction(SIGSEGV, &segv_, nullptr);
    sigaction(SIGBUS, &bus_, nullptr);
    now_warp = nullptr, now_instr = nullptr;
  }
  FaultsThrow(const FaultsThrow&) = delete;
  FaultsThrow& operator=(const FaultsThrow&) = delete;

 private:
  struct sigaction segv_, bus_;
};

// One instruction of a warp.
void step(Warp& w) {
  Launch& l = *w.cta->launch;
  u32 mask;
  int pc;
  if (w.together)
    pc = w.at, mask = w.alive;
  else {
    pc = INT32_MAX;
    const u32 can = w.alive & ~w.parked;
    if (!can)
      fail("lanes of a warp wait at different instructions of the whole warp [" +
           w.cta->launch->kernel->name.substr(0, 100) + " block " + std::to_string(w.cta->id[0]) + " warp " +
           std::to_string(w.id) + "]");
    if ((l.rng() & 31) == 0) {
      int n = l.rng() % __builtin_popcount(can);
      u32 m = can;
      while (n--) m &= m - 1;
      pc = w.pc[__builtin_ctz(m)];
    } else
      for (u32 m = can; m; m &= m - 1) pc = std::min(pc, w.pc[__builtin_ctz(m)]);
    mask = 0;
    for (u32 m = w.alive; m; m &= m - 1)
      if (w.pc[__builtin_ctz(m)] == pc) mask |= 1u << __builtin_ctz(m);
  }
  const Instruction& in = l.kernel->code[pc];
  now_warp = &w, now_instr = &in;
  ++l.executed, ++w.count;
  u32 go = mask;
  if (in.pred >= 0) {
    go = 0;
    for (u32 m = mask; m; m &= m - 1) {
      const int lane = __builtin_ctz(m);
      if ((w.R[in.pred * 32 + lane] != 0) != in.pred_neg) go |= 1u << lane;
    }
  }
  auto advance = [&](u32 lanes, int to) {
    if (w.together && lanes == w.alive) {
      w.at = to;
      return;
    }
    if (w.together) {
      for (u32 m = w.alive; m; m &= m - 1) w.pc[__builtin_ctz(m)] = w.at;
      w.together = false;
    }
    for (u32 m = lanes; m; m &= m - 1) w.pc[__builtin_ctz(m)] = to;
  };
  auto rejoin = [&] {
    if (w.together || !w.alive) return;
    const int first = w.pc[__builtin_ctz(w.alive)];
    for (u32 m = w.alive; m; m &= m - 1)
      if (w.pc[__builtin_ctz(m)] != first) return;
    w.together = true, w.at = first, w.parked = 0;
  };
  switch (in.flow) {
    case kBranch: {
      const u32 stay = mask & ~go;
      if (!stay)
        advance(go, in.target);
      else if (!go)
        advance(stay, pc + 1);
      else {
        advance(go, in.target);
        advance(stay, pc + 1);
      }
      rejoin();
      return;
    }
    case kBrx: {
      if (w.together) {
        for (u32 m = w.alive; m; m &= m - 1) w.pc[__builtin_ctz(m)] = w.at;
        w.together = false;
      }
      for (u32 m = mask; m; m &= m - 1) {
        const int lane = __builtin_ctz(m);
        w.pc[lane] = go >> lane & 1 ? in.targets.at(u32(raw(w, in.ops[0], lane))) : pc + 1;
      }
      rejoin();
      return;
    }
    case kExit: {
      if (w.together && go != w.alive) {
        for (u32 m = w.alive; m; m &= m - 1) w.pc[__builtin_ctz(m)] = w.at;
        w.together = false;
      }
      if (mask & ~go) advance(mask & ~go, pc + 1);
      leave(w, go);
      rejoin();
      return;
    }
    case kTrap:
      if (go) fail(w, in, "trap");
      advance(mask, pc + 1);
      rejoin();
      return;
    case kPlain:
      break;
  }
  if (in.whole && go) {
    u32 wanted = w.alive;
    if (in.run == run_shfl || in.run == run_vote || in.run == run_match || in.run == run_redux || in.run == run_elect) {
      const Operand& m = in.ops.back();
      if (m.kind == Operand::Imm || m.kind == Operand::Reg) wanted &= u32(raw(w, m, __builtin_ctz(go)));
    }
    if (go != mask && (go & wanted) != wanted)
      fail(w, in, "a warp-wide instruction under a predicate that not all lanes have");
    if ((go & wanted) != wanted) {  // the others have to come
      if (w.together) fail(w, in, "a warp-wide instruction");
      w.parked |= mask;
      return;
    }
    if (go & ~wanted) {  // lanes outside the mask operand go by themselves
      if (in.run != run_shfl && in.run != run_vote && in.run != run_elect && in.run != run_redux && in.run != run_match)
        fail(w, in, "a warp-wide instruction");
    }
    w.parked &= ~mask;
  }
  if (go) in.run(w, in, go);
  if (w.state == Warp::Done) return;
  advance(mask, pc + 1);
  rejoin();
}
}  // namespace

void run(const Kernel& kernel, Dim3 grid, Dim3 block, size_t dynamic, int cluster, const vector<u8>& params) {
  Settings& rt = settings();
  auto launch = std::make_unique<Launch>();
  Launch& l = *launch;
  l.kernel = &kernel, l.grid = grid, l.block = block, l.dynamic = dynamic, l.cluster = cluster;
  l.rng.seed(rt.seed * 1000003 + rt.launches++);
  l.params.reset(static_cast<u8*>(aligned_alloc(256, (params.size() + 511) / 256 * 256)), free);
  memcpy(l.params.get(), params.data(), params.size());
  const int threads = block.x * block.y * block.z, warps = (threads + 31) / 32;
  const size_t total =
      (kernel.shared_bytes + kernel.dynamic_align - 1) / kernel.dynamic_align * kernel.dynamic_align + dynamic;
  const u64 blocks = u64(grid.x) * grid.y * grid.z;
  const int at_once =
      std::max(1, rt.multiprocessors *
                      std::max(1, std::min(int(2048 / threads), total ? int((228u << 10) / total) : 8)) / cluster);
  u64 next = 0;
  auto start = [&] {
    auto c = std::make_unique<Cluster>();
    for (int r = 0; r < cluster; ++r) {
      auto cta = std::make_unique<Block>();
      cta->launch = &l, cta->cluster = c.get(), cta->rank = r;
      const u64 b = next++;
      cta->id[0] = b % grid.x, cta->id[1] = b / grid.x % grid.y, cta->id[2] = b / (u64(grid.x) * grid.y);
      cta->memory.resize(total + 1024);
      cta->shared = cta->memory.data() + (1024 - reinterpret_cast<u64>(cta->memory.data()) % 1024) % 1024;
      cta->shared_bytes = total;
      cta->written.assign(total, 0);
      for (size_t i = 0; i < total; ++i) cta->shared[i] = u8(0xA5 + 7 * i);
      for (int i = 0; i < warps; ++i) {
        auto w = std::make_unique<Warp>();
        w->cta = cta.get(), w->id = i;
        const int n = std::min(32, threads - 32 * i);
        w->alive = n == 32 ? ~0u : (1u << n) - 1;
        w->R.assign(size_t(kernel.registers) * 32, 0xdeadbeefdeadbeefull);
        if (kernel.local_bytes) w->local.assign(32, vector<u8>(kernel.local_bytes + 16));
        cta->warps.push_back(std::move(w));
      }
      c->warps += warps;
      c->ctas.push_back(std::move(cta));
    }
    l.live.push_back(std::move(c));
  };
  const FaultsThrow faults;
  vector<Warp*> ready;
  u64 idle = 0, last = 0;
  while (next < blocks || !l.live.empty()) {
    while (next < blocks && int(l.live.size()) < at_once) start();
    ready.clear();
    for (auto& c : l.live)
      for (auto& cta : c->ctas)
        for (auto& w : cta->warps)
          if (w->state == Warp::Run) ready.push_back(w.get());
    if (!l.copies.empty() && (ready.empty() || (l.rng() & 3) == 0 || idle > 64)) {
      const size_t i = l.rng() % l.copies.size();
      auto copy = l.copies[i];
      l.copies.erase(l.copies.begin() + i);
      copy();
      continue;
    }
    if (ready.empty()) {
      string what = "deadlock in " + kernel.name.substr(0, 100) + ":";
      for (auto& c : l.live)
        for (auto& cta : c->ctas)
          for (auto& w : cta->warps)
            if (w->state != Warp::Done)
              what += " block " + std::to_string(cta->id[0]) + " warp " + std::to_string(w->id) +
                      (w->state == Warp::Bar     ? " at barrier " + std::to_string(w->bar)
                       : w->state == Warp::Group ? " for its warpgroup"
                                                 : " at the cluster's barrier") +
                      ";";
      fail(what.substr(0, 1500));
    }
    Warp& w = *ready[l.rng() % ready.size()];
    if (!w.groups.empty() && (l.rng() & 3) == 0) finish_group(w);
    int quantum = 1 << (l.rng() % 9);
    w.polled = false;
    while (quantum-- > 0 && w.state == Warp::Run) {
      step(w);
      if (w.polled) break;
    }
    if (l.progress != last)
      last = l.progress, idle = 0;
    else if (w.polled) {
      if (++idle > 200000) {
        string what = "everybody polls, nobody comes further, in " + kernel.name.substr(0, 100) + ":";
        for (auto& c : l.live)
          for (auto& cta : c->ctas)
            for (auto& x : cta->warps)
              if (x->state != Warp::Done)
                what += " block " + std::to_string(cta->id[0]) + " warp " + std::to_string(x->id) + " line " +
                        std::to_string(l.kernel->code[x->together ? x->at : x->pc[__builtin_ctz(x->alive)]].line) + ";";
        fail(what.substr(0, 2500));
      }
    }
    for (size_t i = 0; i < l.live.size();) {
      Cluster& c = *l.live[i];
      if (c.done_warps == c.warps) {
        l.live[i] = std::move(l.live.back());
        l.live.pop_back();
      } else
        ++i;
    }
  }
  if (!l.copies.empty()) fail("bulk copies under way when the kernel ends: " + kernel.name);
}

Settings& settings() {
  static Settings s;
  return s;
}
}  // namespace ptxsim
