// What whole steps of stacks of matrices on the host have in common (cpu_polar/steps.cpp, eigh/steps.cpp): their lines
// in the tables, and what the elementwise ops are told of them.
#pragma once

#include <cstdint>
#include <vector>

#include "multi_tensor/params.h"

namespace steepest::multi_tensor {

template <class T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// Step: a row of a table that Python makes, of a parameter that is one stack of matrices, contiguous; the i-th has row
// i of the numbers, and lines of the sums behind those of the steps before it.
template <class Step>
class StackSteps {
 public:
  StackSteps(const Step* steps, int64_t count, const double* hypers) : steps_(steps), hypers_(hypers) {
    int64_t line = 0, chunks = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Step& step = steps[i];
      lines_.push_back(line), line += step.matrices;
      chunks += step.matrices * ((step.rows * step.columns - 1) / kChunk + 1);
    }
    lines_.push_back(line);
    partials_.resize(chunks * kSums);
  }

  int64_t first_line(int64_t i) const { return lines_[i]; }
  int64_t lines() const { return lines_.back(); }
  const double* hypers(int64_t i) const { return hypers_ + steps_[i].group * kHypers; }
  Scratch scratch() { return {nullptr, partials_.data()}; }

  Gradient gradient(int64_t i, int64_t address, Dtype dtype) const {
    const Step& step = steps_[i];
    Gradient gradient{};
    gradient.at = at<const void>(address), gradient.dtype = dtype, gradient.flat = true;
    gradient.size = step.matrices * step.rows * step.columns;
    Owner& owner = gradient.owner;
    owner.step = at<float>(step.step), owner.program = Program(step.program);
    for (int h = 0; h < kHypers; ++h) owner.hyper[h] = {nullptr, hypers(i)[h], Dtype::f64};
    owner.first_sum = lines_[i], owner.end_sum = lines_[i + 1];
    return gradient;
  }

  // Without tensors.
  Item item(int64_t i, double ratio) const {
    const Step& step = steps_[i];
    Item item{};
    item.matrices = step.matrices, item.size = step.rows * step.columns;
    item.row = static_cast<int32_t>(i), item.first_sum = lines_[i];
    item.program = Program(step.program), item.ratio = ratio;
    for (int k = 0; k < 3; ++k) item.place[k] = static_cast<uint32_t>(step.place[k]);
    item.flat = true;
    return item;
  }

 private:
  const Step* steps_;
  const double* hypers_;
  std::vector<int64_t> lines_;
  std::vector<double> partials_;
};

inline void put(Item& item, Slot slot, void* address, Dtype dtype) {
  item.at[slot] = address, item.dtype[slot] = dtype;
}

}  // namespace steepest::multi_tensor
