// The fused elementwise ops: check -> params -> device guard, stream -> launch.
//
// Python checks first and in its own words; these checks hold for whoever calls torch.ops.steepest directly. An absent
// tensor is one without elements, and a list without elements is a list of absent tensors.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "multi_tensor/normalize.h"
#include "multi_tensor/params.h"
#include "ops/op_checks.h"
#include "ops/stacks.h"

namespace steepest {
namespace {

using namespace multi_tensor;
using Tensors = std::vector<Tensor>;

constexpr const char* kNames[kSlots] = {"grads", "momenta", "seconds", "directions", "params", "mantissas"};

Ints to_ints(torch::headeronly::IntHeaderOnlyArrayRef values) { return {values.begin(), values.end()}; }

// A contiguous fp64 table of `width` columns, its number of lines.
int64_t check_table(const Tensor& table, const Place& place, int64_t width, const char* name) {
  place.check(table, name);
  STD_TORCH_CHECK(
      table.scalar_type() == ScalarType::Double && table.is_contiguous() && table.dim() == 2 && table.size(1) == width,
      name, " must be a contiguous float64 table of ", width, " columns");
  return table.size(0);
}

Ints contiguous_strides(const Ints& sizes) {
  Ints strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  return strides;
}

// How the tensors of an item meet. A direction is a stack of matrices: contiguous, in a shape of its own. in_order: an
// element's number must be its place among the dimensions, whatever the order in memory.
void lay_out(const std::array<const Tensor*, kSlots>& tensors, const bool (&written)[kSlots], int64_t matrices,
             size_t i, bool& flat, Walk& walk, bool in_order = false) {
  const Tensor* first = nullptr;
  flat = true;
  for (int slot = 0; slot < kSlots; ++slot) {
    const Tensor* tensor = tensors[slot];
    if (tensor == nullptr) continue;
    const bool contiguous = tensor->is_contiguous();
    flat = flat && contiguous;
    if (slot == kDirection) {
      STD_TORCH_CHECK(contiguous, kNames[slot], "[", i, "] must be contiguous");
      continue;
    }
    if (first == nullptr) first = tensor;
    const auto a = tensor->sizes(), b = first->sizes();
    STD_TORCH_CHECK(std::equal(a.begin(), a.end(), b.begin(), b.end()), "the tensors of item ", i, " differ in shape");
  }
  if (flat) return;
  const Ints sizes = to_ints(first->sizes());
  std::vector<Ints> strides;
  for (int slot = 0; slot < kSlots; ++slot) {
    if (slot == kDirection && tensors[slot] != nullptr)
      strides.push_back(contiguous_strides(sizes));
    else
      strides.push_back(to_ints((tensors[slot] != nullptr ? tensors[slot] : first)->strides()));
    STD_TORCH_CHECK(tensors[slot] == nullptr || !written[slot] || !may_overlap(sizes, strides.back()), kNames[slot],
                    "[", i,
                    "] may hold one element at two indices, so it cannot be updated in place; clone() it first");
  }
  flat = matrices == 1 && !in_order && is_flat(sizes, strides);
  STD_TORCH_CHECK(flat || merge_dims(sizes, strides, walk), "the tensors of item ", i, " need more than ", kMaxDims,
                  " strided dimensions; make them contiguous()");
}

Program make_program(int64_t bits, size_t i) {
  const Program program(bits);
  STD_TORCH_CHECK(bits >= 0 && bits < int64_t{1} << Program::kBits && program.direction <= Program::kSign &&
                      program.rounding <= Program::kMantissa && !(program.cautious && program.decay_after),
                  "programs[", i, "] is ", bits, ", which is no program; see Program.packed");
  return program;
}

HyperValue make_number(double value) { return {nullptr, value, Dtype::f64}; }

const float* check_scalar(const std::optional<Tensor>& scalar, const Place& place, const char* name) {
  if (!scalar.has_value()) return nullptr;
  place.check(*scalar, name);
  STD_TORCH_CHECK(scalar->scalar_type() == ScalarType::Float && scalar->numel() == 1, name,
                  " must be one float32 number");
  return static_cast<const float*>(scalar->const_data_ptr());
}

int64_t chunks_of(int64_t matrices, int64_t size) { return size == 0 ? 0 : matrices * ((size - 1) / kChunk + 1); }

// What `grad_stats` and `decide_steps` know of the rows beside the gradients.
struct Owners {
  const Tensors& steps;
  const Tensor &rows, &sums, &skipped;
  const std::vector<int64_t>&programs, &first_sums, &hyper_of;
  const std::vector<double>& hyper;
  const Tensors& tensors;
  const std::vector<int64_t>& tensor_at;
};

// One for every row.
std::vector<Owner> make_owners(const Owners& given, const Place& place) {
  const auto& [steps, rows, sums, skipped, programs, first_sums, hyper_of, hyper, tensors, tensor_at] = given;
  const int64_t lines = check_table(sums, place, kSums, "sums");
  const size_t count = programs.size();
  check_lengths(check_table(rows, place, kColumns, "rows"), count, "rows");
  if (!steps.empty()) check_lengths(steps.size(), count, "steps");
  check_lengths(hyper_of.size(), count, "hyper_of");
  check_lengths(first_sums.size(), count + 1, "first_sums");
  check_lengths(tensor_at.size(), tensors.size(), "tensor_at");
  place.check(skipped, "skipped");
  STD_TORCH_CHECK(skipped.scalar_type() == ScalarType::Long && skipped.numel() == 1,
                  "skipped must be one int64 number");

  std::vector<HyperValue> numbers;
  for (double value : hyper) numbers.push_back(make_number(value));
  for (size_t k = 0; k < tensors.size(); ++k) {
    place.check(tensors[k], "tensors", k);
    const bool wide = tensors[k].scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK((wide || tensors[k].scalar_type() == ScalarType::Float) && tensors[k].numel() == 1 &&
                        tensor_at[k] >= 0 && tensor_at[k] < static_cast<int64_t>(numbers.size()),
                    "tensors[", k, "] must be one float32 or float64 number that takes a place in hyper");
    numbers[tensor_at[k]] = {tensors[k].const_data_ptr(), 0, wide ? Dtype::f64 : Dtype::f32};
  }

  std::vector<Owner> owners(count);
  for (size_t i = 0; i < count; ++i) {
    Owner& owner = owners[i];
    if (!steps.empty() && steps[i].numel() != 0) {
      place.check(steps[i], "steps", i);
      STD_TORCH_CHECK(steps[i].scalar_type() == ScalarType::Float && steps[i].numel() == 1, "steps[", i,
                      "] must be one float32 number");
      owner.step = pointer<float>(steps[i]);
    }
    owner.program = make_program(programs[i], i);
    STD_TORCH_CHECK(!owner.program.start_first || owner.step != nullptr, "programs[", i,
                    "] begins with the first gradient, which steps[", i, "] must count");
    owner.first_sum = first_sums[i], owner.end_sum = first_sums[i + 1];
    STD_TORCH_CHECK(0 <= owner.first_sum && owner.first_sum <= owner.end_sum && owner.end_sum <= lines, "first_sums[",
                    i, "] names lines that the table of sums does not have");
    STD_TORCH_CHECK(hyper_of[i] >= 0 && (hyper_of[i] + 1) * kHypers <= static_cast<int64_t>(numbers.size()),
                    "hyper_of[", i, "] is ", hyper_of[i], "; hyper holds ", kHypers, " numbers for each group");
    std::copy_n(numbers.begin() + hyper_of[i] * kHypers, static_cast<int>(kHypers), owner.hyper);
  }
  return owners;
}

void grad_stats(const Tensors& grads, const Tensors& steps, const Tensor& rows, const Tensor& sums,
                const Tensor& skipped, const Tensor& scratch, const std::vector<int64_t>& programs,
                const std::vector<int64_t>& first_sums, const std::vector<int64_t>& hyper_of,
                const std::vector<double>& hyper, const Tensors& tensors, const std::vector<int64_t>& tensor_at,
                const std::optional<Tensor>& found_inf, const std::optional<Tensor>& grad_scale, bool decide) {
  const Place place(rows);
  check_lengths(programs.size(), grads.size(), "programs");
  const std::vector<Owner> owners =
      make_owners({steps, rows, sums, skipped, programs, first_sums, hyper_of, hyper, tensors, tensor_at}, place);
  if (grads.empty()) return;

  GradStatsParams params{};
  params.gradients.reserve(grads.size());
  int64_t chunks = 0;
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor& grad = grads[i];
    place.check(grad, "grads", i);
    Gradient gradient{};
    gradient.dtype = element_type(grad, place, "grads", i);
    STD_TORCH_CHECK(gradient.dtype != Dtype::i16, "grads[", i, "] must be floating-point");
    gradient.at = grad.const_data_ptr();
    gradient.size = grad.numel();
    STD_TORCH_CHECK(gradient.size > 0, "grads[", i, "] has no elements; leave it out");
    std::array<const Tensor*, kSlots> only{};
    only[kGrad] = &grad;
    lay_out(only, {}, 1, i, gradient.flat, gradient.walk);
    gradient.owner = owners[i];
    chunks += chunks_of(1, gradient.size);
    params.gradients.push_back(gradient);
  }
  params.scaling = {check_scalar(found_inf, place, "found_inf"), check_scalar(grad_scale, place, "grad_scale")};
  params.rows = pointer<double>(rows);
  params.sums = static_cast<const double*>(sums.const_data_ptr());
  params.skipped = pointer<int64_t>(skipped);
  params.scratch = check_scratch(scratch, place, kSums, std::max(sums.size(0), rows.size(0)), chunks);
  params.decide = decide;
#ifdef STEEPEST_HAS_CUDA
  if (place.cuda) {
    const torch::stable::accelerator::DeviceGuard guard(place.index);
    return grad_stats_on_device(params, current_stream(place.index));
  }
#endif
  grad_stats_on_host(params);
}

void decide_steps(const Tensors& steps, const Tensor& rows, const Tensor& sums, const Tensor& skipped,
                  const std::vector<int64_t>& programs, const std::vector<int64_t>& first_sums,
                  const std::vector<int64_t>& hyper_of, const std::vector<double>& hyper, const Tensors& tensors,
                  const std::vector<int64_t>& tensor_at, const std::optional<Tensor>& grad_scale) {
  const Place place(rows);
  DecideStepsParams params{};
  params.owners =
      make_owners({steps, rows, sums, skipped, programs, first_sums, hyper_of, hyper, tensors, tensor_at}, place);
  if (params.owners.empty()) return;
  params.grad_scale = check_scalar(grad_scale, place, "grad_scale");
  params.rows = pointer<double>(rows);
  params.sums = static_cast<const double*>(sums.const_data_ptr());
  params.skipped = pointer<int64_t>(skipped);
#ifdef STEEPEST_HAS_CUDA
  if (place.cuda) {
    const torch::stable::accelerator::DeviceGuard guard(place.index);
    return decide_steps_on_device(params, current_stream(place.index));
  }
#endif
  decide_steps_on_host(params);
}

// What `update_moments` and `apply_update` have in common: nullptr for the slots that the op does not have.
struct Lists {
  std::array<const Tensors*, kSlots> slots;
  bool written[kSlots];
  const Tensors *lengths, *factors;
  const std::vector<int64_t>&programs, &row_of, &matrices, &first_sums, &places;
  const std::vector<double>& ratios;
};

void add_factors(Item& item, const Tensor& factors, const Place& place, size_t i) {
  place.check(factors, "factors", i);
  item.factor_dtype = element_type(factors, place, "factors", i);
  const int64_t rows = factors.numel() % item.matrices == 0 ? factors.numel() / item.matrices : 0;
  STD_TORCH_CHECK(
      (item.factor_dtype == Dtype::f32 || item.factor_dtype == Dtype::f64) && factors.is_contiguous() && rows > 0 &&
          item.size % rows == 0 && item.size / rows <= kMostOfRow,
      "factors[", i, "] has ", factors.numel(), " numbers of ", torch::headeronly::toString(factors.scalar_type()),
      "; it must hold one float32 number for each row of ", item.matrices, " matrices of ", item.size, " elements");
  item.factors = factors.const_data_ptr();
  item.columns = item.size / rows;
}

Item make_item(const Lists& lists, const Place& place, size_t i) {
  Item item{};
  std::array<const Tensor*, kSlots> tensors{};
  int64_t numel = 0;
  for (int slot = 0; slot < kSlots; ++slot) {
    if (lists.slots[slot] == nullptr || lists.slots[slot]->empty()) continue;
    const Tensor& tensor = (*lists.slots[slot])[i];
    const int64_t given = tensor.numel();
    if (given == 0) continue;
    STD_TORCH_CHECK(numel == 0 || numel == given, "the tensors of item ", i, " have ", numel, " and ", given,
                    " elements");
    place.check(tensor, kNames[slot], i);
    item.dtype[slot] = element_type(tensor, place, kNames[slot], i);
    STD_TORCH_CHECK((item.dtype[slot] == Dtype::i16) == (slot == kMantissa), kNames[slot], "[", i,
                    "] must be floating-point, and mantissas int16");
    item.at[slot] = lists.written[slot] ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
    tensors[slot] = &tensor;
    numel = given;
  }
  item.program = make_program(lists.programs[i], i);
  item.matrices = lists.matrices[i];
  STD_TORCH_CHECK(item.matrices > 0 && numel > 0 && numel % item.matrices == 0, "item ", i, " has ", numel,
                  " elements, which are not ", item.matrices, " matrices");
  item.size = numel / item.matrices;
  item.ratio = lists.ratios[i];
  for (int k = 0; k < 3; ++k) item.place[k] = static_cast<uint32_t>(lists.places[3 * i + k]);
  lay_out(tensors, lists.written, item.matrices, i, item.flat, item.walk,
          item.program.rounding == Program::kStochastic);
  if (lists.lengths != nullptr && !lists.lengths->empty() && (*lists.lengths)[i].numel() != 0) {
    const Tensor& lengths = (*lists.lengths)[i];
    place.check(lengths, "lengths", i);
    STD_TORCH_CHECK(
        lengths.scalar_type() == ScalarType::Double && lengths.is_contiguous() && lengths.numel() == item.matrices,
        "lengths[", i, "] must hold one float64 number for each of ", item.matrices, " matrices");
    item.lengths = static_cast<const double*>(lengths.const_data_ptr());
  }
  if (lists.factors != nullptr && !lists.factors->empty() && (*lists.factors)[i].numel() != 0)
    add_factors(item, (*lists.factors)[i], place, i);
  return item;
}

// A tensor that the item's program needs and does not have.
void check_complete(const Item& item, Stage stage, size_t i) {
  const auto needs = [&](Slot slot, bool wanted) {
    STD_TORCH_CHECK(!wanted || item.at[slot] != nullptr, "item ", i, " has no ", kNames[slot],
                    ", which its program uses");
  };
  const bool given = item.program.direction == Program::kGiven;
  needs(kSecond, item.program.power != Program::kNone);
  needs(kGrad, stage == Stage::update_moments);
  needs(kMomentum, stage == Stage::update_moments);
  needs(kDirection, stage == Stage::apply_update);
  needs(kParam, !given || stage == Stage::apply_update);
  const bool keeps = item.program.rounding == Program::kMantissa && item.at[kParam] != nullptr;
  needs(kMantissa, keeps && item.dtype[kParam] == Dtype::bf16);
  STD_TORCH_CHECK(item.at[kMantissa] == nullptr || (item.at[kParam] != nullptr && item.dtype[kParam] == Dtype::bf16),
                  "item ", i, " has a mantissa; only a bfloat16 param keeps one");
  STD_TORCH_CHECK(item.program.power != Program::kNone || item.at[kSecond] == nullptr, "item ", i,
                  " has a second moment, which its program does not use");
}

// How directions are normalized before `apply_update` reads them, item by item: those whose list of averages has a
// tensor without elements are taken as they are. rates: beta2, eps and rms of each.
struct Normalizing {
  const Tensors &directions, &factors, &averages, &divided;
  const Tensor& meeting;
  const std::vector<double>& rates;

