// Apart from library.cpp, so that a new commit recompiles these few lines and nothing else.
#include "build_info.h"

#include "build_info_values.h"

const char* steepest::build_info() { return STEEPEST_BUILD_INFO; }
