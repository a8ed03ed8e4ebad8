#include "symm_gemm/launch_sm90.h"

namespace steepest::symm_gemm {
namespace {

template <Dtype kDtype>
void run_launch(const Launch& launch, const std::vector<Problem>& problems, const Workspace& workspace, void* stream,
                bool overlap) {
  switch (launch.majors) {
    case Majors::kk:
      return launch_sm90<kDtype, Majors::kk>(launch, problems, workspace, stream, overlap);
    case Majors::mnmn:
      return launch_sm90<kDtype, Majors::mnmn>(launch, problems, workspace, stream, overlap);
    case Majors::kmn:
      return launch_sm90<kDtype, Majors::kmn>(launch, problems, workspace, stream, overlap);
  }
}

}  // namespace

void run_on_sm90(const Plan& plan, const std::vector<Problem>& problems, Dtype dtype, const Workspace& workspace,
                 void* stream, bool overlap) {
  for (const Launch& launch : plan.launches) {
    if (dtype == Dtype::f16)
      run_launch<Dtype::f16>(launch, problems, workspace, stream, overlap);
    else
      run_launch<Dtype::bf16>(launch, problems, workspace, stream, overlap);
  }
}

}  // namespace steepest::symm_gemm
