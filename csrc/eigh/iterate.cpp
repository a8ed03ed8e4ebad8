// Rows of memory are the columns of a basis here, so that a part of a basis is contiguous:
//
//   V = Q^T P, rows sorted;   Gram-Schmidt by halves: the second half less its part along the first, in two products
//
// which takes as much work as a Gram product and a triangular solve, nearly all of it in products. Where rows were so
// nearly dependent that they do not come out orthonormal it is done once more, and then they do.
#include "eigh/iterate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu_polar/team.h"
#include "cpu_polar/words.h"

namespace steepest::eigh {
namespace {

using cpu_polar::Kernels;
using cpu_polar::kPanel;
using cpu_polar::Product;
using cpu_polar::Team;

constexpr float kEps = std::numeric_limits<float>::epsilon();
constexpr float kFloor = 8 * kEps;  // of the largest value: what is below is rounding
constexpr float kOrthonormal = 5e-6f, kOrthonormalOnEntry = 1e-2f;
constexpr int kPasses = 3;
constexpr int64_t kRowsAtOnce = 32;  // of a half that is not cut again
constexpr int64_t kAlone = 512;      // a side up to which a thread takes a matrix by itself

// kProbes rows of 1 and -1, by a hash of the column (splitmix64).
void fill_signs(float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint64_t x = static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    for (int64_t t = 0; t < kProbes; ++t) to[t * n + i] = x >> t & 1 ? 1.0f : -1.0f;
  }
}

// Buffers of one matrix at a time.
class Room {
 public:
  explicit Room(int64_t n)
      : n_(n), padded_((n + kPanel - 1) / kPanel * kPanel), memory_(cpu_polar::make_words(floats())) {}

  float* rows() const { return start(); }
  float* shares() const { return start() + n_ * n_; }  // of a half along the other
  uint32_t* left() const { return reinterpret_cast<uint32_t*>(shares() + padded_ * padded_ / 2); }
  uint32_t* right() const { return left() + padded_ * padded_; }
  float* probes() const { return reinterpret_cast<float*>(right() + padded_ * padded_); }  // four of 2 kProbes rows

 private:
  int64_t floats() const { return n_ * n_ + 5 * padded_ * padded_ / 2 + 8 * kProbes * padded_; }
  float* start() const { return reinterpret_cast<float*>(memory_.get()); }

  int64_t n_, padded_;
  cpu_polar::Words memory_;
};

// A step of one matrix: whether it is done, and then what writes its basis, which may take the place of the old one.
class Run {
 public:
  Run(int64_t n, const float* p, const float* q, int64_t* order, float* measured, const Team& team, const Room& room)
      : n_(n),
        p_(p),
        q_(q),
        order_(order),
        measured_(measured),
        team_(team),
        room_(room),
        v_(room.rows()),
        values_(n_),
        lengths_(n_) {}

  bool operator()() {
    std::fill_n(measured_, kMeasured, 0.0f);
    const double largest = team_.kernels.largest({p_, Dtype::f32, 0}, 0, n_ * n_);
    if (!std::isfinite(largest) || largest == 0 || !team_.kernels.symmetric(p_, n_)) return false;
    int exponent = 0;
    std::frexp(largest, &exponent);
    scale_ = std::ldexp(1.0f, std::min(-exponent, 126));
    multiply_by_p();
    if (!(residual_of_old() <= kOrthonormalOnEntry)) return false;
    measured_[kRounding] = rounding();
    sort();
    if (!orthonormalize()) return false;
    measured_[kErrorAfter] = error_of_new();
    measured_[kDone] = 1;
    return true;
  }

  void store(float* basis) const { team_.kernels.transpose(v_, n_, basis); }

 private:
  // D = alpha A B + D (adds) or alpha A B, of factors that are packed.
  void multiply(const uint32_t* a, int64_t m, int64_t k, const uint32_t* b, int64_t n, float* d, float alpha,
                bool adds = false) const {
    Product product{};
    product.a = a, product.b = b, product.m = m, product.n = n, product.k = k;
    product.c = adds ? d : nullptr, product.d = d, product.alpha = alpha, product.beta = adds ? 1.0f : 0.0f;
    team_.multiply(product);
  }

