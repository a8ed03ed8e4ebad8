// The simulator's C interface: modules of PTX text are loaded and their kernels launched, as by the driver of a GPU.
// A call that can fail returns its error as text (until the thread's next call), or nullptr.
#pragma once
#include <cstdint>

extern "C" {
// Loads a module; `module` is for the other calls and lives until ptxsim_unload.
const char* ptxsim_load(const char* ptx, void** module);
void ptxsim_unload(void* module);
// Runs a kernel to its end. `grid` and `block` are three numbers, `cluster` blocks along x are a cluster, `arguments`
// point to the values of the kernel's parameters.
const char* ptxsim_launch(void* module, const char* kernel, const uint32_t* grid, const uint32_t* block, int cluster,
                          uint64_t dynamic_shared_bytes, void** arguments);
// A map of a tensor of `rank` sides, the innermost first; `strides` are bytes of the other sides; `swizzle` is 0, 32,
// 64 or 128. `map` has 128 bytes.
const char* ptxsim_tensor_map(void* map, int element_bytes, int rank, const void* address, const uint64_t* sides,
                              const uint64_t* strides, const uint32_t* box, int swizzle);
// Memory that kernels may access from now on; while nothing is registered they may access everything. An access lies in
// one range, or in several that touch or overlap. Guards around a tensor, also inside a larger allocation, are what is
// not registered: of a tensor with padded rows register each row.
void ptxsim_register(const void* address, uint64_t bytes, const char* name, int writable);
void ptxsim_unregister(const void* address);
void ptxsim_unregister_all();
// The order in which blocks start, that of warps and the times of asynchronous copies.
void ptxsim_seed(uint64_t seed);
void ptxsim_multiprocessors(int count);
// Whether tensor cores cut the sums of products off below the last place of fp32 instead of rounding them.
void ptxsim_truncating(int yes);
// Launches so far.
uint64_t ptxsim_launches();
}
