// Small matrices go one to a thread, all of whose buffers stay in its cache; of a large one all threads share every
// product.
#include "cpu_polar/chain.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>

#include "cpu_polar/team.h"
#include "polar/formulas.cuh"

namespace steepest::cpu_polar {
namespace {

using polar::Kind;
using polar::Node;

// Elements of a matrix up to which a thread takes all of it; of several for every thread more, while their buffers take
// no more than these bytes.
constexpr int64_t kAlone = int64_t{1} << 18, kAloneOfMany = int64_t{1} << 28;
constexpr int64_t kPart = int64_t{1} << 16;  // elements that are loaded or stored at once

// The buffers of one matrix at a time, and packed factors of a product.
class Room {
 public:
  Room(const Stack& stack, Dtype dtype, const Kernels& kernels) : sizes_(stack, dtype, kernels) {
    memory_.reset(new char[sizes_.all() + 64]);
  }

  static int64_t bytes(const Stack& stack, Dtype dtype, const Kernels& kernels) {
    return Sizes(stack, dtype, kernels).all();
  }

  // X and Y first, then the squares.
  void* buffer(int which) const {
    return which < 2 ? start() + which * sizes_.x : start() + 2 * sizes_.x + (which - 2) * sizes_.square;
  }
  uint32_t* packed(int which) const {
    return reinterpret_cast<uint32_t*>(start() + 2 * sizes_.x + 5 * sizes_.square + (which == 0 ? 0 : sizes_.large));
  }

 private:
  // Of one buffer each, in bytes.
  struct Sizes {
    Sizes(const Stack& stack, Dtype dtype, const Kernels& kernels) {
      const int64_t side = stack.side(), length = stack.size() / side, element = bytes_of(dtype);
      const auto packed = [&](int64_t size, int64_t k) { return 4 * packed_words(kernels, element, size, k); };
      x = aligned(stack.size() * element), square = aligned(side * side * element);
      large = std::max(packed(side, length), packed(length, side));
      small = kernels.alike ? packed(side, side) : packed(side, std::max(side, length));
    }
    static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }
    int64_t all() const { return 2 * x + 5 * square + large + small; }

    int64_t x, square, large, small;
  };

  char* start() const { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64); }

  Sizes sizes_;
  std::unique_ptr<char[]> memory_;
};

// One matrix on its way through the chain.
class Run {
 public:
  Run(const Chain& chain, const Stack& stack, int64_t matrix, Dtype dtype, const Kernels& kernels, const Room& room,
      int64_t threads)
      : chain_(chain),
        stack_(stack),
        matrix_(matrix),
        dtype_(dtype),
        kernels_(kernels),
        room_(room),
        threads_(threads),
        side_(stack.side()),
        tall_(stack.rows > stack.columns) {
    for (int i = 0; i < polar::kBuffers; ++i) at_[i] = room.buffer(i);
    out_ = static_cast<char*>(stack.out) + matrix * stack.size() * bytes_of(stack.out_dtype);
    if (stack.out_dtype == dtype) at_[chain.result] = out_;
  }

  void operator()() {
    if (!load()) return;
    multiply({Kind::gram, polar::kGram, polar::kX, polar::kX, polar::kX, {-1, 1}, {-1, 0}, 0});
    take_numbers();
    for (const Node& node : chain_.nodes) node.kind == Kind::sum ? sum(node) : multiply(node);
    if (stack_.out_dtype != dtype_)
      in_parts([&](int64_t, int64_t begin, int64_t count) {
        kernels_.store(at_[chain_.result], begin, count, out_, stack_.out_dtype);
      });
  }

 private:
  // X times a power of two that brings its largest entry into [1/2, 1), or over its norm. False where an entry is not
  // finite: the result is NaN then.
  bool load() {
    const Source x{stack_.x, stack_.x_dtype, matrix_ * stack_.size()};
    std::vector<double> largest(parts());
    in_parts([&](int64_t part, int64_t begin, int64_t count) { largest[part] = kernels_.largest(x, begin, count); });
    double most = 0;
    for (double each : largest) most = each <= most ? most : each;  // NaN stays
    if (!std::isfinite(most)) {
      kernels_.fill(out_, stack_.out_dtype, stack_.size(), std::numeric_limits<float>::quiet_NaN());
      stack_.slack[matrix_] = chain_.divides ? 1.0f : std::numeric_limits<float>::quiet_NaN();
      return false;
    }
    int exponent = 0;
    std::frexp(most, &exponent);
    // Two factors: from the smallest number to 1 is more than the range of fp32.
    const float first = std::ldexp(1.0f, -exponent / 2), second = std::ldexp(1.0f, -exponent - -exponent / 2);
    in_parts([&](int64_t, int64_t begin, int64_t count) { kernels_.load(x, begin, count, first, second, at_[0]); });
    if (chain_.divides) divide(largest);
    return true;
  }

