#pragma once
#include "program.h"

namespace ptxsim {
void decode(Instruction& in, const string& base);
}  // namespace ptxsim
