// The persistent kernel for sm_90a. One warp loads through the tensor memory accelerator, two warpgroups multiply and
// store; CUTLASS's collective does the loading, the multiplying and the pipeline between them.
//
// Why nothing here waits for ever:
//   - A stage of the pipeline is full when both factors' bytes are there, the half that the cluster's other block
//     multicasts included, and empty when the consumers of every block that it was multicast to have released it. Every
//     block of a cluster takes the same tiles, with the same k tiles, so each of these arrivals comes exactly once for
//     each turn of the stage, whatever of the tile lies outside the matrix (the accelerator fills in zeros and counts
//     them).
//   - The named barriers are one for each consumer warpgroup, and all their threads decide alike: whether a chunk is
//     stored, whether there is a C and who sums a cut tile depend on nothing but the tile and a flag that is read
//     after a barrier.
//   - Nobody waits for a part of a cut tile: the warpgroup that arrives last finds the others' in memory.
//   - No block leaves while another can still write to it: what the other multicasts into its shared memory its own
//     consumers wait for, and the other's releases its loading warp waits for at the end (load_tail).
#pragma once

#include "common/arguments.h"
#include "cutlass/arch/reg_reconfig.h"
#include "cutlass/cutlass.h"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "symm_gemm/team_sm90.cuh"

namespace steepest::symm_gemm {

template <Dtype kDtype, Majors kMajors, Tile kTile, End kEnd = End::store>
struct Traits {
  static constexpr bool kUpdates = kEnd == End::update;
  static constexpr TileShape kShape = shape_of(kTile);
  using Element = std::conditional_t<kDtype == Dtype::f16, cutlass::half_t, cutlass::bfloat16_t>;
  using Team = Warpgroup<kDtype>;
  using Store = std::conditional_t<kUpdates, UpdateStore<Team, kTile>, TileStore<Team, kTile>>;
  using LayoutA = std::conditional_t<kMajors == Majors::mnmn, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  using LayoutB = std::conditional_t<kMajors == Majors::kk, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  using Block = cute::Shape<cute::Int<kShape.rows>, cute::Int<kShape.columns>, cute::Int<kShape.depth>>;
  using Cluster = cute::Shape<cute::Int<kShape.cluster>, cute::_1, cute::_1>;
  // 192 KB of factors, beside 32 KB for the epilogue.
  static constexpr int kStages = (192 << 10) / ((kShape.rows + kShape.columns) * kShape.depth * 2);
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LayoutA, 8, Element, LayoutB, 8, float, Block,
      Cluster, cutlass::gemm::collective::StageCount<kStages>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Pipeline = typename Mainloop::MainloopPipeline;

  static constexpr int kConsumers = kWarpgroups * 128;
  static constexpr int kThreads = 128 + kConsumers;
  static_assert(cute::size(typename Mainloop::TiledMma{}) == kConsumers);
  static_assert(kShape.rows == kWarpgroups * kChunk && kShape.rows * kShape.cluster == kShape.columns);
  static_assert(kShape.columns % kChunk == 0 && kConsumerWarps == kConsumers / 32);

  struct Shared {
    alignas(1024) typename Mainloop::TensorStorage factors;
    Staging staging[kWarpgroups];
    alignas(16) typename Mainloop::PipelineStorage pipeline;
  };
  static_assert(sizeof(Shared) <= 227 << 10);

  // Whether thread t of the consumers has its sums where formulas.cuh says: sum 4 j + 2 h + p in row (h) and column (j)
  // + p. The map is linear in the bits of the sum's number, so the powers of two are enough.
  static constexpr bool finds_sums() {
    const auto map = typename Mainloop::TiledMma{}.get_layoutC_TV();  // (thread, sum) -> row + rows column
    for (int thread = 0; thread < kConsumers; ++thread)
      for (int sum = 1; sum < Store::kSums; sum *= 2) {
        const int row = thread / 128 * kChunk + fragment_row(thread % 128, sum / 2 % 2);
        const int column = fragment_column(thread % 128, sum / 4) + sum % 2;
        if (map(thread, sum) != row + kShape.rows * column) return false;
      }
    return true;
  }
  static_assert(finds_sums());

  // One problem as the kernel is told.
  struct Item {
    typename Mainloop::Params mainloop;
    Output output;
    int32_t batch, k;
  };

