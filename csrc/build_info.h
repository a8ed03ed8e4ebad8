// What this binary was built from and for.
#pragma once

#include <string>
#include <vector>

namespace steepest {

// Empty strings stand for "none": no CUDA, no CUTLASS headers, no git checkout.
struct BuildInfo {
  std::string version;
  std::string commit;
  std::string torch;  // version of the headers
  std::string cuda;
  std::vector<std::string> architectures;  // "sm_80", ..., and "compute_120" for PTX
  std::string cutlass;
  bool hopper;  // the products for compute capability 9.0
  std::string compiler;
  std::string interface;  // SHA-256 of library.cpp, where all ops are declared
};

BuildInfo build_info();

}  // namespace steepest
