// Work shared out among torch's threads.
//
// Not for what is compiled for wider instruction sets: of inline functions the linker keeps one, whoever compiled it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>

// torch's own thread pool; in libtorch_cpu since 2.10.
extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                      void (*body)(int64_t begin, int64_t end, void* context), void* context);

extern "C" int32_t torch_get_num_threads(uint32_t* threads);

namespace steepest {

inline int64_t threads_of_torch() {
  uint32_t threads = 1;
  if (torch_get_num_threads(&threads) != 0) throw std::runtime_error("torch does not say how many threads it has");
  return threads;
}

namespace detail {

inline void run(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (torch_parallel_for(0, count, grain, body, context) != 0)
    throw std::runtime_error("torch's thread pool refused the work");
}

}  // namespace detail

// body(i) for i < count; every thread takes a run of them, so that costs should be alike.
template <class Body>
void parallel_for(int64_t count, const Body& body) {
  constexpr int64_t kGrain = 4;  // that a thread takes at least
  const auto call = [](int64_t begin, int64_t end, void* context) {
    for (int64_t i = begin; i < end; ++i) (*static_cast<const Body*>(context))(i);
  };
  detail::run(count, kGrain, call, const_cast<Body*>(&body));
}

// body(i) for i < count, on `most` threads. Whichever is free takes the next, so that costs may differ.
template <class Body>
void for_each(int64_t count, int64_t most, const Body& body) {
  if (most < 2 || count < 2) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct Shared {
    const Body& body;
    int64_t count;
    std::atomic<int64_t> next{0};
  } shared{body, count};
  const auto call = [](int64_t, int64_t, void* context) {
    Shared& all = *static_cast<Shared*>(context);
    for (int64_t i; (i = all.next.fetch_add(1, std::memory_order_relaxed)) < all.count;) all.body(i);
  };
  detail::run(std::min(count, most), 1, call, &shared);
}

}  // namespace steepest
