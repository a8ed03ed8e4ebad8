// What a host op calls for every chunk, compiled for several instruction sets.
#pragma once

#include "multi_tensor/params.h"
#include "multi_tensor/plan.h"

namespace steepest::multi_tensor {

struct HostChunks {
  // A chunk of an item; its sums go into `partial`, which is left alone where no step is taken.
  void (*run)(Stage stage, const Item& item, const double* row, const Span& span, double* partial);
  // Largest magnitude of a gradient's chunk, infinite where an element is not finite, and sum of squares.
  void (*grad_stats)(const Gradient& gradient, const Span& span, double* partial);
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

}  // namespace steepest::multi_tensor
