#include "scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <csignal>
#include <numeric>

#include "barriers.h"
#include "copies.h"
#include "wgmma.h"

namespace ptxsim {
namespace {
constexpr u64 kPatience = 200000;  // turns of warps that only poll before it is a deadlock
constexpr u32 kTogether = 8;       // of so many occasions one parts the lanes of a warp

// What runs now, for a fault of the host that a wrong address of the kernel makes.
const Warp* now_warp = nullptr;
const Instruction* now_instruction = nullptr;

// Turns such a fault into an exception (compiled with -fnon-call-exceptions), as long as it lives.
class FaultsThrow {
 public:
  FaultsThrow() {
    struct sigaction action{};
    action.sa_handler = [](int) {
      if (now_warp && now_instruction) fail(*now_warp, *now_instruction, "an address that is not mapped");
      fail("an address that is not mapped");
    };
    action.sa_flags = SA_NODEFER;
    sigaction(SIGSEGV, &action, &segv_);
    sigaction(SIGBUS, &action, &bus_);
  }
  ~FaultsThrow() {
    sigaction(SIGSEGV, &segv_, nullptr);
    sigaction(SIGBUS, &bus_, nullptr);
    now_warp = nullptr, now_instruction = nullptr;
  }
  FaultsThrow(const FaultsThrow&) = delete;
  FaultsThrow& operator=(const FaultsThrow&) = delete;

