// The ops of the polar iteration: check -> params -> device guard, stream -> launch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/device.h"
#include "cpu_polar/chain.h"
#include "cpu_polar/gemm.h"
#include "cpu_polar/syrk.h"
#include "ops/op_checks.h"
#include "polar/chain.h"
#include "polar/chunks.h"
#include "polar/params.h"
#include "small_polar/params.h"
#include "symm_gemm/plan.h"

namespace steepest {
namespace {

using namespace polar;

void check_floats(const Tensor& tensor, const Place& place, int64_t elements, const char* name) {
  place.check(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == elements,
                  name, " must be a contiguous float32 tensor of ", elements, " elements");
}

std::vector<Node> make_nodes(const std::vector<int64_t>& ints, const std::vector<double>& floats, int64_t columns) {
  const size_t count = ints.size() / kNodeInts;
  STD_TORCH_CHECK(ints.size() == count * kNodeInts && floats.size() == count * kNodeFloats, "a node is ", kNodeInts,
                  " integers and ", kNodeFloats, " numbers; got ", ints.size(), " and ", floats.size());
  return nodes_of(ints.data(), floats.data(), count, columns);
}

std::vector<Stack> make_stacks(const std::vector<Tensor>& xs, const std::vector<Tensor>& ys,
                               const std::vector<Tensor>& slacks, int64_t columns, const Place& place, Dtype dtype) {
  std::vector<Stack> stacks;
  for (size_t i = 0; i < xs.size(); ++i) {
    const Tensor &x = xs[i], &y = ys[i];
    STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous() && x.numel() > 0, "xs[", i,
                    "] must be a contiguous stack of matrices");
    STD_TORCH_CHECK(element_type(x, place, "xs", i) == dtype, "xs[", i, "] is of another type than xs[0]");
    place.check(x, "xs", i), place.check(y, "ys", i);
    STD_TORCH_CHECK(y.scalar_type() == x.scalar_type() && y.is_contiguous() && y.numel() == x.numel(), "ys[", i,
                    "] must be like xs[", i, "]");
    Stack stack{};
    stack.matrices = x.size(0), stack.rows = x.size(1), stack.columns = x.size(2), stack.number_columns = columns;
    check_floats(slacks[i], place, stack.matrices, "slacks");
    stack.at[kX] = x.mutable_data_ptr(), stack.at[kY] = y.mutable_data_ptr();
    stack.slack = pointer<float>(slacks[i]);
    stacks.push_back(stack);
  }
  return stacks;
}

// The weights that a chain ends in; the stacks point into `addresses`.
void add_weights(std::vector<Stack>& stacks, const std::vector<Tensor>& weights, const std::vector<Tensor>& etas,
                 const std::vector<Tensor>& betas, const Place& place, std::vector<void*>& addresses) {
  if (weights.empty()) return;
  int64_t matrices = 0;
  for (const Stack& stack : stacks) matrices += stack.matrices;
  STD_TORCH_CHECK(
      static_cast<int64_t>(weights.size()) == matrices && etas.size() == stacks.size() && betas.size() == stacks.size(),
      "weights has ", weights.size(), " tensors for ", matrices, " matrices; etas and betas go by xs");
  addresses.reserve(weights.size());
  for (size_t i = 0; i < stacks.size(); ++i) {
    Stack& stack = stacks[i];
    const size_t first = addresses.size();
    check_floats(etas[i], place, stack.matrices, "etas"), check_floats(betas[i], place, stack.matrices, "betas");
    const Dtype stored = element_type(weights[first], place, "weights", first);
    stack.update = {addresses.data() + first, stored, {pointer<float>(etas[i]), 1, 0}};
    stack.update_beta = {pointer<float>(betas[i]), 1, 0};
    for (size_t at = first; at < first + stack.matrices; ++at)
      addresses.push_back(weight_address(weights[at], place, at, stack.rows, stack.columns, stored));
  }
}

// Squares, numbers and scratch of the stacks, which live as long as what is returned. Chunks use them in turn, so there
// is room for the largest part of a stack that a chunk has.
std::vector<Tensor> add_room(std::vector<Stack>& stacks, const std::vector<Chunk>& chunks,
                             const std::vector<Node>& nodes, const Place& place, const Tensor& x) {
  bool used[kBuffers] = {false, false, true};
  for (const Node& node : nodes) used[node.out] = true;
  std::vector<Tensor> held;
  const auto hold = [&](Tensor tensor) { return held.emplace_back(std::move(tensor)).mutable_data_ptr(); };
  for (size_t i = 0; i < stacks.size(); ++i) {
    Stack& stack = stacks[i];
    int64_t most = 0;
    for (const Chunk& chunk : chunks) most = std::max(most, chunk[i].count);
    const int64_t side = stack.side(), blocks = most * blocks_of(side);
    for (int buffer = kGram; buffer < kBuffers; ++buffer)
      if (used[buffer]) stack.at[buffer] = hold(torch::stable::new_empty(x, {most, side, side}));
    stack.numbers =
        static_cast<float*>(hold(torch::stable::new_empty(x, {most, stack.number_columns}, ScalarType::Float)));
    held.push_back(torch::stable::new_zeros(x, {most + blocks * kSpreadSums}, ScalarType::Double));
    stack.scratch = check_scratch(held.back(), place, kSpreadSums, most, blocks);
  }
  return held;
}

// What runs on the host or the device: lists of products, and what is done stack by stack.
struct Ways {
  std::function<void(const std::vector<symm_gemm::Problem>&)> products;
  std::function<void(const Stack&)> numbers;
  std::function<void(const Node&, const Stack&)> sum;
};

void run_chain(const std::vector<Node>& nodes, const std::vector<Stack>& stacks, const Ways& run) {
  run.products(first_gram(stacks));
  for (const Stack& stack : stacks) run.numbers(stack);
  for (const Node& node : nodes) {
    if (node.kind == Kind::sum)
      for (const Stack& stack : stacks) run.sum(node, stack);
    else if (&node == &nodes.back() && stacks.front().update.weights != nullptr)
      run.products(updates_of(node, stacks));
    else
      run.products(products_of(node, stacks));
  }
}

#ifdef STEEPEST_HAS_HOPPER
// Plans of all nodes and chunks first, so that one workspace serves them one after another; of their lists of products
// few differ.
void run_on_hopper(const std::vector<Node>& nodes, const std::vector<std::vector<Stack>>& parts,
                   const Numbering& numbering, const Place& place, Dtype dtype, const Tensor& x, bool batch_invariant) {
  void* stream = current_stream(place.index);
  const int multiprocessors = multiprocessors_of(place.index);
  std::vector<std::pair<std::vector<symm_gemm::Shape>, bool>> known;
  std::vector<symm_gemm::Plan> plans;
  std::vector<size_t> plan_of;
  int64_t floats = 0, counters = 0;
  const auto plan = [&](const std::vector<symm_gemm::Problem>& some) {
    std::vector<symm_gemm::Shape> shapes;
    for (const symm_gemm::Problem& problem : some) shapes.push_back(problem.shape);
    const bool updates = some.front().update.weights != nullptr;
    const std::pair<std::vector<symm_gemm::Shape>, bool> key{std::move(shapes), updates};
    plan_of.push_back(std::find(known.begin(), known.end(), key) - known.begin());
    if (plan_of.back() < known.size()) return;
    symm_gemm::Options options = symm_gemm::options_of(updates);
    // Where a sum is cut follows from how many tiles there are in all.
    if (batch_invariant) options.streams = symm_gemm::Streams::never;
    plans.push_back(make_plan(key.first, multiprocessors, options));
    known.push_back(key);
    for (const std::string& reason : plans.back().reasons) STD_TORCH_CHECK(reason.empty(), "polar_chain: ", reason);
    floats = std::max(floats, plans.back().workspace_floats);
    counters = std::max(counters, plans.back().workspace_counters);
  };
  for (const std::vector<Stack>& part : parts)
    run_chain(nodes, part, {plan, [](const Stack&) {}, [](const Node&, const Stack&) {}});
  const Tensor partials = torch::stable::new_empty(x, {floats}, ScalarType::Float);
  const Tensor counts = torch::stable::new_zeros(x, {counters}, ScalarType::Int);
  const symm_gemm::Workspace workspace{pointer<float>(partials), pointer<uint32_t>(counts)};
  auto next = plan_of.begin();
  const Ways ways{
      [&](const std::vector<symm_gemm::Problem>& some) { run_on_sm90(plans[*next++], some, dtype, workspace, stream); },
      [&](const Stack& stack) { numbers_on_device(numbers_params(stack, dtype, numbering), stream); },
      [&](const Node& node, const Stack& stack) { sum_on_device(node, stack, dtype, stream); }};
  for (const std::vector<Stack>& part : parts) run_chain(nodes, part, ways);
}
#endif

bool too_many_weights(const Chunk& chunk) {
  int64_t matrices = 0;
  for (const Range& range : chunk) matrices += range.count;
  return matrices > symm_gemm::kMostWeights;
}

// 0: as many as the planner's model finds, on a CPU one.
std::vector<Chunk> make_chunks(const std::vector<Node>& nodes, const std::vector<Stack>& stacks,
                               [[maybe_unused]] const Place& place, int64_t count) {
#ifdef STEEPEST_HAS_HOPPER
  if (count == 0 && place.cuda)
    return known_chunks(nodes, stacks, {multiprocessors_of(place.index), l2_bytes_of(place.index)});
#endif
  return cut(nodes, stacks, std::max<int64_t>(count, 1));
}

void polar_chain(const std::vector<Tensor>& xs, const std::vector<Tensor>& ys, const std::vector<Tensor>& slacks,
                 const std::vector<Tensor>& weights, const std::vector<Tensor>& etas, const std::vector<Tensor>& betas,
                 const std::vector<int64_t>& ints, const std::vector<double>& floats,
                 const std::vector<double>& constants, const std::vector<int64_t>& powers,
                 const std::vector<double>& least, bool tight, double eps, int64_t chunk_count,
                 [[maybe_unused]] bool batch_invariant) {
  STD_TORCH_CHECK(ys.size() == xs.size() && slacks.size() == xs.size(), "xs, ys and slacks go by one another");
  STD_TORCH_CHECK(chunk_count >= 0, "chunks is ", chunk_count, "; 0 stands for what the planner finds");
  if (xs.empty()) return;
  const Place place(xs[0]);
  const Dtype dtype = element_type(xs[0], place, "xs", 0);
  STD_TORCH_CHECK(dtype == Dtype::f16 || dtype == Dtype::bf16, "xs must be float16 or bfloat16");
  const Numbering numbering = numbering_of(constants, powers, least, tight, eps);
  const std::vector<Node> nodes = make_nodes(ints, floats, numbering.columns);
  std::vector<Stack> stacks = make_stacks(xs, ys, slacks, numbering.columns, place, dtype);
  std::vector<void*> addresses;
  add_weights(stacks, weights, etas, betas, place, addresses);
  STD_TORCH_CHECK(weights.empty() || (!nodes.empty() && nodes.back().kind == Kind::apply &&
                                      nodes.back().beta.column < 0 && nodes.back().beta.value == 0),
                  "a chain that ends in weights ends in a product alpha Q X");
#ifdef STEEPEST_HAS_HOPPER
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (place.cuda) guard.emplace(place.index);
#endif
  std::vector<Chunk> chunks = make_chunks(nodes, stacks, place, chunk_count);
  while (!weights.empty() && std::any_of(chunks.begin(), chunks.end(), too_many_weights))
    chunks = cut(nodes, stacks, 2 * static_cast<int64_t>(chunks.size()));
  const std::vector<Tensor> held = add_room(stacks, chunks, nodes, place, xs[0]);
  std::vector<std::vector<Stack>> parts;
  for (const Chunk& chunk : chunks) parts.push_back(part_of(stacks, chunk));
#ifdef STEEPEST_HAS_HOPPER
  if (place.cuda) return run_on_hopper(nodes, parts, numbering, place, dtype, xs[0], batch_invariant);
#endif
  const Ways ways{[&](const std::vector<symm_gemm::Problem>& some) { products_on_host(some, dtype); },
                  [&](const Stack& stack) { numbers_on_host(numbers_params(stack, dtype, numbering)); },
                  [&](const Node& node, const Stack& stack) { sum_on_host(node, stack, dtype); }};
  for (const std::vector<Stack>& part : parts) run_chain(nodes, part, ways);
}

// Both have three dimensions.
void check_same_shape(const Tensor& x, const Tensor& out, size_t i) {
  const auto sizes = x.sizes(), wanted = out.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), wanted.begin()), "outs[", i, "] is not of the shape of xs[", i,
                  "]");
}

