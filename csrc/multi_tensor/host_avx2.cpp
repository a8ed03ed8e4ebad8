#define STEEPEST_ISA avx2
#include "multi_tensor/host_chunk.h"