  // V = Q^T P, and what the columns of Q have by P. The packed Q stays on the left.
  void multiply_by_p() {
    team_.pack({q_, n_, n_, false}, room_.left());
    team_.pack({p_, n_, n_, false}, room_.right());
    multiply(room_.left(), n_, n_, room_.right(), n_, v_, scale_);
    team_.pack({v_, n_, n_, true}, room_.right());
    const auto *const columns = reinterpret_cast<const float*>(room_.left()), *const rows =
                                                                                  reinterpret_cast<const float*>(
                                                                                      room_.right());
    for_each(cpu_polar::panels_of(n_), team_.threads, [&](int64_t panel) {
      float sums[4][kPanel] = {};
      for (int64_t k = 0; k < n_; ++k)
        for (int64_t r = 0, at = (panel * n_ + k) * kPanel; r < kPanel; ++r)
          sums[k % 4][r] += columns[at + r] * rows[at + r];
      for (int64_t r = 0, first = panel * kPanel; r < std::min<int64_t>(kPanel, n_ - first); ++r)
        values_[first + r] = std::max((sums[0][r] + sums[1][r]) + (sums[2][r] + sums[3][r]), 0.0f);
    });
  }

  // Rows of signs over the roots of values that are not taken below the floor; and the rows of signs behind them.
  void make_probes(float* to) const {
    const float least = std::max(kFloor * *std::max_element(values_.begin(), values_.end()), 1e-37f);
    std::vector<float> over(n_);
    for (int64_t i = 0; i < n_; ++i) over[i] = 1 / std::sqrt(std::max(values_[i], least));
    float* const signs = to + kProbes * n_;
    fill_signs(signs, n_);
    for (int64_t t = 0; t < kProbes; ++t)
      for (int64_t i = 0; i < n_; ++i) to[t * n_ + i] = signs[t * n_ + i] * over[i];
  }

  // D = A B, A of so many rows of memory, B packed.
  void multiply_rows(const float* a, int64_t rows, const uint32_t* b, float* d, float alpha = 1) const {
    auto* const packed = reinterpret_cast<uint32_t*>(room_.probes() + 6 * kProbes * n_);
    team_.pack({a, rows, n_, true}, packed);
    multiply(packed, rows, n_, b, n_, d, alpha);
  }

  // The error of the basis that came in, and its residual.
  float residual_of_old() {
    float *const made = room_.probes(), *const moved = made + 2 * kProbes * n_, *const back = moved + 2 * kProbes * n_;
    make_probes(made);
    team_.pack({v_, n_, n_, false}, room_.right());
    multiply_rows(made, kProbes, room_.right(), moved);
    team_.pack({q_, n_, n_, true}, room_.right());
    multiply_rows(made + kProbes * n_, kProbes, room_.right(), moved + kProbes * n_);
    multiply_rows(moved, 2 * kProbes, room_.left(), back);
    measured_[kErrorBefore] = whitening(made, back);
    return residual(made + kProbes * n_, back + kProbes * n_);
  }

  // Of the basis that goes out, whose residual is taken for each pass.
  float residual_of_new() const {
    float *const made = room_.probes(), *const moved = made + 2 * kProbes * n_;
    make_probes(made);
    team_.pack({v_, n_, n_, false}, room_.right());
    multiply_rows(made, 2 * kProbes, room_.right(), moved);
    team_.pack({v_, n_, n_, true}, room_.left());
    multiply_rows(moved + kProbes * n_, kProbes, room_.left(), moved + 2 * kProbes * n_);
    return residual(made + kProbes * n_, moved + 2 * kProbes * n_);
  }

  // After residual_of_new.
  float error_of_new() const {
    float *const made = room_.probes(), *const moved = made + 2 * kProbes * n_, *const back = moved + 2 * kProbes * n_;
    team_.pack({p_, n_, n_, false}, room_.right());
    multiply_rows(moved, kProbes, room_.right(), back, scale_);
    multiply_rows(back, kProbes, room_.left(), moved);
    return whitening(made, moved);
  }

  // ||Q^T Q z - z|| of signs z, as a mean square.
  float residual(const float* signs, const float* moved) const {
    double total = 0;
    for (int64_t t = 0; t < kProbes; ++t) {
      float part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t i = t * n_; i < (t + 1) * n_; ++i) part += (moved[i] - signs[i]) * (moved[i] - signs[i]);
      total += part;
    }
    return static_cast<float>(std::sqrt(total / (kProbes * n_)));
  }