Dtype cpu_type(const Tensor& tensor, const Place& place, const char* name, size_t i) {
  const Dtype type = element_type(tensor, place, name, i);
  STD_TORCH_CHECK(type == Dtype::f32 || type == Dtype::bf16, name, "[", i, "] must be float32 or bfloat16");
  STD_TORCH_CHECK(tensor.dim() == 3 && tensor.is_contiguous(), name, "[", i,
                  "] must be a contiguous stack of matrices");
  return type;
}

void cpu_chain(const std::vector<Tensor>& xs, const std::vector<Tensor>& outs, const std::vector<Tensor>& slacks,
               const std::vector<int64_t>& ints, const std::vector<double>& floats,
               const std::vector<double>& constants, const std::vector<int64_t>& powers,
               const std::vector<double>& least, bool tight, double eps, int64_t result, bool divides, bool bf16,
               int64_t at_once) {
  STD_TORCH_CHECK(outs.size() == xs.size() && slacks.size() == xs.size(), "xs, outs and slacks go by one another");
  STD_TORCH_CHECK(result == kX || result == kY, "result is buffer ", result, "; 0 and 1 have the shape of X");
  STD_TORCH_CHECK(at_once > 0, "at_once is ", at_once, "; one matrix at least is worked on");
  if (xs.empty()) return;
  const Place place(xs[0]);
  const Dtype dtype = bf16 ? Dtype::bf16 : Dtype::f32;
  const cpu_polar::Kernels* const kernels = cpu_polar::kernels_for(dtype);
  STD_TORCH_CHECK(kernels != nullptr, "cpu_chain has no products of this type for this processor");
  const Numbering numbering = numbering_of(constants, powers, least, tight, eps);
  const cpu_polar::Chain chain{make_nodes(ints, floats, numbering.columns), static_cast<Buffer>(result), numbering,
                               divides};
  STD_TORCH_CHECK(!divides || numbering.columns == 0, "what is divided by its norm takes no numbers from it");
  std::vector<cpu_polar::Stack> stacks;
  for (size_t i = 0; i < xs.size(); ++i) {
    const Tensor &x = xs[i], &out = outs[i];
    cpu_polar::Stack stack{};
    stack.x_dtype = cpu_type(x, place, "xs", i), stack.out_dtype = cpu_type(out, place, "outs", i);
    check_same_shape(x, out, i);
    stack.matrices = x.size(0), stack.rows = x.size(1), stack.columns = x.size(2);
    check_floats(slacks[i], place, stack.matrices, "slacks");
    stack.x = x.const_data_ptr(), stack.out = out.mutable_data_ptr(), stack.slack = pointer<float>(slacks[i]);
    stacks.push_back(stack);
  }
  cpu_polar::run(chain, stacks, dtype, *kernels, at_once);
}

