// The library's index: the schema of every op, and the C functions for facts and plans.
//
// Schemas are registered through torch's stable ABI when the library is loaded; implementations register themselves in
// csrc/ops, the fakes in Python (steepest/ops). The C functions are what Python asks outside of an op, by ctypes
// (steepest/ops/extension.py). Nothing here knows Python, so one binary serves every version of it.
#include <torch/csrc/stable/library.h>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "build_info.h"
#include "common/device.h"
#include "common/json.h"
#include "cpu_polar/kernels.h"
#include "cpu_polar/steps.h"
#include "eigh/cusolver.h"
#include "eigh/params.h"
#include "eigh/steps.h"
#include "multi_tensor/whole_steps.h"
#include "polar/chain.h"
#include "polar/chunks.h"
#include "small_polar/params.h"
#include "symm_gemm/plan.h"

STABLE_TORCH_LIBRARY(steepest, m) {
  m.def(
      "grad_stats(Tensor[] grads, Tensor(a!)[] steps, Tensor(b!) rows, Tensor sums, Tensor(c!) skipped, "
      "Tensor(d!) scratch, int[] programs, int[] first_sums, int[] hyper_of, float[] hyper, Tensor[] tensors, "
      "int[] tensor_at, Tensor? found_inf, Tensor? grad_scale, bool decide=True) -> ()");
  m.def(
      "decide_steps(Tensor(a!)[] steps, Tensor(b!) rows, Tensor sums, Tensor(c!) skipped, int[] programs, "
      "int[] first_sums, int[] hyper_of, float[] hyper, Tensor[] tensors, int[] tensor_at, Tensor? grad_scale) -> ()");
  m.def(
      "update_moments(Tensor[] grads, Tensor(a!)[] momenta, Tensor(b!)[] seconds, Tensor(c!)[] inputs, Tensor(d!)[] "
      "params, "
      "Tensor(e!)[] mantissas, Tensor rows, Tensor(f!) sums, Tensor(g!) scratch, int[] programs, int[] row_of, "
      "int[] matrices, int[] first_sums, int[] places, float[] ratios) -> ()");
  m.def(
      "apply_update(Tensor[] directions, Tensor[] seconds, Tensor(a!)[] params, Tensor(b!)[] mantissas, Tensor[] "
      "lengths, Tensor[] factors, "
      "Tensor rows, Tensor(c!) sums, Tensor(d!) scratch, int[] programs, int[] row_of, int[] matrices, "
      "int[] first_sums, int[] places, float[] ratios) -> ()");
  m.def(
      "normalize_updates(Tensor[] updates, Tensor(a!)[] seconds, Tensor(b!)[] divided, Tensor(c!)[] factors, "
      "Tensor(d!) scratch, float[] beta2, float eps, float rms) -> ()");
  m.def(
      "normalize_and_apply_update(Tensor[] directions, Tensor[] seconds, Tensor(a!)[] params, Tensor(b!)[] mantissas, "
      "Tensor[] lengths, Tensor(e!)[] factors, Tensor(f!)[] averages, Tensor(g!)[] divided, Tensor rows, "
      "Tensor(c!) sums, Tensor(d!) scratch, Tensor(h!) meeting, int[] programs, int[] row_of, int[] matrices, "
      "int[] first_sums, int[] places, float[] ratios, float[] rates) -> ()");
  m.def(
      "chain_numbers(Tensor gram, Tensor(a!) numbers, Tensor(b!) slack, Tensor(c!) scratch, float[] constants, "
      "int[] powers, float[] slacks, bool tight, float eps) -> ()");
  m.def(
      "polar_chain(Tensor(a!)[] xs, Tensor(b!)[] ys, Tensor(c!)[] slacks, Tensor(d!)[] weights, "
      "Tensor[] etas, Tensor[] betas, int[] ints, float[] floats, float[] constants, "
      "int[] powers, float[] least, bool tight, float eps, int chunks=0, bool batch_invariant=False) -> ()");
  m.def(
      "cpu_chain(Tensor[] xs, Tensor(a!)[] outs, Tensor(b!)[] slacks, int[] ints, float[] floats, float[] constants, "
      "int[] powers, float[] least, bool tight, float eps, int result, bool divides, bool bf16, int at_once) -> ()");
  m.def("cpu_syrk(Tensor x, Tensor c, Tensor(a!) out, Tensor alpha, Tensor beta) -> ()");
  m.def("cpu_gemm(Tensor a, Tensor b, Tensor? c, Tensor(a!) out, float alpha, float beta, bool symmetric) -> ()");
  m.def("copy_if(Tensor flag, Tensor(a!)[] to, Tensor[] source) -> ()");
  m.def(
      "grouped_gemm(Tensor[] a, Tensor[] b, Tensor[] c, Tensor(a!)[] out, Tensor[] alphas, Tensor[] betas, "
      "float alpha, float beta, bool symmetric, int tile=0, int streams=0) -> ()");
  m.def("weight_update(Tensor a, Tensor b, Tensor(a!)[] weights, Tensor alpha, Tensor beta) -> ()");
  m.def(
      "small_polar(Tensor[] xs, Tensor(a!)[] outs, Tensor(b!)[] slacks, float[] coefficients, int tables, "
      "float[] least, bool tight, float eps) -> ()");
  m.def("cluster_launch(int device) -> bool");
  m.def(
      "eigh_refresh(Tensor P, Tensor Q, Tensor(a!) basis, Tensor(b!) values, Tensor(c!) status, Tensor(d!) order, "
      "int method, int sweeps) -> ()");
  m.def("eigh_iterate(Tensor P, Tensor Q, Tensor(a!) basis, Tensor(b!) order, Tensor(c!) measured) -> ()");
  m.def("update_factors(Tensor[] grads, Tensor(a!)[] factors, Tensor(b!)[] counts, Tensor[] flags, float beta) -> ()");
  m.def(
      "update_coupled_factors(Tensor[] grads, Tensor[] bases, Tensor(a!)[] factors, Tensor(b!)[] values, "
      "Tensor(c!)[] counts, Tensor[] flags, float beta, bool limited) -> ()");
  m.def(
      "track_bases(Tensor[] factors, Tensor(a!)[] bases, Tensor(b!)[] statuses, Tensor(c!)[] seconds, "
      "Tensor(e!)[] values, Tensor[] flags, int[] shapes, float[] limits, int accepted, int steps, Tensor(d!) left) -> "
      "()");
  m.def(
      "rotate(Tensor[] xs, Tensor[] bases, Tensor[] seconds, Tensor[] steps, int way, float beta, float eps, "
      "bool inside, Tensor[] flags, Tensor(a!)[] outs) -> ()");
  m.def(
      "adam_in_bases(Tensor[] grads, Tensor[] xs, Tensor[] bases, Tensor(a!)[] seconds, Tensor[] steps, float beta, "
      "float eps, bool inside, Tensor[] flags, Tensor(b!)[] outs) -> ()");
  m.def("eigh_batched(Tensor(a!) A, Tensor(b!) W, Tensor(c!) info) -> ()");
}

