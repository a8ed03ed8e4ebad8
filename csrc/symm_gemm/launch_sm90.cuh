// Launches of the kernel for one type and one pair of majors; each is instantiated in a source of its own.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <stdexcept>

#include "common/check.h"
#include "common/device.h"
#include "symm_gemm/kernel_sm90.cuh"
#include "symm_gemm/launch_sm90.h"

namespace steepest::symm_gemm {

// Strides of a factor as CUTLASS has them: (its own dimension, k, matrix), the contiguous one a constant.
template <class Stride>
Stride cutlass_strides(const Strides& from, int64_t rows, int64_t batch) {
  Stride strides{};
  if constexpr (std::is_same_v<std::decay_t<decltype(cute::get<0>(strides))>, int64_t>)
    cute::get<0>(strides) = from.row;
  else
    cute::get<1>(strides) = from.row;
  cute::get<2>(strides) = batch > 1 ? from.matrix : rows * from.row;  // of a single matrix nobody set it
  return strides;
}

// CUTLASS only prints when a tensor map cannot be made, and leaves it zero.
template <class Copy>
void check_tensor_map(const Copy& copy, const char* name) {
  static const cute::TmaDescriptor none{};
  if (std::memcmp(copy.get_tma_descriptor(), &none, sizeof none) == 0)
    throw std::runtime_error(std::string("steepest::symm_gemm: the driver made no tensor map of ") + name);
}

template <class T>
typename T::Item make_item(const Problem& problem, const PlannedProblem& planned) {
  using Mainloop = typename T::Mainloop;
  using Element = typename T::Element;
  const Shape& shape = problem.shape;
  for (const void* at : {problem.a, problem.b, problem.c, static_cast<const void*>(problem.d)})
    if (reinterpret_cast<uintptr_t>(at) % 16 != 0)
      throw std::invalid_argument("steepest::symm_gemm: a matrix does not begin at a multiple of 16 bytes");
  const int m = static_cast<int>(shape.m), n = static_cast<int>(shape.n), k = static_cast<int>(shape.k);
  const int batch = static_cast<int>(shape.batch);
  const int64_t a_rows = shape.majors == Majors::mnmn ? shape.k : shape.m;
  const int64_t b_rows = shape.majors == Majors::kk ? shape.n : shape.k;
  const typename Mainloop::Arguments arguments{
      static_cast<const Element*>(problem.a), cutlass_strides<typename Mainloop::StrideA>(shape.a, a_rows, shape.batch),
      static_cast<const Element*>(problem.b),
      cutlass_strides<typename Mainloop::StrideB>(shape.b, b_rows, shape.batch)};
  typename T::Item item{Mainloop::to_underlying_arguments(cute::make_shape(m, n, k, batch), arguments, nullptr),
                        output_of(problem, planned), batch, k};
  check_tensor_map(item.mainloop.tma_load_a, "A");
  check_tensor_map(item.mainloop.tma_load_b, "B");
  return item;
}

// Puts the addresses of a problem's weights behind those that are there; returns how many they are.
template <class T>
int32_t add_weights(typename T::Batch& batch, int at, const Problem& problem, int32_t first) {
  const int64_t count = problem.shape.batch;
  if (first + count > kMostWeights) throw std::invalid_argument("steepest::symm_gemm: a list has too many weights");
  for (int64_t i = 0; i < count; ++i) {
    if (reinterpret_cast<uintptr_t>(problem.update.weights[i]) % 16 != 0)
      throw std::invalid_argument("steepest::symm_gemm: a matrix of weights does not begin at a multiple of 16 bytes");
    batch.weights[first + i] = problem.update.weights[i];
  }
  batch.items[at].output.first_weight = first;
  return static_cast<int32_t>(count);
}

template <class T>
void launch_tile(const Launch& launch, const std::vector<Problem>& problems, const Workspace& workspace,
                 cudaStream_t stream) {
  static thread_local typename T::Batch batch;  // not on the stack; the launch copies what it is given
  batch.workspace = workspace;
  batch.schedule = launch.schedule;
  batch.count = static_cast<int32_t>(launch.problems.size());
  if (batch.count > T::kItems) throw std::invalid_argument("steepest::symm_gemm: a launch has too many problems");
  [[maybe_unused]] int32_t weights = 0;
  for (int i = 0; i < batch.count; ++i) {
    const PlannedProblem& planned = launch.problems[i];
    batch.first_tile[i] = planned.first_tile, batch.first_step[i] = planned.first_step;
    batch.items[i] = make_item<T>(problems.at(planned.index), planned);
    if constexpr (T::kUpdates) weights += add_weights<T>(batch, i, problems.at(planned.index), weights);
  }
  const auto kernel = reinterpret_cast<const void*>(multiply<T>);
  allow_shared_memory(kernel, sizeof(typename T::Shared));
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(T::kShape.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(launch.schedule.clusters * T::kShape.cluster);
  config.blockDim = dim3(T::kThreads);
  config.dynamicSmemBytes = sizeof(typename T::Shared);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  void* arguments[] = {&batch};
  check_cuda(cudaLaunchKernelExC(&config, kernel, arguments), "symm_gemm: the launch");
}

template <Dtype kDtype, Majors kMajors, End kEnd>
void launch_sm90(const Launch& launch, const std::vector<Problem>& problems, const Workspace& workspace, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (launch.tile == Tile::wide)
    launch_tile<Traits<kDtype, kMajors, Tile::wide, kEnd>>(launch, problems, workspace, on);
  else
    launch_tile<Traits<kDtype, kMajors, Tile::small, kEnd>>(launch, problems, workspace, on);
}

}  // namespace steepest::symm_gemm
