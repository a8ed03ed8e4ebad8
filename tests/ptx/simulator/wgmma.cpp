// Products of a warpgroup: factors in shared memory, named by descriptors, read at any time until the wait.
#include "wgmma.h"

#include "matrix.h"
#include "memory.h"

namespace ptxsim {
namespace {
// Byte of element (mn, k) of a factor that a descriptor names; `size` bytes an element, 4 along k only.
u32 factor_at(u64 desc, bool mn_major, int mn, int k, int size) {
  const u32 start = (desc & 0x3fff) << 4, lbo = (desc >> 16 & 0x3fff) << 4, sbo = (desc >> 32 & 0x3fff) << 4;
  const int kind = desc >> 62 & 3;
  static const u32 span[4] = {16, 128, 64, 32};
  const u32 bytes = span[kind];
  u32 off;
  if (!mn_major) {
    if (kind == 0)
      off = (mn % 8) * 16 + (mn / 8) * sbo + (k * size / 16) * lbo + k * size % 16;
    else
      off = (mn % 8) * bytes + (mn / 8) * sbo + k * size;
  } else {
    const int wide = bytes / 2;
    if (kind == 0)
      off = (mn % 8) * 2 + (mn / 8) * sbo + (k % 8) * 16 + (k / 8) * lbo;
    else
      off = (mn % wide) * 2 + (mn / wide) * lbo + (k % 8) * bytes + (k / 8) * sbo;
  }
  return swizzled(start + off, kind);
}
void do_wgmma(Warp& w, const Pending& p) {
  const Instruction& in = *p.in;
  const int n = in.a, size = size_of(in.t), k = 32 / size;
  vector<float> A(16 * k), B(size_t(k) * n);
  auto read = [&](u64 desc, bool mn_major, int mn, int kk) {
    const u32 at = factor_at(desc, mn_major, mn, kk, size);
    Block* block_at = nullptr;
    const u8* q = shared_at(w, in, at, size, &block_at);
    check_written(w, in, block_at, q, size);
    u32 v = 0;
    memcpy(&v, q, size);
    return in.t == TF32 ? tf32_bits(v) : element(v, 0, in.t);
  };
  const int row = w.id % 4 * 16;
  if (p.a_in_regs) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        float* a = &A[(lane / 4 + 8 * (i & 1)) * k + k / 2 * (i >> 1) + k / 8 * (lane % 4)];
        if (in.t == TF32)
          *a = tf32_bits(p.a_regs[i][lane]);
        else
          for (int h = 0; h < 2; ++h) a[h] = element(p.a_regs[i][lane], h, in.t);
      }
  } else
    for (int r = 0; r < 16; ++r)
      for (int kk = 0; kk < k; ++kk) A[r * k + kk] = read(p.desc_a, p.tnsp_a, row + r, kk);
  for (int c = 0; c < n; ++c)
    for (int kk = 0; kk < k; ++kk) B[size_t(kk) * n + c] = read(p.desc_b, p.tnsp_b, c, kk);
  const Operand& d = in.ops[0];
  for (int i = 0; i < n / 2; ++i)
    for (int lane = 0; lane < 32; ++lane) {
      const int r = lane / 4 + 8 * (i / 2 % 2), c = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      double s = 0;
      for (int kk = 0; kk < k; ++kk) s += double(A[r * k + kk]) * B[size_t(kk) * n + c];
      s *= p.imm_a * p.imm_b;
      if (p.scale_d) s += get<float>(w, d.parts[i], lane);
      put<float>(w, d.parts[i], lane, float(s));
    }
}
}  // namespace
void run_wgmma(Warp& w, const Instruction& in, u32) {
  Pending p{};
  p.in = &in;
  if (in.ops[1].kind == Operand::Vec) {
    p.a_in_regs = true;
    for (int i = 0; i < 4; ++i)
      for (int lane = 0; lane < 32; ++lane) p.a_regs[i][lane] = raw(w, in.ops[1].parts[i], lane);
  } else
    p.desc_a = raw(w, in.ops[1], 0);
  p.desc_b = raw(w, in.ops[2], 0);
  p.scale_d = truth(w, in.ops[3], 0);
  p.imm_a = s32(raw(w, in.ops[4], 0)), p.imm_b = s32(raw(w, in.ops[5], 0));
  if (in.t != TF32) {  // which has no choice
    int at = 6;
    if (!p.a_in_regs) p.tnsp_a = raw(w, in.ops[at++], 0);
    p.tnsp_b = raw(w, in.ops[at], 0);
  }
  w.open.push_back(p);
}
void finish_group(Warp& w) {
  for (const Pending& p : w.groups.front()) do_wgmma(w, p);
  w.groups.pop_front();
  ++w.finished;
}
bool warpgroup_has(const Warp& w, u64 groups) {
  for (auto& o : w.cta->warps)
    if (o->id / 4 == w.id / 4 && o->committed < groups) return false;
  return true;
}
void finish_warpgroup(const Warp& w, u64 groups) {
  for (auto& o : w.cta->warps)
    if (o->id / 4 == w.id / 4)
      while (o->finished < groups) finish_group(*o);
}
void run_wgmma_commit(Warp& w, const Instruction&, u32) {
  w.groups.push_back(std::move(w.open));
  w.open.clear();
  ++w.committed;
  for (auto& o : w.cta->warps)
    if (o->state == Warp::Group && o->id / 4 == w.id / 4 && warpgroup_has(*o, o->wanted))
      finish_warpgroup(*o, o->wanted), o->state = Warp::Run, ++w.cta->launch->progress;
}
// A group is done when all four warps of the warpgroup have issued it: whoever waits for it waits for them.
void run_wgmma_wait(Warp& w, const Instruction& in, u32) {
  const u64 n = in.ops[0].imm;
  w.wanted = w.committed > n ? w.committed - n : 0;
  if (warpgroup_has(w, w.wanted))
    finish_warpgroup(w, w.wanted);
  else
    w.state = Warp::Group;
}
}  // namespace ptxsim
