// What the ops of the polar iteration are told; no torch in here.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/scratch.h"

namespace steepest::polar {

constexpr int kMostTables = 4;
constexpr int kMostNumbers = 320;  // of all tables together: 4 KB of arguments hold them
constexpr int kSpreadSums = 3;

// How the numbers of a chain follow from a matrix' norm: column j of a matrix that takes table t is
// constants[t columns + j] norm^-powers[j], and the table is the first whose `least` slack is reached, or the last.
struct Numbering {
  int32_t tables, columns;
  bool tight;  // the norm: a bound of ||X||_2, or ||X||_F
  double eps;  // the norm is never below
  double least[kMostTables];
  double constants[kMostNumbers];
  int16_t powers[kMostNumbers];
};

struct NumbersParams {
  const void* gram;  // (matrices, m, m) contiguous, symmetric
  Dtype dtype;
  int64_t matrices, m;
  Numbering numbering;
  float* numbers;  // (matrices, columns) contiguous
  float* slack;    // (matrices,)
  Scratch scratch;
};

// Blocks that share a matrix; each takes every so many rows of its lower triangle.
inline int64_t blocks_of(int64_t m) { return m < 64 ? 1 : m > 4096 ? 64 : (m + 63) / 64; }

void numbers_on_host(const NumbersParams& params);
void numbers_on_device(const NumbersParams& params, void* stream);

}  // namespace steepest::polar
