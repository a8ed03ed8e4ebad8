// Apart from library.cpp, so that a new commit recompiles these few lines and nothing else.
#include "build_info.h"

#include <sstream>

#include "build_info_values.h"

namespace steepest {

BuildInfo build_info() {
  std::vector<std::string> architectures;
  std::istringstream names(STEEPEST_ARCHITECTURES);
  for (std::string name; std::getline(names, name, ',');) architectures.push_back(name);
  return {STEEPEST_VERSION,         STEEPEST_COMMIT,      STEEPEST_TORCH_VERSION, STEEPEST_CUDA_VERSION, architectures,
          STEEPEST_CUTLASS_VERSION, STEEPEST_HOPPER != 0, STEEPEST_COMPILER,      STEEPEST_INTERFACE};
}

}  // namespace steepest
