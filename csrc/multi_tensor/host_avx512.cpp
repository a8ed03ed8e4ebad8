#define STEEPEST_ISA avx512
#include "multi_tensor/host_chunk.h"
