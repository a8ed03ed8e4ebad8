// The types of elements, by one name for host and device.
#pragma once

#include <cstdint>

namespace steepest {

enum class Dtype : uint8_t { f32, bf16, f16, f64, i16 };

}  // namespace steepest