  // X over its Frobenius norm, both as torch.optim.Muon rounds them.
  void divide(std::vector<double>& squares) {
    in_parts(
        [&](int64_t part, int64_t begin, int64_t count) { squares[part] = kernels_.square(at_[0], begin, count); });
    const double norm = std::sqrt(std::accumulate(squares.begin(), squares.end(), 0.0));
    const float by = kernels_.round(static_cast<float>(std::max(norm, chain_.numbering.eps)));
    if (by == 0) return;
    in_parts([&](int64_t, int64_t begin, int64_t count) { kernels_.divide(at_[0], begin, count, by); });
  }

  int64_t parts() const { return (stack_.size() + kPart - 1) / kPart; }

  // body(part, first element, elements)
  template <class Body>
  void in_parts(const Body& body) const {
    for_each(parts(), threads_, [&](int64_t i) { body(i, i * kPart, std::min(kPart, stack_.size() - i * kPart)); });
  }

  void take_numbers() {
    const polar::Numbering& numbering = chain_.numbering;
    if (chain_.divides) {
      stack_.slack[matrix_] = 1;
      return;
    }
    double square, trace, diagonal_square;
    kernels_.spread(at_[polar::kGram], side_, square, trace, diagonal_square);
    const double norm =
        polar::squared_norm(numbering, {std::max(square - diagonal_square, 0.0) / 2, trace, diagonal_square}, side_);
    const double slack = std::sqrt(trace / norm);
    const int table = polar::table_of(numbering, slack);
    stack_.slack[matrix_] = static_cast<float>(slack);
    numbers_.resize(numbering.columns);
    for (int j = 0; j < numbering.columns; ++j) numbers_[j] = polar::number(numbering, table, j, 1 / std::sqrt(norm));
  }

  float value(const polar::Number& number) const { return number.column < 0 ? number.value : numbers_[number.column]; }

  void sum(const Node& node) const {
    const float beta = value(node.beta);
    kernels_.sum(at_[node.a], beta == 0 ? nullptr : at_[node.c], at_[node.out], side_, value(node.alpha), beta,
                 node.gamma);
  }

  void multiply(const Node& node) const {
    const bool applies = node.kind == Kind::apply, gram = node.kind == Kind::gram;
    const int64_t length = gram ? stack_.size() / side_ : side_;
    Product product{};
    product.m = applies ? stack_.rows : side_, product.n = applies ? stack_.columns : side_, product.k = length;
    product.symmetric = !applies, product.same = gram || (!applies && node.a == node.b);
    product.alpha = value(node.alpha), product.beta = value(node.beta);
    product.c = product.beta == 0 ? nullptr : at_[node.c];
    product.d = at_[node.out];
    // A square, which is symmetric, has rows of k; X has them where it is tall and all of it stands on the right.
    const void *left = at_[node.a], *right = gram ? left : at_[node.b];
    if (applies && tall_) std::swap(left, right);
    const int place = applies && !tall_ ? 1 : 0;  // the factor that may be larger than a square has the first
    const Team team{kernels_, threads_};
    uint32_t *const a = room_.packed(place), *const b = room_.packed(1 - place);
    const Factor rows{left, product.m, length, gram ? !tall_ : applies && tall_};
    team.pack_rows(rows, a);
    product.a = a, product.b = product.same && kernels_.alike ? a : b;
    if (product.b == b) team.pack(product.same ? rows : Factor{right, product.n, length, false}, b);
    team.multiply(product);
  }

  const Chain& chain_;
  const Stack& stack_;
  const int64_t matrix_;
  const Dtype dtype_;
  const Kernels& kernels_;
  const Room& room_;
  const int64_t threads_;
  const int64_t side_;
  const bool tall_;
  void* at_[polar::kBuffers];
  void* out_;
  std::vector<float> numbers_;
};

}  // namespace

void run(const Chain& chain, const std::vector<Stack>& stacks, Dtype dtype, const Kernels& kernels, int64_t at_once) {
  const int64_t threads = threads_of_torch();
  int64_t large = 0;
  for (const Stack& stack : stacks) large += stack.size() > kAlone ? stack.matrices : 0;
  const bool many = large >= 2 * threads && at_once >= threads;
  std::vector<std::pair<const Stack*, int64_t>> alone;
  for (const Stack& stack : stacks) {
    if (stack.matrices == 0 || stack.size() == 0) continue;
    if (stack.size() <= kAlone || (many && Room::bytes(stack, dtype, kernels) * threads <= kAloneOfMany)) {
      for (int64_t i = 0; i < stack.matrices; ++i) alone.emplace_back(&stack, i);
      continue;
    }
    const Room room(stack, dtype, kernels);
    for (int64_t i = 0; i < stack.matrices; ++i) Run(chain, stack, i, dtype, kernels, room, threads)();
  }
  // The longest first, so that no thread has one left when the others are done.
  std::stable_sort(alone.begin(), alone.end(), [](const auto& a, const auto& b) {
    return a.first->size() * a.first->side() > b.first->size() * b.first->side();
  });
  for_each(static_cast<int64_t>(alone.size()), at_once, [&](int64_t i) {
    const auto& [stack, matrix] = alone[i];
    Run(chain, *stack, matrix, dtype, kernels, Room(*stack, dtype, kernels), 1)();
  });
}

}  // namespace steepest::cpu_polar