  void check_lists(size_t count) const {
    check_lengths(directions.size(), count, "directions"), check_lengths(factors.size(), count, "factors");
    check_lengths(averages.size(), count, "averages"), check_lengths(divided.size(), count, "divided");
    check_lengths(rates.size(), 3 * count, "rates");
  }
  // What an item reads for its direction.
  const Tensor& read(size_t i) const { return divided[i].numel() == 0 ? directions[i] : divided[i]; }
  Stack stack(const Item& item, const Place& place, size_t i) const {
    const Tensor* const made = divided[i].numel() == 0 ? nullptr : &divided[i];
    if (averages[i].numel() == 0) {
      STD_TORCH_CHECK(made == nullptr, "divided[", i, "] is given for an item without averages");
      return {};
    }
    Stack stack = make_stack(directions[i], averages[i], made, factors[i], place, i, {"directions", "averages"});
    STD_TORCH_CHECK(stack.matrices == item.matrices && stack.size() == item.size, "directions[", i, "] must be ",
                    item.matrices, " matrices of ", item.size, " elements");
    add_rates(stack, rates[3 * i], rates[3 * i + 1], rates[3 * i + 2]);
    return stack;
  }
};

void run(Stage stage, const Lists& lists, const Tensor& rows, const Tensor& sums, const Tensor& scratch,
         const Normalizing* normalizing = nullptr) {
  const Place place(rows);
  const int64_t parameters = check_table(rows, place, kColumns, "rows");
  const int64_t lines = check_table(sums, place, kSums, "sums");
  const size_t count = lists.programs.size();
  const auto check_list = [&](const Tensors* list, const char* name) {
    if (list != nullptr && !list->empty()) check_lengths(list->size(), count, name);
  };
  for (int slot = 0; slot < kSlots; ++slot) check_list(lists.slots[slot], kNames[slot]);
  check_list(lists.lengths, "lengths");
  check_list(lists.factors, "factors");
  check_lengths(lists.row_of.size(), count, "row_of");
  check_lengths(lists.matrices.size(), count, "matrices");
  check_lengths(lists.first_sums.size(), count, "first_sums");
  check_lengths(lists.places.size(), 3 * count, "places");
  check_lengths(lists.ratios.size(), count, "ratios");
  NormalizedItemsParams params{};
  int64_t chunks = 0, stacked = 0, parts = 0;
  params.items.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    Item item = make_item(lists, place, i);
    check_complete(item, stage, i);
    item.first_sum = lists.first_sums[i];
    STD_TORCH_CHECK(lists.row_of[i] >= 0 && lists.row_of[i] < parameters, "row_of[", i, "] is ", lists.row_of[i],
                    "; rows has ", parameters);
    item.row = static_cast<int32_t>(lists.row_of[i]);
    STD_TORCH_CHECK(item.first_sum >= 0 && item.first_sum + item.matrices <= lines, "first_sums[", i,
                    "] names lines that the table of sums does not have");
    chunks += chunks_of(item.matrices, item.size);
    params.items.push_back(item);
    if (normalizing == nullptr) continue;
    params.stacks.push_back(normalizing->stack(item, place, i));
    const Stack& stack = params.stacks.back();
    if (stack.matrices != 0) stacked += stack.matrices, parts += stack.matrices * blocks_of(stack);
  }
  if (count == 0) return;
  params.rows = static_cast<const double*>(rows.const_data_ptr());
  params.sums = pointer<double>(sums);
  params.scratch = check_scratch(scratch, place, kSums, std::max(lines, parameters), chunks);
  const bool normalizes = stacked != 0;
  if (normalizes) params.meeting = check_meeting(normalizing->meeting, place, stacked, parts, "meeting");
#ifdef STEEPEST_HAS_CUDA
  if (place.cuda) {
    const torch::stable::accelerator::DeviceGuard guard(place.index);
    void* const stream = current_stream(place.index);
    return normalizes ? normalize_and_apply_on_device(params, stream) : run_on_device(stage, params, stream);
  }
#endif
  normalizes ? normalize_and_apply_on_host(params) : run_on_host(stage, params);
}

