// How a call's matrices are cut into chunks that go through a chain one after another. Host only, no CUDA.
//
// Launches of a chain read what the launches before them wrote. Where the squares of all matrices together are larger
// than the L2 cache, every launch finds nothing of them there; those of a chunk stay, and the next chunk writes to the
// same memory. But smaller launches fill the machine worse. A batch is cut where the model's traffic with memory takes
// more off the launches' time than their waves add to it.
#pragma once

#include <cstdint>
#include <vector>

#include "polar/chain.h"

namespace steepest::polar {

struct Range {
  int64_t first, count;
};
using Chunk = std::vector<Range>;  // of every stack; some may have none

struct Machine {
  int multiprocessors;
  int64_t l2_bytes;
};

// What the model says of a way to cut: bytes between the L2 cache and memory, and clocks.
struct Cost {
  int64_t traffic;
  double clocks;
};

struct Chunking {
  std::vector<Chunk> chunks;
  Cost cost, whole;  // of these chunks, and of all matrices at once
};

// So many chunks, or as many as there are matrices, with about as many bytes each.
std::vector<Chunk> cut(const std::vector<Node>& nodes, const std::vector<Stack>& stacks, int64_t count);

// Of a chain behind its first Gram product, as run_chain has it. One chunk where all matrices fit into the cache, and
// where no other number of chunks is enough faster.
Chunking make_chunks(const std::vector<Node>& nodes, const std::vector<Stack>& stacks, const Machine& machine);

// The chunks alone, found once for the same chain, shapes and machine.
const std::vector<Chunk>& known_chunks(const std::vector<Node>& nodes, const std::vector<Stack>& stacks,
                                       const Machine& machine);

// The stacks of a chunk: their own part of X, Y and slack, and the beginning of what chunks use in turn.
std::vector<Stack> part_of(const std::vector<Stack>& stacks, const Chunk& chunk);

}  // namespace steepest::polar
