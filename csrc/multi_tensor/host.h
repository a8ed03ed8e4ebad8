// What a host op calls for every chunk, compiled for several instruction sets, and on which threads.
#pragma once

#include <stdexcept>

#include "multi_tensor/normalize.h"
#include "multi_tensor/params.h"
#include "multi_tensor/plan.h"

// torch's own thread pool; in libtorch_cpu since 2.10.
extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                      void (*body)(int64_t begin, int64_t end, void* context), void* context);

namespace steepest::multi_tensor {

struct HostChunks {
  // A chunk of an item; its sums go into `partial`, which is left alone where no step is taken.
  void (*run)(Stage stage, const Item& item, const double* row, const Span& span, double* partial);
  // Largest magnitude of a gradient's chunk, infinite where an element is not finite, and sum of squares.
  void (*grad_stats)(const Gradient& gradient, const Span& span, double* partial);
  // Sum of squares of elements that follow one another, fp32 but for a few thousand at a time; in_double: fp64.
  double (*square_sum)(const void* at, Dtype dtype, int64_t count, bool in_double);
  // Divides elements [start, start + count) of a stack; `lengths` are their sums of squares.
  void (*normalize)(const Stack& stack, int64_t start, int64_t count, double eps, double* lengths);
};

namespace baseline {
extern const HostChunks chunks;
}
#ifdef STEEPEST_HAS_X86_SETS
namespace avx2 {
extern const HostChunks chunks;
}
namespace avx512 {
extern const HostChunks chunks;
}
#endif

// The widest vectors that the processor has and ATEN_CPU_CAPABILITY, which limits those of torch, allows.
const HostChunks& best_chunks();

// body(i) for i < count, on torch's threads.
template <class Body>
void parallel(int64_t count, const Body& body) {
  constexpr int64_t kGrain = 4;  // that a thread takes at least
  const auto call = [](int64_t begin, int64_t end, void* context) {
    for (int64_t i = begin; i < end; ++i) (*static_cast<const Body*>(context))(i);
  };
  if (torch_parallel_for(0, count, kGrain, call, const_cast<Body*>(&body)) != 0)
    throw std::runtime_error("torch's thread pool refused the work");
}

}  // namespace steepest::multi_tensor
