#include "common/vectors.h"

#ifdef STEEPEST_HAS_X86_SETS
#include <cpuid.h>

#include <cstdlib>
#include <string_view>
#endif
#if defined(STEEPEST_HAS_X86_SETS) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace steepest {

#ifdef STEEPEST_HAS_X86_SETS
namespace {

std::string_view limit() {
  const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
  return capability == nullptr ? "" : capability;
}

}  // namespace

Vectors widest_vectors() {
  if (limit() == "default") return Vectors::baseline;
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (wide && limit() != "avx2") return Vectors::avx512;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Vectors::avx2 : Vectors::baseline;
}

bool is_intel() {
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
}

bool has_bf16_vectors() { return widest_vectors() == Vectors::avx512 && __builtin_cpu_supports("avx512bf16"); }

bool has_bf16_tiles() {
#ifdef __linux__
  if (widest_vectors() != Vectors::avx512 || limit() == "avx512") return false;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of Linux 5.16, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}
#else
Vectors widest_vectors() { return Vectors::baseline; }

bool is_intel() { return false; }

bool has_bf16_vectors() { return false; }

bool has_bf16_tiles() { return false; }
#endif

}  // namespace steepest
