#include "cpu_polar/kernels.h"

#include <cstdlib>
#include <string_view>

#ifdef STEEPEST_HAS_X86_SETS
#include <cpuid.h>
#endif
#if defined(STEEPEST_HAS_X86_SETS) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace steepest::cpu_polar {

#ifdef STEEPEST_HAS_X86_SETS
namespace {

// Whether the processor has tiles for bf16, and the system lets this process use them once it has asked.
bool asks_for_tiles() {
#ifdef __linux__
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of Linux 5.16, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}

// ATEN_CPU_CAPABILITY limits the vectors of torch, and these with it: "avx512" leaves tiles out as well.
const Kernels* find(Dtype dtype) {
  const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view limit = capability == nullptr ? "" : capability;
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && limit != "avx2" &&
                    limit != "default";
  if (dtype == Dtype::bf16) {
    if (wide && limit != "avx512" && asks_for_tiles()) {
#ifdef STEEPEST_HAS_AMX
      return &amx_bf16::bf16;
#else
      return nullptr;  // torch's products have tiles
#endif
    }
#ifdef STEEPEST_HAS_AVX512_BF16
    if (wide && __builtin_cpu_supports("avx512bf16")) return &avx512_bf16::bf16;
#endif
    return nullptr;
  }
  if (dtype != Dtype::f32 || limit == "default") return nullptr;
  if (wide) return &avx512::f32;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &avx2::f32 : nullptr;
}

}  // namespace

const Kernels* kernels_for(Dtype dtype) {
  static const Kernels *const f32 = find(Dtype::f32), *const bf16 = find(Dtype::bf16);
  return dtype == Dtype::f32 ? f32 : dtype == Dtype::bf16 ? bf16 : nullptr;
}
#else
const Kernels* kernels_for(Dtype) { return nullptr; }
#endif

}  // namespace steepest::cpu_polar