namespace {

namespace json = steepest::json;
namespace sg = steepest::symm_gemm;

// The text that `make` returns, kept for the caller until this thread's next call; {"error": ...} where it throws.
template <class Make>
const char* text(Make make) {
  thread_local std::string kept;
  try {
    kept = make();
  } catch (const std::exception& error) {
    kept = json::object({{"error", json::string(error.what())}});
  }
  return kept.c_str();
}

// Null, or what went wrong, no JSON, kept likewise.
template <class Body>
const char* error_of(Body body) {
  thread_local std::string kept;
  try {
    body();
  } catch (const std::exception& error) {
    kept = error.what();
    return kept.c_str();
  }
  return nullptr;
}

std::string string_or_null(const std::string& value) { return value.empty() ? "null" : json::string(value); }

constexpr int kProductNumbers = 6;  // batch, m, n, k, Majors, symmetric: a product of contiguous factors

sg::Shape to_shape(const int64_t* p) {
  const int64_t batch = p[0], m = p[1], n = p[2], k = p[3];
  const auto majors = static_cast<sg::Majors>(p[4]);
  const int64_t a = majors == sg::Majors::mnmn ? m : k, b = majors == sg::Majors::kk ? k : n;
  return {batch, m, n, k, majors, p[5] != 0, {a, m * k}, {b, n * k}, {n, m * n}, {n, m * n}, false};
}

std::string launch_text(const sg::Launch& launch) {
  const sg::TileShape tile = sg::shape_of(launch.tile);
  return json::object({
      {"majors", json::number(static_cast<int>(launch.majors))},
      {"tile", json::numbers(std::vector<int>{tile.rows, tile.columns, tile.depth})},
      {"cluster", json::number(tile.cluster)},
      {"clusters", json::number(launch.schedule.clusters)},
      {"tiles", json::number(launch.tiles)},
      {"whole", json::number(launch.schedule.whole)},
      {"steps", json::number(launch.schedule.steps)},
      {"waves", json::number(launch.waves)},
      {"efficiency", json::number(launch.efficiency)},
      {"problems", json::list(launch.problems,
                              [](const sg::PlannedProblem& problem) {
                                return json::object({{"index", json::number(problem.index)},
                                                     {"tiles", json::number(problem.tiling.tiles)},
                                                     {"k_tiles", json::number(problem.tiling.k_tiles)}});
                              })},
  });
}

// More than any device has room for. Within it, sums of bytes times matrices stay within 64 bits, and cutting takes
// seconds.
constexpr int64_t kMostMatrices = int64_t{1} << 20, kMostElements = int64_t{1} << 37;

// shapes: (matrices, rows, columns) of each.
std::vector<steepest::polar::Stack> to_stacks(const int64_t* shapes, int64_t count) {
  std::vector<steepest::polar::Stack> stacks(count);
  double matrices = 0, elements = 0;
  for (steepest::polar::Stack& stack : stacks) {
    stack.matrices = *shapes++, stack.rows = *shapes++, stack.columns = *shapes++;
    const double each = static_cast<double>(stack.rows) * static_cast<double>(stack.columns);
    matrices += stack.matrices, elements += each * stack.matrices;
    if (stack.matrices < 1 || stack.rows < 1 || stack.columns < 1 || matrices > kMostMatrices ||
        elements > kMostElements)
      throw std::invalid_argument("stacks have 1 to " + std::to_string(kMostMatrices) + " matrices and at most " +
                                  std::to_string(kMostElements) + " elements in all, got " +
                                  std::to_string(stack.matrices) + " matrices of " + std::to_string(stack.rows) +
                                  " x " + std::to_string(stack.columns));
  }
  return stacks;
}

std::string chunk_text(const steepest::polar::Chunk& chunk) {
  return json::list(chunk, [](const steepest::polar::Range& range) {
    return json::numbers(std::vector<int64_t>{range.first, range.count});
  });
}

}  // namespace

