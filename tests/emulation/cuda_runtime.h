// CUDA's side of a kernel on a CPU, so that the kernels' own source runs without a GPU: what they name, and no more.
//
// Found in place of the toolkit's header by a C++ compiler. A launch runs its clusters one after another, and the
// threads of a cluster's blocks as fibers, which hand over to one another at barriers and shuffles only: the same run
// every time. What this proves is what each thread computes and writes, and that barriers stand where they must;
// clusters that run at once, the order in which memory becomes visible and the GPU's own arithmetic are for a GPU.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // clusters run one after another; blocks of a larger one use dynamic shared memory alone

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {  // a sanitizer sees an access that is not aligned
  unsigned x, y, z, w;
};
inline uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kMostThreads = 256;  // of a block
constexpr int kMostBlocks = 4;     // of a cluster
constexpr int kMost = kMostThreads * kMostBlocks;
constexpr int kWarp = 32;
constexpr size_t kStack = size_t{128} << 10;  // a kernel's arguments are 32 KB of it

enum Order { kForward, kBackward, kShuffled };
inline Order order = kForward;  // of the clusters of a launch, and of the threads between two barriers
inline int64_t launches = 0;

struct Barrier {
  int arrived = 0, generation = 0, line = 0;
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t entry;
  jmp_buf at;  // unlike swapcontext no call into the kernel
  bool begun, done;
  int shuffles;
};

inline Fiber fibers[kMost];
inline Barrier of_cluster, of_block[kMostBlocks], of_warp[kMost / kWarp];
inline uint64_t values[2][kMost];  // what lanes show one another, by turns, so that one barrier serves a shuffle
inline int count, current, idle;   // idle: hand-overs since a thread last came further
inline int cluster;                // the number of the first of its blocks
inline std::vector<int> turns, turn_of;
inline jmp_buf home;
inline void (*body)(const void*);
inline const void* argument;
inline std::string failure;

inline int rank() { return current / static_cast<int>(blockDim.x); }  // of the block in its cluster

inline void turn_to(int fiber) {
  current = fiber;
  threadIdx = {static_cast<unsigned>(fiber) % blockDim.x, 0, 0};
  blockIdx = {static_cast<unsigned>(cluster + rank()), 0, 0};
}

inline std::vector<int> permutation(int size) {
  static std::mt19937 random(0);
  std::vector<int> indices(size);
  std::iota(indices.begin(), indices.end(), 0);
  if (order == kBackward) std::reverse(indices.begin(), indices.end());
  if (order == kShuffled) std::shuffle(indices.begin(), indices.end(), random);
  return indices;
}

// To the next of `among` threads, those that a barrier waits for: a warp's, a block's or all.
[[noreturn]] inline void hand_over(int among) {
  const int turn = turn_of[current], first = turn / among * among;
  for (int step = 1; step <= among; ++step) {
    const int next = turns[first + (turn + step) % among];
    if (fibers[next].done) continue;
    turn_to(next);
    if (fibers[next].begun) _longjmp(fibers[next].at, 1);
    fibers[next].begun = true;
    setcontext(&fibers[next].entry);
  }
  _longjmp(home, 1);
}

inline void fiber() {
  body(argument);
  fibers[current].done = true;
  idle = 0;
  hand_over(count);
}

[[noreturn]] inline void fail(const std::string& what) {
  failure = "thread " + std::to_string(threadIdx.x) + " of block " + std::to_string(blockIdx.x) + ": " + what;
  _longjmp(home, 1);
}

// Every thread of the barrier comes to the same line, or the launch fails; nobody may have returned before.
inline void wait(Barrier& barrier, int threads, int line) {
  if (barrier.arrived == 0) barrier.line = line;
  if (barrier.line != line)
    fail("waits in line " + std::to_string(line) + ", others in line " + std::to_string(barrier.line));
  if (++barrier.arrived == threads) {
    barrier.arrived = idle = 0;
    ++barrier.generation;
    return;
  }
  const int generation = barrier.generation;
  while (barrier.generation == generation) {
    if (++idle > 2 * count) fail("waits in line " + std::to_string(line) + " for a thread that does not come");
    if (_setjmp(fibers[current].at) == 0) hand_over(threads);
  }
}

inline void run_cluster() {
  turns.clear();  // a block's threads follow one another, and a warp's: each runs as far ahead of the others as it can
  const int threads = static_cast<int>(blockDim.x);
  for (const int block : permutation(count / threads))
    for (const int warp : permutation(threads / kWarp))
      for (const int lane : permutation(kWarp)) turns.push_back(block * threads + warp * kWarp + lane);
  turn_of.resize(count);
  for (int i = 0; i < count; ++i) turn_of[turns[i]] = i;
  of_cluster = {};
  for (Barrier& block : of_block) block = {};
  for (Barrier& warp : of_warp) warp = {};
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    if (fiber.stack == nullptr) fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.get(), fiber.entry.uc_stack.ss_size = kStack;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, emulation::fiber, 0);
    fiber.begun = fiber.done = false, fiber.shuffles = 0;
  }
  idle = 0, current = turns.back();  // the first turn is the next
  if (_setjmp(home) == 0) hand_over(count);
  if (!failure.empty()) throw std::runtime_error(std::exchange(failure, {}));
}

// kernel<<<blocks, threads>>>(arguments), in clusters of `together` blocks
template <class Arguments>
void launch(void (*kernel)(Arguments), int blocks, int threads, const Arguments& arguments, int together = 1) {
  if (blocks < 1 || blocks % together != 0 || together > kMostBlocks || threads > kMostThreads || threads % kWarp != 0)
    throw std::invalid_argument("a launch of no such size");
  struct Call {
    void (*kernel)(Arguments);
    const Arguments& arguments;
  } call{kernel, arguments};
  body = [](const void* call) { static_cast<const Call*>(call)->kernel(static_cast<const Call*>(call)->arguments); };
  argument = &call;
  count = threads * together;
  gridDim = {static_cast<unsigned>(blocks), 1, 1}, blockDim = {static_cast<unsigned>(threads), 1, 1};
  ++launches;
  for (int each : permutation(blocks / together)) {
    cluster = each * together;
    run_cluster();
  }
}

}  // namespace emulation

inline void __syncthreads(int line = __builtin_LINE()) {
  emulation::wait(emulation::of_block[emulation::rank()], static_cast<int>(blockDim.x), line);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int step, int line = __builtin_LINE()) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  using namespace emulation;
  if (mask != 0xffffffff) fail("a shuffle of some lanes only");
  uint64_t* shown = values[fibers[current].shuffles++ % 2];
  std::memcpy(&shown[current], &value, sizeof value);
  wait(of_warp[current / kWarp], kWarp, line);
  if (current % kWarp + step < kWarp) std::memcpy(&value, &shown[current + step], sizeof value);
  return value;
}

inline void __threadfence() {}
template <class T>
T __ldcg(const T* at) {
  return *at;
}
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  return std::exchange(*at, *at + value);
}
