#pragma once
#include "program.h"

namespace ptxsim {
// Fills what an instruction does from its name ("add") and modifiers (in.mods); throws where it is not known.
void decode(Instruction& in, const string& name);
}  // namespace ptxsim
