#include "symm_gemm/launch_sm90.cuh"

namespace steepest::symm_gemm {
template void launch_sm90<Dtype::f16, Majors::mnmn, End::store>(const Launch&, const std::vector<Problem>&,
                                                                const Workspace&, void*);
}
