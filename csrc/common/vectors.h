// Which vectors the processor has and ATEN_CPU_CAPABILITY, which limits those of torch, allows.
#pragma once

namespace steepest {

// Sets of x86 instructions that code is compiled for, the wider ones last; elsewhere the baseline is all there is.
enum class Vectors { baseline, avx2, avx512 };

Vectors widest_vectors();

// What was compiled for the widest of them.
template <class T>
const T* of_widest_vectors(const T* avx512, const T* avx2, const T* baseline) {
  switch (widest_vectors()) {
    case Vectors::avx512:
      return avx512;
    case Vectors::avx2:
      return avx2;
    case Vectors::baseline:
      break;
  }
  return baseline;
}

// Whether the processor is one of Intel's, which memory and libraries treat otherwise than the rest of x86.
bool is_intel();

// Products of bf16 beside AVX-512.
bool has_bf16_vectors();

// Tiles for bf16 (AMX), for which a process asks its system; the limit "avx512" leaves them out.
bool has_bf16_tiles();

}  // namespace steepest
