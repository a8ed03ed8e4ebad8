// What the polar factor of small matrices is told; no torch in here. Sizes and strides are in elements.
//
//     out = s Q X,   Q = (a_K I + Z_K) ... (a_1 I + Z_1),   Z_k = b_k R_k + c_k R_k^2 + ...,
//     R_1 = X X^T / norm^2,   R_{k+1} = (a_k I + Z_k) R_k (a_k I + Z_k),   s = 1 / norm
//
// for matrices whose shorter side is at most kMostRows: a block takes a matrix, or a cluster of blocks one whose
// shorter side is beyond what a block holds, reads it three times (its range, R, Q X) and keeps the rest in shared
// memory. "Short" and "long" below are a matrix' sides; a tall one is handled as it lies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace steepest::small_polar {

constexpr int kMostAlone = 128;  // of the shorter side, in a block
constexpr int kMostRows = 256;   // in a cluster
constexpr int kMostTables = 3;
constexpr int kMostSteps = 8;
constexpr int kMostTerms = 5;

// Equal matrices, whose rows lie in one piece each; where the columns do, the transposes go in, whose polar factors are
// the transposes. `slack` is filled with ||X||_F over the norm taken: 0 for a zero matrix, NaN where X is not finite.
struct Matrices {
  const void* x;
  void* out;     // x itself, with the same strides and type, or apart from it
  float* slack;  // nullptr, or one for each
  int64_t count;
  int32_t rows, columns;
  int64_t x_row, x_matrix;  // from one to the next
  int64_t out_row, out_matrix;
  Dtype x_dtype, out_dtype;  // f32, bf16 or f16
};

// The odd polynomials of one table, lowest coefficient first, two to five of them for degrees 3 to 9.
using Table = std::vector<std::vector<double>>;

// As steepest.linalg.coefficients.Schedule: a matrix takes the first table whose slack it reaches, the last takes any.
struct Schedule {
  std::vector<Table> tables;
  std::vector<double> slacks;
  bool tight;  // the norm is a bound from R, not ||X||_F
  double eps;  // below which no norm is taken; the mean eigenvalue of the prescaled X X^T is of order 1
};

// A schedule as the kernel takes it. A step's numbers, for terms a, b, c, ...: as they are up to degree 7, and for
// degree 9  a, u, e, e kappa, lambda  of  Z = e T^2 + e kappa T + lambda R,  T = R^2 + u R  (linalg/chain.py).
struct Numbers {
  float steps[kMostTables][kMostSteps][kMostTerms];
  uint8_t terms[kMostTables][kMostSteps];
  float slacks[kMostTables];  // of the last: minus infinity
  float least_square;         // eps^2
  int32_t tables, count;      // steps of a table
  bool tight;
};

// Throws where a table is none that the kernel bears; see plan.cpp for the largest gain.
Numbers numbers(const Schedule& schedule);

// What a device offers.
struct Room {
  size_t bytes;   // of shared memory, for a block
  bool clusters;  // blocks reach each other's
};

// By compute capability, 10 major + minor; nothing without ldmatrix and fp16 products of depth 16. Capabilities not
// known are given what the smallest known one has.
Room room_of(int capability);

// Bytes of shared memory of each of the blocks that share a matrix whose shorter side is `rows`.
size_t shared_bytes(int64_t rows, int blocks);

// How many blocks take such a matrix: 1 or, where it is too long for one, a cluster of 4; 0 where there is no room.
int blocks_for(int64_t rows, const Room& room);

// The longest shorter side for which there is.
int64_t most_rows(const Room& room);

// All matrices in one launch for blocks and one for clusters, or in as few as the arguments and a grid of `most_blocks`
// hold. `stream` is a cudaStream_t on the current device. Throws when a matrix does not fit or a launch fails.
void polar_on_device(const std::vector<Matrices>& matrices, const Schedule& schedule, const Room& room, void* stream,
                     int32_t most_blocks = INT32_MAX);

}  // namespace steepest::small_polar