// Texts are JSON. Arrays are given with how many things they describe.
#define STEEPEST_EXPORT extern "C" __attribute__((visibility("default")))

STEEPEST_EXPORT const char* steepest_build_info() { return steepest::build_info(); }

STEEPEST_EXPORT int64_t steepest_small_polar_rows(int32_t capability) {
  return steepest::small_polar::most_rows(steepest::small_polar::room_of(capability));
}

STEEPEST_EXPORT int32_t steepest_small_polar_blocks(int64_t rows, int32_t capability) {
  return steepest::small_polar::blocks_for(rows, steepest::small_polar::room_of(capability));
}

STEEPEST_EXPORT int64_t steepest_eigh_rows(int32_t capability) {
  return steepest::eigh::most_rows(steepest::shared_limit(capability));
}

STEEPEST_EXPORT int32_t steepest_cpu_products(int32_t bf16) {
  return steepest::cpu_polar::kernels_for(bf16 != 0 ? steepest::Dtype::bf16 : steepest::Dtype::f32) != nullptr;
}

STEEPEST_EXPORT int32_t steepest_cpu_gemm_is_faster() { return steepest::cpu_polar::is_faster_than_blas(); }

// Memory that is yet to be written is to lie in huge pages, where the system has them.
STEEPEST_EXPORT void steepest_advise_huge_pages(void* begin, int64_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), address = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = address / page * page;
  madvise(reinterpret_cast<void*>(first), address + static_cast<uintptr_t>(size) - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)size;
#endif
}

// Steps of parameters on the host, of which `steps` says everything but the addresses of this step's gradients and
// weights (multi_tensor/whole_steps.h). Null, or what went wrong, no JSON.
STEEPEST_EXPORT const char* steepest_whole_steps(const void* steps, int64_t count, const int64_t* grads,
                                                 const int64_t* params, const double* hypers, const float* found_inf,
                                                 const float* grad_scale, double* rows, double* sums,
                                                 int64_t* skipped) {
  namespace mt = steepest::multi_tensor;
  return error_of([&] {
    const auto* table = static_cast<const mt::WholeStep*>(steps);
    mt::whole_steps_on_host({table, count, grads, params, hypers, {found_inf, grad_scale}, rows, sums, skipped});
  });
}

// Steps of Adam in eigenbases on the host, of which `steps` and `numbers` say everything but what is of this step
// (eigh/steps.h). Null, or what went wrong, no JSON.
STEEPEST_EXPORT const char* steepest_steps_in_bases(const void* steps, const void* numbers, int64_t count,
                                                    const int64_t* grads, const int64_t* params, const double* hypers,
                                                    const double* betas, const float* found_inf, double* rows,
                                                    double* sums, int64_t* skipped, int64_t workspace,
                                                    const int8_t* due, int32_t* left, const double* limits,
                                                    int32_t accepted, int64_t tries) {
  namespace eigh = steepest::eigh;
  return error_of([&] {
    const auto* const kernels = steepest::cpu_polar::kernels_for(steepest::Dtype::f32);
    if (kernels == nullptr) throw std::runtime_error("there are no products for this processor");
    const auto* const table = static_cast<const eigh::StepInBases*>(steps);
    const auto* const of_steps = static_cast<const eigh::StepNumbers*>(numbers);
    const steepest::multi_tensor::Scaling scaling{found_inf, nullptr};
    const eigh::Refreshes refreshes{due, left, {limits[0], limits[1], limits[2], accepted, tries}};
    eigh::steps_in_bases(
        {table, of_steps, count, grads, params, hypers, betas, scaling, rows, sums, skipped, workspace, refreshes},
        *kernels);
  });
}

