#include "cpu_polar/kernels.h"

#include "common/vectors.h"

namespace steepest::cpu_polar {

#ifdef STEEPEST_HAS_X86_SETS
namespace {

const Kernels* find_bf16() {
  if (has_bf16_tiles()) {
#ifdef STEEPEST_HAS_AMX
    return &amx_bf16::bf16;
#else
    return nullptr;  // torch's products have tiles
#endif
  }
#ifdef STEEPEST_HAS_AVX512_BF16
  if (has_bf16_vectors()) return &avx512_bf16::bf16;
#endif
  return nullptr;
}

}  // namespace

const Kernels* kernels_for(Dtype dtype) {
  static const Kernels* const f32 = of_widest_vectors<Kernels>(&avx512::f32, &avx2::f32, nullptr);
  static const Kernels* const bf16 = find_bf16();
  return dtype == Dtype::f32 ? f32 : dtype == Dtype::bf16 ? bf16 : nullptr;
}
#else
const Kernels* kernels_for(Dtype) { return nullptr; }
#endif

bool is_faster_than_blas() { return kernels_for(Dtype::f32) != nullptr && !is_intel(); }

}  // namespace steepest::cpu_polar
