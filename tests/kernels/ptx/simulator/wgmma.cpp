#include "wgmma.h"

#include <algorithm>

#include "matrix.h"
#include "memory.h"

namespace ptxsim {
namespace {
struct Descriptor {
  u32 start, leading, stride;
  int swizzle;  // 0: none, 1: 128 bytes, 2: 64, 3: 32
  explicit Descriptor(u64 bits)
      : start(u32(bits & 0x3fff) << 4),
        leading(u32(bits >> 16 & 0x3fff) << 4),
        stride(u32(bits >> 32 & 0x3fff) << 4),
        swizzle(int(bits >> 62)) {}
  // Of the 16 bytes that hold (row, k) and the next elements along k, or, transposed, along the rows.
  u32 chunk(bool transposed, int row, int k, int element_bytes) const {
    constexpr u32 kSpans[4] = {16, 128, 64, 32};
    const u32 span = kSpans[swizzle], r = u32(row), x = u32(k), per_chunk = 16 / u32(element_bytes);
    u32 at;
    if (!transposed)
      at = r % 8 * span + r / 8 * stride + (swizzle == 0 ? x / per_chunk * leading : x * u32(element_bytes));
    else if (swizzle == 0)
      at = r / 8 * stride + x % 8 * 16 + x / 8 * leading;
    else
      at = r % (span / 2) * 2 + r / (span / 2) * leading + x % 8 * span + x / 8 * stride;
    return swizzled(start + at, swizzle);
  }
};

// to[row * row_step + k * k_step] = the factor; 32 bytes along k
void read_factor(const Warp& w, const Instruction& in, u64 bits, bool transposed, int first_row, int rows, double* to,
                 int row_step, int k_step) {
  if (bits >> 49 & 7) fail(w, in, "a wgmma descriptor with a base offset");
  const Descriptor d(bits);
  const int bytes = size_of(in.t == TF32 ? F32 : in.t), per_chunk = 16 / bytes;
  if (transposed && bytes != 2) fail(w, in, "a transposed factor of 32 bits");
  double values[8];
  if (!transposed) {
    for (int r = 0; r < rows; ++r)
      for (int k = 0; k < in.b; k += per_chunk) {
        widen_16_bytes(load_shared_async(w, in, d.chunk(false, first_row + r, k, bytes), 16), in.t, values);
        for (int i = 0; i < per_chunk; ++i) to[r * row_step + (k + i) * k_step] = values[i];
      }
    return;
  }
  for (int k = 0; k < in.b; ++k)
    for (int r = 0; r < rows; r += 8) {
      widen_16_bytes(load_shared_async(w, in, d.chunk(true, first_row + r, k, bytes), 16), in.t, values);
      for (int i = 0; i < 8; ++i) to[(r + i) * row_step + k * k_step] = values[i];
    }
}

// One product, of all four warps.
void execute(Warp* const* warps, const Product* const* products) {
  const Instruction& in = *products[0]->in;
  const int n = in.a, k = in.b;
  thread_local vector<double> A(64 * 16), B(16 * 256), C(16 * 256);
  read_factor(*warps[0], in, products[0]->b, products[0]->b_transposed, 0, n, B.data(), 1, n);
  for (int g = 0; g < 4; ++g) {
    Warp& w = *warps[g];
    const Product& p = *products[g];
    if (p.in != &in || p.b != products[0]->b) fail(w, in, "the warps of a warpgroup multiply different factors");
    if (p.a_in_registers) {
      const bool bf16 = in.t == BF16;
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
          const u32 v = p.a_registers[i][lane];
          const int r = lane / 4 + 8 * (i & 1);
          if (in.t == TF32)
            A[size_t(r * k + lane % 4 + 4 * (i >> 1))] = double(tf32_bits(v));
          else
            for (int h = 0; h < 2; ++h)
              A[size_t(r * k + 2 * (lane % 4) + h + 8 * (i >> 1))] = double(widen(u16(v >> (16 * h)), bf16));
        }
    } else
      read_factor(w, in, p.a, p.a_transposed, 16 * g, 16, A.data(), k, 1);
    std::fill(C.begin(), C.begin() + 16 * n, 0.0);
    multiply(A.data(), B.data(), C.data(), 16, n, k);
    const double scale = p.scale_a * p.scale_b;
    const bool truncates = settings().truncates;
    for (int i = 0; i < n / 2; ++i) {
      u64* d = lanes_of(w, in.ops[0].parts[size_t(i)]);
      const double* from = C.data() + 8 * (i / 2 % 2) * n + 8 * (i / 4) + i % 2;
      for (int lane = 0; lane < 32; ++lane) {
        double s = scale * from[lane / 4 * n + 2 * (lane % 4)];
        if (p.scale_d) s += double(from_bits<float>(d[lane]));
        d[lane] = to_bits(rounded_sum(s, truncates));
      }
    }
  }
}

struct Warpgroup {
  Warp* warps[4] = {};
  explicit Warpgroup(const Warp& w) {
    const size_t first = size_t(w.id) / 4 * 4;
    if (first + 4 > w.cta->warps.size()) fail("wgmma in a block whose warpgroup has less than four warps");
    for (size_t i = 0; i < 4; ++i) warps[i] = w.cta->warps[first + i].get();
  }
  bool has_committed(u64 groups) const {
    for (const Warp* w : warps)
      if (w->committed < groups) return false;
    return true;
  }
  // Executes groups until so many are finished.
  void finish(u64 groups) {
    while (warps[0]->finished < groups) {
      const size_t count = warps[0]->groups.front().size();
      for (Warp* w : warps)
        if (w->groups.front().size() != count) fail("the warps of a warpgroup commit different numbers of wgmma");
      for (size_t i = 0; i < count; ++i) {
        const Product* products[4];
        for (int g = 0; g < 4; ++g) products[g] = &warps[g]->groups.front()[i];
        execute(warps, products);
      }
      for (Warp* w : warps) w->groups.pop_front(), ++w->finished;
    }
  }
};
}  // namespace