  static constexpr int kItems = kUpdates ? kUpdateCapacity : kCapacity;
  struct Weights {
    void* weights[kMostWeights];
  };
  struct None {};
  struct Batch : std::conditional_t<kUpdates, Weights, None> {
    Workspace workspace;
    Schedule schedule;
    int32_t count;
    int32_t first_tile[kItems], first_step[kItems];
    Item items[kItems];
  };
  static_assert(sizeof(Batch) <= kArgumentBytes);
};

// A cluster's next part of the work.
template <class Batch>
__device__ inline bool next(const Batch& batch, Walk& walk, Work& work) {
  const auto tiling_of = [&](int problem) -> const Tiling& { return batch.items[problem].output.tiling; };
  return walk.next(batch.schedule, batch.first_tile, batch.first_step, batch.count, tiling_of, work);
}

template <class T>
__device__ inline void load_tiles(const typename T::Batch& batch, typename T::Pipeline& pipeline,
                                  typename T::Shared& shared, int rank, int cluster) {
  using namespace cute;
  typename T::Mainloop mainloop;
  auto write = cutlass::make_producer_start_state<typename T::Pipeline>();
  int known = -1;
  Walk walk(batch.schedule, cluster);
  for (Work work; next(batch, walk, work);) {
    const auto& item = batch.items[work.problem];
    if (work.problem != known && elect_one_sync()) T::Mainloop::prefetch_tma_descriptors(item.mainloop);
    known = work.problem;
    const auto sizes = make_shape(item.output.m, item.output.n, item.k, item.batch);
    const auto factors = mainloop.load_init(sizes, item.mainloop);
    const auto steps = shape<3>(get<0>(factors));
    const auto place = make_coord(work.place.row * T::kShape.cluster + rank, work.place.column, _, work.matrix);
    mainloop.load(item.mainloop, pipeline, write, factors, place,
                  make_coord_iterator(idx2crd(work.k_begin, steps), steps), work.k_tiles, threadIdx.x % 32, rank,
                  shared.factors);
    write.advance(work.k_tiles);
  }
  mainloop.load_tail(pipeline, write);
}

// The same number, which the compiler does not know to be the last turn's: what follows from it is computed when it is
// needed and holds no registers from tile to tile.
__device__ inline int anew(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

template <class T>
__device__ inline void multiply_tiles(const typename T::Batch& batch, typename T::Pipeline& pipeline,
                                      typename T::Shared& shared, int rank, int cluster) {
  using namespace cute;
  typename T::Mainloop mainloop;
  typename T::Mainloop::TiledMma mma;
  typename T::Mainloop::PipelineState read;
  const int thread = threadIdx.x - 128;
  Walk walk(batch.schedule, cluster);
  for (Work work; next(batch, walk, work);) {
    const auto& item = batch.items[work.problem];
    const typename T::Team team{thread / 128, anew(thread % 128)};
    typename T::Store store(item.output, work, rank, team, shared.staging[team.warpgroup]);
    if constexpr (T::kUpdates) store.weights = batch.weights[item.output.first_weight + work.matrix];
    store.begin();
    auto sums = partition_fragment_C(mma, take<0, 2>(typename T::Block{}));
    static_assert(decltype(size(sums))::value == T::Store::kSums &&
                  decltype(cosize(sums.layout()))::value == size(sums));
    mainloop.mma(pipeline, read, sums, work.k_tiles, thread, shared.factors, item.mainloop);
    mainloop.mma_tail(pipeline, read, work.k_tiles);
    warpgroup_fence_operand(sums);  // no use of them moves above the wait for the tensor cores
    read.advance(work.k_tiles);
    store.finish(*reinterpret_cast<float (*)[T::Store::kSums]>(sums.data()), batch.workspace);
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) multiply(const __grid_constant__ typename T::Batch batch) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename T::Shared*>(memory);
  constexpr bool kClustered = T::kShape.cluster > 1;
  const int warpgroup = cutlass::canonical_warp_group_idx();
  const int warp = cutlass::canonical_warp_idx_sync();
  const int rank = kClustered ? static_cast<int>(cute::block_rank_in_cluster()) : 0;
  const int cluster = static_cast<int>(blockIdx.x) / T::kShape.cluster;

  using Pipeline = typename T::Pipeline;
  typename Pipeline::Params params;
  if (warp == 0) params.role = Pipeline::ThreadCategory::Producer;
  if (warpgroup > 0) params.role = Pipeline::ThreadCategory::Consumer;
  params.is_leader = threadIdx.x % 128 == 0;
  params.num_consumers = T::kConsumers;
  params.transaction_bytes = T::Mainloop::TmaTransactionBytes;
  Pipeline pipeline(shared.pipeline, params, typename T::Cluster{});
  // Every block's barriers are ready before any block of the cluster arrives at them.
  if constexpr (kClustered) {
    cute::cluster_arrive_relaxed();
    cute::cluster_wait();
  } else {
    __syncthreads();
  }

  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (warp == 0) load_tiles<T>(batch, pipeline, shared, rank, cluster);
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    multiply_tiles<T>(batch, pipeline, shared, rank, cluster);
  }
#endif
}

}  // namespace steepest::symm_gemm
