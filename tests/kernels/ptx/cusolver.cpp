// What csrc/eigh/cusolver.cpp calls of cuSOLVER, on a CPU: the arguments are looked at, and the matrices solved by
// cyclic Jacobi sweeps in fp64.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <vector>

namespace {

constexpr int kInvalid = 3;  // CUSOLVER_STATUS_INVALID_VALUE
constexpr size_t kDevice = 1000;
constexpr int kMostHandles = 8;
struct Handle {
  void* stream;
  bool alive;
} handles[kMostHandles];
int params = 0, alive_params = 0;
bool refuses_params = false, refuses_stream = false;
void* host_memory = nullptr;  // of the last call

Handle* known(void* handle) {
  for (Handle& each : handles)
    if (handle == &each && each.alive) return &each;
  return nullptr;
}

size_t host_bytes_of(int64_t n) { return 100 * static_cast<size_t>(n); }

bool fits(void* handle, void* given, int jobz, int uplo, int64_t n, int type_a, int64_t lda, int type_w, int compute,
          int64_t batch) {
  return known(handle) != nullptr && given == &params && jobz == 1 && uplo == 0 && lda == n && type_a == type_w &&
         type_a == compute && (type_a == 0 || type_a == 1) && n * n * batch <= INT32_MAX;
}

// Columns of a become eigenvectors, values ascending. False where a number is not finite.
template <class T>
bool solve_one(T* a, T* w, int64_t n) {
  std::vector<double> b(n * n), v(n * n, 0.0);
  for (int64_t j = 0; j < n; ++j) {
    v[j * n + j] = 1;
    for (int64_t i = j; i < n; ++i) b[j * n + i] = b[i * n + j] = a[j * n + i];  // the lower triangle, by columns
  }
  for (double x : b)
    if (!std::isfinite(x)) return false;
  for (int sweep = 0; sweep < 30; ++sweep)
    for (int64_t p = 0; p < n; ++p)
      for (int64_t q = p + 1; q < n; ++q) {
        if (b[p * n + q] == 0) continue;
        const double angle = 0.5 * std::atan2(2 * b[p * n + q], b[q * n + q] - b[p * n + p]);
        const double c = std::cos(angle), s = std::sin(angle);
        const auto turn = [&](std::vector<double>& x, int64_t i, int64_t j) {
          const double first = x[i], second = x[j];
          x[i] = c * first - s * second, x[j] = s * first + c * second;
        };
        for (int64_t k = 0; k < n; ++k) turn(b, k * n + p, k * n + q);
        for (int64_t k = 0; k < n; ++k) turn(b, p * n + k, q * n + k), turn(v, p * n + k, q * n + k);
      }
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i + 1; j < n; ++j)
      if (b[order[j] * n + order[j]] < b[order[i] * n + order[i]]) std::swap(order[i], order[j]);
  for (int64_t j = 0; j < n; ++j) {
    w[j] = static_cast<T>(b[order[j] * n + order[j]]);
    for (int64_t i = 0; i < n; ++i) a[j * n + i] = static_cast<T>(v[order[j] * n + i]);
  }
  return true;
}

}  // namespace

extern "C" {

int cusolverDnCreate(void** handle) {
  for (Handle& each : handles)
    if (!each.alive) {
      each = {nullptr, true};
      *handle = &each;
      return 0;
    }
  return kInvalid;
}
int cusolverDnDestroy(void* handle) {
  Handle* const own = known(handle);
  if (own == nullptr) return kInvalid;
  own->alive = false;
  return 0;
}
int cusolverDnCreateParams(void** made) {
  if (refuses_params) return kInvalid;
  ++alive_params;
  *made = &params;
  return 0;
}
int cusolverDnDestroyParams(void* given) {
  if (given != &params || alive_params == 0) return kInvalid;
  --alive_params;
  return 0;
}
// A handle serves one stream: what it holds on the device may be in use there.
int cusolverDnSetStream(void* handle, void* stream) {
  Handle* const own = known(handle);
  if (refuses_stream || own == nullptr || (own->stream != nullptr && own->stream != stream)) return kInvalid;
  own->stream = stream;
  return 0;
}
int cusolver_handles() {
  int count = 0;
  for (const Handle& each : handles) count += each.alive;
  return count;
}
int cusolver_params() { return alive_params; }
void cusolver_refuse(int params, int stream) { refuses_params = params != 0, refuses_stream = stream != 0; }
void* cusolver_host_memory() { return host_memory; }

int cusolverDnXsyevBatched_bufferSize(void* handle, void* given, int jobz, int uplo, int64_t n, int type_a, const void*,
                                      int64_t lda, int type_w, const void*, int compute, size_t* device, size_t* host,
                                      int64_t batch) {
  if (!fits(handle, given, jobz, uplo, n, type_a, lda, type_w, compute, batch)) return kInvalid;
  *device = kDevice, *host = host_bytes_of(n);
  return 0;
}

int cusolverDnXsyevBatched(void* handle, void* given, int jobz, int uplo, int64_t n, int type_a, void* a, int64_t lda,
                           int type_w, void* w, int compute, void* device, size_t device_bytes, void* host,
                           size_t host_bytes, int* info, int64_t batch) {
  if (!fits(handle, given, jobz, uplo, n, type_a, lda, type_w, compute, batch)) return kInvalid;
  if (device_bytes != kDevice || host_bytes != host_bytes_of(n) || host == nullptr) return kInvalid;
  host_memory = host;
  for (size_t i = 0; i < device_bytes; ++i)
    if (static_cast<char*>(device)[i] != 0) return kInvalid;
  for (int64_t k = 0; k < batch; ++k) {
    const bool solved = type_a == 0
                            ? solve_one(static_cast<float*>(a) + k * n * n, static_cast<float*>(w) + k * n, n)
                            : solve_one(static_cast<double*>(a) + k * n * n, static_cast<double*>(w) + k * n, n);
    info[k] = solved ? 0 : static_cast<int>(n);
  }
  return 0;
}
}
