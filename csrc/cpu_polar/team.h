// Products that threads make together, whose bits do not depend on how many they are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/threads.h"
#include "cpu_polar/kernels.h"

namespace steepest::cpu_polar {

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

// body(stack, i, team) for the matrices i of these stacks: of one that is small(stack), and of many, a thread takes
// each by itself; of the others all threads take one after another.
template <class Stack, class Small, class Body>
void each_matrix(const std::vector<Stack>& stacks, const Kernels& kernels, const Small& small, const Body& body) {
  struct Job {
    const Stack& stack;
    int64_t matrix;
  };
  std::vector<Job> alone, large;
  const int64_t threads = threads_of_torch();
  for (const Stack& each : stacks) {
    std::vector<Job>& jobs = small(each) || each.matrices >= 2 * threads ? alone : large;
    for (int64_t i = 0; i < each.matrices; ++i) jobs.push_back({each, i});
  }
  for_each(static_cast<int64_t>(alone.size()), threads,
           [&](int64_t i) { body(alone[i].stack, alone[i].matrix, Team{kernels, 1}); });
  for (const Job& job : large) body(job.stack, job.matrix, Team{kernels, threads});
}

}  // namespace steepest::cpu_polar
