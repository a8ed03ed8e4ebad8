// Addresses of the state spaces and the checks of every access.
#pragma once
#include "instructions.h"

namespace ptxsim {

// `bytes` at a shared address of the block (or, with a rank in its upper byte, of the cluster).
u8* shared_at(Warp& w, const Instruction& in, u64 address, size_t bytes, Block** block_at = nullptr);
// The block whose shared memory a generic address lies in, or nullptr.
Block* block_of(Warp& w, const u8* at);
u8* address_of(Warp& w, const Instruction& in, const Operand& o, int space, int lane, size_t bytes, Block** block_at);
void mark(Block* block_at, const u8* p, size_t bytes);
void check_written(Warp& w, const Instruction& in, Block* block_at, const u8* p, size_t bytes);
}  // namespace ptxsim
