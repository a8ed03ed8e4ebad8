#include "polar/chunks.h"

#include <algorithm>
#include <map>
#include <set>

#include "symm_gemm/plan.h"

namespace steepest::polar {
namespace {

constexpr int64_t kElement = 2;  // bytes

// The model orders choices and is not measured. Bytes in a clock of a multiprocessor: memory of an H100 (3.35 TB/s at
// 1.755 GHz; an H200 has half as much again), and its L2 cache. Clocks from one launch to the next.
constexpr double kMemoryBytes = 1900, kCacheBytes = 3500, kLaunch = 3000;
// Of the time that memory takes: the rest hides behind arithmetic. All of it or none would be the extremes.
constexpr double kExposed = 0.5;
constexpr double kWorthCutting = 0.97;
constexpr size_t kMostKnown = 1024;
// Of the cache; the rest is for what passes through.
constexpr int64_t share_of(int64_t l2_bytes) { return l2_bytes / 4 * 3; }

using Sizes = std::vector<int64_t>;  // bytes of each buffer

// Buffers come and go whole; the one that was used longest ago leaves first, to memory if it was written.
class Cache {
 public:
  explicit Cache(int64_t capacity) : capacity_(capacity) {}

  void use(int8_t buffer, int64_t bytes, bool writes) {
    Line line{buffer, bytes, writes};
    const auto cached =
        std::find_if(lines_.begin(), lines_.end(), [&](const Line& each) { return each.buffer == buffer; });
    if (cached != lines_.end()) {
      line.dirty = line.dirty || cached->dirty;
      used_ -= bytes;
      lines_.erase(cached);
    } else if (!writes) {
      traffic_ += bytes;
    }
    lines_.push_back(line);
    for (used_ += bytes; used_ > capacity_; lines_.erase(lines_.begin())) {
      used_ -= lines_.front().bytes;
      if (lines_.front().dirty) traffic_ += lines_.front().bytes;
    }
  }
  // What somebody reads later; all else in the cache is dead.
  void keep(int8_t buffer) {
    for (const Line& line : lines_)
      if (line.buffer == buffer && line.dirty) traffic_ += line.bytes;
  }
  int64_t traffic() const { return traffic_; }

