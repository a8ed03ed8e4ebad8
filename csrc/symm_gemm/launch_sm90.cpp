#include "symm_gemm/launch_sm90.h"

#include <stdexcept>

namespace steepest::symm_gemm {
namespace {

template <Dtype kDtype>
void run_launch(const Launch& launch, const std::vector<Problem>& problems, const Workspace& workspace, void* stream) {
  const bool updates = problems.at(launch.problems.front().index).update.weights != nullptr;
  switch (launch.majors) {
    case Majors::kk:
      if (updates) return launch_sm90<kDtype, Majors::kk, End::update>(launch, problems, workspace, stream);
      return launch_sm90<kDtype, Majors::kk, End::store>(launch, problems, workspace, stream);
    case Majors::mnmn:
      if (updates) throw std::invalid_argument("steepest::symm_gemm: no updates by products of transposed factors");
      return launch_sm90<kDtype, Majors::mnmn, End::store>(launch, problems, workspace, stream);
    case Majors::kmn:
      if (updates) return launch_sm90<kDtype, Majors::kmn, End::update>(launch, problems, workspace, stream);
      return launch_sm90<kDtype, Majors::kmn, End::store>(launch, problems, workspace, stream);
  }
}

}  // namespace

void run_on_sm90(const Plan& plan, const std::vector<Problem>& problems, Dtype dtype, const Workspace& workspace,
                 void* stream) {
  for (const Launch& launch : plan.launches) {
    if (dtype == Dtype::f16)
      run_launch<Dtype::f16>(launch, problems, workspace, stream);
    else
      run_launch<Dtype::bf16>(launch, problems, workspace, stream);
  }
}

}  // namespace steepest::symm_gemm
