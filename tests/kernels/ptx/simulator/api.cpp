#include "api.h"

#include "launch.h"
#include "scheduler.h"
#include "tensor_map.h"

namespace {
using namespace ptxsim;

template <class F>
const char* guarded(F f) {
  thread_local string error;
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

const Kernel* find(void* module, const char* name) { return static_cast<Module*>(module)->find(name); }
}  // namespace

extern "C" {
const char* ptxsim_load(const char* ptx, void** module) {
  return guarded([&] {
    auto m = std::make_unique<Module>(ptx);
    for (const string& name : m->names()) m->find(name);
    *module = m.release();
  });
}
void ptxsim_unload(void* module) { delete static_cast<Module*>(module); }
const char* ptxsim_launch(void* module, const char* kernel, const uint32_t* grid, const uint32_t* block, int cluster,
                          uint64_t dynamic_shared_bytes, void** arguments) {
  return guarded([&] {
    const Kernel* k = find(module, kernel);
    if (!k) throw Refused("the module has no kernel " + string(kernel));
    launch(*k, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, cluster, dynamic_shared_bytes, arguments);
  });
}
const char* ptxsim_tensor_map(void* map, int element_bytes, int rank, const void* address, const uint64_t* sides,
                              const uint64_t* strides, const uint32_t* box, int swizzle) {
  return guarded([&] { encode_tensor_map(map, element_bytes, rank, address, sides, strides, box, swizzle); });
}
void ptxsim_register(const void* address, uint64_t bytes, const char* name, int writable) {
  ranges().add(reinterpret_cast<u64>(address), bytes, name, writable != 0);
}
void ptxsim_unregister(const void* address) { ranges().remove(reinterpret_cast<u64>(address)); }
void ptxsim_unregister_all() { ranges().clear(); }
void ptxsim_seed(uint64_t seed) { settings().seed = seed, settings().seeded_at = settings().launches; }
void ptxsim_multiprocessors(int count) { settings().multiprocessors = count; }
void ptxsim_truncating(int yes) { settings().truncates = yes != 0; }
uint64_t ptxsim_launches() { return settings().launches; }
}