// Steps along polar factors on the host, of which `steps`, `ratios` and chains say everything but what is of this step
// (cpu_polar/steps.h). Null, or what went wrong, no JSON.
STEEPEST_EXPORT const char* steepest_polar_steps(const void* steps, const double* ratios, int64_t count,
                                                 const int64_t* chain_ints, const double* chain_floats, int64_t chains,
                                                 const int64_t* grads, const int64_t* params, const double* hypers,
                                                 const float* found_inf, const float* grad_scale, double* rows,
                                                 double* sums, int64_t* skipped, int64_t workspace) {
  namespace cp = steepest::cpu_polar;
  return error_of([&] {
    const auto* const table = static_cast<const cp::PolarStep*>(steps);
    cp::polar_steps({table,
                     ratios,
                     count,
                     cp::chains_of(chain_ints, chain_floats, chains),
                     grads,
                     params,
                     hypers,
                     {found_inf, grad_scale},
                     rows,
                     sums,
                     skipped,
                     workspace});
  });
}

// Why none of these libraries, a name on each line, can be loaded; null where one is.
STEEPEST_EXPORT const char* steepest_load_cusolver(const char* names) {
  return text([&] {
    std::vector<std::string> list;
    std::istringstream lines(names);
    for (std::string name; std::getline(lines, name);) list.push_back(name);
    return string_or_null(steepest::eigh::load_cusolver(list));
  });
}

// Why the kernel does not bear a schedule, null where it does. coefficients: of every step of every table, terms[i] for
// the i-th step; steps[t] of table t.
STEEPEST_EXPORT const char* steepest_small_polar_refusal(const double* coefficients, const int64_t* terms,
                                                         const int64_t* steps, int64_t tables, const double* least,
                                                         int64_t slacks) {
  return text([&]() -> std::string {
    steepest::small_polar::Schedule schedule{{}, {least, least + slacks}, false, 0};
    for (int64_t t = 0; t < tables; ++t) {
      schedule.tables.emplace_back();
      for (int64_t k = 0; k < steps[t]; coefficients += *terms++, ++k)
        schedule.tables.back().emplace_back(coefficients, coefficients + *terms);
    }
    try {
      steepest::small_polar::numbers(schedule);
    } catch (const std::invalid_argument& error) {
      return json::string(error.what());
    }
    return "null";
  });
}

// The launches of a list of products, why products are refused, and the memory that all launches share, in bytes.
STEEPEST_EXPORT const char* steepest_symm_gemm_plan(const int64_t* products, int64_t count, int32_t multiprocessors) {
  return text([&] {
    std::vector<sg::Shape> shapes;
    for (int64_t i = 0; i < count; ++i) shapes.push_back(to_shape(products + kProductNumbers * i));
    const sg::Plan plan = sg::make_plan(shapes, multiprocessors);
    return json::object({{"launches", json::list(plan.launches, launch_text)},
                         {"reasons", json::list(plan.reasons, string_or_null)},
                         {"workspace_bytes", json::number(4 * (plan.workspace_floats + plan.workspace_counters))}});
  });
}

// How a chain (nodes as polar_chain takes them) cuts stacks of (matrices, rows, columns): for every chunk (first,
// count) of each stack, and the model's bytes and clocks of these chunks and of all matrices at once.
STEEPEST_EXPORT const char* steepest_polar_chunks(const int64_t* ints, const double* floats, int64_t count,
                                                  const int64_t* shapes, int64_t shape_count, int32_t multiprocessors,
                                                  int64_t l2_bytes) {
  return text([&] {
    const std::vector<steepest::polar::Node> nodes = steepest::polar::nodes_of(ints, floats, count, INT32_MAX);
    if (multiprocessors < 1 || l2_bytes < 0)
      throw std::invalid_argument("multiprocessors are at least 1 and l2_bytes 0, got " +
                                  std::to_string(multiprocessors) + " and " + std::to_string(l2_bytes));
    const std::vector<steepest::polar::Stack> stacks = to_stacks(shapes, shape_count);
    const steepest::polar::Chunking chosen = make_chunks(nodes, stacks, {multiprocessors, l2_bytes});
    return json::object({{"chunks", json::list(chosen.chunks, chunk_text)},
                         {"bytes", json::number(chosen.cost.traffic)},
                         {"bytes_whole", json::number(chosen.whole.traffic)},
                         {"clocks", json::number(chosen.cost.clocks)},
                         {"clocks_whole", json::number(chosen.whole.clocks)}});
  });
}
