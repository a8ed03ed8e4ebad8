// The types of elements, by one name for host and device.
#pragma once

#include <cstdint>

namespace steepest {

enum class Dtype : uint8_t { f32, bf16, f16, f64, i16 };

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

}  // namespace steepest
