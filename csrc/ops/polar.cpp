// The door of the ops of the polar iteration: check -> params -> device guard, stream -> launch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "ops/door.h"
#include "polar/params.h"

namespace steepest {
namespace {

using namespace polar;

Numbering make_numbering(const std::vector<double>& constants, const std::vector<int64_t>& powers,
                         const std::vector<double>& slacks, bool tight, double eps) {
  const size_t tables = slacks.size() + 1, columns = powers.size();
  STD_TORCH_CHECK(tables <= kMostTables && constants.size() == tables * columns && constants.size() <= kMostNumbers,
                  "constants has ", constants.size(), " elements; wanted are ", tables, " tables of ", columns,
                  ", at most ", kMostTables, " tables and ", kMostNumbers, " elements");
  for (const int64_t power : powers) STD_TORCH_CHECK(power >= 0 && power < 1 << 15, "powers has ", power);
  Numbering numbering{};
  numbering.tables = static_cast<int32_t>(tables), numbering.columns = static_cast<int32_t>(columns);
  numbering.tight = tight, numbering.eps = eps;
  std::copy(slacks.begin(), slacks.end(), numbering.least);
  std::copy(constants.begin(), constants.end(), numbering.constants);
  std::copy(powers.begin(), powers.end(), numbering.powers);
  return numbering;
}

void check_floats(const Tensor& tensor, const Place& place, int64_t elements, const char* name) {
  place.check(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == elements,
                  name, " must be a contiguous float32 tensor of ", elements, " elements");
}

void chain_numbers(const Tensor& gram, const Tensor& numbers, const Tensor& slack, const Tensor& scratch,
                   const std::vector<double>& constants, const std::vector<int64_t>& powers,
                   const std::vector<double>& slacks, bool tight, double eps) {
  const Place place(gram);
  STD_TORCH_CHECK(gram.dim() == 3 && gram.size(1) == gram.size(2) && gram.size(1) > 0 && gram.is_contiguous(),
                  "gram must be a contiguous stack of square matrices");
  NumbersParams params{};
  params.dtype = element_type(gram, place, "gram", 0);
  STD_TORCH_CHECK(params.dtype != Dtype::f64 && params.dtype != Dtype::i16,
                  "gram must be float32, bfloat16 or float16");
  params.matrices = gram.size(0), params.m = gram.size(1);
  params.numbering = make_numbering(constants, powers, slacks, tight, eps);
  check_floats(numbers, place, params.matrices * params.numbering.columns, "numbers");
  check_floats(slack, place, params.matrices, "slack");
  if (params.matrices == 0) return;
  params.gram = gram.const_data_ptr();
  params.numbers = pointer<float>(numbers), params.slack = pointer<float>(slack);
  params.scratch = check_scratch(scratch, place, kSpreadSums, params.matrices, params.matrices * blocks_of(params.m));
#ifdef STEEPEST_HAS_CUDA
  if (place.cuda) {
    const torch::stable::accelerator::DeviceGuard guard(place.index);
    return numbers_on_device(params, current_stream(place.index));
  }
#endif
  numbers_on_host(params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(steepest, CPU, m) { m.impl("chain_numbers", TORCH_BOX(&chain_numbers)); }

#ifdef STEEPEST_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(steepest, CUDA, m) { m.impl("chain_numbers", TORCH_BOX(&chain_numbers)); }
#endif

}  // namespace steepest