  // The whitening error, from Q^T P Q D^-1/2 z for signs z. Of a row i of W = D^-1/2 Q^T P Q D^-1/2 the mean of
  // z_i (W z)_i is W_ii and its variance the sum of squares beside the diagonal. Where W_ii is not 1, d_i was not the
  // value.
  float whitening(const float* probes, const float* images) const {
    std::vector<float> sums(n_), squares(n_);
    for (int64_t t = 0; t < kProbes; ++t)
      for (int64_t i = 0; i < n_; ++i) {
        const float x = images[t * n_ + i] * probes[t * n_ + i];
        sums[i] += x, squares[i] += x * x;
      }
    double total = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const float mean = sums[i] / kProbes, variance = (squares[i] - sums[i] * mean) / (kProbes - 1);
      total += variance / std::clamp(mean, 0.25f, 4.0f);
    }
    return static_cast<float>(std::sqrt(std::max(total, 0.0) / n_));
  }

  // Of entries eps max d / 32, as in linalg/basis.py.
  float rounding() const {
    const float top = *std::max_element(values_.begin(), values_.end());
    double total = 0;
    for (float value : values_) total += top / std::max(value, kFloor * top);
    return static_cast<float>(kEps / 32 * total / std::sqrt(n_));
  }

  // Rows by their values, descending. A row that is rounding alone is the column of Q instead.
  void sort() {
    std::iota(order_, order_ + n_, int64_t{0});
    std::stable_sort(order_, order_ + n_, [&](int64_t a, int64_t b) { return values_[a] > values_[b]; });
    std::vector<double> squares(n_);
    for_each(n_, team_.threads, [&](int64_t i) { squares[i] = team_.kernels.square(v_ + i * n_, 0, n_); });
    const double least = kFloor * std::sqrt(*std::max_element(squares.begin(), squares.end()));
    gone_.assign(n_, false);
    for (int64_t i = 0; i < n_; ++i)
      if (squares[order_[i]] <= least * least) gone_[i] = true;
    std::vector<float> kept(n_);
    std::vector<bool> placed(n_, false);
    for (int64_t start = 0; start < n_; ++start) {
      if (placed[start] || order_[start] == start) continue;
      std::copy_n(v_ + start * n_, n_, kept.begin());
      int64_t at = start;
      for (; order_[at] != start; at = order_[at]) {
        std::copy_n(v_ + order_[at] * n_, n_, v_ + at * n_);
        placed[at] = true;
      }
      std::copy_n(kept.begin(), n_, v_ + at * n_);
      placed[at] = true;
    }
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t k = 0; gone_[i] && k < n_; ++k) v_[i * n_ + k] = q_[k * n_ + order_[i]];
  }

  bool orthonormalize() {
    values_.assign(n_, 1.0f);
    for (int pass = 0; pass < kPasses; ++pass) {
      orthonormalize(0, n_);
      for (int64_t i = 0; i < n_; ++i) {
        if (!(lengths_[i] > 0 && std::isfinite(lengths_[i]))) return false;
        values_[i] = gone_[i] ? 0 : values_[i] * lengths_[i];
      }
      measured_[kResidual] = residual_of_new();
      if (measured_[kResidual] <= kOrthonormal) return true;
    }
    return false;
  }

  void orthonormalize(int64_t begin, int64_t end) {
    if (end - begin <= kRowsAtOnce) {
      team_.kernels.orthonormalize(v_ + begin * n_, end - begin, n_, lengths_.data() + begin);
      return;
    }
    const int64_t middle = begin + ((end - begin) / 2 + kPanel - 1) / kPanel * kPanel;
    orthonormalize(begin, middle);
    subtract(begin, middle, end);
    orthonormalize(middle, end);
  }

  // Rows [middle, end) less their parts along [begin, middle).
  void subtract(int64_t begin, int64_t middle, int64_t end) const {
    const int64_t first = middle - begin, second = end - middle;
    float *const unit = v_ + begin * n_, *const others = v_ + middle * n_;
    team_.pack({others, second, n_, true}, room_.left());
    team_.pack({unit, first, n_, true}, room_.right());
    multiply(room_.left(), second, n_, room_.right(), first, room_.shares(), 1);
    team_.pack({room_.shares(), second, first, true}, room_.left());
    team_.pack({unit, n_, first, false}, room_.right());
    multiply(room_.left(), second, first, room_.right(), n_, others, -1, true);
  }

  const int64_t n_;
  const float *const p_, *const q_;
  int64_t* const order_;
  float* const measured_;
  const Team& team_;
  const Room& room_;
  float* const v_;
  std::vector<float> values_, lengths_;  // of the basis; diag(R) of a pass
  std::vector<bool> gone_;
  float scale_ = 1;
};

// body(i, team, room) for matrices of side(i) rows: small ones, or many, on a thread each.
template <class Side, class Body>
void each_matrix(int64_t matrices, const Kernels& kernels, const Side& side, const Body& body) {
  const int64_t threads = threads_of_torch();
  const auto alone = [&](int64_t i) { return side(i) <= kAlone || matrices >= 2 * threads; };
  for_each(matrices, threads, [&](int64_t i) {
    if (alone(i)) body(i, Team{kernels, 1}, Room(side(i)));
  });
  std::unique_ptr<Room> room;
  for (int64_t i = 0, last = 0; i < matrices; ++i) {
    if (alone(i)) continue;
    if (last != side(i)) room = std::make_unique<Room>(last = side(i));
    body(i, Team{kernels, threads}, *room);
  }
}