 private:
  struct sigaction segv_, bus_;
};

// ---- one instruction of a warp

void leave(Warp& w, const Instruction& in, u32 mask) {
  w.alive &= ~mask;
  if (w.alive) return;
  if (!w.groups.empty() || !w.open.empty()) fail(w, in, "a warp leaves with wgmma under way");
  if (!w.bulk_groups.empty() || !w.bulk_open.empty())
    fail(w, in, "a warp leaves with bulk copies under way that read shared memory");
  land_all(w);
  hand_over_unpublished(w);
  sleep(w, Warp::Done);
  Block& cta = *w.cta;
  Launch& l = *cta.launch;
  ++cta.done, ++cta.cluster->done_warps, ++l.progress;
  if (cta.finished()) l.global.leave(cta);
  check_cluster(*cta.cluster, l);
}

void scatter(Warp& w) {  // every lane goes by itself
  if (!w.together) return;
  for (const int lane : lanes(w.alive)) w.pc[lane] = w.at;
  w.together = false;
}
// Loops over all lanes, whichever are meant, are what compilers make vectors of.
void go_to(Warp& w, u32 mask, int to) {
  if (w.together && mask == w.alive) {
    w.at = to;
    return;
  }
  scatter(w);
  for (int lane = 0; lane < 32; ++lane) w.pc[lane] = mask >> lane & 1 ? to : w.pc[lane];
}
u32 lanes_at(const Warp& w, u32 mask, int pc) {
  u32 there = 0;
  for (int lane = 0; lane < 32; ++lane) there |= u32(w.pc[lane] == pc) << lane;
  return there & mask;
}
int first_pc(const Warp& w, u32 mask) {
  int first = INT32_MAX;
  for (int lane = 0; lane < 32; ++lane) first = std::min(first, mask >> lane & 1 ? w.pc[lane] : INT32_MAX);
  return first;
}
void rejoin(Warp& w) {
  if (w.together || !w.alive) return;
  const int first = w.pc[__builtin_ctz(w.alive)];
  if (lanes_at(w, w.alive, first) != w.alive) return;
  w.together = true, w.at = first, w.parked = w.behind = 0;
}

u32 guard(const Warp& w, const Instruction& in, u32 mask) {
  if (in.pred < 0) return mask;
  const u64* p = w.R + size_t(in.pred) * 32;
  u32 set = 0;
  for (int lane = 0; lane < 32; ++lane) set |= u32(p[lane] != 0) << lane;
  return mask & (in.negated ? ~set : set);
}

// The lanes that go together next, and where they are.
u32 next_lanes(Warp& w, int& pc) {
  if (w.together) {
    pc = w.at;
    return w.alive;
  }
  Launch& l = *w.cta->launch;
  if (!(w.alive & ~w.parked & ~w.behind)) w.behind = 0;
  const u32 can = w.alive & ~w.parked & ~w.behind;
  if (!can) {
    const int a = w.pc[__builtin_ctz(w.alive)];
    fail(w, l.kernel->code[size_t(a)], "lanes of a warp wait at different instructions of the whole warp");
  }
  if (l.one_in(32)) {
    u32 m = can;
    for (u64 n = l.rng() % u64(__builtin_popcount(can)); n > 0; --n) m &= m - 1;
    pc = w.pc[__builtin_ctz(m)];
  } else
    pc = first_pc(w, can);
  return lanes_at(w, w.alive & ~w.behind, pc);
}

// Lanes of a warp need not go together between instructions of the whole warp: some stay behind for a while.
void part(Warp& w) {
  Launch& l = *w.cta->launch;
  if (!w.together) {
    if (l.one_in(2)) w.behind = 0;
  } else if (l.one_in(kTogether)) {
    scatter(w);
    w.behind = w.alive & u32(l.rng());
  }
}

// Whether an instruction of the whole warp can go on; else its lanes wait for the others.
bool gathered(Warp& w, const Instruction& in, u32 mask, u32 go) {
  u32 wanted = w.alive;
  if (in.masked) {
    const u32 members = u32(raw(w, in.ops.back(), __builtin_ctz(go)));
    for (const int lane : lanes(go)) {
      if (!(members >> lane & 1)) fail(w, in, "a lane that is not in the mask");
      if (u32(raw(w, in.ops.back(), lane)) != members) fail(w, in, "lanes with different masks, which is not modelled");
    }
    wanted &= members;
  }
  if ((go & wanted) != wanted) {
    if (go != mask) fail(w, in, "a warp-wide instruction under a predicate that not all lanes have");
    if (w.together) fail(w, in, "a warp-wide instruction that lanes of its mask do not reach");
    w.parked |= mask;
    return false;
  }
  w.parked &= ~mask;
  return true;
}

void step(Warp& w, Launch& l) {
  int pc;
  const u32 mask = next_lanes(w, pc);
  const Instruction& in = l.kernel->code[size_t(pc)];
  now_instruction = &in;
  ++l.executed;
  const u32 go = guard(w, in, mask);
  switch (in.flow) {
    case kPlain:
      if (go) {
        if (in.whole && !gathered(w, in, mask, go)) return;
        in.run(w, in, go);
      }
      if (w.together && mask == w.alive) {
        w.at = pc + 1;
        if (in.whole && w.state == Warp::Run) part(w);
        return;
      }
      go_to(w, mask, pc + 1);
      break;
    case kBranch: {
      const u32 stay = mask & ~go;
      if (go) go_to(w, go, in.target);
      if (stay) go_to(w, stay, pc + 1);
      break;
    }
    case kBranchTable:
      scatter(w);
      for (const int lane : lanes(mask)) {
        const u32 i = u32(raw(w, in.ops[0], lane));
        if ((go >> lane & 1) && i >= in.targets.size()) fail(w, in, "a branch beyond its table of labels");
        w.pc[lane] = go >> lane & 1 ? in.targets[i] : pc + 1;
      }
      break;
    case kExit:
      if (go != w.alive) scatter(w);
      if (mask & ~go) go_to(w, mask & ~go, pc + 1);
      leave(w, in, go);
      break;
    case kTrap:
      if (go) fail(w, in, "trap");
      go_to(w, mask, pc + 1);
      break;
  }
  rejoin(w);
}

// ---- a launch

class Scheduler {
 public:
  Scheduler(Launch& l, size_t shared_bytes) : l_(l), shared_bytes_(shared_bytes) {
    const u64 threads = l.block.count();
    warps_ = (threads + 31) / 32;
    const u64 by_threads = 2048 / threads, by_memory = shared_bytes ? (228u << 10) / shared_bytes : 8;
    const u64 each = std::max<u64>(1, std::min<u64>(std::min(by_threads, by_memory), 32));
    at_once_ = std::max<u64>(1, u64(settings().multiprocessors) * each / u64(l.cluster));
    draw_order();
  }
  void run();

 private:
  void draw_order();
  void start_cluster();
  void start_warp(Block& cta, u64 id, u64 threads);
  void land_copy(size_t i);
  void late_effects(Warp& w);
  void turn(Warp& w);
  void retire();
  [[noreturn]] void stuck(const string& what) const;

