#include "eigh/cusolver.h"

#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace steepest::eigh {
namespace {

// From cusolverDn.h of cuSOLVER 11.7.1 (CUDA 12.6.2), the first with cusolverDnXsyevBatched; enumerations are ints.
using Handle = void*;
using Params = void*;
constexpr int kVectors = 1;          // CUSOLVER_EIG_MODE_VECTOR
constexpr int kLower = 0;            // CUBLAS_FILL_MODE_LOWER
constexpr int kFp32 = 0, kFp64 = 1;  // CUDA_R_32F, CUDA_R_64F

struct Library {
  int (*create)(Handle*);
  int (*destroy)(Handle);
  int (*set_stream)(Handle, void*);
  int (*create_params)(Params*);
  int (*destroy_params)(Params);
  int (*buffer_size)(Handle, Params, int jobz, int uplo, int64_t n, int type_a, const void* a, int64_t lda, int type_w,
                     const void* w, int type_compute, size_t* device_bytes, size_t* host_bytes, int64_t batch);
  int (*solve)(Handle, Params, int jobz, int uplo, int64_t n, int type_a, void* a, int64_t lda, int type_w, void* w,
               int type_compute, void* device, size_t device_bytes, void* host, size_t host_bytes, int* info,
               int64_t batch);
};

std::mutex mutex;  // of what follows; a handle serves one thread at a time
std::unique_ptr<Library> library;
// A handle has memory of its own on the device, so two streams, whose solvers run at once, do not share one. Nor do
// they share host memory, which a solver that runs on after its call returned may still read: a call's lives until a
// later one on its stream wants more, and then on beside the larger piece.
struct Solver {
  Handle handle;
  Params params;
  std::vector<std::unique_ptr<char[]>> host;
  size_t host_bytes;  // of the last, at least twice those of the one before
};
std::map<std::pair<int32_t, void*>, Solver> solvers;  // never destroyed: the driver may be gone by then

template <class Function>
bool find(void* opened, const char* name, Function& to) {
  to = reinterpret_cast<Function>(dlsym(opened, name));
  return to != nullptr;
}

void check(int status, const char* name) {
  if (status != 0)
    throw std::runtime_error(std::string("steepest::eigh_batched: ") + name + " failed with cuSOLVER's status " +
                             std::to_string(status));
}

Solver& solver_of(int32_t device, void* stream) {
  if (library == nullptr) throw std::runtime_error("steepest::eigh_batched: no cuSOLVER is loaded");
  const std::pair<int32_t, void*> key{device, stream};
  const auto known = solvers.find(key);
  if (known != solvers.end()) return known->second;
  // What has been made is destroyed where a later call fails: the next attempt makes its own.
  using Made = std::unique_ptr<void, int (*)(void*)>;
  Solver made{};
  check(library->create(&made.handle), "cusolverDnCreate");
  Made handle(made.handle, library->destroy);
  check(library->create_params(&made.params), "cusolverDnCreateParams");
  Made params(made.params, library->destroy_params);
  check(library->set_stream(made.handle, stream), "cusolverDnSetStream");
  Solver& kept = solvers.emplace(key, std::move(made)).first->second;
  static_cast<void>(handle.release()), static_cast<void>(params.release());
  return kept;
}

void* host_memory(Solver& solver, size_t bytes) {
  if (solver.host.empty() || bytes > solver.host_bytes) {
    solver.host_bytes = std::max(bytes, 2 * solver.host_bytes);
    solver.host.push_back(std::make_unique<char[]>(solver.host_bytes));
  }
  return solver.host.back().get();
}

}  // namespace

std::string load_cusolver(const std::vector<std::string>& names) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (library != nullptr) return {};
  std::string reasons = names.empty() ? "no library to look for" : "";
  for (const std::string& name : names) {
    if (!reasons.empty()) reasons += "; ";
    void* opened = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (opened == nullptr) {
      const char* error = dlerror();
      reasons += error != nullptr ? error : name;
      continue;
    }
    auto loaded = std::make_unique<Library>();
    if (find(opened, "cusolverDnCreate", loaded->create) && find(opened, "cusolverDnDestroy", loaded->destroy) &&
        find(opened, "cusolverDnSetStream", loaded->set_stream) &&
        find(opened, "cusolverDnCreateParams", loaded->create_params) &&
        find(opened, "cusolverDnDestroyParams", loaded->destroy_params) &&
        find(opened, "cusolverDnXsyevBatched_bufferSize", loaded->buffer_size) &&
        find(opened, "cusolverDnXsyevBatched", loaded->solve)) {
      library = std::move(loaded);
      return {};
    }
    dlclose(opened);
    reasons += name + " has no cusolverDnXsyevBatched, which CUDA 12.6.2 brought";
  }
  return reasons;
}

int64_t most_matrices(int64_t n) { return INT32_MAX / (n * n); }

Workspace workspace_of(const Solve& solve, int32_t device, void* stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Solver& with = solver_of(device, stream);
  const int type = solve.fp64 ? kFp64 : kFp32;
  Workspace size{};
  check(library->buffer_size(with.handle, with.params, kVectors, kLower, solve.n, type, solve.a, solve.n, type, solve.w,
                             type, &size.device, &size.host, solve.count),
        "cusolverDnXsyevBatched_bufferSize");
  return size;
}

void solve_on_device(const Solve& solve, const Workspace& size, void* zeroed, int32_t device, void* stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  Solver& with = solver_of(device, stream);
  const int type = solve.fp64 ? kFp64 : kFp32;
  check(library->solve(with.handle, with.params, kVectors, kLower, solve.n, type, solve.a, solve.n, type, solve.w, type,
                       zeroed, size.device, host_memory(with, size.host), size.host, solve.info, solve.count),
        "cusolverDnXsyevBatched");
}

}  // namespace steepest::eigh
