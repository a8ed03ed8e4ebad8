#define STEEPEST_ISA avx512_bf16
#include "cpu_polar/kernels_x86.h"

namespace steepest::cpu_polar::avx512_bf16 {
const Kernels bf16 = kernels<Half>;
}
