// One launch of a plan, for one type and one pair of majors; defined in the sources sm90_<type>_<majors>.cu and
// sm90_<type>_<majors>_update.cu.
#pragma once

#include "symm_gemm/plan.h"

namespace steepest::symm_gemm {

template <Dtype, Majors, End>
void launch_sm90(const Launch& launch, const std::vector<Problem>& problems, const Workspace& workspace, void* stream);

}  // namespace steepest::symm_gemm
