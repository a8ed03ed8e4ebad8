#include "eigh/layout.h"
#include "eigh/params.h"

namespace steepest::eigh {

size_t shared_bytes(int64_t n) { return n > kMostRows ? 0 : Layout(n).bytes(); }

int64_t most_rows(size_t limit) {
  int64_t n = 0;
  // Beside them a block has under 1 KB of its own.
  while (n < kMostRows && shared_bytes(n + 1) + 1024 <= limit) ++n;
  return n;
}

}  // namespace steepest::eigh
