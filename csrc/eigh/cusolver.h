// cuSOLVER's batched symmetric eigensolver, found at run time: no header and no library of it is needed to build.
//
//     A V = V diag(w), w ascending; A symmetric, of which the lower triangle in columns is read
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace steepest::eigh {

// Loads the first of these libraries that has what is wanted, once for the process; an empty string, or why none does.
std::string load_cusolver(const std::vector<std::string>& names);

// Stacks of `count` contiguous n x n matrices, fp32 or fp64: a <- V in columns, w <- eigenvalues, info <- 0 for every
// matrix that was solved.
struct Solve {
  void* a;
  void* w;
  int32_t* info;
  int64_t count, n;
  bool fp64;
};

// cuSOLVER counts elements of a call in 32 bits.
int64_t most_matrices(int64_t n);

struct Workspace {
  size_t device, host;  // bytes
};

// On a loaded library and the current device, `device`; at most most_matrices at once. Throw with cuSOLVER's status.
// `zeroed` must be: cuSOLVER 11.7.1 returned vectors that were not orthonormal from a workspace that was not
// (pytorch#192483).
Workspace workspace_of(const Solve& solve, int32_t device, void* stream);
void solve_on_device(const Solve& solve, const Workspace& size, void* zeroed, int32_t device, void* stream);

}  // namespace steepest::eigh
