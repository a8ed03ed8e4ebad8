// What the refresh of small eigenbases is told; no torch in here.
//
// For each symmetric P and orthonormal Q a better basis Q' and d' = diag(Q'^T P Q'), the whole of
// steepest.linalg.basis.eigh_refresh for fp32 matrices of at most kMostRows rows in one launch: a block takes a matrix
// and keeps all of it in shared memory. Nothing is read by the host: where the Jacobi rotation is not enough, the same
// block goes on to Jacobi sweeps.
#pragma once

#include <cstddef>
#include <cstdint>

namespace steepest::eigh {

constexpr int kMostRows = 128;

enum class Method : int32_t { jr, eigh, automatic };

// Bits of a status, as in steepest/linalg/basis.py.
enum Status : int32_t {
  kAccepted = 1,
  kFellBack = 2,
  kLargeRotation = 4,
  kWantsExact = 8,
  kNotFinite = 16,
  kNotOrthonormal = 32,
  kNotSymmetric = 64,
};

// Stacks of `count` matrices, contiguous; nothing overlaps.
struct Refresh {
  const float* p;
  const float* q;
  float* basis;
  float* values;
  int32_t* status;
  int64_t* order;
  int64_t count;
  int32_t n;
  Method method;
  int32_t sweeps;  // simultaneous Jacobi rotations
};

// Bytes of shared memory for matrices of n rows; 0 where n is beyond kMostRows.
size_t shared_bytes(int64_t n);

// The largest n that fits into so much (common/device.h).
int64_t most_rows(size_t limit);

// `limit` as above; `stream` is a cudaStream_t on the current device. Throws when n does not fit or the launch fails.
void refresh_on_device(const Refresh& refresh, size_t limit, void* stream);

}  // namespace steepest::eigh
