// The epilogue's arithmetic and where it keeps a chunk in shared memory; host and device.
//
// A warpgroup's chunk is 64 x 64 entries of D. Its threads hold it as the tensor cores leave it: thread t has, for
// h < 2 and j < 8, the two entries of row 16 (t / 32) + 8 h + t % 32 / 4 from column 8 j + 2 (t % 4) on. In shared
// memory it lies as rows of eight 16-byte vectors, once as it is and once transposed, and vector v of row r is kept at
// v ^ (r % 8): eight rows of one vector, and eight vectors of one row, touch every bank once.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace steepest::symm_gemm {

// One entry of alpha A B + beta C + gamma I, `gamma` 0 off the diagonal and `c` 0 where there is no C. Two roundings,
// in this order.
STEEPEST_HD inline float entry(float alpha, float product, float beta, float c, float gamma) {
  return fmaf(alpha, product, fmaf(beta, c, gamma));
}

// What the product of an update is multiplied by, and an entry of beta W + alpha A B. Where a factor is 0 there is no
// product, NaN or not.
STEEPEST_HD inline float factor(float alpha, float eta) { return eta == 0 ? 0.0f : alpha * eta; }
STEEPEST_HD inline float moved(float beta, float weight, float alpha, float product) {
  return alpha == 0 ? beta * weight : fmaf(alpha, product, beta * weight);
}

constexpr int kChunk = 64;  // rows and columns
constexpr int kVector = 8;  // entries of 16 bytes
constexpr int kRowVectors = kChunk / kVector;
constexpr int kChunkVectors = kChunk * kRowVectors;

STEEPEST_HD constexpr int staged(int row, int vector) { return row * kRowVectors + (vector ^ (row % 8)); }

// Row and column, in the chunk, of the first of the two entries (h, j) of thread t.
STEEPEST_HD constexpr int fragment_row(int thread, int h) { return thread / 32 * 16 + h * 8 + thread % 32 / 4; }
STEEPEST_HD constexpr int fragment_column(int thread, int j) { return j * 8 + thread % 4 * 2; }

// Whether a thread has the entries of its rows on the diagonal of the chunk.
STEEPEST_HD constexpr bool has_diagonal(int thread) { return thread % 32 / 8 == thread % 4; }

// Four 8 x 8 matrices move at once: matrix i of quarter q is (h, j) = (i % 2, 2 q + i / 2), and lane l gives the
// address of row l % 8 of matrix l / 8, transposed: of its column.
STEEPEST_HD constexpr int matrix_h(int i) { return i % 2; }
STEEPEST_HD constexpr int matrix_j(int quarter, int i) { return 2 * quarter + i / 2; }
STEEPEST_HD constexpr int direct_slot(int thread, int quarter) {
  const int lane = thread % 32, i = lane / 8;
  return staged(thread / 32 * 16 + matrix_h(i) * 8 + lane % 8, matrix_j(quarter, i));
}
STEEPEST_HD constexpr int mirrored_slot(int thread, int quarter) {
  const int lane = thread % 32, i = lane / 8;
  return staged(matrix_j(quarter, i) * 8 + lane % 8, thread / 32 * 2 + matrix_h(i));
}

// A chunk in fp32 has 16 vectors of four entries in a row, the even ones in the first half. Writing, eight lanes have
// pairs of entries of two vectors in four rows; reading, eight even or eight odd vectors of a row.
constexpr int kWideVectors = kChunk / 4;
STEEPEST_HD constexpr int staged_wide(int row, int vector) {
  return row * kWideVectors + vector % 2 * 8 + (vector / 2 ^ row % 8 ^ vector % 2 * 4);
}

// The vectors that a thread moves between shared and global memory: (row, vector) for i < 4, a row by 8 lanes.
constexpr int kVectorsPerThread = kChunkVectors / 128;
STEEPEST_HD constexpr int moved_row(int thread, int i) { return thread / 8 + i * 16; }
STEEPEST_HD constexpr int moved_vector(int thread) { return thread % 8; }

}  // namespace steepest::symm_gemm
