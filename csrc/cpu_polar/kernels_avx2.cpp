#define STEEPEST_ISA avx2
#include "cpu_polar/kernels_x86.h"

namespace steepest::cpu_polar::avx2 {
const Kernels f32 = kernels<Single>;
}
