// One spelling for functions that host code (plans, tests) and kernels share.
#pragma once

#ifdef __CUDACC__
#define STEEPEST_HD __host__ __device__
#else
#define STEEPEST_HD
#endif

// Headers with formulas open an inline namespace of this name: a source that is compiled for a wider instruction set
// than the rest defines it, and so shares no inline function with the others.
#ifndef STEEPEST_ISA
#define STEEPEST_ISA portable
#endif