// A contiguous stack (matrices, rows, columns), or one of transposes of such: whether it is by rows.
bool lies_by_rows(const Tensor& x, const Place& place, const char* name) {
  place.check(x, name);
  STD_TORCH_CHECK(x.dim() == 3 && x.scalar_type() == ScalarType::Float, name, " must be a float32 stack of matrices");
  const int64_t matrices = x.size(0), rows = x.size(1), columns = x.size(2);
  const bool by_rows = x.is_contiguous();
  STD_TORCH_CHECK(by_rows || ((rows == 1 || x.stride(1) == 1) && (columns == 1 || x.stride(2) == rows) &&
                              (matrices == 1 || x.stride(0) == rows * columns)),
                  name, " must be a contiguous stack, or one of transposes");
  return by_rows;
}

// c may be out.
void cpu_syrk(const Tensor& x, const Tensor& c, const Tensor& out, const Tensor& alpha, const Tensor& beta) {
  const Place place(x);
  const cpu_polar::Kernels* const kernels = cpu_polar::kernels_for(Dtype::f32);
  STD_TORCH_CHECK(kernels != nullptr, "cpu_syrk has no products for this processor");
  const bool by_rows = lies_by_rows(x, place, "x");
  const int64_t matrices = x.size(0), m = x.size(1), k = x.size(2);
  check_floats(c, place, matrices * m * m, "c"), check_floats(out, place, matrices * m * m, "out");
  check_floats(alpha, place, matrices, "alpha"), check_floats(beta, place, matrices, "beta");
  cpu_polar::average(
      {{matrices, m, k, static_cast<const float*>(x.const_data_ptr()), by_rows,
        static_cast<const float*>(c.const_data_ptr()), pointer<float>(out),
        static_cast<const float*>(alpha.const_data_ptr()), static_cast<const float*>(beta.const_data_ptr())}},
      *kernels);
}

