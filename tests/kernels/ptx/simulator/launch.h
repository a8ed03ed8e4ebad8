// What a runtime does before a kernel starts: checks of the launch, and the copy of its arguments.
#pragma once
#include "machine.h"

namespace ptxsim {
// A launch or tensor map that a GPU's driver would not take.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Runs a kernel to its end; throws Refused before it starts or another std::runtime_error if it fails.
void launch(const Kernel& kernel, Dim3 grid, Dim3 block, int cluster, size_t dynamic_bytes, void** arguments);
}  // namespace ptxsim
