// The state of a running launch, and how instructions read and write their operands.
#pragma once
#include <deque>
#include <functional>
#include <random>

#include "global_memory.h"
#include "program.h"

namespace ptxsim {
struct Dim3 {
  u32 x = 1, y = 1, z = 1;
  u64 count() const { return u64(x) * y * z; }
};

struct Launch;
struct Cluster;

struct Product {  // one wgmma of a warp, from its issue until it has read shared memory
  const Instruction* in;
  u64 a, b;  // descriptors
  bool a_in_registers, scale_d, a_transposed, b_transposed;
  int scale_a, scale_b;
  u32 a_registers[4][32];
};

struct Copy {  // cp.async of a warp, from its issue until it lands
  struct Lane {
    int lane;
    u64 to, from;
    u32 bytes;  // read; the rest is zeros
  };
  u32 bytes;  // written, a lane
  vector<Lane> lanes;
};

struct BulkStore {  // from shared to global memory, until its group is waited for
  std::function<void()> run;
};
struct BulkLoad {  // to shared memory, until it lands
  const Cluster* to;
  std::function<void()> land;
};

struct NamedBarrier {
  int arrived = 0, expected = 0;
  u32 generation = 0;
  int votes = 0;  // bar.red
};

struct Block {
  Launch* launch;
  Cluster* cluster;
  int rank;
  u32 id[3];
  vector<u8> memory;
  u8* shared = nullptr;
  size_t shared_bytes = 0;
  vector<u8> written;      // a flag a byte
  vector<u8> async_view;   // what wgmma and bulk copies see of shared memory; empty if the kernel has neither
  vector<u8> unpublished;  // a flag a byte that only the generic view has
  vector<std::pair<u32, u32>> unpublished_ranges;  // of warps that have met the others since
  NamedBarrier barriers[16];
  vector<std::unique_ptr<Warp>> warps;
  int done = 0;
  bool finished() const { return done == int(warps.size()); }
  int spare_registers = 0;  // of a lane, that warps gave back
  StoreBuffer stores;       // global memory that other blocks do not see yet
  u64 acquired = 0;         // no load returns what was overwritten before this time
};

struct Cluster {
  vector<std::unique_ptr<Block>> ctas;
  int arrived = 0;
  u32 generation = 0;
  int warps = 0, done_warps = 0;
};

struct Warp {
  enum State : u8 { Run, AtBarrier, AtCluster, AtWarpgroup, AtMBarrier, AtRegisters, Done };
  Block* cta;
  int id;
  State state = Run;
  bool together = true, polled = false;
  int at = 0;                 // the next instruction, of lanes that are together
  u32 alive = 0, parked = 0;  // parked: at an instruction of the whole warp that others do not reach yet
  u32 behind = 0;             // lanes that stay where they are while the others go ahead
  u64* R = nullptr;           // 32 lanes a register
  vector<u64> registers;
  int pc[32] = {};
  int ready_index = -1;
  int most_registers = 0, wanted_registers = 0;  // setmaxnreg, of a lane
  // wgmma
  u64 committed = 0, finished = 0, wanted = 0;  // groups; the warpgroup's tensor cores go together
  bool fenced = false;                          // wgmma.fence since the last group
  vector<Product> open;
  std::deque<vector<Product>> groups;
  // barriers
  int bar = 0;
  u32 generation = 0;  // waited for
  int vote_register = -1, vote_kind = 0;
  u32 cluster_generation = 0;  // of the last arrival
  bool cluster_arrived = false;
  const u8* mbarrier = nullptr;
  // copies
  vector<Copy> copies_open;
  std::deque<vector<Copy>> copy_groups;
  vector<BulkStore> bulk_open;
  std::deque<vector<BulkStore>> bulk_groups;
  vector<std::pair<u32, u32>> unpublished;  // shared memory written without a fence of the async proxy
  vector<u8> local;
};

struct Settings {
  u64 seed = 1;
  int multiprocessors = 8;
  u64 launches = 0, seeded_at = 0;  // so far, and when the seed was set, from when on every launch is reproducible
  bool truncates = false;           // tensor cores, the sums of products
  Settings();
};
Settings& settings();

struct Launch {
  const Kernel* kernel;
  Dim3 grid, block;
  size_t dynamic;
  int cluster;
  std::shared_ptr<u8> params;
  std::mt19937_64 rng;
  vector<std::unique_ptr<Cluster>> live;
  vector<Warp*> ready;
  vector<Warp*> at_mbarriers;
  vector<BulkLoad> copies;
  GlobalMemory global;
  u64 executed = 0, progress = 0;
  bool one_in(u32 n) { return rng() % n == 0; }
};

string where(const Warp& w, const Instruction& in);
[[noreturn]] void fail(const Warp& w, const Instruction& in, const string& what);
[[noreturn]] inline void unknown(const Warp& w, const Instruction& in) {
  fail(w, in, "an instruction or a type that the simulator does not know");
}

// A warp that waits is not in the launch's list of warps that can run.
void sleep(Warp& w, Warp::State state);
void wake(Warp& w);

// The number of a special register such as "%tid.x", -1 where there is none, and its value in one lane.
int special_register(const string& name);
constexpr int kClock = 0;
u64 special_value(const Warp& w, int id, int lane);
u64 address_of_symbol(const Warp& w, int symbol, int lane);

constexpr u32 kAllLanes = ~0u;

// The set bits of a mask, lowest first.
struct lanes {
  u32 mask;
  explicit lanes(u32 m) : mask(m) {}
  struct iterator {
    u32 rest;
    int operator*() const { return __builtin_ctz(rest); }
    void operator++() { rest &= rest - 1; }
    bool operator!=(const iterator& other) const { return rest != other.rest; }
  };
  iterator begin() const { return {mask}; }
  iterator end() const { return {0}; }
};

// The 32 lanes of an operand.
inline u64* lanes_of(const Warp& w, const Operand& o) { return w.R + size_t(o.reg) * 32; }
inline u64 raw(const Warp& w, const Operand& o, int lane) { return w.R[size_t(o.reg) * 32 + size_t(lane)]; }
template <class T>
inline T get(const Warp& w, const Operand& o, int lane) {
  return from_bits<T>(raw(w, o, lane));
}
inline bool truth(const Warp& w, const Operand& o, int lane) { return (raw(w, o, lane) != 0) != o.negated; }
inline void put_raw(Warp& w, const Operand& o, int lane, u64 v) { w.R[size_t(o.reg) * 32 + size_t(lane)] = v; }
template <class T>
inline void put(Warp& w, const Operand& o, int lane, T value) {
  put_raw(w, o, lane, to_bits(value));
}
// Element i of a vector operand, or the operand itself.
inline const Operand& part(const Operand& o, int i) { return o.kind == Operand::Vector ? o.parts[size_t(i)] : o; }
}  // namespace ptxsim
