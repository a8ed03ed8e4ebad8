// What tests say to the stand-in for the CUDA runtime.
#pragma once

extern "C" {
// The last error's text; the runtime's calls return only a code.
const char* ptxsim_error();
void ptxsim_clear();
// Of the device: 10 major + minor.
void ptxsim_capability(int capability);
// Whether a device of 9.0 or newer launches blocks in clusters, as it says itself.
void ptxsim_clusters(int yes);
// The PTX of the module that has a kernel, by its mangled name; nullptr where there is none.
const char* ptxsim_text(const char* kernel);
// The mangled name of one of the kernels that are registered; nullptr beyond the last.
const char* ptxsim_kernel(int index);
// Launches of a kernel run what this PTX has under its name, or again what was compiled (nullptr). The error or
// nullptr.
const char* ptxsim_replace(const char* kernel, const char* ptx);
}
