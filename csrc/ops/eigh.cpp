// The ops of the refresh of small eigenbases, of the batched eigensolver and of orthogonal iteration on a CPU: check ->
// params -> device guard, stream -> launch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>

#include "common/device.h"
#include "cpu_polar/kernels.h"
#include "eigh/cusolver.h"
#include "eigh/iterate.h"
#include "eigh/params.h"
#include "ops/op_checks.h"

namespace steepest {

namespace {

using namespace eigh;

void check_stack(const Tensor& tensor, const Place& place, ScalarType type, int64_t elements, const char* name) {
  place.check(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous() && tensor.numel() == elements, name,
                  " must be a contiguous tensor of ", torch::headeronly::toString(type), " with ", elements,
                  " elements");
}

void eigh_iterate(const Tensor& p, const Tensor& q, const Tensor& basis, const Tensor& order, const Tensor& measured) {
  const Place place(p);
  const cpu_polar::Kernels* const kernels = cpu_polar::kernels_for(Dtype::f32);
  STD_TORCH_CHECK(kernels != nullptr, "eigh_iterate has no products for this processor");
  STD_TORCH_CHECK(p.dim() == 3 && p.size(1) == p.size(2), "P must be a stack of square matrices");
  const int64_t count = p.size(0), n = p.size(1);
  for (const auto& [tensor, name] : {std::pair{&p, "P"}, {&q, "Q"}, {&basis, "basis"}})
    check_stack(*tensor, place, ScalarType::Float, count * n * n, name);
  check_stack(order, place, ScalarType::Long, count * n, "order");
  check_stack(measured, place, ScalarType::Float, count * kMeasured, "measured");
  if (count * n == 0) return;
  iterate({count, n, static_cast<const float*>(p.const_data_ptr()), static_cast<const float*>(q.const_data_ptr()),
           pointer<float>(basis), pointer<int64_t>(order), pointer<float>(measured)},
          *kernels);
}

#ifdef STEEPEST_HAS_CUDA
void eigh_refresh(const Tensor& p, const Tensor& q, const Tensor& basis, const Tensor& values, const Tensor& status,
                  const Tensor& order, int64_t method, int64_t sweeps) {
  const Place place(p);
  STD_TORCH_CHECK(p.dim() == 3 && p.size(1) == p.size(2), "P must be a stack of square matrices");
  STD_TORCH_CHECK(method >= 0 && method <= static_cast<int64_t>(Method::automatic) && sweeps > 0 && sweeps <= INT32_MAX,
                  "method ", method, " or sweeps ", sweeps, " is out of range");
  const int64_t count = p.size(0), n = p.size(1);
  for (const auto& [tensor, name] : {std::pair{&p, "P"}, {&q, "Q"}, {&basis, "basis"}})
    check_stack(*tensor, place, ScalarType::Float, count * n * n, name);
  check_stack(values, place, ScalarType::Float, count * n, "values");
  check_stack(status, place, ScalarType::Int, count, "status");
  check_stack(order, place, ScalarType::Long, count * n, "order");
  const Refresh refresh{static_cast<const float*>(p.const_data_ptr()),
                        static_cast<const float*>(q.const_data_ptr()),
                        pointer<float>(basis),
                        pointer<float>(values),
                        pointer<int32_t>(status),
                        pointer<int64_t>(order),
                        count,
                        static_cast<int32_t>(n),
                        static_cast<Method>(method),
                        static_cast<int32_t>(sweeps)};
  const torch::stable::accelerator::DeviceGuard guard(place.index);
  refresh_on_device(refresh, shared_limit(capability_of(place.index)), current_stream(place.index));
}

// a: columns of a are read, and eigenvectors written there; in as few calls as cuSOLVER's counters hold.
void eigh_batched(const Tensor& a, const Tensor& w, const Tensor& info) {
  const Place place(a);
  const ScalarType type = a.scalar_type();
  STD_TORCH_CHECK(a.dim() == 3 && a.size(1) == a.size(2) && a.numel() > 0, "A must be a stack of square matrices");
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "A must be float32 or float64");
  const int64_t count = a.size(0), n = a.size(1), most = most_matrices(n);
  STD_TORCH_CHECK(most > 0, "n must be at most 46340, got ", n);
  check_stack(a, place, type, count * n * n, "A");
  check_stack(w, place, type, count * n, "W");
  check_stack(info, place, ScalarType::Int, count, "info");
  const torch::stable::accelerator::DeviceGuard guard(place.index);
  void* stream = current_stream(place.index);
  const int64_t width = type == ScalarType::Double ? 8 : 4;
  for (int64_t first = 0; first < count; first += most) {
    const Solve solve{pointer<char>(a) + first * n * n * width,
                      pointer<char>(w) + first * n * width,
                      pointer<int32_t>(info) + first,
                      std::min(most, count - first),
                      n,
                      type == ScalarType::Double};
    const Workspace size = workspace_of(solve, place.index, stream);
    const Tensor zeroed = torch::stable::new_zeros(a, {static_cast<int64_t>(size.device)}, ScalarType::Byte);
    solve_on_device(solve, size, zeroed.mutable_data_ptr(), place.index, stream);
  }
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(steepest, CPU, m) { m.impl("eigh_iterate", TORCH_BOX(&eigh_iterate)); }
#ifdef STEEPEST_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(steepest, CUDA, m) {
  m.impl("eigh_refresh", TORCH_BOX(&eigh_refresh));
  m.impl("eigh_batched", TORCH_BOX(&eigh_batched));
}
#endif

}  // namespace steepest
