// What threads do together: work shared out among them, and products whose bits do not depend on how many they are.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>

#include "cpu_polar/kernels.h"

// torch's own thread pool; in libtorch_cpu since 2.10.
extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                      void (*body)(int64_t begin, int64_t end, void* context), void* context);

extern "C" int32_t torch_get_num_threads(uint32_t* threads);

namespace steepest::cpu_polar {

inline int64_t threads_of_torch() {
  uint32_t threads = 1;
  if (torch_get_num_threads(&threads) != 0) throw std::runtime_error("torch does not say how many threads it has");
  return threads;
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
  if (torch_parallel_for(0, std::min(count, most), 1, call, &shared) != 0)
    throw std::runtime_error("torch's thread pool refused the work");
}

struct Team {
  const Kernels& kernels;
  int64_t threads;

  void pack(const Factor& factor, uint32_t* to) const { pack(factor, kernels.pack, to); }
  void pack_rows(const Factor& factor, uint32_t* to) const { pack(factor, kernels.pack_rows, to); }

  void multiply(const Product& product) const {
    constexpr int64_t kRowsOfTask = 128;
    const int64_t panels = panels_of(product.n), together = kernels.together;
    if (threads < 2) return kernels.multiply(product, 0, product.m, 0, panels);
    const int64_t rows = (product.m + kRowsOfTask - 1) / kRowsOfTask;
    const int64_t columns = (panels + together - 1) / together;
    for_each(rows * columns, threads, [&](int64_t i) {
      const int64_t row = i / columns * kRowsOfTask, panel = i % columns * together;
      kernels.multiply(product, row, std::min(product.m, row + kRowsOfTask), panel, std::min(panels, panel + together));
    });
  }

 private:
  void pack(const Factor& factor, decltype(Kernels::pack) kernel, uint32_t* to) const {
    constexpr int64_t kPanelsOfTask = 8;
    const int64_t panels = panels_of(factor.size), part = threads > 1 ? kPanelsOfTask : panels;
    for_each((panels + part - 1) / part, threads,
             [&](int64_t i) { kernel(factor, i * part, std::min(panels, (i + 1) * part), to); });
  }
};

}  // namespace steepest::cpu_polar
