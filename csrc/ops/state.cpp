// The op that writes state on a CPU: check -> copy.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/threads.h"
#include "ops/op_checks.h"

namespace steepest {
namespace {

constexpr int64_t kBytesAtOnce = int64_t{1} << 18;

struct Copy {
  char* to;
  const char* from;
  int64_t bytes;
};

void copy_if(const Tensor& flag, const std::vector<Tensor>& to, const std::vector<Tensor>& source) {
  const Place place(flag);
  STD_TORCH_CHECK(flag.scalar_type() == ScalarType::Bool && flag.numel() == 1, "flag must be one bool");
  STD_TORCH_CHECK(to.size() == source.size(), "to has ", to.size(), " tensors, source has ", source.size());
  std::vector<Copy> copies;
  for (size_t i = 0; i < to.size(); ++i) {
    place.check(to[i], "to", i), place.check(source[i], "source", i);
    STD_TORCH_CHECK(to[i].scalar_type() == source[i].scalar_type() && to[i].numel() == source[i].numel() &&
                        to[i].is_contiguous() && source[i].is_contiguous(),
                    "to[", i, "] and source[", i, "] must be contiguous, of one dtype and one number of elements");
    const int64_t bytes = to[i].numel() * static_cast<int64_t>(to[i].element_size());
    for (int64_t begin = 0; begin < bytes; begin += kBytesAtOnce)
      copies.push_back({pointer<char>(to[i]) + begin, static_cast<const char*>(source[i].const_data_ptr()) + begin,
                        std::min(kBytesAtOnce, bytes - begin)});
  }
  if (!*static_cast<const bool*>(flag.const_data_ptr())) return;
  for_each(static_cast<int64_t>(copies.size()), threads_of_torch(),
           [&](int64_t i) { std::memmove(copies[i].to, copies[i].from, copies[i].bytes); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(steepest, CPU, m) { m.impl("copy_if", TORCH_BOX(&copy_if)); }

}  // namespace steepest
