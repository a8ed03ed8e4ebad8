// Addresses of the state spaces, and the checks of every access.
#pragma once
#include "instructions.h"

namespace ptxsim {
// Where an access goes.
struct Place {
  u8* at;
  Block* shared;  // whose shared memory it is, nullptr for other memory
};

// The place of a memory operand in one lane; fails where it is misaligned or out of bounds.
Place place_of(Warp& w, const Instruction& in, const Operand& o, int space, int lane, size_t bytes, bool write);
Place place_at(Warp& w, const Instruction& in, u64 address, int space, int lane, size_t bytes, bool write);

// `bytes` at a shared address of the block (or, with a rank in its upper byte, of the cluster).
Place shared_at(Warp& w, const Instruction& in, u64 address, size_t bytes);
// The block whose shared memory a generic address lies in, or nullptr.
Block* block_of(const Warp& w, const u8* at);
// Fails where global memory may not be accessed; `w` names the lane's kernel and arguments.
void check_global(const Warp& w, const Instruction& in, u64 address, size_t bytes, bool write, int lane);

// Fails where a byte of shared memory was never written.
void check_written(const Warp& w, const Instruction& in, const Place& p, size_t bytes);

// Shared memory, by instructions of the generic proxy: bytes become written, and the async proxy sees them later.
void store_shared(Warp& w, const Place& p, const void* from, size_t bytes);
// Shared memory as the async proxy writes and reads it.
void store_shared_async(Block& block, size_t offset, const void* from, size_t bytes);
const u8* load_shared_async(const Warp& w, const Instruction& in, u64 address, size_t bytes);
// fence.proxy.async: what this warp wrote, and what others wrote before they met it, is there for the async proxy.
void publish_shared(Warp& w);
// At a barrier or an arrival: others may publish for this warp from now on.
void hand_over_unpublished(Warp& w);
}  // namespace ptxsim