// c may be out, which is apart from a and b.
void cpu_gemm(const Tensor& a, const Tensor& b, const std::optional<Tensor>& c, const Tensor& out, double alpha,
              double beta, bool symmetric) {
  const Place place(a);
  const cpu_polar::Kernels* const kernels = cpu_polar::kernels_for(Dtype::f32);
  STD_TORCH_CHECK(kernels != nullptr, "cpu_gemm has no products for this processor");
  const bool a_by_rows = lies_by_rows(a, place, "a"), b_by_rows = lies_by_rows(b, place, "b");
  const int64_t matrices = a.size(0), m = a.size(1), k = a.size(2), n = b.size(2);
  STD_TORCH_CHECK(b.size(0) == matrices && b.size(1) == k, "a and b must be stacks of matrices that make products");
  STD_TORCH_CHECK(!symmetric || m == n, "a symmetric product is square, not ", m, " x ", n);
  check_floats(out, place, matrices * m * n, "out");
  if (c) check_floats(*c, place, matrices * m * n, "c");
  const cpu_polar::StackedFactor left{static_cast<const float*>(a.const_data_ptr()), a_by_rows},
      right{static_cast<const float*>(b.const_data_ptr()), b_by_rows};
  cpu_polar::multiply({matrices, m, n, k, left, right, c ? static_cast<const float*>(c->const_data_ptr()) : nullptr,
                       pointer<float>(out), static_cast<float>(alpha), c ? static_cast<float>(beta) : 0.0f, symmetric},
                      *kernels);
}

