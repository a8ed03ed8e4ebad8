// What a device is; no CUDA header in here.
#pragma once

#include <cstdint>

namespace steepest {

int multiprocessors_of(int32_t device);
int capability_of(int32_t device);  // 10 major + minor

}  // namespace steepest
