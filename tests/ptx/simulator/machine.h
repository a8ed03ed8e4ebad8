// The state of a running launch, and how instructions read and write their operands.
#pragma once
#include <deque>
#include <functional>
#include <memory>
#include <random>

#include "program.h"

namespace ptxsim {
struct Dim3 {
  u32 x = 1, y = 1, z = 1;
};

struct Launch;
struct Cluster;

struct Pending {  // one wgmma
  const Instruction* in;
  u64 desc_a, desc_b;
  u32 a_regs[4][32];
  bool a_in_regs;
  bool scale_d;
  int imm_a, imm_b, tnsp_a, tnsp_b;
};

struct Block {
  Launch* launch;
  Cluster* cluster;
  int rank;
  u32 id[3];
  vector<u8> memory;
  vector<u8> written;  // a flag a byte
  u8* shared = nullptr;
  size_t shared_bytes = 0;
  struct Named {
    int arrived = 0, expected = 0;
    u32 generation = 0;
  } bars[16];
  vector<std::unique_ptr<Warp>> warps;
  int done = 0;
};

struct Cluster {
  vector<std::unique_ptr<Block>> ctas;
  int arrived = 0;
  u32 generation = 0;
  int warps = 0, done_warps = 0;
};

struct Warp {
  Block* cta;
  int id;
  u32 alive = 0, parked = 0;
  vector<u64> R;
  int pc[32];
  bool together = true;
  int at = 0;
  enum State : u8 { Run, Bar, ClusterWait, Group, Done } state = Run;  // Group: for the warpgroup's other warps
  u64 committed = 0, finished = 0, wanted = 0;  // groups of wgmma; the warpgroup's tensor cores go together
  int bar = 0;
  u32 generation = 0;          // waited for
  u32 cluster_generation = 0;  // of the last arrival
  bool polled = false;
  vector<std::vector<u8>> local;
  vector<Pending> open;
  std::deque<vector<Pending>> groups;
  u64 count = 0;
};

struct Copy {  // a bulk tensor copy under way
  Block* to;
  vector<std::pair<u32, u8>> unused;
  u32 dst, mbar;
  u32 bytes;
  std::function<void()> land;
};

struct Launch {
  const Kernel* kernel;
  Dim3 grid, block;
  size_t dynamic;
  int cluster;
  std::shared_ptr<u8> params;
  std::mt19937_64 rng;
  vector<std::unique_ptr<Cluster>> live;
  std::deque<std::function<void()>> copies;
  u64 executed = 0, progress = 0;
};

string where(const Warp& w, const Instruction& in);
[[noreturn]] void fail(const Warp& w, const Instruction& in, const string& what);

// The value of a special register, and of a symbol (an address), in one lane.
u64 special(const Warp& w, int id, int lane);
u64 symbol_value(const Warp& w, int sym, int lane);
u64 slow_value(const Warp& w, const Operand& o, int lane);
extern const std::map<string, int> kSpecials;

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

inline u64 raw(const Warp& w, const Operand& o, int lane) {
  if (o.kind == Operand::Reg) return w.R[o.reg * 32 + lane];
  if (o.kind == Operand::Imm) return o.imm;
  return slow_value(w, o, lane);
}
template <class T>
inline T get(const Warp& w, const Operand& o, int lane) {
  u64 v = raw(w, o, lane);
  T t;
  memcpy(&t, &v, sizeof t);
  return t;
}
inline bool truth(const Warp& w, const Operand& o, int lane) { return (raw(w, o, lane) != 0) != o.neg; }
template <class T>
inline void put(Warp& w, const Operand& o, int lane, T value) {
  if (o.kind == Operand::Sink) return;
  u64 v = 0;
  memcpy(&v, &value, sizeof value);
  w.R[o.reg * 32 + lane] = v;
}
inline void put_raw(Warp& w, const Operand& o, int lane, u64 v) {
  if (o.kind != Operand::Sink) w.R[o.reg * 32 + lane] = v;
}
}  // namespace ptxsim
