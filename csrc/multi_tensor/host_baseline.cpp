#define STEEPEST_ISA baseline
#include "multi_tensor/host_chunk.h"
