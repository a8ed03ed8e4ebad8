#define STEEPEST_ISA avx512
#include "cpu_polar/kernels_x86.h"

namespace steepest::cpu_polar::avx512 {
const Kernels f32 = kernels<Single>;
}
