// `update_moments` and `apply_update`: one pass over everything elementwise on either side of the direction, all
// tensors in a launch.
#include "multi_tensor/items.cuh"

namespace steepest::multi_tensor {
namespace {

// At most 128 registers, so that two blocks share a multiprocessor and one's loads hide the other's arithmetic.
template <class Batch>
__global__ void __launch_bounds__(kThreads, 2) update_moments(const __grid_constant__ Batch batch) {
  run<UpdateMoments>(batch, static_cast<int32_t>(blockIdx.x));
}

template <class Batch>
__global__ void __launch_bounds__(kThreads, 2) apply_update(const __grid_constant__ Batch batch) {
  run<ApplyUpdate>(batch, static_cast<int32_t>(blockIdx.x));
}

template <class KernelItem>
void launch_some(Stage stage, const ItemsParams& params, const std::vector<int>& some, cudaStream_t stream) {
  using Batch = Batch<Head, KernelItem>;
  const Head head{params.rows, params.sums, params.scratch};
  std::vector<Extent> extents;
  for (int i : some) extents.push_back({params.items[i].matrices, params.items[i].size});
  const auto convert = [&](int position) { return device_item<KernelItem>(params.items[some[position]]); };
  if (stage == Stage::update_moments)
    launch<Batch>("update_moments", head, extents, stream, update_moments<Batch>, convert);
  else
    launch<Batch>("apply_update", head, extents, stream, apply_update<Batch>, convert);
}

}  // namespace

void run_on_device(Stage stage, const ItemsParams& params, void* stream) {
  std::vector<int> flat, strided;
  for (int i = 0; i < static_cast<int>(params.items.size()); ++i) (params.items[i].flat ? flat : strided).push_back(i);
  launch_some<FlatItem>(stage, params, flat, static_cast<cudaStream_t>(stream));
  launch_some<StridedItem>(stage, params, strided, static_cast<cudaStream_t>(stream));
}

}  // namespace steepest::multi_tensor
