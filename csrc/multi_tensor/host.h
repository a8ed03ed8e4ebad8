// What a host op calls for every chunk, compiled for several instruction sets.
#pragma once

#include "multi_tensor/normalize.h"
#include "multi_tensor/params.h"
#include "multi_tensor/plan.h"

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

// What is compiled for the widest vectors (common/vectors.h).
const HostChunks& best_chunks();

}  // namespace steepest::multi_tensor