// Where the columns were before two steps.
std::vector<int64_t> composed(const std::vector<int64_t>& first, const std::vector<int64_t>& second) {
  std::vector<int64_t> both(second.size());
  for (size_t i = 0; i < both.size(); ++i) both[i] = first[second[i]];
  return both;
}

// A factor of one matrix of a stack, and where the columns of its new basis were; empty where the old one stays.
struct Job {
  const Tracked& stack;
  int64_t side, matrix;
  std::vector<int64_t>& order;
};

bool lowered(const float* measured, const Limits& limits) {
  const double before = measured[kErrorBefore], after = measured[kErrorAfter];
  const double rounding = measured[kRounding];
  const bool fell = after <= limits.progress * before || after <= limits.settled || after <= 2 * rounding;
  return before <= limits.near && fell;
}

// One step, or several where one alone lowers the error too little, taken or left.
void track_one(const Job& job, const Limits& limits, const Team& team, const Room& room) {
  const int64_t n = job.stack.length(job.side), first = job.matrix * n * n;
  const Side& side = job.stack.sides[job.side];
  std::vector<int64_t> order(n);
  std::vector<float> between;  // the basis between two steps
  float before = 0;
  side.left[job.matrix] = 1;
  for (int64_t step = 0; step < limits.steps; ++step) {
    float measured[kMeasured];
    Run run(n, side.p + first, step == 0 ? side.basis + first : between.data(), order.data(), measured, team, room);
    if (!run()) break;
    if (step == 0) before = measured[kErrorBefore];
    measured[kErrorBefore] = before;
    job.order = step == 0 ? order : composed(job.order, order);
    if (lowered(measured, limits)) {
      run.store(side.basis + first);
      side.status[job.matrix] = limits.accepted, side.left[job.matrix] = 0;
      return;
    }
    if (!(before <= limits.near)) break;
    between.resize(n * n);
    run.store(between.data());
  }
  job.order.clear();
}

// Row i of what is rows x columns comes from row from_row[i], column j from column from_column[j]; empty: they stay.
void reorder(float* x, int64_t rows, int64_t columns, const std::vector<int64_t>& from_row,
             const std::vector<int64_t>& from_column) {
  if (x == nullptr || (from_row.empty() && from_column.empty())) return;
  const std::vector<float> before(x, x + rows * columns);
  for (int64_t i = 0; i < rows; ++i) {
    const float* const from = before.data() + (from_row.empty() ? i : from_row[i]) * columns;
    float* const to = x + i * columns;
    if (from_column.empty())
      std::copy_n(from, columns, to);
    else
      for (int64_t j = 0; j < columns; ++j) to[j] = from[from_column[j]];
  }
}

}  // namespace

void iterate(const Iteration& iteration, const Kernels& kernels) {
  const int64_t n = iteration.n, size = n * n;
  const auto side = [&](int64_t) { return n; };
  each_matrix(iteration.matrices, kernels, side, [&](int64_t i, const Team& team, const Room& room) {
    Run run(n, iteration.p + i * size, iteration.q + i * size, iteration.order + i * n,
            iteration.measured + i * kMeasured, team, room);
    if (run()) run.store(iteration.basis + i * size);
  });
}

void track(const std::vector<Tracked>& stacks, const Limits& limits, const Kernels& kernels) {
  struct Orders {
    const Tracked& stack;
    int64_t matrix;
    std::vector<int64_t> of[2];
  };
  std::vector<Orders> orders;
  for (const Tracked& stack : stacks)
    for (int64_t matrix = 0; matrix < stack.matrices; ++matrix) orders.push_back({stack, matrix, {}});
  std::vector<Job> jobs;
  for (Orders& each : orders)
    for (int64_t side = 0; side < 2; ++side)
      if (each.stack.sides[side].p != nullptr) jobs.push_back({each.stack, side, each.matrix, each.of[side]});
  const auto length = [&](int64_t i) { return jobs[i].stack.length(jobs[i].side); };
  each_matrix(static_cast<int64_t>(jobs.size()), kernels, length,
              [&](int64_t i, const Team& team, const Room& room) { track_one(jobs[i], limits, team, room); });
  for_each(static_cast<int64_t>(orders.size()), threads_of_torch(), [&](int64_t i) {
    const Orders& each = orders[i];
    const int64_t rows = each.stack.rows, columns = each.stack.columns;
    float* const second = each.stack.second == nullptr ? nullptr : each.stack.second + each.matrix * rows * columns;
    reorder(second, rows, columns, each.of[0], each.of[1]);
    for (int64_t side = 0; side < 2; ++side) {
      const int64_t n = each.stack.length(side);
      float* const values = each.stack.sides[side].values;
      reorder(values == nullptr ? nullptr : values + each.matrix * n, 1, n, {}, each.of[side]);
    }
  });
}

}  // namespace steepest::eigh