void update_moments(const Tensors& grads, const Tensors& momenta, const Tensors& seconds, const Tensors& inputs,
                    const Tensors& params, const Tensors& mantissas, const Tensor& rows, const Tensor& sums,
                    const Tensor& scratch, const std::vector<int64_t>& programs, const std::vector<int64_t>& row_of,
                    const std::vector<int64_t>& matrices, const std::vector<int64_t>& first_sums,
                    const std::vector<int64_t>& places, const std::vector<double>& ratios) {
  run(Stage::update_moments,
      {{&grads, &momenta, &seconds, &inputs, &params, &mantissas},
       {false, true, true, true, true, true},
       nullptr,
       nullptr,
       programs,
       row_of,
       matrices,
       first_sums,
       places,
       ratios},
      rows, sums, scratch);
}

// read: what items read for their directions.
Lists of_apply(const Tensors& read, const Tensors& seconds, const Tensors& params, const Tensors& mantissas,
               const Tensors& lengths, const Tensors& factors, const std::vector<int64_t>& programs,
               const std::vector<int64_t>& row_of, const std::vector<int64_t>& matrices,
               const std::vector<int64_t>& first_sums, const std::vector<int64_t>& places,
               const std::vector<double>& ratios) {
  return {{nullptr, nullptr, &seconds, &read, &params, &mantissas},
          {false, false, false, false, true, true},
          &lengths,
          &factors,
          programs,
          row_of,
          matrices,
          first_sums,
          places,
          ratios};
}