  Launch& l_;
  size_t shared_bytes_;
  u64 warps_, at_once_, idle_ = 0, last_progress_ = 0;
  vector<u64> waiting_;  // clusters that have not started, the next one last
  // Turns until a product or a bulk copy is there that may be late, on average: launches are hasty and slow in turn.
  const u32 products_wait_ = 1u << (2 * (l_.rng() % 4)), copies_wait_ = 1u << (2 * (l_.rng() % 4));
  vector<vector<u64>> spare_registers_;
};

void Scheduler::start_warp(Block& cta, u64 id, u64 threads) {
  auto w = std::make_unique<Warp>();
  const Kernel& k = *l_.kernel;
  w->cta = &cta, w->id = int(id);
  w->alive = u32(low_bits(int(std::min<u64>(32, threads - 32 * id))));
  const bool used = !spare_registers_.empty();
  if (used) {
    w->registers = std::move(spare_registers_.back());
    spare_registers_.pop_back();
  } else
    w->registers.assign(size_t(k.registers) * 32, 0xdeadbeefdeadbeefull);
  w->R = w->registers.data();
  w->local.resize(k.local_bytes * 32);
  w->most_registers = k.most_registers;
  for (const Constant& c : k.constants) {
    u64* lane = w->R + size_t(c.reg) * 32;
    if (c.kind == Constant::Value) {
      if (!used) std::fill_n(lane, 32, c.value);
    } else
      for (int i = 0; i < 32; ++i)
        lane[i] = c.kind == Constant::Special ? special_value(*w, c.id, i) : address_of_symbol(*w, c.id, i) + c.value;
  }
  w->ready_index = int(l_.ready.size());
  l_.ready.push_back(w.get());
  cta.warps.push_back(std::move(w));
}

// A GPU promises no order in which clusters start: launches go up, down or any way.
void Scheduler::draw_order() {
  waiting_.resize(l_.grid.count() / u64(l_.cluster));
  std::iota(waiting_.rbegin(), waiting_.rend(), 0);
  const u64 way = l_.rng() % 4;
  if (way == 0) return;
  if (way == 1) {
    std::reverse(waiting_.begin(), waiting_.end());
    return;
  }
  for (size_t i = waiting_.size(); i > 1; --i) std::swap(waiting_[i - 1], waiting_[l_.rng() % i]);
}

void Scheduler::start_cluster() {
  auto c = std::make_unique<Cluster>();
  const u64 first = waiting_.back() * u64(l_.cluster);
  waiting_.pop_back();
  for (int rank = 0; rank < l_.cluster; ++rank) {
    auto cta = std::make_unique<Block>();
    cta->launch = &l_, cta->cluster = c.get(), cta->rank = rank;
    const u64 b = first + u64(rank);
    cta->id[0] = u32(b % l_.grid.x), cta->id[1] = u32(b / l_.grid.x % l_.grid.y);
    cta->id[2] = u32(b / (u64(l_.grid.x) * l_.grid.y));
    cta->memory.resize(shared_bytes_ + 1024);
    cta->shared = cta->memory.data() + (1024 - reinterpret_cast<u64>(cta->memory.data()) % 1024) % 1024;
    cta->shared_bytes = shared_bytes_;
    cta->written.assign(shared_bytes_ + 8, 0);
    for (size_t i = 0; i < shared_bytes_; ++i) cta->shared[i] = u8(0xA5 + 7 * i);
    if (l_.kernel->reads_asynchronously) {
      cta->async_view.assign(cta->shared, cta->shared + shared_bytes_);
      cta->unpublished.assign(shared_bytes_, 0);
    }
    c->ctas.push_back(std::move(cta));
  }
  for (const auto& cta : c->ctas) {
    cta->warps.reserve(warps_);
    for (u64 i = 0; i < warps_; ++i) start_warp(*cta, i, l_.block.count());
  }
  c->warps = int(warps_) * l_.cluster;
  l_.live.push_back(std::move(c));
}

void Scheduler::land_copy(size_t i) {
  std::swap(l_.copies[i], l_.copies.back());
  const BulkLoad copy = std::move(l_.copies.back());
  l_.copies.pop_back();
  copy.land();
}

// What may happen at any time does.
void Scheduler::late_effects(Warp& w) {
  const u64 r = l_.rng();
  if (!w.groups.empty() && l_.one_in(products_wait_)) finish_oldest_group(w);
  if ((!w.copies_open.empty() || !w.copy_groups.empty()) && (r >> 2 & 3) == 0) land_some(w);
  if (!w.bulk_groups.empty() && (r >> 4 & 3) == 0) {
    for (const BulkStore& copy : w.bulk_groups.front()) copy.run();
    w.bulk_groups.front().clear();
  }
  if (l_.global.late && (r >> 6 & 15) == 0) {
    l_.global.drain_some(*w.cta, r >> 16);
    l_.global.drain_left(r >> 16);
  }
}

void Scheduler::stuck(const string& what) const {
  string s = what + " in " + l_.kernel->name.substr(0, 120) + ":";
  for (const auto& c : l_.live)
    for (const auto& cta : c->ctas)
      for (const auto& w : cta->warps) {
        if (w->state == Warp::Done) continue;
        s += " block " + std::to_string(cta->id[0]) + " warp " + std::to_string(w->id);
        switch (w->state) {
          case Warp::AtBarrier:
            s += " at barrier " + std::to_string(w->bar);
            break;
          case Warp::AtCluster:
            s += " at the cluster's barrier";
            break;
          case Warp::AtWarpgroup:
            s += " for its warpgroup";
            break;
          case Warp::AtRegisters:
            s += " for registers";
            break;
          case Warp::AtMBarrier: {
            const Block* of = block_of(*w, w->mbarrier);
            s += " at the mbarrier at byte " + std::to_string(w->mbarrier - of->shared);
            if (of != cta.get()) s += " of block " + std::to_string(of->id[0]);
            break;
          }
          default:
            break;
        }
        const int pc = w->together || !w->alive ? w->at : w->pc[__builtin_ctz(w->alive)];
        s += ", PTX line " + std::to_string(l_.kernel->code[size_t(pc)].line) + ";";
        if (s.size() > 2500) fail(s);
      }
  fail(s);
}

void Scheduler::turn(Warp& w) {
  late_effects(w);
  part(w);
  now_warp = &w;
  w.polled = false;
  int quantum = 1 << (l_.rng() % 9);
  while (quantum-- > 0 && w.state == Warp::Run && !w.polled) step(w, l_);
  now_warp = nullptr;
  if (l_.progress != last_progress_)
    last_progress_ = l_.progress, idle_ = 0;
  else if (w.polled && ++idle_ > kPatience)
    stuck("deadlock (everybody polls, nobody comes further)");
}

void Scheduler::retire() {
  for (size_t i = 0; i < l_.live.size();) {
    Cluster& c = *l_.live[i];
    if (c.done_warps < c.warps) {
      ++i;
      continue;
    }
    for (size_t copy = 0; copy < l_.copies.size(); ++copy)
      if (l_.copies[copy].to == &c) land_copy(copy);  // which fails
    for (const auto& cta : c.ctas)
      for (const auto& w : cta->warps) spare_registers_.push_back(std::move(w->registers));
    l_.live[i] = std::move(l_.live.back());
    l_.live.pop_back();
  }
}

void Scheduler::run() {
  while (!waiting_.empty() || !l_.live.empty()) {
    while (!waiting_.empty() && l_.live.size() < at_once_) start_cluster();
    if (!l_.copies.empty() && (l_.ready.empty() || l_.one_in(copies_wait_) || idle_ > 64)) {
      land_copy(l_.rng() % l_.copies.size());
      continue;
    }
    if (l_.ready.empty()) stuck("deadlock");
    turn(*l_.ready[l_.rng() % l_.ready.size()]);
    retire();
  }
}
// For parameters: PTX may hold their addresses in 32 bits before cvta.param makes generic ones of them.
std::shared_ptr<u8> parameter_memory(size_t bytes) {
#ifdef MAP_32BIT
  constexpr int kBelow = MAP_32BIT;
#else
  constexpr int kBelow = 0;
#endif
  void* const at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | kBelow, -1, 0);
  if (at == MAP_FAILED) fail("no memory for the parameters of a launch");
  return {static_cast<u8*>(at), [bytes](u8* memory) { munmap(memory, bytes); }};
}
}  // namespace

void run(const Kernel& kernel, Dim3 grid, Dim3 block, int cluster, size_t dynamic_bytes, const vector<u8>& params) {
  Launch l;
  l.kernel = &kernel, l.grid = grid, l.block = block, l.dynamic = dynamic_bytes, l.cluster = cluster;
  l.params = parameter_memory(params.size() + 1);
  memcpy(l.params.get(), params.data(), params.size());
  l.rng.seed(settings().seed * 1000003 + settings().launches++ - settings().seeded_at);
  l.global.late = grid.count() > 1;
  const size_t align = kernel.dynamic_align;
  const FaultsThrow faults;
  Scheduler(l, (kernel.shared_bytes + align - 1) / align * align + dynamic_bytes).run();
  if (!l.copies.empty()) fail("bulk copies under way when the kernel ends: " + kernel.name);
  l.global.drain_all_left();
}
}  // namespace ptxsim
