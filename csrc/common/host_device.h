// One spelling for functions that host code (plans, tests) and kernels share.
#pragma once

#ifdef __CUDACC__
#define STEEPEST_HD __host__ __device__
#else
#define STEEPEST_HD
#endif