#ifdef STEEPEST_HAS_CUDA
Dtype small_type(const Tensor& tensor, const Place& place, const char* name, size_t i) {
  const Dtype type = element_type(tensor, place, name, i);
  STD_TORCH_CHECK(type != Dtype::f64 && type != Dtype::i16, name, "[", i, "] must be float32, bfloat16 or float16");
  return type;
}

small_polar::Schedule make_schedule(const std::vector<double>& coefficients, int64_t tables,
                                    const std::vector<double>& least, bool tight, double eps) {
  const int64_t terms = small_polar::kMostTerms, count = static_cast<int64_t>(coefficients.size());
  STD_TORCH_CHECK(tables > 0 && count > 0 && count % (tables * terms) == 0, "coefficients has ", count,
                  " elements; wanted are ", terms, " for each step of ", tables, " tables");
  small_polar::Schedule schedule{{}, least, tight, eps};
  auto at = coefficients.begin();
  for (int64_t t = 0; t < tables; ++t) {
    small_polar::Table table;
    for (int64_t k = 0; k < count / (tables * terms); ++k, at += terms)
      table.emplace_back(at, std::find_if(at, at + terms, [](double value) { return value != value; }));
    schedule.tables.push_back(std::move(table));
  }
  return schedule;
}

void small_polar_op(const std::vector<Tensor>& xs, const std::vector<Tensor>& outs, const std::vector<Tensor>& slacks,
                    const std::vector<double>& coefficients, int64_t tables, const std::vector<double>& least,
                    bool tight, double eps) {
  STD_TORCH_CHECK(outs.size() == xs.size() && slacks.size() == xs.size(), "xs, outs and slacks go by one another");
  if (xs.empty()) return;
  const Place place(xs[0]);
  const small_polar::Schedule schedule = make_schedule(coefficients, tables, least, tight, eps);
  std::vector<small_polar::Matrices> matrices;
  for (size_t i = 0; i < xs.size(); ++i) {
    const Tensor &x = xs[i], &out = outs[i];
    place.check(x, "xs", i), place.check(out, "outs", i);
    STD_TORCH_CHECK(x.dim() == 3 && out.dim() == 3 && x.stride(2) == 1 && out.stride(2) == 1, "xs[", i,
                    "] and outs must be stacks of matrices with contiguous rows");
    check_same_shape(x, out, i);
    STD_TORCH_CHECK(x.size(1) <= INT32_MAX && x.size(2) <= INT32_MAX, "xs[", i, "] has too long a side");
    check_floats(slacks[i], place, x.size(0), "slacks");
    matrices.push_back({x.const_data_ptr(), out.mutable_data_ptr(), pointer<float>(slacks[i]), x.size(0),
                        static_cast<int32_t>(x.size(1)), static_cast<int32_t>(x.size(2)), x.stride(1), x.stride(0),
                        out.stride(1), out.stride(0), small_type(x, place, "xs", i),
                        small_type(out, place, "outs", i)});
  }
  const torch::stable::accelerator::DeviceGuard guard(place.index);
  small_polar::Room room = small_polar::room_of(capability_of(place.index));
  room.clusters = room.clusters && has_clusters(place.index);
  polar_on_device(matrices, schedule, room, current_stream(place.index));
}

bool cluster_launch(int64_t device) { return has_clusters(static_cast<int32_t>(device)); }
#endif

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
  params.numbering = numbering_of(constants, powers, slacks, tight, eps);
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

STABLE_TORCH_LIBRARY_IMPL(steepest, CPU, m) {
  m.impl("chain_numbers", TORCH_BOX(&chain_numbers));
  m.impl("polar_chain", TORCH_BOX(&polar_chain));
  m.impl("cpu_chain", TORCH_BOX(&cpu_chain));
  m.impl("cpu_syrk", TORCH_BOX(&cpu_syrk));
  m.impl("cpu_gemm", TORCH_BOX(&cpu_gemm));
}

#ifdef STEEPEST_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(steepest, CompositeExplicitAutograd, m) {
  m.impl("cluster_launch", TORCH_BOX(&cluster_launch));
}

STABLE_TORCH_LIBRARY_IMPL(steepest, CUDA, m) {
  m.impl("chain_numbers", TORCH_BOX(&chain_numbers));
  m.impl("small_polar", TORCH_BOX(&small_polar_op));
#ifdef STEEPEST_HAS_HOPPER
  m.impl("polar_chain", TORCH_BOX(&polar_chain));
#endif
}
#endif

}  // namespace steepest