 private:
  struct Line {
    int8_t buffer;
    int64_t bytes;
    bool dirty;
  };
  int64_t capacity_, used_ = 0, traffic_ = 0;
  std::vector<Line> lines_;
};

bool reads_c(const Node& node) { return node.kind != Kind::gram && (node.beta.column >= 0 || node.beta.value != 0); }

double clocks_of_products(const Node& node, const std::vector<Stack>& stacks, int multiprocessors) {
  std::vector<symm_gemm::Shape> shapes;
  for (const symm_gemm::Problem& problem : products_of(node, stacks)) shapes.push_back(problem.shape);
  double clocks = 0;
  for (const symm_gemm::Launch& launch : make_plan(shapes, multiprocessors).launches) clocks += launch.clocks + kLaunch;
  return clocks;
}

// Of a chunk that finds nothing of its own in the cache.
Cost cost_of(const std::vector<Node>& nodes, const std::vector<Stack>& stacks, const Machine& machine) {
  Sizes sizes(kBuffers);
  for (const Stack& stack : stacks)
    for (int8_t buffer = 0; buffer < kBuffers; ++buffer)
      sizes[buffer] +=
          kElement * stack.matrices * (buffer <= kY ? stack.rows * stack.columns : stack.side() * stack.side());
  Cache cache(share_of(machine.l2_bytes));
  double clocks = 0;
  std::map<Kind, double> products;  // clocks, which depend on nothing else of a node
  const auto launch = [&](double least_clocks, std::initializer_list<int8_t> reads, int8_t writes) {
    double moved = 0;
    for (const int8_t buffer : std::set<int8_t>(reads)) cache.use(buffer, sizes[buffer], false), moved += sizes[buffer];
    if (writes >= 0) cache.use(writes, sizes[writes], true), moved += sizes[writes];
    clocks += std::max(least_clocks, moved / kCacheBytes);
  };
  const auto product = [&](const Node& node) {
    const auto [at, missing] = products.try_emplace(node.kind, 0);
    if (missing) at->second = clocks_of_products(node, stacks, machine.multiprocessors);
    launch(at->second, {node.a, node.b, reads_c(node) ? node.c : node.a}, node.out);
  };
  const double passes = kLaunch * static_cast<double>(stacks.size());
  product({Kind::gram, kGram, kX, kX, kX, {-1, 1}, {-1, 0}, 0});
  launch(passes, {kGram}, -1);
  for (const Node& node : nodes) {
    if (node.kind == Kind::sum)
      launch(passes, {node.a, reads_c(node) ? node.c : node.a}, node.out);
    else
      product(node);
  }
  cache.keep(nodes.empty() ? static_cast<int8_t>(kX) : nodes.back().out);
  return {cache.traffic(), clocks + kExposed * cache.traffic() / kMemoryBytes};
}

int64_t matrices_of(const std::vector<Stack>& stacks) {
  int64_t matrices = 0;
  for (const Stack& stack : stacks) matrices += stack.matrices;
  return matrices;
}

// Of a matrix of each stack: X, Y and the squares that the chain uses.
std::vector<int64_t> bytes_of(const std::vector<Node>& nodes, const std::vector<Stack>& stacks) {
  std::set<int8_t> squares{kGram};
  for (const Node& node : nodes)
    if (node.out >= kGram) squares.insert(node.out);
  std::vector<int64_t> bytes;
  for (const Stack& stack : stacks)
    bytes.push_back(kElement * (2 * stack.rows * stack.columns +
                                static_cast<int64_t>(squares.size()) * stack.side() * stack.side()));
  return bytes;
}

}  // namespace

// A matrix goes where the middle of its bytes lies.
std::vector<Chunk> cut(const std::vector<Node>& nodes, const std::vector<Stack>& stacks, int64_t count) {
  count = std::min(count, matrices_of(stacks));
  const std::vector<int64_t> bytes = bytes_of(nodes, stacks);
  int64_t all = 0, begin = 0;
  for (size_t i = 0; i < stacks.size(); ++i) all += stacks[i].matrices * bytes[i];
  std::vector<Chunk> chunks(count, Chunk(stacks.size(), Range{0, 0}));
  for (size_t i = 0; i < stacks.size(); ++i)
    for (int64_t matrix = 0; matrix < stacks[i].matrices; ++matrix, begin += bytes[i]) {
      Range& range = chunks[(2 * begin + bytes[i]) * count / (2 * all)][i];
      if (range.count++ == 0) range.first = matrix;
    }
  const auto empty = [](const Chunk& chunk) {
    return std::all_of(chunk.begin(), chunk.end(), [](const Range& range) { return range.count == 0; });
  };
  chunks.erase(std::remove_if(chunks.begin(), chunks.end(), empty), chunks.end());
  return chunks;
}

std::vector<Stack> part_of(const std::vector<Stack>& stacks, const Chunk& chunk) {
  std::vector<Stack> part;
  for (size_t i = 0; i < stacks.size(); ++i) {
    if (chunk[i].count == 0) continue;
    const int64_t first = chunk[i].first;
    Stack stack = stacks[i];
    stack.matrices = chunk[i].count;
    for (const int8_t buffer : {kX, kY})
      if (stack.at[buffer] != nullptr)
        stack.at[buffer] = static_cast<uint16_t*>(stack.at[buffer]) + first * stack.rows * stack.columns;
    if (stack.slack != nullptr) stack.slack += first;
    if (stack.update.weights != nullptr) {
      stack.update.weights += first;
      stack.update.eta.at += first, stack.update_beta.at += first;
    }
    part.push_back(stack);
  }
  return part;
}

Chunking make_chunks(const std::vector<Node>& nodes, const std::vector<Stack>& stacks, const Machine& machine) {
  const std::vector<int64_t> bytes = bytes_of(nodes, stacks);
  int64_t all = 0;
  for (size_t i = 0; i < stacks.size(); ++i) all += stacks[i].matrices * bytes[i];
  const int64_t share = share_of(machine.l2_bytes), matrices = matrices_of(stacks);
  Chunking best{cut(nodes, stacks, 1), {}, {}};
  if (all <= share || matrices < 2) return best;
  best.cost = best.whole = cost_of(nodes, stacks, machine);
  double least = best.whole.clocks * kWorthCutting;
  std::map<std::vector<int64_t>, Cost> known;  // by the matrices of each stack
  // Chunks so small that half of the cache would be empty gain nothing more.
  const int64_t most = share > 0 ? std::min(matrices, 2 * ((all - 1) / share + 1)) : matrices;
  int64_t before = 1;
  for (int64_t size = matrices - 1; size > 0; --size) {
    const int64_t count = (matrices - 1) / size + 1;
    if (count == before) continue;
    if (count > most) break;
    before = count;
    Chunking chunking{cut(nodes, stacks, count), {}, best.whole};
    for (const Chunk& chunk : chunking.chunks) {
      std::vector<int64_t> counts;
      for (const Range& range : chunk) counts.push_back(range.count);
      const auto [at, missing] = known.try_emplace(counts);
      if (missing) at->second = cost_of(nodes, part_of(stacks, chunk), machine);
      chunking.cost.traffic += at->second.traffic, chunking.cost.clocks += at->second.clocks;
    }
    if (chunking.cost.clocks < least) least = chunking.cost.clocks, best = std::move(chunking);
  }
  return best;
}

const std::vector<Chunk>& known_chunks(const std::vector<Node>& nodes, const std::vector<Stack>& stacks,
                                       const Machine& machine) {
  std::vector<int64_t> key{machine.multiprocessors, machine.l2_bytes};
  for (const Stack& stack : stacks) key.insert(key.end(), {stack.matrices, stack.rows, stack.columns});
  for (const Node& node : nodes)
    key.insert(key.end(), {static_cast<int64_t>(node.kind), node.out, node.a, node.b, node.c, reads_c(node)});
  thread_local std::map<std::vector<int64_t>, std::vector<Chunk>> known;
  const auto entry = known.find(key);
  if (entry != known.end()) return entry->second;
  if (known.size() >= kMostKnown) known.clear();
  return known[key] = make_chunks(nodes, stacks, machine).chunks;
}

}  // namespace steepest::polar
