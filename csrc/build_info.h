// What this binary was built from and for.
#pragma once

namespace steepest {

// JSON: version, commit, torch (of the headers), cuda, architectures ("sm_80", ..., and "compute_120" for PTX),
// cutlass, hopper (whether it has the products for compute capability 9.0), compiler, interface (SHA-256 of
// library.cpp, where all is declared that Python calls). null stands for none: no CUDA, no CUTLASS headers, no git
// checkout.
const char* build_info();

}  // namespace steepest
