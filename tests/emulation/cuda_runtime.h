// CUDA's side of a kernel on a CPU, so that the kernels' own source runs without a GPU: what they name, and no more.
//
// Found in place of the toolkit's header by a C++ compiler. A launch runs its blocks one after another, and a block's
// threads as fibers, which hand over to one another at barriers and shuffles only: the same run every time. What this
// proves is what each thread computes and writes, and that barriers stand where they must; blocks that run at once,
// the order in which memory becomes visible and the GPU's own arithmetic are for a GPU.
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
#define __shared__ static  // blocks run one after another

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

constexpr int kMost = 256;  // threads of a block
constexpr int kWarp = 32;
constexpr size_t kStack = size_t{128} << 10;  // a kernel's arguments are 32 KB of it

enum Order { kForward, kBackward, kShuffled };
inline Order order = kForward;  // of the blocks of a launch, and of the threads between two barriers
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
inline Barrier of_block, of_warp[kMost / kWarp];
inline uint64_t values[2][kMost];  // what lanes show one another, by turns, so that one barrier serves a shuffle
inline int count, current, idle;   // idle: hand-overs since a thread last came further
inline std::vector<int> turns, turn_of;
inline jmp_buf home;
inline void (*body)(const void*);
inline const void* argument;
inline std::string failure;

inline std::vector<int> permutation(int size) {
  static std::mt19937 random(0);
  std::vector<int> indices(size);
  std::iota(indices.begin(), indices.end(), 0);
  if (order == kBackward) std::reverse(indices.begin(), indices.end());
  if (order == kShuffled) std::shuffle(indices.begin(), indices.end(), random);
  return indices;
}

[[noreturn]] inline void hand_over() {
  for (int step = 1; step <= count; ++step) {
    const int next = turns[(turn_of[current] + step) % count];
    if (fibers[next].done) continue;
    current = next;
    threadIdx = {static_cast<unsigned>(next), 0, 0};
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
  hand_over();
}

[[noreturn]] inline void fail(const std::string& what) {
  failure = "thread " + std::to_string(current) + " of block " + std::to_string(blockIdx.x) + ": " + what;
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
    if (_setjmp(fibers[current].at) == 0) hand_over();
  }
}

inline void run_block() {
  turns = permutation(count);
  turn_of.resize(count);
  for (int i = 0; i < count; ++i) turn_of[turns[i]] = i;
  of_block = {};
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
  if (_setjmp(home) == 0) hand_over();
  if (!failure.empty()) throw std::runtime_error(std::exchange(failure, {}));
}

// kernel<<<blocks, threads>>>(arguments)
template <class Arguments>
void launch(void (*kernel)(Arguments), int blocks, int threads, const Arguments& arguments) {
  if (blocks < 1 || threads > kMost || threads % kWarp != 0) throw std::invalid_argument("a launch of no such size");
  struct Call {
    void (*kernel)(Arguments);
    const Arguments& arguments;
  } call{kernel, arguments};
  body = [](const void* call) { static_cast<const Call*>(call)->kernel(static_cast<const Call*>(call)->arguments); };
  argument = &call;
  count = threads;
  gridDim = {static_cast<unsigned>(blocks), 1, 1}, blockDim = {static_cast<unsigned>(threads), 1, 1};
  ++launches;
  for (int block : permutation(blocks)) {
    blockIdx = {static_cast<unsigned>(block), 0, 0};
    run_block();
  }
}

}  // namespace emulation

inline void __syncthreads(int line = __builtin_LINE()) { emulation::wait(emulation::of_block, emulation::count, line); }

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