void apply_update(const Tensors& directions, const Tensors& seconds, const Tensors& params, const Tensors& mantissas,
                  const Tensors& lengths, const Tensors& factors, const Tensor& rows, const Tensor& sums,
                  const Tensor& scratch, const std::vector<int64_t>& programs, const std::vector<int64_t>& row_of,
                  const std::vector<int64_t>& matrices, const std::vector<int64_t>& first_sums,
                  const std::vector<int64_t>& places, const std::vector<double>& ratios) {
  const Lists lists = of_apply(directions, seconds, params, mantissas, lengths, factors, programs, row_of, matrices,
                               first_sums, places, ratios);
  run(Stage::apply_update, lists, rows, sums, scratch);
}

void normalize_and_apply_update(const Tensors& directions, const Tensors& seconds, const Tensors& params,
                                const Tensors& mantissas, const Tensors& lengths, const Tensors& factors,
                                const Tensors& averages, const Tensors& divided, const Tensor& rows, const Tensor& sums,
                                const Tensor& scratch, const Tensor& meeting, const std::vector<int64_t>& programs,
                                const std::vector<int64_t>& row_of, const std::vector<int64_t>& matrices,
                                const std::vector<int64_t>& first_sums, const std::vector<int64_t>& places,
                                const std::vector<double>& ratios, const std::vector<double>& rates) {
  const Normalizing normalizing{directions, factors, averages, divided, meeting, rates};
  normalizing.check_lists(programs.size());
  Tensors read;
  for (size_t i = 0; i < programs.size(); ++i) read.push_back(normalizing.read(i));
  const Lists lists = of_apply(read, seconds, params, mantissas, lengths, factors, programs, row_of, matrices,
                               first_sums, places, ratios);
  run(Stage::apply_update, lists, rows, sums, scratch, &normalizing);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(steepest, CPU, m) {
  m.impl("grad_stats", TORCH_BOX(&grad_stats));
  m.impl("decide_steps", TORCH_BOX(&decide_steps));
  m.impl("update_moments", TORCH_BOX(&update_moments));
  m.impl("apply_update", TORCH_BOX(&apply_update));
  m.impl("normalize_and_apply_update", TORCH_BOX(&normalize_and_apply_update));
}

#ifdef STEEPEST_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(steepest, CUDA, m) {
  m.impl("grad_stats", TORCH_BOX(&grad_stats));
  m.impl("decide_steps", TORCH_BOX(&decide_steps));
  m.impl("update_moments", TORCH_BOX(&update_moments));
  m.impl("apply_update", TORCH_BOX(&apply_update));
  m.impl("normalize_and_apply_update", TORCH_BOX(&normalize_and_apply_update));
}
#endif

}  // namespace steepest