void finish_oldest_group(Warp& w) {
  Warpgroup group(w);
  if (group.has_committed(w.finished + 1)) group.finish(w.finished + 1);
}

// a: n, b: k; d, a or its descriptor, b's descriptor, scale of d, of a, of b (, a transposed), b transposed
void run_wgmma(Warp& w, const Instruction& in, u32) {
  if (!w.fenced && w.open.empty()) fail(w, in, "the first wgmma of a group without wgmma.fence");
  Product p{};
  p.in = &in;
  p.a_in_registers = in.ops[1].kind == Operand::Vector;
  if (p.a_in_registers)
    for (int i = 0; i < 4; ++i)
      for (int lane = 0; lane < 32; ++lane) p.a_registers[i][lane] = u32(raw(w, in.ops[1].parts[size_t(i)], lane));
  else
    p.a = raw(w, in.ops[1], 0);
  p.b = raw(w, in.ops[2], 0);
  p.scale_d = truth(w, in.ops[3], 0);
  p.scale_a = s32(raw(w, in.ops[4], 0)), p.scale_b = s32(raw(w, in.ops[5], 0));
  size_t at = 6;
  if (!p.a_in_registers && in.ops.size() > at + 1) p.a_transposed = raw(w, in.ops[at++], 0) != 0;
  if (in.ops.size() > at) p.b_transposed = raw(w, in.ops[at], 0) != 0;
  w.open.push_back(p);
}
void run_wgmma_fence(Warp& w, const Instruction&, u32) { w.fenced = true; }
void run_wgmma_commit(Warp& w, const Instruction&, u32) {
  w.groups.push_back(std::move(w.open));
  w.open.clear();
  ++w.committed;
  w.fenced = false;
  Warpgroup group(w);
  for (Warp* other : group.warps)
    if (other->state == Warp::AtWarpgroup && group.has_committed(other->wanted)) {
      group.finish(other->wanted);
      wake(*other);
      ++w.cta->launch->progress;
    }
}
// A group is done when all four warps have issued it: whoever waits for it waits for them.
void run_wgmma_wait(Warp& w, const Instruction& in, u32) {
  const u64 left = raw(w, in.ops[0], 0);
  w.wanted = w.committed > left ? w.committed - left : 0;
  Warpgroup group(w);
  if (group.has_committed(w.wanted))
    group.finish(w.wanted);
  else
    sleep(w, Warp::AtWarpgroup);
}
}  // namespace ptxsim
