// Which block works on which part of which item.
//
// The matrices of an item are cut into chunks of `chunk` elements, none of which holds elements of two matrices, so
// that a matrix' sums are sums over its chunks. A launch takes up to `capacity` items (what its kernel arguments hold)
// and one block for every chunk of theirs, and for each of their parts. A block finds its item by binary search in
// `first_chunk`, so there is no table that grows with the number of elements.
#pragma once

#include <cstdint>
#include <vector>

#include "common/host_device.h"

namespace steepest::multi_tensor {

struct Extent {
  int64_t matrices;
  int64_t size;       // elements of each
  int64_t parts = 0;  // blocks of each that have other work, before the first chunk
};

struct Launch {
  std::vector<int> items;            // positions in the caller's list; empty items are left out
  std::vector<int32_t> first_chunk;  // of each item, rising from 0
  std::vector<int32_t> first_part;   // likewise
  int32_t chunks = 0, parts = 0;     // blocks of this launch
};

std::vector<Launch> plan_launches(const std::vector<Extent>& items, int64_t chunk, int capacity);

// The chunk-th chunk of an item: elements [start, start + length) of the item, all of one matrix.
struct Span {
  int64_t matrix;
  int64_t start;
  int64_t length;
  int32_t chunks;  // of its matrix
};

STEEPEST_HD inline Span span(int64_t size, int64_t chunk, int64_t index) {
  const int64_t chunks = (size - 1) / chunk + 1;
  const int64_t matrix = index / chunks, begin = index % chunks * chunk;
  const int64_t rest = size - begin;
  return {matrix, matrix * size + begin, rest < chunk ? rest : chunk, static_cast<int32_t>(chunks)};
}

}  // namespace steepest::multi_tensor
