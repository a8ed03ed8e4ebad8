#include "eigh/cusolver.h"

#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

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
  int (*set_stream)(Handle, void*);
  int (*create_params)(Params*);
  int (*buffer_size)(Handle, Params, int jobz, int uplo, int64_t n, int type_a, const void* a, int64_t lda, int type_w,
                     const void* w, int type_compute, size_t* device_bytes, size_t* host_bytes, int64_t batch);
  int (*solve)(Handle, Params, int jobz, int uplo, int64_t n, int type_a, void* a, int64_t lda, int type_w, void* w,
               int type_compute, void* device, size_t device_bytes, void* host, size_t host_bytes, int* info,
               int64_t batch);
};

std::mutex mutex;  // of what follows; a handle serves one thread at a time
std::unique_ptr<Library> library;
struct Own {
  Handle handle;
  Params params;
};
std::map<int32_t, Own> own;  // by device; never destroyed: the driver may be gone by then

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

const Own& own_of(int32_t device, void* stream) {
  if (library == nullptr) throw std::runtime_error("steepest::eigh_batched: no cuSOLVER is loaded");
  auto found = own.find(device);
  if (found == own.end()) {
    Own made{};
    check(library->create(&made.handle), "cusolverDnCreate");
    check(library->create_params(&made.params), "cusolverDnCreateParams");
    found = own.emplace(device, made).first;
  }
  check(library->set_stream(found->second.handle, stream), "cusolverDnSetStream");
  return found->second;
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
    if (find(opened, "cusolverDnCreate", loaded->create) && find(opened, "cusolverDnSetStream", loaded->set_stream) &&
        find(opened, "cusolverDnCreateParams", loaded->create_params) &&
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
  const Own& with = own_of(device, stream);
  const int type = solve.fp64 ? kFp64 : kFp32;
  Workspace size{};
  check(library->buffer_size(with.handle, with.params, kVectors, kLower, solve.n, type, solve.a, solve.n, type, solve.w,
                             type, &size.device, &size.host, solve.count),
        "cusolverDnXsyevBatched_bufferSize");
  return size;
}

void solve_on_device(const Solve& solve, const Workspace& size, void* zeroed, int32_t device, void* stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Own& with = own_of(device, stream);
  const int type = solve.fp64 ? kFp64 : kFp32;
  std::vector<char> host(size.host);
  check(library->solve(with.handle, with.params, kVectors, kLower, solve.n, type, solve.a, solve.n, type, solve.w, type,
                       zeroed, size.device, host.data(), size.host, solve.info, solve.count),
        "cusolverDnXsyevBatched");
}

}  // namespace steepest::eigh
